"""Spoil files, read them in a process that cannot do harm, and say what came of it.

A case is one seed file (or one of several in a folder) with one to three changes, all drawn from the case's own seed.
It is read in a forked child: limited memory, so that a huge shape in a header cannot allocate; an alarm, so that
nothing hangs; an audit hook that notes what no reader may do (unpickle a class, open a file outside of its folder,
start a process, open a connection). What the user would see is what counts: no error, or one of ours with exit code 2
or 3.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY = 3 << 30  # bytes beyond what the process has when it starts
SECONDS = 20  # for one input
OUTSIDE = "s2d-deploy-outside"  # a file that inputs point at; whoever opens it has left the folder
_FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, slots=True)
class Reader:
    """One reader of outside files.

    Attributes:
        name: e.g. ``"plan"``.
        seed: makes the sound files in an empty folder; called once.
        read: reads the folder as a user's command would.
        files: which files are spoiled, relative names.
        repair: after a change, makes digests fit again, so that what lies behind them is reached; half of the cases.
        weight: share of the cases.
        special: further whole-file inputs by name, written in the place of the first of `files`.
    """

    name: str
    seed: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    repair: Callable[[Path], None] | None = None
    weight: float = 1.0
    special: Callable[[], dict[str, bytes]] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """What one input came to.

    Attributes:
        reader: its name.
        index: of the case; with the seed it makes the input again.
        outcome: "read", the class of an error of ours, or "FAIL".
        text: of the error.
        seconds: for reading.
    """

    reader: str
    index: int
    outcome: str
    text: str
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether a user would have seen a traceback, a crash, a hang or worse."""
        return self.outcome == "FAIL"


def prepare(reader: Reader, folder: Path) -> None:
    """Make the sound files of `reader` in ``folder/<name>``, and see that they are read."""
    home = folder / reader.name
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    reader.seed(home)
    for secret in (folder / OUTSIDE, folder.parent / OUTSIDE):
        secret.write_bytes(b"outside")
    reader.read(home)


def run(reader: Reader, folder: Path, indices: Sequence[int], seed: int) -> list[Case]:
    """Read the cases `indices`; a child that dies is a failed case, and the next child goes on behind it."""
    found: list[Case] = []
    left = list(indices)
    while left:
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receiver)
            _work(reader, folder, left, seed, sender)
        os.close(sender)
        with os.fdopen(receiver) as lines:
            done = [Case(reader.name, *json.loads(line)) for line in lines]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found += done
        if len(done) < len(left):
            found.append(Case(reader.name, left[len(done)], "FAIL", f"the process died: {_ending(status)}", 0.0))
        left = left[len(done) + 1 :]
    return found


def _ending(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"


def _work(reader: Reader, folder: Path, indices: Sequence[int], seed: int, sender: int) -> None:
    """The child: never returns."""
    try:
        sys.stdout.flush()
        faulthandler.disable()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        place = folder / f"case-{os.getpid()}"
        watch = _Watch(folder)
        with os.fdopen(sender, "w") as out:
            for index in indices:
                try:
                    outcome, text, seconds = _one(reader, folder / reader.name, place, index, seed, watch)
                except Exception as error:  # ours, not the reader's: it must be seen all the same
                    outcome, text, seconds = "FAIL", f"no input was made: {type(error).__name__}: {error}", 0.0
                out.write(json.dumps([index, outcome, text[:2000], round(seconds, 4)]) + "\n")
                out.flush()
        shutil.rmtree(place, ignore_errors=True)
    finally:
        os._exit(0)


class _Watch:
    """Notes what a reader may not do; on while `folder` is set."""

    def __init__(self, home: Path) -> None:
        self.home, self.place, self.seen = str(home), None, list[str]()
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.place is None:
            return
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {args[:2]!r}"[:200])
        elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(args[0]))  # noqa: PTH100 - links stay as they are
            writes = isinstance(args[2], int) and args[2] & _WRITING
            if OUTSIDE in path or (writes and not path.startswith((self.place, "/dev/", "/tmp/", "/proc/"))):  # noqa: S108
                self.seen.append(f"open {path}"[:200])


def _one(reader: Reader, home: Path, place: Path, index: int, seed: int, watch: _Watch) -> tuple[str, str, float]:
    from s2d_deploy.errors import S2DDeployError

    write_case(reader, home, place, index, seed)
    start = time.perf_counter()
    watch.seen.clear()
    signal.signal(signal.SIGALRM, _hung)
    signal.alarm(SECONDS)
    watch.place = str(place)
    try:
        reader.read(place)
        outcome, text = "read", ""
    except S2DDeployError as error:
        outcome, text = type(error).__name__, str(error)
        if error.exit_code not in (2, 3):
            outcome = "FAIL"
    except BaseException as error:
        outcome = "FAIL"
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        text = f"{type(error).__name__}: {error} at {' '.join(frames[-8:])}"
    finally:
        signal.alarm(0)
        watch.place = None
    if watch.seen:
        outcome, text = "FAIL", f"{watch.seen[0]} ({text[:200]})"
    return outcome, text, time.perf_counter() - start


def _hung(*_: object) -> None:
    raise TimeoutError(f"no answer within {SECONDS} s")


def write_case(reader: Reader, home: Path, place: Path, index: int, seed: int) -> str:
    """Write the input of a case into `place`; returns what was done."""
    draw = random.Random(f"{seed}/{reader.name}/{index}")  # noqa: S311
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(home, place)
    special = reader.special() if reader.special is not None else {}
    names = sorted(special)
    if index < len(names):
        (place / reader.files[0]).write_bytes(special[names[index]])
        return names[index]
    name = draw.choice(reader.files)
    path = place / name
    blob, done = path.read_bytes(), []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        change = draw.choice(_changes_for(name))
        blob = change(blob, draw)
        done.append(change.__name__)
    path.write_bytes(blob)
    if reader.repair is not None and draw.random() < 0.5:
        try:
            reader.repair(place)
            done.append("repaired")
        except Exception:  # what is broken so far that no digest can be made to fit
            done.append("beyond repair")
    return f"{name}: {', '.join(done)}"


# ---- changes of bytes ---------------------------------------------------------------------------------------


def flip(blob: bytes, draw: random.Random) -> bytes:
    """One bit."""
    if not blob:
        return b"\x00"
    out = bytearray(blob)
    out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def overwrite(blob: bytes, draw: random.Random) -> bytes:
    """A few bytes near the start (headers) or anywhere."""
    out = bytearray(blob)
    for _ in range(draw.randint(1, 8)):
        if out:
            out[draw.randrange(min(len(out), draw.choice((64, len(out)))))] = draw.randrange(256)
    return bytes(out)


def number(blob: bytes, draw: random.Random) -> bytes:
    """An extreme integer."""
    width = draw.choice((1, 2, 4, 8))
    value = draw.choice((0, 1, (1 << (8 * width - 1)) - 1, 1 << (8 * width - 1), (1 << 8 * width) - 1))
    place = draw.randrange(max(1, min(len(blob), draw.choice((32, 256, 1 << 30)))))
    return blob[:place] + value.to_bytes(width, draw.choice(("little", "big"))) + blob[place + width :]


def truncate(blob: bytes, draw: random.Random) -> bytes:
    """The end is missing."""
    return blob[: draw.randrange(len(blob) + 1)]


def cut(blob: bytes, draw: random.Random) -> bytes:
    """A piece is missing."""
    a, b = sorted(draw.randrange(len(blob) + 1) for _ in range(2))
    return blob[:a] + blob[b:]


def repeat(blob: bytes, draw: random.Random) -> bytes:
    """A piece is there twice."""
    a, b = sorted(draw.randrange(len(blob) + 1) for _ in range(2))
    return blob[:b] + blob[a:b] + blob[b:]


def insert(blob: bytes, draw: random.Random) -> bytes:
    """Bytes that are not there."""
    place = draw.randrange(len(blob) + 1)
    return blob[:place] + draw.randbytes(draw.randint(1, 64)) + blob[place:]


def empty(blob: bytes, draw: random.Random) -> bytes:  # noqa: ARG001
    """Nothing at all."""
    return b""


def foreign(blob: bytes, draw: random.Random) -> bytes:  # noqa: ARG001
    """Something else."""
    return draw.choice(
        (
            b"null",
            b"[]",
            b"{}",
            b"0",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"\x80\x04N.",
            b"PK\x03\x04",
            b"\x00" * 64,
        )
    )


BYTES = (flip, flip, overwrite, overwrite, number, number, truncate, cut, repeat, insert, empty, foreign)


# ---- changes of text ----------------------------------------------------------------------------------------

_WORDS = (
    *(
        "!!python/object/apply:os.system ['true']",
        "&a [*a]",
        "*b",
        "<<: {a: 1}",
        "? [1]",
        "!!binary AAAA",
        "2001-01-01",
    ),
    *("\t", "\n", "- ", ": ", "{", "]", '"', "'", "#", "%", "---", "...", "\x00", "\ufeff", "\ud800", "é", "\u202e"),
    *("1e999", ".nan", "-.inf", "0x", "1_0", "~", "yes", "999999999999999999999999999", "-1", "../../" + OUTSIDE),
)


def word(blob: bytes, draw: random.Random) -> bytes:
    """A word that means something to YAML, JSON or a path."""
    text = blob.decode("utf-8", "surrogateescape")
    place = draw.randrange(len(text) + 1)
    return (text[:place] + draw.choice(_WORDS) + text[place:]).encode("utf-8", "surrogatepass")


def line(blob: bytes, draw: random.Random) -> bytes:
    """Lines doubled, dropped, swapped or indented."""
    lines = blob.split(b"\n")
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.randrange(4)
    if kind == 0:
        lines.insert(i, lines[j])
    elif kind == 1:
        del lines[i]
    elif kind == 2:
        lines[i], lines[j] = lines[j], lines[i]
    else:
        lines[i] = b" " * draw.randint(1, 3) + lines[i]
    return b"\n".join(lines)


# ---- changes of documents -----------------------------------------------------------------------------------


def odd_value(draw: random.Random) -> Any:
    """A value that few expect."""
    return draw.choice(
        (
            *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, 1e308, -0.0, "", "x", " "),
            *("../../" + OUTSIDE, "/etc/passwd", "a\x00b", "\ud800", "é" * 3, "x" * 10_000, "nan", "w4a4", "fp32"),
            *([], {}, [[]], [None], [1, "x"], {"a": None}, {"": {}}, [[[[[[[[]]]]]]]], [0] * 1000, {"kind": "tensor"}),
        )
    )


def change_document(document: Any, draw: random.Random) -> Any:
    """A copy with one node replaced, removed, renamed, repeated or moved."""
    document = copy.deepcopy(document)
    nodes: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            nodes.append((node, key))
            collect(node[key])

    collect(document)
    if not nodes:
        return odd_value(draw)
    # Deep documents have most nodes in their longest list; every depth should have its turn.
    owner, key = draw.choice(nodes if draw.random() < 0.7 else nodes[:40])
    kind = draw.randrange(6)
    if kind <= 2:
        owner[key] = odd_value(draw)
    elif kind == 3:
        del owner[key]
    elif kind == 4:
        other, place = draw.choice(nodes)
        try:
            owner[key] = copy.deepcopy(other[place])
        except (KeyError, IndexError):
            owner[key] = None
    elif isinstance(owner, dict):
        owner[draw.choice(("", "x", "__class__", "name", key.upper(), f"{key}_", "../" + OUTSIDE))] = owner.pop(key)
    else:
        owner.insert(draw.randrange(len(owner) + 1), copy.deepcopy(owner[key]))
    return document


def document(blob: bytes, draw: random.Random) -> bytes:
    """JSON (which is YAML, too) with a changed node."""
    try:
        loaded = json.loads(blob)
    except (ValueError, RecursionError):
        return flip(blob, draw)
    return json.dumps(change_document(loaded, draw)).encode("utf-8", "surrogatepass")


def safetensors(blob: bytes, draw: random.Random) -> bytes:
    """A safetensors file with a changed header, its data as they were."""
    try:
        length = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + length])
    except (ValueError, RecursionError):
        return flip(blob, draw)
    changed = json.dumps(change_document(header, draw)).encode("utf-8", "surrogatepass")
    return len(changed).to_bytes(8, "little") + changed + blob[8 + length :]


def onnx_graph(blob: bytes, draw: random.Random) -> bytes:
    """An ONNX file that still parses, with one thing in it changed."""
    import onnx

    try:
        model = onnx.ModelProto.FromString(blob)
    except Exception:  # protobuf's errors share no public base class
        return flip(blob, draw)
    graph = model.graph
    names = [
        "",
        "x",
        "../../" + OUTSIDE,
        *(t.name for t in graph.initializer),
        *(o for n in graph.node for o in n.output),
    ]
    kind = draw.randrange(10)
    if kind <= 2 and graph.node:
        node = draw.choice(graph.node)
        what = draw.randrange(4)
        if what == 0 and node.input:
            node.input[draw.randrange(len(node.input))] = draw.choice(names)
        elif what == 1:
            node.op_type = draw.choice(
                ["", "MatMul", "Conv", "Add", "Loop", "If", "Reshape", "QuantizeLinear", "DequantizeLinear"]
            )
        elif what == 2 and node.input:
            del node.input[draw.randrange(len(node.input)) :]
        elif node.attribute:
            attribute = draw.choice(node.attribute)
            attribute.i, attribute.f = draw.choice((0, -1, 2**31, -(2**63), 7)), draw.choice((0.0, float("nan"), 1e38))
            if draw.random() < 0.3:
                attribute.name = draw.choice(("axis", "block_size", "perm", "to", "x"))
    elif kind <= 6 and graph.initializer:
        tensor = draw.choice(graph.initializer)
        what = draw.randrange(6)
        if what == 0:
            del tensor.dims[:]
            tensor.dims.extend(draw.choice(([], [0], [-1], [2**40], [2**31, 2**31], [3, 5], [1] * 20)))
        elif what == 1:
            tensor.data_type = draw.choice((*range(24), 99))
        elif what == 2:
            tensor.raw_data = tensor.raw_data[: draw.randrange(len(tensor.raw_data) + 1)]
        elif what == 3:
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.ClearField("raw_data")
            entry = tensor.external_data.add()
            entry.key, entry.value = (
                "location",
                draw.choice(("../../" + OUTSIDE, "/etc/passwd", "../" + OUTSIDE, "", "model.onnx")),
            )
        elif what == 4:
            tensor.name = draw.choice(names)
        else:
            tensor.raw_data = overwrite(tensor.raw_data, draw)
    elif kind == 7:
        for prop in draw.choice(graph.node).metadata_props if graph.node else model.metadata_props:
            prop.value = draw.choice(("", "-1", "x", "10" * 500, "W4A4", "../" + OUTSIDE))
    elif kind == 8:
        values = [*graph.input, *graph.output]
        if values:
            shape = draw.choice(values).type.tensor_type
            shape.elem_type = draw.randrange(20)
            if shape.shape.dim:
                shape.shape.dim[0].dim_value = draw.choice((0, -1, 2**62, 1))
    elif graph.node:
        i = draw.randrange(len(graph.node))
        if draw.random() < 0.5:
            del graph.node[i]
        else:
            graph.node.append(graph.node[i])
    return bytes(model.SerializeToString())


def _changes_for(name: str) -> tuple[Callable[[bytes, random.Random], bytes], ...]:
    suffix = Path(name).suffix
    if suffix == ".json":
        return (*BYTES, *(document,) * 14, word, word, line)
    if suffix in (".yaml", ".txt"):
        return (*BYTES, *(document,) * 8, *(word,) * 8, line, line)
    if suffix == ".safetensors":
        return (*BYTES, *(safetensors,) * 10)
    if suffix == ".onnx":
        return (*BYTES, *(onnx_graph,) * 16)
    return BYTES

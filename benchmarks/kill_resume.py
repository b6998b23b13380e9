"""Kill a run with signal 9 at a random moment, resume it, compare every byte with a run that nobody disturbed.

Three ways to die, one after the other:

- `time`: at a moment drawn uniformly over the run's length, wherever it is (in C++, in a write, between two renames);
- `step`: in front of the n-th change to the run folder (open for writing, rename, remove, mkdir, fsync), n uniform
  over all of them, so that the short windows around renames are hit as often as the long ones;
- `torn`: as soon as a file grows beyond n bytes, in the middle of that write.

One command in ten is `run`, three are `quantize`, and six `condition` (training, and conditioning with checkpoints of
its own): the long export would be hit by most kills otherwise. Half of them start in an empty folder, the others
replace the finished stages of another recipe (`--update`). A third of the resumed ones is killed, too. After the last
one no leftover may lie in the folder, and all files must be those of an undisturbed command, save for what is declared
volatile: times, seconds, latencies. Reports hold such, so they are compared without them, and report.html, .md and
junit.xml must be what their report.json renders to.

`--full N` adds runs on a file system of random small size (needs the right to mount in a namespace of its own): exit
code 2 and a sentence, and the resumed run gives the same bytes.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from _common import WORK, Record, at_most, finish, guarded, parser, positive
from _forked import Ended, Forked
from _recipes import RECIPE

from s2d_deploy.manifest import differences

OTHER = {"train": {"epochs": 1, "seed": 1}}
FLAGS = ("tiny.yaml", "-o", "run", "--update", "--quiet")
VERBS = ("run", *("condition",) * 6, *("quantize",) * 3)  # most trials where most happens in a second
MODES = ("time", "step", "torn")
# What may differ between two runs of one recipe: when it was, and how long it took.
VOLATILE = ("created", "seconds", "latency_ms", "latency", "speedup", "speedup_over_float", "speedup_ci")
TIMED = "bench"  # stages that hold nothing but times
ADVICE = "notes"  # of a report's audits: also says what is slower than float
RENDERED = ("report.html", "report.md", "junit.xml")

_STEPS = """
import os, signal, sys
left, log = {left}, {log!r}
log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
root = os.path.abspath("run")
changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
def step(what):
    global left
    if log is not None:
        os.write(log, (what + "\\n").encode())
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def audit(event, args):
    if event in changes:
        step(event)
    elif event == "open" and isinstance(args[0], str) and args[2] is not None and args[2] & 3:
        if os.path.abspath(args[0]).startswith(root):
            step("open")
sys.addaudithook(audit)
flush = os.fsync
def fsync(descriptor):
    step("fsync")
    flush(descriptor)
os.fsync = fsync
"""
_TORN = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
"""


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` by its name, without what is volatile; reports against their report.json."""
    return {str(p.relative_to(folder)): _digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _digest(path: Path) -> str:
    if path.name == ".s2d-deploy.lock":
        return "lock"  # holds the number of the process
    blob = path.read_bytes()
    if path.name in RENDERED:
        return "rendered from report.json" if blob == _rendered(path) else "not what report.json renders to"
    if path.name in ("manifest.json", "report.json"):
        document = stable(json.loads(blob), ADVICE if path.name == "report.json" else "")
        if path.name == "manifest.json":
            document.pop("sha256", None)  # of the manifest itself, times included
            if str(document.get("stage")).startswith(f"{TIMED}/"):
                document.pop("info")
        blob = json.dumps(document, sort_keys=True).encode()
    return hashlib.sha256(blob).hexdigest()


def stable(value: Any, more: str = "") -> Any:
    """A JSON document without what is volatile, and without the key `more`."""
    if isinstance(value, dict):
        return {k: stable(v, more) for k, v in value.items() if k not in VOLATILE and k != more}
    return [stable(v, more) for v in value] if isinstance(value, list) else value


def _numbered(value: Any) -> Any:
    """Lists as mappings, so that a difference is told by its place."""
    if isinstance(value, list):
        return {f"{i:04}": _numbered(v) for i, v in enumerate(value)}
    return {k: _numbered(v) for k, v in value.items()} if isinstance(value, dict) else value


def _rendered(path: Path) -> bytes:
    from s2d_deploy.junit import to_junit
    from s2d_deploy.report import read_report, validate
    from s2d_deploy.report_html import to_html
    from s2d_deploy.report_markdown import to_markdown

    typed = validate(read_report(path.parent))
    renderer = {"report.html": to_html, "report.md": to_markdown, "junit.xml": to_junit}[path.name]
    return renderer(typed).encode()


def leftovers(folder: Path) -> list[str]:
    """What a run that has ended must not leave: half-made stages, temporary files, checkpoints of a training."""
    odd = [p for p in folder.rglob("*") if p.suffix in (".tmp", ".part", ".old")]
    odd += [p for name in (".partial", "training") if (folder / name).is_dir() for p in (folder / name).iterdir()]
    return sorted({str(p.relative_to(folder)) for p in odd})


@dataclass(frozen=True, slots=True)
class Sound:
    """What a command does when nobody disturbs it.

    Attributes:
        other: a folder where it has done the same for another recipe.
        exit_code: of it.
        seconds: that it takes.
        steps: changes to the run folder, in order.
        wanted: `digests` of what it leaves.
        sizes: of those files in bytes, ascending.
        repeatable: whether a second one left the same.
    """

    other: Path
    exit_code: int
    seconds: float
    steps: list[str]
    wanted: dict[str, str]
    sizes: list[int]
    repeatable: bool


class Trials:
    """Kills and resumes, beside an undisturbed run.

    Args:
        forked: runs commands.
        work: an empty folder.
        seed: of all moments.
    """

    def __init__(self, forked: Forked, work: Path, seed: int) -> None:
        self.forked, self.work, self.random = forked, work, random.Random(seed)  # noqa: S311
        self._run("run", self._prepared("warm"), warm=True)
        self.sound = {verb: self._undisturbed(verb) for verb in dict.fromkeys(VERBS)}

    def _undisturbed(self, verb: str) -> Sound:
        clean, again, other = (self._prepared(f"{verb}-{name}") for name in ("clean", "again", "other"))
        first = self._run(verb, clean)
        log = self.work / f"{verb}-steps.log"
        seconds = self._run(verb, again, before=_STEPS.format(left=-1, log=str(log.absolute()))).seconds
        self._write_recipe(other, RECIPE | OTHER)
        self._run(verb, other)
        wanted = digests(clean / "run")
        sizes = sorted(p.stat().st_size for p in (clean / "run").rglob("*") if p.is_file())
        repeatable = digests(again / "run") == wanted
        return Sound(other, first.code, seconds, log.read_text().split(), wanted, sizes, repeatable)

    def trial(self, number: int) -> dict[str, Any]:
        """One command: killed, perhaps again, and resumed to its end."""
        verb, mode = VERBS[number % len(VERBS)], MODES[(number + number // len(VERBS)) % len(MODES)]
        replacing = self.random.random() < 1 / 2
        place = self._prepared(f"trial-{number}", self.sound[verb].other if replacing else None)
        kills: list[str] = []
        while not kills or self.random.random() < 1 / 3:
            ended, where = self._killed(verb, place, mode)
            if not ended.killed:
                break
            kills.append(where)
        found = self._judged(verb, place, self._run(verb, place))
        shutil.rmtree(place)
        return {"verb": verb, "mode": mode, "replacing": replacing, "kills": kills, **found}

    def full_disk(self, number: int) -> dict[str, Any]:
        """One run on a file system of random size, and once more when there is room."""
        verb = VERBS[number % len(VERBS)]
        sound = self.sound[verb]
        size = self.random.randint(4096 * 8, int(sum(sound.sizes) * 1.2))
        place = self._prepared(f"full-{number}")
        disk = place / "run"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)], check=True)  # noqa: S607
        try:
            ended = self._run(verb, place)
            said = ended.clear and (ended.code == sound.exit_code or "the disk is full" in ended.stderr)
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)  # noqa: S607
            kept = sorted(str(p.parent.relative_to(disk)) for p in disk.glob("*/**/manifest.json"))
            found = self._judged(verb, place, self._run(verb, place))
        finally:
            subprocess.run(["umount", str(disk)], check=True)  # noqa: S607
        shutil.rmtree(place)
        said_line = ended.stderr.strip().splitlines()[-1].replace(f"{place}/", "")[:300] if ended.code else ""
        stopped = ended.code != sound.exit_code
        return {
            "verb": verb,
            "size": size,
            "stopped": stopped,
            "code": ended.code,
            "said": said_line,
            "clear": said,
            "stages": len(kept),
            **found,
        }

    def _judged(self, verb: str, place: Path, last: Ended) -> dict[str, Any]:
        found, sound = digests(place / "run"), self.sound[verb]
        differing = sorted(n for n in found.keys() | sound.wanted.keys() if found.get(n) != sound.wanted.get(n))
        where = [d for name in differing for d in self._where(verb, place, name)]
        return {
            "equal": not differing and last.code == sound.exit_code,
            "differing": differing[:10],
            "where": where[:20],
            "leftovers": leftovers(place / "run"),
            "exit_code": last.code,
            "said_last": last.stderr[-1000:] if last.code != sound.exit_code else "",
        }

    def _where(self, verb: str, place: Path, name: str) -> list[str]:
        """Keys at which a JSON file differs from the undisturbed one."""
        ours, theirs = place / "run" / name, self.work / f"{verb}-clean" / "run" / name
        if ours.suffix != ".json" or not (ours.is_file() and theirs.is_file()):
            return []
        return differences(*(_numbered(stable(json.loads(path.read_bytes()))) for path in (theirs, ours)))

    def _killed(self, verb: str, place: Path, mode: str) -> tuple[Ended, str]:
        sound = self.sound[verb]
        if mode == "time":
            seconds = self.random.uniform(0.0, sound.seconds)
            return self._run(verb, place, seconds=seconds), f"{seconds:.3f} s"
        if mode == "torn":
            limit = self.random.choice([self.random.randint(1, 4096), self.random.randint(1, sound.sizes[-1])])
            ended = self._run(verb, place, before=_TORN.format(limit=limit))
            return ended, f"a file of {limit} bytes"
        left = self.random.randint(1, len(sound.steps))
        ended = self._run(verb, place, before=_STEPS.format(left=left, log=""))
        return ended, f"step {left}: {sound.steps[left - 1]}"

    def _run(self, verb: str, place: Path, **how: Any) -> Ended:
        return self.forked((verb, *FLAGS), place, **how)

    def _prepared(self, name: str, replaced: Path | None = None) -> Path:
        place = self.work / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        if replaced is not None:
            shutil.copytree(replaced / "run", place / "run")
        self._write_recipe(place, RECIPE)
        return place

    def _write_recipe(self, place: Path, recipe: dict[str, Any]) -> None:
        (place / "tiny.yaml").write_text(json.dumps(copy.deepcopy(recipe)))  # JSON is YAML


def arguments_parser() -> argparse.ArgumentParser:
    made = parser("kill_resume.py", __doc__ or "")
    made.add_argument("--trials", type=positive, default=210, help="kills, the three ways in turn (default: 210)")
    made.add_argument("--full", type=int, default=0, metavar="N", help="runs on a file system of random size")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--namespace", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--work", type=Path, default=WORK / "kill-resume", help="emptied first (default: %(default)s)")
    return made


def main(arguments: argparse.Namespace) -> int:
    """Run the trials; exit code 0 where every run came to the same bytes."""
    record = Record("kill-resume", threads=1, command=arguments.command)
    for name in ("junit", "report", "report_html", "report_markdown"):  # now: the code that the commands load, too
        import_module(f"s2d_deploy.{name}")
    work: Path = arguments.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    with Forked(work / "logs") as forked:
        trials = Trials(forked, work, arguments.seed)
        for verb, sound in trials.sound.items():
            print(f"{verb}: {sound.seconds:.1f} s, {len(sound.steps)} steps, {len(sound.wanted)} files", flush=True)
        found: list[dict[str, Any]] = []
        number = 0
        while sum(bool(t["kills"]) for t in found) < arguments.trials:
            found.append(trials.trial(number))
            number += 1
            if number % 20 == 0:
                print(f"{number} trials", flush=True)
            if not found[-1]["equal"] or found[-1]["leftovers"]:
                print(json.dumps(found[-1], indent=1), flush=True)
        full = [trials.full_disk(n) for n in range(arguments.full)]
    killed = [t for t in found if t["kills"]]
    by_mode = Counter(t["mode"] for t in killed)
    figures = [
        at_most(
            "undisturbed commands that differ when repeated", sum(not s.repeatable for s in trials.sound.values()), 0
        ),
        at_most(
            f"of {len(killed)} killed and resumed runs, with other bytes",
            sum(not t["equal"] for t in killed),
            0,
            f"{sum(len(t['kills']) for t in killed)} kills; " + ", ".join(f"{m} {by_mode[m]}" for m in MODES),
        ),
        at_most("runs that left something behind", sum(bool(t["leftovers"]) for t in found), 0),
    ]
    if full:
        stopped = sum(t["stopped"] for t in full)
        figures += [
            at_most("runs on a full disk without a clear sentence", sum(not t["clear"] for t in full), 0),
            at_most(
                "runs on a full disk that did not resume to the same bytes",
                sum(not t["equal"] for t in full),
                0,
                f"{stopped} of {len(full)} were stopped by the disk",
            ),
        ]
    data = {
        "recipe": RECIPE,
        "seed": arguments.seed,
        "undisturbed": {
            verb: {"seconds": round(s.seconds, 2), "files": len(s.wanted), "steps": dict(Counter(s.steps))}
            for verb, s in trials.sound.items()
        },
        "volatile": [*VOLATILE, f"report.json: {ADVICE}", f"{TIMED}/*: info"],
        "trials": found,
        "full_disk": full,
    }
    return finish(record, arguments.results, figures, data)


def in_namespace(arguments: Sequence[str]) -> int:
    """Run this script again where it may mount: in a namespace of its own, which ends with it."""
    command = ["unshare", "-rm", sys.executable, __file__, *arguments, "--namespace"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    chosen = arguments_parser().parse_args()
    if chosen.full and not chosen.namespace:
        sys.exit(in_namespace(sys.argv[1:]))
    typed = [a for a in sys.argv[1:] if a != "--namespace"]
    chosen.command = ["python", "benchmarks/kill_resume.py", *typed]
    sys.exit(guarded(main, chosen))

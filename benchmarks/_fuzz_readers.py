"""Every reader of files from outside, with sound files to spoil: what `fuzz_inputs.py` and its tests go through.

Sound files come from one small run of the package itself (`made`), so they are what a user's folder holds.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _fuzz import Reader, change_document, odd_value
from _recipes import RECIPE
from PIL import Image
from torch import nn

from s2d_deploy.files import digest, sha256_file

BUNDLE = "evidence.zip"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "line", *map(str, range(20)))


class Evil:
    """A pickle of it would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("__import__('os').system('true')",))


def made(folder: Path) -> Path:
    """The run folder of a small recipe; made once."""
    from s2d_deploy.bundle import make_bundle
    from s2d_deploy.console import Display
    from s2d_deploy.pipeline import Pipeline
    from s2d_deploy.recipe import parse_recipe
    from s2d_deploy.run import run
    from s2d_deploy.store import RunFolder

    recipe = parse_recipe(RECIPE)
    with RunFolder(folder) as store:
        store.claim(recipe.document())
        pipeline = Pipeline(recipe, store, Display(quiet=True))
        outcome = run(pipeline, command=["s2d-deploy", "run", "tiny.yaml"])
        make_bundle(pipeline, outcome.report, folder / BUNDLE)
    return folder


class Readers:
    """The readers, over the sound run in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[Reader]:
        """Every reader."""
        return [
            Reader("recipe", self._recipe, self._read_recipe, ("tiny.yaml",), weight=4),
            Reader("override", self._recipe, self._read_override, ("value.txt",), weight=1),
            Reader("manifest", self._stage, self._read_stage, ("manifest.json", "plan.json"), self._reseal, 3),
            Reader("run folder", self._root, self._read_root, ("manifest.json",), weight=1),
            Reader("plan", self._plan, self._read_plan, ("plan.json", "plan.safetensors"), self._resign_plan, 3),
            Reader("changes", self._changes, self._read_changes, ("changed.json", "changed.safetensors"), weight=1),
            Reader("inserted", self._inserted, self._read_inserted, ("inserted.safetensors",), weight=1),
            Reader("calibration", self._calibration, self._read_calibration, ("calibration.safetensors",), weight=1),
            Reader("training", self._training, self._read_training, ("a.pt",), weight=1, special=evil_checkpoints),
            Reader(
                "checkpoint", self._checkpoint, self._read_checkpoint, ("config.json", "model.safetensors"), weight=0.6
            ),
            Reader("state", self._state, self._read_state, ("model.safetensors",), weight=1.5),
            Reader("onnx", self._onnx, self._read_onnx, ("model.onnx",), weight=3),
            Reader("reference", self._artifact, self._read_reference, ("model.onnx", "files.json"), weight=1.5),
            Reader("ort", self._ort, self._read_ort, ("model.onnx", "files.json"), weight=1),
            Reader("dialect", self._onnx, self._read_dialect, ("model.onnx",), weight=1),
            Reader(
                "tvm",
                self._tvm,
                self._read_tvm,
                ("model.json", "params.safetensors", "files.json"),
                self._resign_tvm,
                1.5,
            ),
            Reader("tensorrt", self._trt, self._read_trt, ("engine.json", "files.json"), weight=1),
            Reader("images", self._images, self._read_images, tuple(IMAGES), weight=4, special=None),
            Reader("huge images", self._images, self._read_images, ("train/0.png",), weight=0.2, special=huge_images),
            Reader(
                "preprocessor", self._preprocessor, self._read_preprocessor, ("preprocessor_config.json",), weight=1
            ),
            Reader("texts", self._texts, self._read_texts, ("texts.txt",), weight=0.4),
            Reader("tokenizer", self._texts, self._read_texts, ("tokenizer.json", "tokenizer_config.json"), weight=0.5),
            Reader("arrays", self._arrays, self._read_arrays, ("data.npz",), weight=2, special=odd_arrays),
            Reader("report", self._report, self._read_report, ("report.json",), weight=2),
            Reader("baseline", self._baseline, self._read_baseline, ("baseline.json",), weight=1),
            Reader("bundle", self._bundle, self._read_bundle, (BUNDLE,), weight=1),
            Reader("costs", self._costs, self._read_costs, ("costs.json",), weight=1),
            Reader("model and data", self._checkpoint, self._read_as_recipe, ("config.json",), weight=0.5),
        ]

    # ---- recipes --------------------------------------------------------------------------------------------

    def _recipe(self, place: Path) -> None:
        (place / "tiny.yaml").write_text(json.dumps(RECIPE, indent=1))
        (place / "value.txt").write_text("0.1")

    def _read_recipe(self, place: Path) -> None:
        from s2d_deploy.gate import GateLimits
        from s2d_deploy.ptq.passes import parse_steps
        from s2d_deploy.recipe import load_recipe, parse_recipe

        recipe = load_recipe(str(place / "tiny.yaml"))
        assert parse_recipe(recipe.document()).document() == recipe.document()
        digest(recipe.document())
        parse_steps(recipe.quantize.passes)
        for precision in recipe.quantize.precisions:
            GateLimits.from_dict(recipe.gates.limits_for(precision))

    def _read_override(self, place: Path) -> None:
        from s2d_deploy.recipe import load_recipe

        text = (place / "value.txt").read_bytes().decode("utf-8", "surrogateescape")
        keys = ("quantize.passes", "model.config", "targets", "condition.learning_rate", "data")
        load_recipe(json.loads(json.dumps(RECIPE)), [f"{keys[len(text) % len(keys)]}={text}"])

    # ---- what a run leaves ----------------------------------------------------------------------------------

    def _stage(self, place: Path) -> None:
        shutil.copytree(self.folder / "quantize" / "w8a8", place, dirs_exist_ok=True)

    def _read_stage(self, place: Path) -> None:
        from s2d_deploy.session import Artifact
        from s2d_deploy.store import verify_folder

        manifest = verify_folder(place)
        files = manifest["info"].get("files")
        if isinstance(files, dict):
            artifact = Artifact(place, "ort", "w8a8", files)
            _ = [artifact.path(role) for role in files]

    def _reseal(self, place: Path) -> None:
        from s2d_deploy.manifest import own_digest

        path = place / "manifest.json"
        document = json.loads(path.read_bytes())
        document["key_sha256"] = digest(document["key"])
        for entry in document["files"]:
            file = place / entry["name"]
            if file.is_file():
                entry |= {"size_bytes": file.stat().st_size, "sha256": sha256_file(file)}
        path.write_text(json.dumps(document | {"sha256": own_digest(document)}))

    def _root(self, place: Path) -> None:
        self._read_root(place)
        (place / "condition").mkdir()
        shutil.copy(self.folder / "condition" / "manifest.json", place / "condition" / "manifest.json")

    def _read_root(self, place: Path) -> None:
        from s2d_deploy.recipe import parse_recipe
        from s2d_deploy.store import RunFolder

        recipe = parse_recipe(RECIPE)
        with RunFolder(place) as store:
            store.claim(recipe.document())

    def _plan(self, place: Path) -> None:
        for name in ("plan.json", "plan.safetensors"):
            shutil.copy(self.folder / "quantize" / "w8a8" / name, place / name)

    def _resign_plan(self, place: Path) -> None:
        document = json.loads((place / "plan.json").read_bytes())
        document["tensors_sha256"] = sha256_file(place / "plan.safetensors")
        (place / "plan.json").write_text(json.dumps(document))

    def _read_plan(self, place: Path) -> None:
        from s2d_deploy.plan import Plan, sites_of
        from s2d_deploy.simulation import simulate

        plan = Plan.load(place)
        plan.digest()
        sites_of(plan, plan.ops.values())
        for op in plan.ops:
            plan.declared(op)
        simulate(self._model(), plan)

    def _calibration(self, place: Path) -> None:
        shutil.copy(self.folder / "calibrate" / "calibration.safetensors", place / "calibration.safetensors")

    def _read_calibration(self, place: Path) -> None:
        from s2d_deploy.calibrate import Calibration

        for h in Calibration.load(place / "calibration.safetensors").histograms.values():
            _ = h.absmax, h.std, h.kurtosis, h.percentile(99.9)

    def _changes(self, place: Path) -> None:
        from s2d_deploy.ptq.input_transform import BlockHadamard, ChannelScale, attach, save_changes

        changed = _net()
        attach(changed.get_submodule("0"), ChannelScale(8))
        attach(changed.get_submodule("0"), BlockHadamard(4, seed=1))
        save_changes(_net(), changed, place)

    def _read_changes(self, place: Path) -> None:
        from s2d_deploy.ptq.input_transform import load_changes

        load_changes(_net(), place)

    def _inserted(self, place: Path) -> None:
        from s2d_deploy.equalized_linear import EqualizedLinear, put
        from s2d_deploy.inserted_layers import save_inserted

        changed = _net()
        linear = changed.get_submodule("0")
        put(changed, "0", EqualizedLinear(linear, torch.zeros(8), torch.ones(8), torch.ones(8, dtype=torch.int64), ()))
        save_inserted(changed, place)

    def _read_inserted(self, place: Path) -> None:
        from s2d_deploy.inserted_layers import apply_inserted

        apply_inserted(_net(), place)

    def _training(self, place: Path) -> None:
        from s2d_deploy.checkpointing import fingerprint, save

        model = _net()
        save(place / "a.pt", {"fingerprint": fingerprint(model), "model": model.state_dict()})

    def _read_training(self, place: Path) -> None:
        from s2d_deploy.checkpointing import fingerprint, load, load_whole

        model = _net()
        load_whole(model, load(place / "a.pt", fingerprint(model))["model"])

    def _report(self, place: Path) -> None:
        shutil.copy(self.folder / "report.json", place / "report.json")

    def _read_report(self, place: Path) -> None:
        from s2d_deploy.compare import compare_reports
        from s2d_deploy.report import read_report, write_reports
        from s2d_deploy.tables import comparison_table, results_table

        document = read_report(place)
        rows = compare_reports(document, read_report(self.folder))
        comparison_table(rows, "a", "b")
        results_table(document["results"])
        write_reports(document, place / "again")

    def _baseline(self, place: Path) -> None:
        from s2d_deploy.baseline import baseline_of, write_baseline
        from s2d_deploy.report import read_report

        write_baseline(place / "baseline.json", baseline_of(read_report(self.folder))[0])

    def _read_baseline(self, place: Path) -> None:
        from s2d_deploy.baseline import compare, read_baseline
        from s2d_deploy.report import read_report

        compare(read_report(self.folder), read_baseline(place / "baseline.json"))

    def _bundle(self, place: Path) -> None:
        shutil.copy(self.folder / BUNDLE, place / BUNDLE)

    def _read_bundle(self, place: Path) -> None:
        from s2d_deploy.bundle_check import check, read_bundle

        check(read_bundle(place / BUNDLE))

    # ---- models ---------------------------------------------------------------------------------------------

    def _checkpoint(self, place: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(self.folder / "condition" / name, place / name)

    def _read_checkpoint(self, place: Path) -> None:
        from s2d_deploy.models import load_model
        from s2d_deploy.recipe import ModelSection

        load_model(ModelSection(pretrained=str(place)))

    def _read_as_recipe(self, place: Path) -> None:
        from s2d_deploy.diagnosis_recipe import as_recipe
        from s2d_deploy.recipe import load_recipe

        (place / "data").mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(place / "data" / "a.png")
        (place / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
        load_recipe(as_recipe(str(place), str(place / "data"), None, 4))

    def _state(self, place: Path) -> None:
        from safetensors.torch import save_file

        save_file(_net().state_dict(), place / "model.safetensors")

    def _read_state(self, place: Path) -> None:
        from s2d_deploy.models import check_finite, load_state

        model = _net()
        load_state(model, place / "model.safetensors")
        check_finite(model)

    @cache  # noqa: B019 - as long as the process
    def _model(self) -> nn.Module:
        from s2d_deploy.models import load_model
        from s2d_deploy.recipe import parse_recipe

        recipe = json.loads((self.folder / "manifest.json").read_bytes())["recipe"]
        return load_model(parse_recipe(recipe).model, checkpoint=self.folder / "condition").module

    # ---- artifacts ------------------------------------------------------------------------------------------

    def _onnx(self, place: Path) -> None:
        shutil.copy(self.folder / "onnx" / "w8a8" / "model.onnx", place / "model.onnx")

    def _read_onnx(self, place: Path) -> None:
        from s2d_deploy.qgraph import contractions, load_model

        for c in contractions(load_model(place / "model.onnx")):
            _ = c.integer

    def _read_dialect(self, place: Path) -> None:
        from s2d_deploy.registry import load_target

        for name in ("ort", "tvm", "tensorrt", "reference"):
            (place / name).mkdir()
            load_target(name).dialect(place / "model.onnx", place / name, precision="w8a8")
            shutil.rmtree(place / name)

    def _artifact(self, place: Path) -> None:
        self._onnx(place)
        (place / "files.json").write_text('{"model": "model.onnx"}')

    def _ort(self, place: Path) -> None:
        from s2d_deploy.registry import load_target

        target, common = load_target("ort"), self.folder / "onnx" / "w8a8" / "model.onnx"
        dialect = target.dialect(common, place, precision="w8a8")
        artifact = target.build(dialect, place, precision="w8a8", options={}, progress=lambda _: None)
        (place / "files.json").write_text(json.dumps(artifact.files))

    def _read_reference(self, place: Path) -> None:
        self._open(place, "reference")

    def _read_ort(self, place: Path) -> None:
        self._open(place, "ort")

    def _open(self, place: Path, name: str) -> None:
        from s2d_deploy.registry import load_runtime
        from s2d_deploy.session import Artifact

        artifact = Artifact(place, name, "w8a8", _files(place))
        feeds = {"pixel_values": np.zeros((2, 1, 8, 8), np.float32)}
        with load_runtime(name).open(artifact, threads=1) as session:
            session.audit()
            session.run(feeds)

    def _tvm(self, place: Path) -> None:
        from safetensors.torch import save_file

        from s2d_deploy.runtimes._tvm_artifact import write_description  # noqa: TID251

        save_file({"w": torch.ones(4, 4)}, place / "params.safetensors")
        (place / "model.so").write_bytes(b"\x7fELF")
        files = {"library": "model.so", "parameters": "params.safetensors", "description": "model.json"}
        functions = {"main": {"parameters": ["w"]}}
        write_description(place, files, {"functions": functions, "inputs": [], "ops": [], "batches": [1]})
        (place / "files.json").write_text(json.dumps(files))

    def _resign_tvm(self, place: Path) -> None:
        path = place / "model.json"
        document = json.loads(path.read_bytes())
        document["sha256"] = {name: sha256_file(place / name) for name in ("model.so", "params.safetensors")}
        path.write_text(json.dumps(document))

    def _read_tvm(self, place: Path) -> None:
        from s2d_deploy.runtimes._tvm_artifact import read_description, read_parameters  # noqa: TID251
        from s2d_deploy.session import Artifact

        artifact = Artifact(place, "tvm", "w8a8", _files(place))
        read_parameters(artifact, read_description(artifact))

    def _trt(self, place: Path) -> None:
        from s2d_deploy.runtimes.trt import FORMAT  # noqa: TID251

        needed = ("package", "version", "compute_capabilities", "inputs", "outputs", "ops", "shapes", "audit")
        (place / "engine.json").write_text(json.dumps({"format": FORMAT, **{key: [] for key in needed}}))
        (place / "model.engine").write_bytes(b"engine")
        (place / "files.json").write_text('{"engine": "model.engine", "description": "engine.json"}')

    def _read_trt(self, place: Path) -> None:
        from s2d_deploy.runtimes.trt import _engine_bytes, read_description  # noqa: TID251
        from s2d_deploy.session import Artifact

        artifact = Artifact(place, "tensorrt", "w8a8", _files(place))
        read_description(artifact)
        _engine_bytes(artifact)

    # ---- data -----------------------------------------------------------------------------------------------

    def _images(self, place: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
        (place / "train").mkdir()
        (place / "test").mkdir()
        for name in IMAGES:
            Image.fromarray(pixels).save(place / name)

    def _read_images(self, place: Path) -> None:
        self._whole(kind="images", path=str(place), image_size=8, channels=3)

    def _preprocessor(self, place: Path) -> None:
        (place / "preprocessor_config.json").write_text(
            '{"do_normalize": true, "image_mean": [0.5], "image_std": [0.5]}'
        )

    def _read_preprocessor(self, place: Path) -> None:
        from s2d_deploy.pixels import has_image_processor, image_statistics

        has_image_processor(str(place))
        image_statistics(str(place), 1)

    def _texts(self, place: Path) -> None:
        from transformers import BertTokenizerFast

        (place / "vocab.txt").write_text("\n".join(WORDS))
        BertTokenizerFast(vocab=str(place / "vocab.txt")).save_pretrained(place)
        (place / "texts.txt").write_text("\n".join(f"line {i}" for i in range(20)))

    def _read_texts(self, place: Path) -> None:
        self._whole(kind="text", path=str(place / "texts.txt"), tokenizer=str(place), max_length=6)

    def _arrays(self, place: Path) -> None:
        arrays = {f"{s}.pixel_values": np.zeros((4, 1, 8, 8), np.float32) for s in ("train", "test")}
        np.savez(place / "data.npz", **arrays, **{f"{s}.labels": np.arange(4) for s in ("train", "test")})

    def _read_arrays(self, place: Path) -> None:
        self._whole(kind="npz", path=str(place / "data.npz"))

    def _whole(self, **fields: Any) -> None:
        from s2d_deploy.data import load_data
        from s2d_deploy.recipe import DataSection

        section = DataSection(**fields)
        data = load_data(section, image_size=None, channels=1, classes=None, model_source=None)
        for split in (data.train, data.test):
            for batch in split.batches(4):
                _ = [tensor.sum() for tensor in batch.values()]

    def _costs(self, place: Path) -> None:
        (place / "costs.json").write_text(json.dumps({op: {"w8a8": 1.0, "w4a4": 0.5} for op in self._ops()}))

    def _read_costs(self, place: Path) -> None:
        from s2d_deploy.ptq.mixed import Options, _read_costs
        from s2d_deploy.sensitivity import check_budget

        options = Options(budget=100.0, candidates=("w8a8", "w4a4"), costs=str(place / "costs.json"))
        costs, _facts = _read_costs(options, self._ops())
        check_budget(costs, options.budget)

    @cache  # noqa: B019 - as above
    def _ops(self) -> Any:
        from s2d_deploy.plan import Plan

        return Plan.load(self.folder / "quantize" / "w8a8").ops


IMAGES = tuple(
    f"{split}/{i}.{kind}" for split in ("train", "test") for i, kind in enumerate(("png", "jpg", "bmp", "webp"))
)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def _files(place: Path) -> Any:
    """The artifact's files, as its stage's manifest would name them."""
    from s2d_deploy.files import read_json

    return read_json(place / "files.json")


@cache
def evil_checkpoints() -> dict[str, bytes]:
    """Pickles that would run something, bare and inside a checkpoint's archive."""
    whole = io.BytesIO()
    torch.save({"fingerprint": Evil()}, whole)
    return {
        "bare pickle": pickle.dumps(Evil()),
        "in an archive": whole.getvalue(),
        "protocol 0": pickle.dumps(Evil(), 0),
    }


@cache
def huge_images() -> dict[str, bytes]:
    """PNG files whose headers promise more pixels than there is memory for."""
    made: dict[str, bytes] = {}
    for width, height in ((65_500, 65_500), (2**31 - 1, 1), (1, 2**31 - 1), (10**5, 10**4), (14_000, 14_000), (0, 0)):
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\x00" * 4096)), (b"IEND", b"")]
        chunks = [
            struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d) & 0xFFFFFFFF) for n, d in parts
        ]
        made[f"png {width} x {height}"] = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    return made


@cache
def odd_arrays() -> dict[str, bytes]:
    """Archives of arrays that promise more than they hold, or hold objects."""

    def archive(name: str, content: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            for split in ("train", "test"):
                file.writestr(f"{split}.{name}", content)
        return out.getvalue()

    def npy(header: str, body: bytes = b"") -> bytes:
        text = header.encode() + b" " * (63 - (10 + len(header)) % 64) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body

    objects = io.BytesIO()
    np.save(objects, np.array([Evil()], dtype=object), allow_pickle=True)
    return {
        "objects": archive("x.npy", objects.getvalue()),
        "huge": archive("x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}")),
        "huge product": archive(
            "x.npy", npy("{'descr': '<f8', 'fortran_order': True, 'shape': (2147483647, 2147483647)}")
        ),
        "negative": archive("x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}", b"\0" * 64)),
        "not a header": archive("x.npy", npy("__import__('os').system('true')")),
        "bomb": archive(
            "x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1073741824,)}", b"\0" * (1 << 26))
        ),
        "text": archive("x.npy", npy("{'descr': '<U4', 'fortran_order': False, 'shape': (2,)}", b"\0" * 32)),
        "no dimensions": archive("x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': ()}", b"\0" * 4)),
        "names": archive("../../x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"\0" * 4)),
        "one array": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"\0" * 4),
    }


__all__ = ["Readers", "change_document", "evil_checkpoints", "huge_images", "made", "odd_arrays", "odd_value"]

"""What fuzzing has found, one test for each: files that contradict themselves, or promise more than they hold."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from s2d_deploy.arrays_check import check_promises
from s2d_deploy.checkpointing import fingerprint, load, save
from s2d_deploy.errors import ArtifactError, DataError, ModelError, PlanError
from s2d_deploy.graph_check import sound
from s2d_deploy.grid import Grid
from s2d_deploy.inserted_layers import INSERTED_FILE, apply_inserted
from s2d_deploy.models import config_as_it_was
from s2d_deploy.pixels import image_statistics
from s2d_deploy.plan import Plan
from s2d_deploy.ptq.input_transform import ChannelScale, attach, load_changes, save_changes
from s2d_deploy.qgraph import contractions, load_model
from s2d_deploy.report import read_report, write_reports

DEEP = "[" * 100_000


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


# --- ONNX ---------------------------------------------------------------------------------------------------------


def graph() -> onnx.ModelProto:
    """x -> Q -> DQ -> MatMul with a dequantized weight."""
    codes = np.ones((4, 3), np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"], "fc.input.quantize"),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["dx"], "fc.input.dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], "fc.weight.dequantize", axis=1),
        helper.make_node("MatMul", ["dx", "dw"], ["y"], "fc"),
    ]
    stored = {
        "xs": np.float32(0.5),
        "xz": np.int8(0),
        "w": codes,
        "ws": np.ones(3, np.float32),
        "wz": np.zeros(3, np.int8),
    }
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
            [numpy_helper.from_array(np.asarray(a), n) for n, a in stored.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
    )


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def short(model: onnx.ModelProto) -> None:
    tensor(model, "w").raw_data = b"\x01" * 5


def negative(model: onnx.ModelProto) -> None:
    tensor(model, "w").dims[0] = -4


def huge(model: onnx.ModelProto) -> None:
    del tensor(model, "w").dims[:]
    tensor(model, "w").dims.extend([2**31, 2**31])


def dangling(model: onnx.ModelProto) -> None:
    model.graph.node[3].input[0] = "nowhere"


def no_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "z"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (short, "tensor 'w' of shape [4, 3] has 5 bytes in the place of 12"),
        (negative, "tensor 'w' has the shape [-4, 3]"),
        (huge, "tensor 'w' of shape [2147483648, 2147483648] has 12 bytes in the place of 4611686018427387904"),
        (dangling, "node 'fc' (MatMul) reads 'nowhere', which nothing before it makes"),
        (no_output, "output 'z' is made by no node"),
    ],
)
def test_a_graph_that_contradicts_itself(tmp_path: Path, spoil, words: str):
    model, path = graph(), tmp_path / "model.onnx"
    onnx.save(model, path)
    assert [c.integer for c in contractions(load_model(path))] == [True]
    spoil(model)
    onnx.save(model, path)
    with pytest.raises(ArtifactError) as caught:
        load_model(path)
    assert f"{path}: not a sound ONNX file. Found: {words}" in str(caught.value)


def test_external_data_stay_in_the_folder(tmp_path: Path):
    (tmp_path / "outside").write_bytes(b"\x01" * 12)
    (tmp_path / "inside").mkdir()
    model, path = graph(), tmp_path / "inside" / "model.onnx"
    codes = tensor(model, "w")
    codes.ClearField("raw_data")
    codes.data_location = TensorProto.EXTERNAL
    codes.external_data.add(key="location", value="../outside")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        load_model(path)


@pytest.mark.parametrize("spoil", ["scale", "zero point", "macs", "one input"])
def test_a_contraction_that_is_not_ours_is_named(spoil: str):
    model = graph()
    fc = model.graph.node[3]
    if spoil == "scale":
        tensor(model, "ws").data_type = TensorProto.UNDEFINED
    elif spoil == "zero point":
        model.graph.node[2].input[2] = "gone"
    elif spoil == "macs":
        fc.metadata_props.add(key="s2d.macs", value="many")
    else:
        del fc.input[1]
    with pytest.raises(ArtifactError, match="node 'fc': not a sound ONNX file of this package"):
        contractions(model)


def test_the_machines_refusal_is_not_the_graphs_fault():
    with pytest.raises(OSError, match="full"), sound("model.onnx"):
        raise OSError(28, "full")
    with pytest.raises(PlanError), sound("model.onnx"):
        raise PlanError("ours")
    with (
        pytest.raises(ArtifactError, match=r"model\.onnx: .*KeyError: 'x'.*report this as a bug, with --debug"),
        sound("model.onnx"),
    ):
        raise KeyError("x")


# --- arrays -------------------------------------------------------------------------------------------------------


def npz(path: Path, header: str, body: bytes) -> Path:
    text = header.encode() + b" " * (63 - (10 + len(header)) % 64) + b"\n"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("train.x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body)
    return path


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}", "takes 4398046511104 bytes"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}", "shape \\(-1, 4\\)"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "Python objects"),
    ],
)
def test_an_array_that_promises_more_than_it_holds(tmp_path: Path, header: str, words: str):
    with pytest.raises(ValueError, match=words):
        check_promises(npz(tmp_path / "a.npz", header, b"\0" * 64))


def test_sound_arrays_pass(tmp_path: Path):
    for order in ("C", "F"):
        arrays = {"a": np.zeros((3, 4), order=order), "b": np.array(1), "c": np.zeros((0, 4))}
        np.savez_compressed(tmp_path / "a.npz", **arrays)
        check_promises(tmp_path / "a.npz")


# --- documents ----------------------------------------------------------------------------------------------------


def test_deep_documents(tmp_path: Path):
    (tmp_path / "plan.json").write_text(DEEP)
    with pytest.raises(ArtifactError, match=r"plan\.json: truncated, or not JSON"):
        Plan.load(tmp_path)
    (tmp_path / "changed.json").write_text(DEEP)
    with pytest.raises(ArtifactError, match=r"changed\.json: truncated, or not JSON"):
        load_changes(net(), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(DEEP)
    with pytest.raises(DataError, match="not readable JSON"):
        image_statistics(str(tmp_path), 1)


def test_image_statistics_beyond_any_float(tmp_path: Path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [10**400]}))
    with pytest.raises(DataError, match="image statistics are not numbers"):
        image_statistics(str(tmp_path), 1)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": "4"},
        {"bits": True},
        {"signed": 1},
        {"granularity": {"kind": "axis", "axis": "0"}},
        {"granularity": {"kind": "block", "axis": 0, "size": 0}},
        {"granularity": {"kind": "block", "axis": 0, "size": -32}},
    ],
)
def test_a_grid_of_wrong_types(change: dict):
    with pytest.raises(PlanError, match="not a Grid"):
        Grid.from_dict(Grid(4).to_dict() | change)


@pytest.mark.parametrize("arguments", [{"width": 1 << 40}, {"width": "8"}, {"width": 0}, {"width": [8]}, {}])
def test_a_transform_larger_than_its_layer(tmp_path: Path, arguments: dict):
    changed = net()
    attach(changed[0], ChannelScale(8))
    save_changes(net(), changed, tmp_path)
    path = tmp_path / "changed.json"
    document = json.loads(path.read_text())
    document["transforms"]["0"]["arguments"] = arguments
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"changed\.json: not changes of this model"):
        load_changes(net(), tmp_path)


def test_more_copies_than_there_is_memory_for(tmp_path: Path):
    copies = torch.ones(8, dtype=torch.int64)
    copies[3] = 1 << 50
    save_file({"0.shift": torch.zeros(8), "0.scale": torch.ones(8), "0.copies": copies}, tmp_path / INSERTED_FILE)
    with pytest.raises(ModelError, match="more than 64 copies of a channel, on average"):
        apply_inserted(net(), tmp_path)


# --- checkpoints of a training ------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_training_checkpoint(tmp_path: Path):
    """torch.load does not look at the archive's checksums."""
    model, path = net(), tmp_path / "a.pt"
    mark = fingerprint(model)
    state = {
        "fingerprint": mark,
        "model": dict(model.state_dict()),
        "losses": [1.0, None],
        "rng": torch.get_rng_state(),
    }
    save(path, state)
    read = load(path, mark)
    assert list(read) == list(state)
    assert torch.equal(read["model"]["0.weight"], state["model"]["0.weight"])
    weight = state["model"]["0.weight"].numpy().tobytes()
    raw = bytearray(path.read_bytes())
    place = raw.find(weight)
    assert place > 0
    raw[place + 5] ^= 1
    path.write_bytes(raw)
    assert torch.load(io.BytesIO(bytes(raw)), weights_only=True)  # torch sees nothing
    with pytest.raises(ArtifactError, match="not a readable checkpoint of a conditioning run"):
        load(path, mark)


def test_what_running_a_model_writes_into_its_config_is_taken_back():
    """Killed behind its last step, a conditioning that was resumed had written another config.json."""
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.for_model(
        "vit", image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = AutoModelForImageClassification.from_config(config)
    before = model.config.to_dict()
    with config_as_it_was(model):
        model(pixel_values=torch.zeros(1, 1, 8, 8), labels=torch.zeros(1, dtype=torch.int64))
        assert model.config.problem_type is not None
    assert model.config.to_dict() == before
    with config_as_it_was(net()):  # no config: nothing to do
        pass


def test_a_page_that_cannot_be_made_loses_neither_figures_nor_the_other_pages(tmp_path: Path):
    """The schema leaves forms open, so that a report of another version may be read."""
    result = {
        "target": "ort",
        "precision": "w4a4",
        "status": "measured",
        "parity": {"explanation": {"verdict": "rounding", "findings": [{"layer": 7}]}},
    }
    report = {"schema_version": "1", "results": [result], "verdict": "undecided"}
    with pytest.raises(ArtifactError, match=r"report\.\w+: cannot be made from this report"):
        write_reports(report, tmp_path)
    assert read_report(tmp_path)["results"] == [result]
    assert (tmp_path / "junit.xml").is_file()


@pytest.mark.parametrize("limit", [64, 700, 3000])
def test_a_training_checkpoint_that_finds_no_room(tmp_path: Path, limit: int):
    """torch's writer speaks of an unexpected position; the user is told what the machine has refused."""
    path = tmp_path / "a.pt"
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from s2d_deploy.checkpointing import save\n"
        "from s2d_deploy.errors import StageError\n"
        "path, limit = Path(sys.argv[1]), int(sys.argv[2])\n"
        "save(path, {'fingerprint': 'old'})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try:\n"
        "    save(path, {'fingerprint': 'new', 'weights': torch.zeros(1000)})\n"
        "except StageError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(limit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{path}: the file would exceed the allowed size" in done.stdout.replace(".part", "")
    assert load(path, "old") == {"fingerprint": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]

"""Whole graphs for CUDA, run without a GPU: by TVM's virtual machine, with kernels emulated on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

pytest.importorskip("tvm")

import cuda_emulator
from common_graphs import Common

from s2d_deploy.qgraph import contractions

pytestmark = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing()))


@pytest.mark.parametrize(
    ("device", "name", "precision", "kernels"),
    [("cuda -arch=sm_80", "vit", "w4a4", "_int4"), ("cuda -arch=sm_75 -kernels=dp4a", "bert", "w8a8", "integer_8bit")],
)
def test_a_transformer_computes_what_the_simulation_does(
    exported: Callable[[str, str], Any],
    device: str,
    name: str,
    precision: str,
    kernels: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = exported(name, precision)
    proto = onnx.load(model.path)
    graph = cuda_emulator.EmulatedGraph(proto, [3], {"sequence": 7}, device, tmp_path, monkeypatch)
    inputs = [model.feeds[i["name"]] for i in graph.about["inputs"]]
    (output,) = graph("run_3", inputs)
    (expected,) = model.outputs.values()
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    codes = graph("codes_3", inputs)
    sites = graph.about["functions"]["codes_3"]["sites"]
    assert set(sites) == set(model.codes)
    for site, place in sites.items():
        found = codes[place].reshape(model.codes[site].shape)
        # A code may flip where its value lies on the boundary between two, as on any runtime; by one, never more.
        flipped = found != model.codes[site]
        assert np.abs(found.astype(int) - model.codes[site])[flipped].max(initial=0) <= 1
        near = np.abs(np.abs(model.scaled[site] - np.trunc(model.scaled[site])) - 0.5) < 1e-4
        assert np.all(near.reshape(flipped.shape)[flipped])
    stored = {c.name: c.right.stored for c in contractions(proto) if c.right is not None}
    rng = np.random.default_rng(0)
    for op, about in graph.about["ops"].items():
        assert kernels in about["kernels"]["3"]
        entry = about["accumulate"]["3"]
        high = 8 if precision == "w4a4" else 128
        shapes = [entry["left_shape"], entry["right_shape"]]
        operands = []
        for shape, dtype in zip(shapes, (about["left_dtype"], about["right_dtype"]), strict=True):
            if shape is not None:
                low, most = (-high, high) if dtype == "int8" else (0, 2 * high)
                operands.append(rng.integers(low, most, shape).astype(dtype))
        (found,) = graph(entry["function"], operands, entry["parameters"])
        right = (operands[1] if len(operands) > 1 else stored[op]).astype(np.int64)
        if right.ndim == 4 and len(operands) == 1:  # the patch embedding: its windows do not overlap
            patch = right.shape[-1]
            b, c, h, w = operands[0].shape
            tiles = operands[0].reshape(b, c, h // patch, patch, w // patch, patch).astype(np.int64)
            expected = np.einsum("bchiwj,ocij->bohw", tiles, right)
        else:
            expected = operands[0].astype(np.int64) @ right
        np.testing.assert_array_equal(found, expected, err_msg=op)


def mixed() -> onnx.ModelProto:
    """A convolution with groups and padding, zero points on both sides, blocks of K, weight-only and float products."""
    g, rng = Common("w4a8", image=(4, 3, 3)), np.random.default_rng(1)
    image = g.activation("image", "patch.input", "INT8", 0.05, 7)
    kernel = g.weight("patch.weight", "INT4", rng.integers(-8, 8, (12, 2, 3, 3)), rng.uniform(0.01, 0.02, 12), axis=0)
    window = {"group": 2, "pads": [1, 1, 1, 0], "strides": [2, 1]}
    conv = g.op("Conv", "patch", [image, kernel, g.constant("patch.bias", rng.standard_normal(12).astype("f"))],
                "W4A8", **window)  # fmt: skip
    flat = g.add("Reshape", [conv, g.constant("rows", np.array([0, 12, -1]))], "flat")
    x = g.activation(g.add("Transpose", [flat], "turned", perm=[0, 2, 1]), "fc.input", "INT4", 0.05, -3)
    zeros = rng.integers(0, 16, 10)
    weight = g.weight("fc.weight", "UINT4", rng.integers(0, 16, (12, 10)), rng.uniform(0.01, 0.02, 10), zeros, axis=1)
    gelu = g.add("Gelu", [g.op("MatMul", "fc", [x, weight], "W4A4")], "gelu")
    y = g.activation(gelu, "blocked.input", "UINT8", 0.01, 120)
    scales = rng.uniform(0.01, 0.02, (2, 9))
    weight = g.weight("blocked.weight", "INT8", rng.integers(-128, 128, (10, 9)), scales, axis=0, block_size=5)
    z = g.op("MatMul", "blocked", [y, weight], "W8A8")
    only = g.weight("only.weight", "INT4", rng.integers(-8, 8, (9, 7)), rng.uniform(0.01, 0.02, 7), axis=1)
    z = g.op("MatMul", "only", [z, only], "W4A16")
    last = g.constant("last.weight", rng.standard_normal((7, 3)).astype("f"))
    g.add("Softmax", [g.op("MatMul", "last", [z, last], "float")], "y", axis=-1)
    return g.model("y")


def test_everything_else_that_the_importer_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed()
    graph = cuda_emulator.EmulatedGraph(model, [2], {}, "cuda -arch=sm_80", tmp_path, monkeypatch)
    image = np.random.default_rng(2).standard_normal((2, 4, 3, 3)).astype(np.float32)
    (found,) = graph("run_2", [image])
    (expected,) = ReferenceEvaluator(model).run(None, {"image": image})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert {op: about["arithmetic"] for op, about in graph.about["ops"].items()} == {
        "patch": "integer", "fc": "integer", "blocked": "integer", "only": "weight-only", "last": "float",
    }  # fmt: skip
    assert "_int4" in graph.about["ops"]["fc"]["kernels"]["2"]

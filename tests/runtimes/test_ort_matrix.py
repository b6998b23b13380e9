"""Dialects by precision, opset and version: ONNX's reference evaluator and the installed onnxruntime must agree.

The common file and the Q/DQ dialect use standard operators only, which the reference evaluator computes itself. For the
integer dialect it is given the operators of com.microsoft, written here from their documentation, in float64.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

sys.path.insert(0, str(Path(__file__).parents[1]))
from common_graphs import Common, linear

from s2d_deploy.registry import load_target

ort = pytest.importorskip("onnxruntime")
TARGET = load_target("ort")
ROOT = Path(__file__).parents[2]
# The README's statement, checked below.
OPSET, CONTRIB = 21, 1


class MatMulIntegerToFloat(OpRun):
    """``(A - a_zero) @ (B - b_zero) * a_scale * b_scale + bias``."""

    op_domain = "com.microsoft"

    def _run(self, a, b, a_scale, b_scale, a_zero=None, b_zero=None, bias=None):
        left = a.astype(np.int64) - (0 if a_zero is None else a_zero.astype(np.int64))
        right = b.astype(np.int64) - (0 if b_zero is None else b_zero.astype(np.int64))
        y = (left @ right) * (a_scale.astype(np.float64) * b_scale)
        return ((y if bias is None else y + bias).astype(np.float32),)


class MatMulNBits(OpRun):
    """Float ``A @ dequantized(B).T``: blocks of K, two codes a byte, zero point 8 unless given."""

    op_domain = "com.microsoft"

    def _run(self, a, b, scales, zeros=None, K=None, N=None, bits=None, block_size=None, accuracy_level=None):
        blocks = K // block_size
        codes = np.stack([b & 15, b >> 4], -1).reshape(N, blocks, block_size).astype(np.int64)
        zero = np.full((N, blocks), 8)
        if zeros is not None:
            packed = zeros.reshape(N, -1)
            zero = np.stack([packed & 15, packed >> 4], -1).reshape(N, -1)[:, :blocks].astype(np.int64)
        weight = (codes - zero[..., None]) * scales.reshape(N, blocks, 1).astype(np.float64)
        return ((a.astype(np.float64) @ weight.reshape(N, K).T).astype(np.float32),)


def attention():
    common = Common("w4a4", x=(2, 6, 8))
    common.add("Transpose", ["x"], "xt", perm=[0, 1, 3, 2])
    query = common.activation("x", "a.query", "INT4", 0.3)
    key = common.activation("xt", "a.key", "INT4", 0.25)
    scores = common.op("MatMul", "a.scores", [query, key], "W4A4")
    scaled = common.add("Mul", [scores, common.constant("factor", np.float32(0.125))], "scaled")
    probs = common.activation(common.add("Softmax", [scaled], "p", axis=-1), "a.probs", "UINT4", 0.04)
    value = common.activation("x", "a.value", "INT4", 0.2)
    common.add("Identity", [common.op("MatMul", "a.context", [probs, value], "W4A4")], "y")
    return common.model("y")


def convolution(strides):
    rng = np.random.default_rng(3)
    common = Common("w4a8", x=(3, 8, 8))
    left = common.activation("x", "conv.input", "INT8", 0.02)
    right = common.weight("conv.weight", "INT4", rng.integers(-8, 8, (6, 3, 4, 4)), np.full(6, 0.1), axis=0)
    bias = common.constant("conv.bias", rng.normal(size=6).astype(np.float32))
    common.add("Identity", [common.op("Conv", "conv", [left, right, bias], "W4A8", strides=strides)], "y")
    return common.model("y")


def blocks():
    rng = np.random.default_rng(4)
    common = Common("w4a16", x=(5, 64))
    scale = rng.uniform(0.01, 0.1, (2, 12))
    right = common.weight("fc.weight", "INT4", rng.integers(-8, 8, (64, 12)), scale, axis=0, block_size=32)
    common.add("Identity", [common.op("MatMul", "fc", ["x", right], "W4A16")], "y")
    return common.model("y")


CASES = {
    "w8a8": ("w8a8", lambda: linear("w8a8", "INT8", "INT8")[0]),
    "w8a8-zero-points": ("w8a8", lambda: linear("w8a8", "INT8", "UINT8", zero_point=111, weight_zeros=True)[0]),
    "w4a8": ("w4a8", lambda: linear("w4a8", "INT4", "INT8")[0]),
    "w4a8-conv": ("w4a8", lambda: convolution([2, 2])),
    "w4a8-patches": ("w4a8", lambda: convolution([4, 4])),
    "w4a16": ("w4a16", blocks),
    "w4a4": ("w4a4", lambda: linear("w4a4", "INT4", "INT4")[0]),
    "w4a4-attention": ("w4a4", attention),
}
every_case = pytest.mark.parametrize("case", CASES)


def feeds(model):
    shape = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
    return {"x": np.random.default_rng(7).normal(size=shape).astype(np.float32)}


def written(case, folder, **options):
    """The common model and its dialect."""
    precision, make = CASES[case]
    model = make()
    onnx.save(model, folder / "common.onnx")
    path = TARGET.dialect_for(
        folder / "common.onnx", folder / "made", precision=precision, options=options, placement=None
    )
    return model, onnx.load(path)


def by_ort(model, level):
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    # As the adapter sets it: a W4A16 product keeps its activations in float.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def close(found, wanted):
    # Sums of 64 products at most, in another order, and one more rounding of the product of two scales.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=64 * 2.0**-23 * np.abs(wanted).max())


@every_case
def test_the_reference_evaluator_and_onnxruntime_agree(tmp_path, case):
    model, dialect = written(case, tmp_path)
    x = feeds(model)
    wanted = ReferenceEvaluator(model).run(None, x)[0]
    levels = ort.GraphOptimizationLevel
    close(by_ort(model, levels.ORT_DISABLE_ALL).run(None, x)[0], wanted)
    close(ReferenceEvaluator(dialect, new_ops=[MatMulIntegerToFloat, MatMulNBits]).run(None, x)[0], wanted)
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC, levels.ORT_ENABLE_EXTENDED, levels.ORT_ENABLE_ALL):
        close(by_ort(dialect, level).run(None, x)[0], wanted)


@every_case
def test_the_q_dq_dialect_is_standard_onnx(tmp_path, case):
    model, dialect = written(case, tmp_path, dialect="qdq")
    assert {entry.domain for entry in dialect.opset_import} - {"com.microsoft"} == {""}
    assert {node.domain for node in dialect.graph.node} == {""}
    x = feeds(model)
    wanted = ReferenceEvaluator(model).run(None, x)[0]
    close(ReferenceEvaluator(dialect).run(None, x)[0], wanted)
    close(by_ort(dialect, ort.GraphOptimizationLevel.ORT_DISABLE_ALL).run(None, x)[0], wanted)


@every_case
def test_opsets_are_those_that_the_readme_states(tmp_path, case):
    model, dialect = written(case, tmp_path)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": OPSET}
    assert {entry.domain: entry.version for entry in dialect.opset_import} == {"": OPSET, "com.microsoft": CONTRIB}


def test_the_installed_version_is_in_the_stated_range():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (stated,) = extras["ort"]
    low, high = (tuple(map(int, part.split(".")))[:2] for part in stated.removeprefix("onnxruntime>=").split(",<"))
    assert low <= tuple(map(int, version("onnxruntime").split(".")[:2])) < high
    readme = (ROOT / "README.md").read_text()
    assert f"onnxruntime {'.'.join(map(str, low))} to {high[0]}.{high[1] - 1}" in readme
    assert f"opset {OPSET}" in readme

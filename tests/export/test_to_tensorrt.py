"""Target `tensorrt`: exact codes in the dialect; engines that are really built (no GPU needed); refusals in words."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from s2d_deploy import load_runtime, load_target
from s2d_deploy.errors import (
    ArtifactError,
    DeviceUnavailable,
    RecipeError,
    RuntimeUnavailable,
    StageError,
    UnsupportedError,
)
from s2d_deploy.qgraph import contractions, load_model

dialect = import_module("s2d_deploy.export._trt_dialect")
options = import_module("s2d_deploy.export._trt_options")
script = import_module("s2d_deploy.export.to_tensorrt")
package = import_module("s2d_deploy.runtimes._trt_package")
TARGET = load_target("tensorrt")
needs_tensorrt = pytest.mark.skipif(not package.installed(), reason=f"TensorRT is not installed ({package.INSTALL})")

CODES = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127), "UINT8": (0, 255)}
NUMPY = {"INT4": ml_dtypes.int4, "UINT4": ml_dtypes.uint4, "INT8": np.int8, "UINT8": np.uint8}
WIDTH = 128


class Graph:
    """A common ONNX file, put together by hand (docs/architecture.md, section 4)."""

    def __init__(self, precision: str) -> None:
        self.precision, self.nodes, self.stored = precision, [], []

    def const(self, name: str, array: np.ndarray) -> str:
        self.stored.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, kind: str, inputs: list[str], name: str, props: dict[str, str] | None = None, **attributes) -> str:
        node = helper.make_node(kind, inputs, [f"{name}.out"], name=name, **attributes)
        for key, value in (props or {}).items():
            node.metadata_props.add(key=key, value=value)
        self.nodes.append(node)
        return node.output[0]

    def pair(self, x: str, site: str, container: str, scale: float, zero: int = 0) -> str:
        s = self.const(f"{site}.scale", np.float32(scale))
        z = self.const(f"{site}.zero", np.array(zero, NUMPY[container]))
        codes = self.node("QuantizeLinear", [x, s, z], f"{site}.quantize", {"s2d.site": site})
        return self.node("DequantizeLinear", [codes, s, z], f"{site}.dequantize", {"s2d.site": site})

    def weight(self, site: str, codes: np.ndarray, container: str, scale: np.ndarray, zero=None, **attributes) -> str:
        c = self.const(f"{site}.codes", codes.astype(NUMPY[container]))
        s = self.const(f"{site}.scale", scale.astype(np.float32))
        z = self.const(f"{site}.zero", (np.zeros(scale.shape) if zero is None else zero).astype(NUMPY[container]))
        return self.node("DequantizeLinear", [c, s, z], f"{site}.dequantize", {"s2d.site": site}, **attributes)

    def product(self, a: str, b: str, op: str, declared: str, kind: str = "MatMul", **attributes) -> str:
        return self.node(kind, [a, b], op, {"s2d.op": op, "s2d.declared": declared, "s2d.macs": "1000"}, **attributes)

    def model(self, output: str, shape: list[int | str], outputs: tuple[str, ...] = ()) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * len(shape)) for n in (output, *outputs)],
            self.stored,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        model.metadata_props.add(key="s2d.precision", value=self.precision)
        return model

    def save(self, folder: Path, output: str, shape: list[int | str]) -> Path:
        path = folder / "common.onnx"
        onnx.save_model(self.model(output, shape), path)
        return path


def block(precision: str, probs: str = "UINT8") -> Graph:
    """q, k, v -> attention -> projection with 128 features: one op of each kind that a transformer has."""
    g = Graph(precision)
    bits = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4), "w4a16": (4, 16), "fp32": (16, 16)}[precision]
    declared = "float" if precision == "fp32" else precision.upper()
    acts = {8: "INT8", 4: "INT4"}.get(bits[1])
    rng = np.random.default_rng(0)

    def quantized(x: str, site: str, container: str | None = acts, scale: float = 0.5) -> str:
        return x if acts is None else g.pair(x, site, container, scale / CODES[container][1])

    def linear(x: str, op: str) -> str:
        if bits[0] == 16:
            w = g.const(f"{op}.weight", rng.normal(size=(WIDTH, WIDTH)).astype(np.float32))
        else:
            high = CODES[f"INT{bits[0]}"][1]
            codes = rng.integers(-high, high + 1, (WIDTH, WIDTH))
            blocked = bits[1] == 16
            scale = rng.uniform(0.01, 0.02, (WIDTH // 32, WIDTH) if blocked else (WIDTH,))
            layout = {"axis": 0, "block_size": 32} if blocked else {"axis": 1}
            w = g.weight(f"{op}.weight", codes, f"INT{bits[0]}", scale, **layout)
        y = g.product(x, w, op, declared)
        return g.node("Add", [y, g.const(f"{op}.bias", rng.normal(size=WIDTH).astype(np.float32))], f"{op}.add")

    h = quantized("x", "q.input", scale=3.0)
    q, k, v = (linear(h, op) for op in "qkv")
    kt = g.node("Transpose", [k], "transpose", perm=[0, 2, 1])
    inner = "float" if acts is None else {"INT8": "W8A8", "INT4": "W4A4"}[acts]
    s = g.product(quantized(q, "a.query", scale=9.0), quantized(kt, "a.key", scale=9.0), "a.scores", inner)
    p = g.node("Softmax", [g.node("Mul", [s, g.const("root", np.float32(0.1))], "scaled")], "softmax", axis=-1)
    container = {"INT8": probs, "INT4": "UINT4"}.get(acts)
    c = g.product(quantized(p, "a.probs", container, scale=1.0), quantized(v, "a.value", scale=9.0), "a.context", inner)
    linear(quantized(c, "o.input", scale=9.0), "o")
    return g


def common(folder: Path, precision: str, **kind) -> Path:
    return block(precision, **kind).save(folder, "o.add.out", ["batch", 16, WIDTH])


@cache
def built(precision: str, **opts):
    """One engine for each precision, shared by the tests (about 2 s each)."""
    import tempfile

    folder = Path(tempfile.mkdtemp())
    path = TARGET.dialect(common(folder, precision), folder, precision=precision)
    return TARGET.build(
        path, folder, precision=precision, options={"compute_capabilities": ["8.6"], **opts}, progress=lambda _: None
    )


# ---- the dialect -----------------------------------------------------------------------------------------------


def one_product(container: str, zero: int, scale: float) -> Graph:
    g = Graph("w8a8")
    w = g.weight("op.weight", np.arange(-12, 12).reshape(6, 4), "INT8", np.linspace(0.1, 0.4, 4), axis=1)
    g.product(g.pair("x", "op.input", container, scale, zero), w, "op", "W8A8")
    return g


@pytest.mark.parametrize("container", list(CODES))
@settings(max_examples=25)
@given(data=st.data())
def test_codes_are_the_common_files_codes_less_zero_point_and_offset(container, data):
    low, high = CODES[container]
    zero = data.draw(st.integers(low, high))
    scale = data.draw(st.floats(2**-10, 8, width=32))
    units = data.draw(st.lists(st.floats(-400, 400, width=32), min_size=6, max_size=6))
    x = (np.array(units, np.float32) * np.float32(scale)).reshape(1, 6)
    x[0, 0] = np.float32(2.5) * np.float32(scale)  # a tie
    g = one_product(container, zero, scale)
    source = g.model("op.out", [1, 6], outputs=("op.input.dequantize.out",))
    wanted, values = ReferenceEvaluator(source).run(None, {"x": x})
    # The slow obvious meaning of the common file: code less zero point, an exact integer.
    steps = np.clip(np.round(x / np.float32(scale)), low - zero, high - zero)
    np.testing.assert_array_equal(values, steps.astype(np.float32) * np.float32(scale))
    result = dialect.to_dialect(g.model("op.out", [1, 6]))
    quantizer = next(n for n in result.graph.node if n.op_type == "QuantizeLinear")
    result.graph.output.append(helper.make_tensor_value_info(quantizer.output[0], TensorProto.INT8, None))
    found, codes = ReferenceEvaluator(result).run(None, {"x": x})
    offset = 0 if low - zero >= -128 and high - zero <= 127 else low - zero + 128
    np.testing.assert_array_equal(codes.astype(np.int64) + offset, steps.astype(np.int64))
    # Both sums have 6 products; the shifted form adds one term as large as offset * sum(W).
    size = np.abs(steps).max() * scale * 12 * 0.4 * 6 + abs(offset) * scale * 12 * 0.4 * 6
    np.testing.assert_allclose(found, wanted, rtol=0, atol=8 * np.finfo(np.float32).eps * size + 1e-30)


@pytest.mark.parametrize("precision", ["fp32", "w8a8", "w4a16", "w4a8", "w4a4"])
def test_dialect_computes_what_the_common_file_computes(tmp_path, precision):
    source = common(tmp_path, precision)
    path = TARGET.dialect(source, tmp_path / "out", precision=precision)
    x = np.random.default_rng(1).normal(size=(2, 16, WIDTH)).astype(np.float32)
    wanted, found = (ReferenceEvaluator(str(p)).run(None, {"x": x})[0] for p in (source, path))
    assert np.abs(wanted).max() > 1
    # 128 float products in each sum; a flipped code would be a whole step (0.01) away.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=128 * np.finfo(np.float32).eps * np.abs(wanted).max())


@pytest.mark.parametrize("precision", ["w8a8", "w4a16", "w4a8", "w4a4"])
def test_every_zero_point_is_a_signed_zero(tmp_path, precision):
    model = load_model(TARGET.dialect(common(tmp_path, precision), tmp_path / "out", precision=precision))
    stored = {t.name: t for t in model.graph.initializer}
    quantizers = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(quantizers) >= 4
    for node in quantizers:
        zero = stored[node.input[2]]
        assert not numpy_helper.to_array(zero).astype(np.int8).any()
        assert zero.data_type in (TensorProto.INT8, TensorProto.INT4)
        if zero.data_type == TensorProto.INT4:  # weights only
            assert node.input[0] in stored
    wanted = {c.name: (c.declared, c.macs) for c in contractions(load_model(tmp_path / "common.onnx"))}
    assert {c.name: (c.declared, c.macs) for c in contractions(model)} == wanted


def test_int4_weights_stay_packed_and_a_convolution_gets_bytes(tmp_path):
    g = Graph("w4a8")
    codes = np.arange(-8, 8).reshape(4, 1, 2, 2)
    x = g.pair("x", "patch.input", "INT8", 0.1)
    y = g.product(x, g.weight("patch.weight", codes, "INT4", np.full(4, 0.1), axis=0), "patch", "W4A8", kind="Conv")
    model = dialect.to_dialect(g.model(y, ["batch", 1, 4, 4]))
    (conv,) = contractions(model)
    assert conv.right.storage == "INT8"
    np.testing.assert_array_equal(conv.right.stored, codes)
    model = dialect.to_dialect(block("w4a8").model("o.add.out", ["batch", 16, WIDTH]))
    before = [c.right.stored for c in contractions(model) if c.right.stored is not None]
    assert {c.right.storage for c in contractions(model) if c.right.stored is not None} == {"INT4"}
    after = [c.right for c in contractions(dialect.widen_weights(model)) if c.right.stored is not None]
    assert {o.storage for o in after} == {"INT8"}
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new.stored)


def test_affine_4_bit_weights_become_exact_bytes():
    g = Graph("w4a8")
    codes, zero = np.arange(0, 16).reshape(4, 4), np.array([0, 3, 8, 15])
    g.product(
        g.pair("x", "op.input", "INT8", 0.1),
        g.weight("op.weight", codes, "UINT4", np.ones(4), zero, axis=1),
        "op",
        "W4A8",
    )
    (op,) = contractions(dialect.to_dialect(g.model("op.out", ["batch", 4])))
    assert op.right.storage == "INT8"
    np.testing.assert_array_equal(op.right.stored, codes - zero)


def test_a_per_token_scale_moves_behind_the_product():
    g = Graph("w8a8")
    one, z = g.const("one", np.float32(1)), g.const("z", np.int8(0))
    axes = g.const("axes", np.array([-1]))
    absmax = g.node("ReduceMax", [g.node("Abs", ["x"], "abs"), axes], "max", keepdims=1)
    scale = g.node("Div", [absmax, g.const("qmax", np.float32(127))], "scale")
    codes = g.node("QuantizeLinear", [g.node("Div", ["x", scale], "units"), one, z], "op.input.quantize")
    y = g.node("Mul", [g.node("DequantizeLinear", [codes, one, z], "op.input.dequantize"), scale], "values")
    g.product(y, g.weight("op.weight", np.arange(-8, 8).reshape(4, 4), "INT8", np.full(4, 0.1), axis=1), "op", "W8A8")
    source = g.model("op.out", ["batch", 4])
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    wanted = ReferenceEvaluator(source).run(None, {"x": x})[0]
    result = dialect.to_dialect(source)
    (op,) = contractions(result)
    assert op.integer
    np.testing.assert_allclose(ReferenceEvaluator(result).run(None, {"x": x})[0], wanted, rtol=1e-6, atol=1e-6)


def test_every_quantizer_that_cannot_be_expressed_is_named():
    g = Graph("w4a8")
    blocks = g.weight("a.weight", np.ones((64, 4)), "INT4", np.ones((2, 4)), axis=0, block_size=32)
    g.product(g.pair("x", "a.input", "INT8", 0.1), blocks, "a", "W4A8")
    codes = np.array([[255, 0]] * 4)
    far = g.weight("b.weight", codes, "UINT8", np.ones(2), np.array([0, 255]), axis=1)
    g.product(g.pair("a.out", "b.input", "INT8", 0.1), far, "b", "W8A8")
    with pytest.raises(UnsupportedError) as caught:
        dialect.to_dialect(g.model("b.out", ["batch", 64]))
    text = str(caught.value)
    assert "2 quantizer(s)" in text
    assert "a.weight: scales in blocks along K beside quantized activations" in text
    assert "quantize.overrides" in text
    assert "b.weight: 8-bit weights less their zero points reach -255..255" in text


@pytest.mark.parametrize("scale", [0.0, 1e-40, np.inf, np.nan])
def test_a_scale_without_a_reciprocal_is_refused(scale):
    g = Graph("w8a8")
    w = g.weight("op.weight", np.ones((4, 2)), "INT8", np.array([0.1, scale]), axis=1)
    g.product(g.pair("x", "op.input", "INT8", scale), w, "op", "W8A8")
    with pytest.raises(UnsupportedError) as caught:
        dialect.to_dialect(g.model("op.out", ["batch", 4]))
    for site in ("op.input", "op.weight"):
        assert f"{site}: 1 scale(s) that are zero, denormal or not finite" in str(caught.value)


def test_an_unsigned_8_bit_input_of_a_convolution_is_refused():
    g = Graph("w8a8")
    w = g.weight("patch.weight", np.ones((4, 1, 2, 2)), "INT8", np.ones(4), axis=0)
    g.product(g.pair("x", "patch.input", "UINT8", 0.1), w, "patch", "W8A8", kind="Conv")
    with pytest.raises(
        UnsupportedError, match=r"patch\.input: 8-bit codes 0\.\.255 .* do not fit INT8 in front of Conv"
    ):
        dialect.to_dialect(g.model("patch.out", ["batch", 1, 4, 4]))


def test_a_file_of_another_precision_or_no_file_is_refused(tmp_path):
    source = common(tmp_path, "w8a8")
    with pytest.raises(ArtifactError, match=r"Expected: s2d\.precision 'w4a4'.* Found: 'w8a8'"):
        TARGET.dialect(source, tmp_path / "out", precision="w4a4")
    source.write_bytes(source.read_bytes()[:200])
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        TARGET.dialect(source, tmp_path / "out", precision="w8a8")


# ---- options ---------------------------------------------------------------------------------------------------


def test_options_name_every_offender():
    with pytest.raises(RecipeError) as caught:
        options.Options.parse({"compute_capability": ["8.6"], "batch": [4, 2, 1], "tf32": "yes"})
    text = str(caught.value)
    assert "unknown key 'compute_capability'" in text
    assert "did you mean 'compute_capabilities'?" in text
    assert "options.batch: bad value" in text
    assert "options.tf32: bad value. Expected: true or false" in text


@pytest.mark.parametrize("given_", [["8.6", "12.0"], ["sm86", "sm_120"], ("86", 12.0)])
def test_capabilities_are_read_in_the_usual_spellings(given_):
    chosen = options.Options.parse({"compute_capabilities": given_}).compute_capabilities
    assert [options.sm_name(c) for c in chosen] == ["SM86", "SM120"]


def test_batches_that_a_run_will_use_make_the_profile_unless_it_is_given():
    assert options.Options.parse({"batch_sizes": [1, 16, 64]}).batch == (1, 1, 64)
    assert options.Options.parse({"batch_sizes": [1, 64], "batch": 8}).batch == (1, 8, 8)


def test_a_dynamic_dimension_needs_a_range():
    g = Graph("fp32")
    g.node("Relu", ["x"], "relu")
    model = g.model("relu.out", ["batch", "sequence", 4])
    with pytest.raises(RecipeError, match=r"no range for sequence of input 'x'.*dimensions: \{sequence:"):
        options.Options().shapes(model)
    chosen = options.Options.parse({"dimensions": {"sequence": {"min": 1, "opt": 5, "max": 9}}, "batch": 2})
    assert chosen.shapes(model) == {"x": [[1, 1, 4], [2, 5, 4], [2, 9, 4]]}


# ---- engines ---------------------------------------------------------------------------------------------------


@needs_tensorrt
@pytest.mark.parametrize(
    ("precision", "rung", "executed"),
    [
        ("fp32", "float", {"float32"}),
        ("w8a8", "native", {"int8"}),
        ("w4a8", "emulated", {"int8"}),
        ("w4a4", "emulated", {"int8"}),
        ("w4a16", "weight-only", {"float16"}),
    ],
)
def test_engine_is_built_and_audited_without_a_gpu(precision, rung, executed):
    artifact = built(precision)
    assert sorted(artifact.files) == ["description", "engine"]
    assert artifact.info["compute_capabilities"] == ["8.6"]
    assert artifact.info["rung"] == rung
    audit = artifact.info["audit"]
    assert set(audit["executed"]) == executed
    assert {op["name"] for op in audit["ops"]} == {"q", "k", "v", "a.scores", "a.context", "o"}
    assert "nothing was executed" in audit["evidence"]
    document = json.loads(artifact.path("description").read_text())
    assert document["inputs"] == [{"name": "x", "dtype": "FLOAT", "shape": [-1, 16, WIDTH]}]
    assert document["shapes"]["x"] == [[1, 16, WIDTH], [8, 16, WIDTH], [32, 16, WIDTH]]
    assert len(lzma.decompress(artifact.path("engine").read_bytes())) == document["engine_bytes"]
    json.dumps(artifact.info)


@needs_tensorrt
@pytest.mark.parametrize("precision", ["w4a4", "w4a8"])
def test_4_bit_weights_take_at_most_0_15_of_their_fp32_bytes(precision):
    artifact = built(precision)
    float_bytes = 4 * 4 * WIDTH * WIDTH
    assert artifact.info["weight_size_bytes"] <= 0.15 * float_bytes
    # Not only said: the packed codes (low nibble first) stand in the engine, and their one-byte form does not.
    engine = lzma.decompress(artifact.path("engine").read_bytes())
    for op in contractions(load_model(artifact.folder / "model.onnx")):
        if op.right.stored is not None:
            nibbles = op.right.stored.reshape(-1).astype(np.uint8) & 15
            packed = (nibbles[0::2] | nibbles[1::2] << 4).tobytes()
            assert packed in engine, op.name
            assert op.right.stored.astype(np.int8).tobytes() not in engine


@needs_tensorrt
def test_wide_storage_holds_one_code_in_each_byte():
    wide = built("w4a4", weight_storage="int8")
    assert wide.info["weight_size_bytes"] > 1.8 * built("w4a4").info["weight_size_bytes"]
    assert set(wide.info["audit"]["executed"]) == {"int8"}
    assert wide.info["rung"] == "emulated"


@needs_tensorrt
def test_one_engine_serves_several_gpus_and_is_the_same_each_time(tmp_path, capfd):
    path = TARGET.dialect(common(tmp_path, "w8a8"), tmp_path, precision="w8a8")
    engines = []
    for name in ("a", "b"):
        artifact = TARGET.build(
            path,
            tmp_path / name,
            precision="w8a8",
            options={"compute_capabilities": ["8.0", "8.6", "8.9", "12.0", "12.1"], "compress": False},
            progress=lambda _: None,
        )
        engines.append(artifact.path("engine").read_bytes())
    assert engines[0] == engines[1]
    assert len(engines[0]) == artifact.info["engine_bytes"]
    assert capfd.readouterr() == ("", "")


@needs_tensorrt
def test_signed_probabilities_keep_attention_on_codes(tmp_path):
    folder = tmp_path
    path = TARGET.dialect(common(folder, "w8a8", probs="INT8"), folder, precision="w8a8")
    assert not any(n.name.endswith(".shift.add") for n in load_model(path).graph.node)
    artifact = TARGET.build(
        path, folder, precision="w8a8", options={"compute_capabilities": ["8.6"]}, progress=lambda _: None
    )
    assert set(artifact.info["audit"]["executed"]) == {"int8"}


def build_refused(tmp_path: Path, path: Path, precision: str, **opts) -> str:
    with pytest.raises((UnsupportedError, RecipeError, DeviceUnavailable, StageError)) as caught:
        TARGET.build(path, tmp_path, precision=precision, options=opts, progress=lambda _: None)
    return str(caught.value)


@needs_tensorrt
def test_an_operator_that_tensorrt_lacks_names_node_layer_and_recipe_line(tmp_path):
    g = block("w8a8")
    g.node("Frobnicate", ["o.add.out"], "head.odd", domain="user.ops")
    model = g.model("head.odd.out", ["batch", 16, WIDTH])
    model.opset_import.append(helper.make_opsetid("user.ops", 1))
    path = tmp_path / "odd.onnx"
    onnx.save_model(dialect.to_dialect(model), path)
    text = build_refused(tmp_path, path, "w8a8", compute_capabilities=["8.6"])
    assert "ONNX node 'head.odd' (Frobnicate), layer 'o': TensorRT has no operator Frobnicate" in text
    assert "quantize.overrides: {'o': fp32}" in text


@needs_tensorrt
@pytest.mark.parametrize(
    ("precision", "capability", "words"),
    [
        ("fp32", "7.5", ["Turing (SM75): FP32 GEMM is not supported", 'leave "7.5" out of targets[tensorrt].options']),
        ("w4a4", "7.5", ["sm75, because the model contains HW-specific datatypes: int4", 'leave "7.5" out']),
        ("w8a8", "9.0", ["cannot build for 9.0", "Expected: 7.5, 8.0, 8.6, 8.9, 12.0, 12.1", "the package tensorrt"]),
    ],
)
def test_a_gpu_that_cannot_be_built_for_is_refused_in_words(tmp_path, precision, capability, words):
    path = TARGET.dialect(common(tmp_path, precision), tmp_path, precision=precision)
    text = build_refused(tmp_path, path, precision, compute_capabilities=[capability])
    for part in words:
        assert part in text


@needs_tensorrt
def test_the_current_gpu_is_asked_for_where_there_is_none(tmp_path):
    if load_runtime("tensorrt").available() is None:
        pytest.skip("there is a GPU here")
    path = TARGET.dialect(common(tmp_path, "w8a8"), tmp_path, precision="w8a8")
    text = build_refused(tmp_path, path, "w8a8", compute_capabilities="current")
    assert '"current" needs an NVIDIA GPU and its driver here' in text


@needs_tensorrt
def test_a_builder_that_takes_too_long_is_stopped(tmp_path):
    path = TARGET.dialect(common(tmp_path, "w8a8"), tmp_path, precision="w8a8")
    text = build_refused(tmp_path, path, "w8a8", timeout_s=0.01)
    assert "still at work after 0.01 s" in text
    assert "targets[tensorrt].options.timeout_s" in text


def test_a_missing_package_gives_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "NAMES", ("no_such_tensorrt",))
    path = TARGET.dialect(common(tmp_path, "w8a8"), tmp_path, precision="w8a8")
    with pytest.raises(RuntimeUnavailable, match=r"pip install 's2d-deploy\[tensorrt\]'"):
        TARGET.build(path, tmp_path, precision="w8a8", options={}, progress=lambda _: None)


# ---- the script ------------------------------------------------------------------------------------------------


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    for part in ("--compute-capability", "example.py", "exit codes", "w4a4 emulated", "engine.json", "CHECKPOINT"):
        assert part in text.replace("w4a8, w4a4 emulated", "w4a4 emulated")


@needs_tensorrt
def test_script_builds_and_prints_one_document(tmp_path):
    command = [
        sys.executable,
        "-m",
        "s2d_deploy.export.to_tensorrt",
        str(common(tmp_path, "w4a4")),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, "--compute-capability", "8.6", "8.9", "--batch", "1", "2", "4", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["compute_capabilities"] == ["8.6", "8.9"]
    assert document["batch"] == {"min": 1, "opt": 2, "max": 4}
    files = ["engine.json", "example.py", "manifest.json", "model.engine.xz", "model.onnx"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == files
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["common"] == "common.onnx"
    assert manifest["inputs"]["x"] == {"dtype": "float", "shape": ["batch", 16, WIDTH]}
    assert {f["name"]: f["sha256"] for f in manifest["files"]}["model.engine.xz"] == hashlib.sha256(
        (tmp_path / "out" / "model.engine.xz").read_bytes()
    ).hexdigest()
    example = (tmp_path / "out" / "example.py").read_text()
    compile(example, "example.py", "exec")
    assert "s2d_deploy" not in example
    if load_runtime("tensorrt").available() is not None:  # it fails for want of a driver, and of nothing else
        failed = subprocess.run(
            [sys.executable, str(tmp_path / "out" / "example.py")], capture_output=True, text=True, check=False, cwd="/"
        )
        assert failed.returncode == 1
        assert "an NVIDIA GPU of 8.6 or 8.9 with its driver" in failed.stderr
        assert "Traceback" not in failed.stderr


@needs_tensorrt
def test_script_takes_a_quantized_checkpoint(finished, tmp_path, capsys):
    checkpoint = finished.folder / "quantize" / "w4a16"
    chosen = ["--compute-capability", "8.6", "--compute", "bf16"]
    assert script.main([str(checkpoint), str(tmp_path / "out"), *chosen]) == 0
    text = capsys.readouterr().out
    assert "rung weight-only" in text
    assert "compiled, not run: 100.0% bfloat16" in text
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["checkpoint"] == "w4a16"
    assert manifest["info"]["compute"] == "bf16"


def test_script_answers_bad_input_with_exit_code_2(tmp_path, capsys):
    assert script.main([str(tmp_path / "none.onnx"), str(tmp_path / "out")]) == 2
    assert "not a readable ONNX file" in capsys.readouterr().err
    assert script.main([str(common(tmp_path, "w8a8")), str(tmp_path / "out"), "--batch", "3", "2", "1"]) == 2
    assert "in ascending order" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

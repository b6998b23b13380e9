"""The ONNX Runtime dialect: what it computes against integers in NumPy, what the file holds, what is refused.

Tolerance: the accumulators are exact, and three float32 operations follow (product of the scales, product, bias): 4 eps
relative to the largest term.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

sys.path.insert(0, str(Path(__file__).parents[1]))
from common_graphs import RANGES, Common, linear, quantized

from s2d_deploy.errors import ArtifactError, PlanError, RecipeError, UnsupportedError
from s2d_deploy.registry import load_runtime, load_target

ort = pytest.importorskip("onnxruntime")
EPS = 4 * 2.0**-23
TARGET = load_target("ort")


def rewritten(model, folder, precision):
    """The dialect file of a common model."""
    (folder / "common").mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "common" / "model.onnx")
    return TARGET.dialect(folder / "common" / "model.onnx", folder / "dialect", precision=precision)


def run(path, **feeds):
    """Plain onnxruntime, as a user without this package would."""
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=EPS * np.abs(expected).max())


def images(shape, seed=1):
    """Values beyond every grid's ends among them."""
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2
    x.reshape(-1)[:4] = [1e9, -1e9, 40.0, -40.0]
    return x


@pytest.mark.parametrize(
    ("precision", "storage", "activation", "zero_point"),
    [
        ("w8a8", "INT8", "INT8", 0),
        ("w8a8", "INT8", "INT8", -17),
        ("w8a8", "INT8", "UINT8", 111),
        ("w4a8", "INT4", "INT8", 0),
        ("w4a4", "INT4", "INT4", 0),
        ("w4a4", "INT4", "INT4", 3),
        ("w4a4", "INT4", "UINT4", 0),
        ("w4a4", "INT4", "UINT4", 5),
        ("w4a4", "UINT4", "INT4", 0),
        ("w8a8", "UINT8", "UINT8", 128),
    ],
)
@pytest.mark.parametrize("weight_zeros", [False, True])
def test_a_linear_layer_is_one_integer_kernel(tmp_path, precision, storage, activation, zero_point, weight_zeros):
    model, codes, scale, zeros, bias, step = linear(
        precision, storage, activation, zero_point=zero_point, weight_zeros=weight_zeros
    )
    path = rewritten(model, tmp_path, precision)
    x = images((2, 5, 24))
    lhs = quantized(x, activation, step, zero_point) - zero_point
    accumulators = lhs @ (codes - zeros)
    close(run(path, x=x)[0], accumulators * (step * scale).astype(np.float64) + bias)
    contractions = [kind for kind in kinds(path) if "MatMul" in kind]
    assert contractions == ["MatMulIntegerToFloat"]
    assert "Add" not in kinds(path)


@settings(max_examples=12)
@given(
    k=st.integers(1, 70),
    n=st.integers(1, 40),
    activation=st.sampled_from(list(RANGES)),
    storage=st.sampled_from(list(RANGES)),
    seed=st.integers(0, 99),
)
def test_any_width_and_type(tmp_path_factory, k, n, activation, storage, seed):
    model, codes, scale, *_, step = linear("w4a4", storage, activation, k=k, n=n, seed=seed, bias=False)
    path = rewritten(model, tmp_path_factory.mktemp("any"), "w4a4")
    x = images((1, 5, k), seed) if k > 1 else np.ones((1, 5, 1), np.float32)
    expected = (quantized(x, activation, step) @ codes) * (step * scale).astype(np.float64)
    np.testing.assert_allclose(run(path, x=x)[0], expected, rtol=EPS, atol=EPS)


def attention(factor):
    """``x [batch, 4, 6, 8]`` -> scores -> Mul -> Softmax -> context -> y, everything in 4 bit."""
    common = Common("w4a4", x=(4, 6, 8))
    common.add("Transpose", ["x"], "xt", perm=[0, 1, 3, 2])
    query = common.activation("x", "a.query", "INT4", 0.3)
    key = common.activation("xt", "a.key", "INT4", 0.25)
    scores = common.op("MatMul", "a.scores", [query, key], "W4A4")
    scaled = common.add("Mul", [scores, common.constant("factor", np.float32(factor))], "scaled")
    probs = common.activation(common.add("Softmax", [scaled], "p", axis=-1), "a.probs", "UINT4", 0.04)
    value = common.activation("x", "a.value", "INT4", 0.2)
    common.add("Identity", [common.op("MatMul", "a.context", [probs, value], "W4A4")], "y")
    return common.model("y")


@pytest.mark.parametrize(("factor", "folded"), [(0.125, True), (8**-0.5, False)])
def test_attention_products_are_integer_kernels_with_a_signed_right_side(tmp_path, factor, folded):
    path = rewritten(attention(factor), tmp_path, "w4a4")
    x = np.random.default_rng(2).normal(size=(3, 4, 6, 8)).astype(np.float32)
    scores = (quantized(x, "INT4", 0.3) @ quantized(x, "INT4", 0.25).swapaxes(2, 3)).astype(np.float32)
    scaled = scores * (np.float32(0.3) * np.float32(0.25)) * np.float32(factor)
    probs = np.exp(scaled - scaled.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    # A probability within 1e-4 steps of a rounding boundary could flip; none does here, so equality is fair.
    assert np.abs(np.abs(probs / np.float32(0.04) % 1) - 0.5).min() > 1e-4
    context = quantized(probs, "UINT4", 0.04) @ quantized(x, "INT4", 0.2)
    close(run(path, x=x)[0], context * np.float64(np.float32(0.04) * np.float32(0.2)))
    graph = onnx.load(path).graph
    assert ("Mul" in [n.op_type for n in graph.node]) is not folded
    types = {v.name: v.data_type for v in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            assert types[node.input[4]] == TensorProto.UINT8
            assert types[node.input[5]] == TensorProto.INT8


def test_quantizers_move_in_front_of_transposes(tmp_path):
    graph = onnx.load(rewritten(attention(0.125), tmp_path, "w4a4")).graph
    makers = {n.output[0]: n for n in graph.node}
    assert makers["a.key.codes"].op_type == "Transpose"
    assert {p.key: p.value for p in makers["a.key.codes"].metadata_props}["s2d.site"] == "a.key"


def conv(shape, weight_shape, activation, zero_point, **attributes):
    rng = np.random.default_rng(3)
    codes = rng.integers(-8, 8, weight_shape)
    scale = rng.uniform(0.01, 0.1, weight_shape[0]).astype(np.float32)
    bias = rng.normal(size=weight_shape[0]).astype(np.float32)
    common = Common("w4a4", x=shape)
    left = common.activation("x", "conv.input", activation, 0.25, zero_point)
    right = common.weight("conv.weight", "INT4", codes, scale, axis=0)
    inputs = [left, right, common.constant("conv.bias", bias)]
    common.add("Identity", [common.op("Conv", "conv", inputs, "W4A4", **attributes)], "y")
    return common.model("y"), codes, scale, bias


def conv_by_loops(x, weight, stride, pad, group):
    """Cross-correlation of integers, zero padded, by loops over the output."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    o, per_group, kh, kw = weight.shape
    out = np.zeros((len(x), o, (x.shape[2] - kh) // stride + 1, (x.shape[3] - kw) // stride + 1), np.int64)
    for channel in range(o):
        first = channel // (o // group) * per_group
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                patch = x[:, first : first + per_group, i * stride : i * stride + kh, j * stride : j * stride + kw]
                out[:, channel, i, j] = (patch * weight[channel]).sum((1, 2, 3))
    return out


@pytest.mark.parametrize(
    ("kernel", "size", "group", "stride", "pad", "zero_point"),
    [
        ("MatMulIntegerToFloat", 8, 1, 4, 0, 0),
        ("MatMulIntegerToFloat", 8, 1, 4, 0, -3),
        ("ConvInteger", 9, 1, 4, 0, 0),
        ("ConvInteger", 8, 1, 2, 1, 0),
        ("ConvInteger", 8, 1, 2, 1, -3),
        ("ConvInteger", 8, 2, 1, 2, 4),
    ],
)
def test_convolutions(tmp_path, kernel, size, group, stride, pad, zero_point):
    model, codes, scale, bias = conv(
        (4, size, size), (6, 4 // group, 4, 4), "INT4", zero_point, strides=[stride] * 2, pads=[pad] * 4, group=group
    )
    path = rewritten(model, tmp_path, "w4a4")
    x = images((3, 4, size, size))
    accumulators = conv_by_loops(quantized(x, "INT4", 0.25, zero_point) - zero_point, codes, stride, pad, group)
    expected = accumulators * (np.float32(0.25) * scale)[:, None, None].astype(np.float64) + bias[:, None, None]
    close(run(path, x=x)[0], expected)
    assert kernel in kinds(path)
    assert "Conv" not in kinds(path)


def weight_only(k, n, block, zeros=False):
    rng = np.random.default_rng(5)
    codes = rng.integers(-8, 8, (k, n))
    scale = rng.uniform(0.01, 0.1, (k // block, n)).astype(np.float32)
    zero_point = rng.integers(-8, 8, scale.shape) if zeros else None
    common = Common("w4a16", x=(5, k))
    right = common.weight("fc.weight", "INT4", codes, scale, zero_point, axis=0, block_size=block)
    common.add("Identity", [common.op("MatMul", "fc", ["x", right], "W4A16")], "y")
    offset = 0 if zero_point is None else zero_point.repeat(block, 0)
    return common.model("y"), (codes - offset) * scale.repeat(block, 0).astype(np.float64)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("k", "block", "kernel"), [(96, 32, "MatMulNBits"), (64, 64, "MatMulNBits"), (24, 8, "MatMul")]
)
def test_weight_only_keeps_float_activations(tmp_path, zeros, k, block, kernel):
    model, weight = weight_only(k, 24, block, zeros)
    path = rewritten(model, tmp_path, "w4a16")
    x = np.random.default_rng(6).normal(size=(2, 5, k)).astype(np.float32)
    expected = x.astype(np.float64) @ weight
    # K float32 roundings relative to the sum of magnitudes (Higham, section 3.1) ...
    bound = k * 2.0**-23 * (np.abs(x).astype(np.float64) @ np.abs(weight))
    assert (np.abs(run(path, x=x)[0] - expected) <= bound).all()
    # ... which activations rounded to INT8 block by block, ONNX Runtime's own choice, do not meet.
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs((np.rint(x / step) * step) @ weight - expected) > bound).any()
    assert kernel in kinds(path)
    for node in onnx.load(path).graph.node:
        if node.op_type == "MatMulNBits":
            assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 1


def test_blocks_with_integer_activations_are_right_and_admitted(tmp_path):
    rng = np.random.default_rng(7)
    codes, scale = rng.integers(-8, 8, (64, 12)), rng.uniform(0.01, 0.1, (2, 12)).astype(np.float32)
    common = Common("w4a8", x=(5, 64))
    left = common.activation("x", "fc.input", "INT8", 0.02)
    right = common.weight("fc.weight", "INT4", codes, scale, axis=0, block_size=32)
    common.add("Identity", [common.op("MatMul", "fc", [left, right], "W4A8", macs=3840)], "y")
    path = rewritten(common.model("y"), tmp_path, "w4a8")
    x = images((2, 5, 64))
    expected = (quantized(x, "INT8", 0.02) * np.float64(np.float32(0.02))) @ (codes * scale.repeat(32, 0))
    np.testing.assert_allclose(run(path, x=x)[0], expected, atol=64 * EPS * np.abs(expected).max())
    with load_runtime("ort").open(build(path, tmp_path, "w4a8"), threads=1) as session:
        audit = session.audit()
    assert audit.rung == "dequantized"
    assert [op.name for op in audit.mismatches()] == ["fc"]
    assert audit.notes == ("fc: declared W4A8, computed in float by MatMul from dequantized values",)


def test_per_token_activations_are_right(tmp_path):
    codes = np.random.default_rng(8).integers(-127, 128, (16, 6))
    common = Common("w8a8", x=(5, 16))
    one, zero = common.constant("one", np.float32(1)), common.constant("zero", np.int8(0))
    common.add("Abs", ["x"], "abs")
    common.add("ReduceMax", ["abs", common.constant("axes", np.array([-1]))], "absmax", keepdims=1)
    common.add("Div", ["absmax", common.constant("qmax", np.float32(127))], "scale")
    common.add("Div", ["x", "scale"], "steps")
    common.add("QuantizeLinear", ["steps", one, zero], "codes", props={"s2d.site": "fc.input"})
    common.add("DequantizeLinear", ["codes", one, zero], "whole", props={"s2d.site": "fc.input"})
    common.add("Mul", ["whole", "scale"], "left")
    right = common.weight("fc.weight", "INT8", codes, np.full(6, 0.05), axis=1)
    common.add("Identity", [common.op("MatMul", "fc", ["left", right], "W8A8")], "y")
    path = rewritten(common.model("y"), tmp_path, "w8a8")
    x = np.random.default_rng(9).normal(size=(2, 5, 16)).astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    expected = (np.rint(x / scale) * scale.astype(np.float64)) @ (codes * np.float64(np.float32(0.05)))
    np.testing.assert_allclose(run(path, x=x)[0], expected, atol=16 * EPS * np.abs(expected).max())
    with load_runtime("ort").open(build(path, tmp_path, "w8a8"), threads=1) as session:
        audit = session.audit()
        found = session.codes({"x": x})["fc.input"]
        exact = session.accumulate("fc", found)
    np.testing.assert_array_equal(found, np.rint(x / scale))
    np.testing.assert_array_equal(exact, found.astype(np.int64) @ codes)
    assert [(op.kernel, op.precision) for op in audit.ops] == [("MatMulIntegerToFloat", "int8")]
    assert (audit.rung, audit.mismatches()) == ("native", [])


def build(path, folder, precision, **options):
    return TARGET.build(path, folder / "built", precision=precision, options=options, progress=lambda _: None)


def test_four_bit_weights_are_four_bit_on_disk(tmp_path):
    model, *_ = linear("w4a4", "INT4", "INT4", k=256, n=256)
    path = rewritten(model, tmp_path, "w4a4")
    artifact = build(path, tmp_path, "w4a4")
    weights = artifact.info["weights"]
    assert weights["float32_bytes"] == 4 * 256 * 256
    assert weights["stored_bytes"] == 256 * 256 // 2 + 4 * 256  # codes, scales
    assert weights["ratio"] < 0.15
    assert artifact.size_bytes < 256 * 256 // 2 + 4096
    assert artifact.files == {"model": "model.onnx"}


def test_weights_beyond_a_protobuf_go_beside_the_model(tmp_path, monkeypatch):
    """With the limit lowered: the artifact is two files, and everything that a session does still works from them."""
    monkeypatch.setattr(sys.modules[type(TARGET).__module__], "_EXTERNAL_BEYOND", 1000)
    model, codes, scale, _, bias, step = linear("w4a4", "INT4", "INT4", k=64, n=64)
    artifact = build(rewritten(model, tmp_path, "w4a4"), tmp_path, "w4a4")
    assert artifact.files == {"model": "model.onnx", "data": "model.onnx.data"}
    assert artifact.path("data").stat().st_size >= 64 * 64 // 2
    x = images((2, 5, 64))
    lhs = quantized(x, "INT4", step)
    with load_runtime("ort").open(artifact, threads=1) as session:
        close(session.run({"x": x})["y"], lhs @ codes * (step * scale).astype(np.float64) + bias)
        np.testing.assert_array_equal(session.codes({"x": x})["fc.input"], lhs)
        np.testing.assert_array_equal(session.accumulate("fc", lhs.astype(np.int8)), lhs @ codes)
        assert session.audit().executed == {"int8": 1.0}


def test_weights_with_blocks_are_counted_packed(tmp_path):
    artifact = build(rewritten(weight_only(256, 64, 32)[0], tmp_path, "w4a16"), tmp_path, "w4a16")
    assert artifact.info["weights"] == {
        "stored_bytes": 256 * 64 // 2 + 4 * 8 * 64,
        "float32_bytes": 4 * 256 * 64,
        "ratio": (256 * 64 // 2 + 4 * 8 * 64) / (4 * 256 * 64),
    }


def test_unpacked_weights_reach_the_kernel_folded(tmp_path):
    path = rewritten(linear("w4a4", "INT4", "INT4")[0], tmp_path, "w4a4")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    assert "Cast" in kinds(path)
    assert "Cast" not in [n.op_type for n in optimized.node]
    (kernel,) = [n for n in optimized.node if n.op_type == "MatMulIntegerToFloat"]
    assert {t.name: t.data_type for t in optimized.initializer}[kernel.input[1]] == TensorProto.INT8


def test_tied_weights_are_unpacked_once(tmp_path):
    common = Common("w4a4", x=(5, 8))
    right = common.weight("fc.weight", "INT4", np.arange(64).reshape(8, 8) % 16 - 8, np.full(8, 0.1), axis=1)
    first = common.op("MatMul", "fc", [common.activation("x", "fc.input", "INT4", 0.25), right], "W4A4")
    second = common.op("MatMul", "again", [common.activation(first, "again.input", "INT4", 0.5), right], "W4A4")
    common.add("Identity", [second], "y")
    path = rewritten(common.model("y"), tmp_path, "w4a4")
    assert kinds(path).count("Cast") == 1
    assert kinds(path).count("MatMulIntegerToFloat") == 2
    assert run(path, x=np.ones((1, 5, 8), np.float32))[0].shape == (1, 5, 8)


def test_the_dialect_is_the_same_bytes_every_time(tmp_path):
    model = attention(0.125)
    assert (
        rewritten(model, tmp_path / "a", "w4a4").read_bytes() == rewritten(model, tmp_path / "b", "w4a4").read_bytes()
    )


def test_another_precision_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"Expected: s2d.precision 'w8a8' in its metadata. Found: 'w4a4'"):
        rewritten(linear("w4a4", "INT4", "INT4")[0], tmp_path, "w8a8")


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e-40, np.inf, np.nan])
def test_scales_that_nothing_can_divide_by_are_named(tmp_path, bad):
    common = Common("w4a4", x=(5, 8))
    left = common.activation("x", "fc.input", "INT4", bad)
    right = common.weight("fc.weight", "INT4", np.zeros((8, 8)), np.full(8, bad), axis=1)
    common.add("Identity", [common.op("MatMul", "fc", [left, right], "W4A4")], "y")
    with pytest.raises(PlanError, match=r"fc\.input, fc\.weight\. Expected: finite, positive, and no denormals"):
        rewritten(common.model("y"), tmp_path, "w4a4")


def test_a_truncated_file_is_refused(tmp_path):
    path = rewritten(linear("w4a4", "INT4", "INT4")[0], tmp_path, "w4a4")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        build(path, tmp_path, "w4a4")


def foreign(model, op_type, domain=""):
    """An operator that nobody knows in front of the output."""
    last = model.graph.node.pop()
    node = onnx.helper.make_node(op_type, [last.input[0]], ["foreign"], name="foreign", domain=domain)
    model.graph.node.extend([node, onnx.helper.make_node("Identity", ["foreign"], list(last.output), name="last")])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: foreign(m, "Foo"), r"operator Foo is not in opset 21"),
        (lambda m: foreign(m, "Foo", "my.ops"), r"domain 'my\.ops' is used, but the model does not import it"),
        (lambda m: setattr(m.opset_import[0], "version", 90), r"opset 90 is newer than this onnxruntime"),
        (lambda m: setattr(m, "ir_version", 99), r"IR version 99 is newer than this onnxruntime"),
    ],
)
def test_what_onnxruntime_does_not_have_is_said_in_words(tmp_path, change, text):
    model = linear("w4a4", "INT4", "INT4")[0]
    change(model)
    with pytest.raises(UnsupportedError, match=text):
        build(rewritten(model, tmp_path, "w4a4"), tmp_path, "w4a4")


def test_the_common_file_is_not_overwritten(tmp_path):
    common = tmp_path / "model.onnx"
    onnx.save(linear("w4a4", "INT4", "INT4")[0], common)
    with pytest.raises(ArtifactError, match="would overwrite the common file"):
        TARGET.dialect(common, tmp_path, precision="w4a4")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"provider": ["CPUExecutionProvider"]}, r"unknown option 'provider'.*did you mean 'providers'\?"),
        ({"graph_optimization_level": "al"}, r"Expected: one of all, extended, basic, disable\..*did you mean 'all'\?"),
        ({"providers": "CPUExecutionProvider"}, r"providers\. Expected: a list"),
        ({"providers": [3]}, r"Expected: names, or pairs \[name, options\]\. Found: 3"),
    ],
)
def test_wrong_options_are_named(tmp_path, options, text):
    path = rewritten(linear("w4a4", "INT4", "INT4")[0], tmp_path, "w4a4")
    with pytest.raises(RecipeError, match=text):
        build(path, tmp_path, "w4a4", **options)


@pytest.mark.parametrize("level", ["all", "extended", "basic", "disable"])
def test_every_optimization_level_computes_the_same(tmp_path, level):
    path = rewritten(attention(0.125), tmp_path, "w4a4")
    x = np.random.default_rng(0).normal(size=(3, 4, 6, 8)).astype(np.float32)
    artifact = build(path, tmp_path, "w4a4", graph_optimization_level=level)
    with load_runtime("ort").open(artifact, threads=1) as session:
        np.testing.assert_array_equal(session.run({"x": x})["y"], run(path, x=x)[0])


def test_the_script_builds_and_tells_what_executes(tmp_path, capsys):
    from s2d_deploy.export.to_ort import main  # noqa: TID251

    onnx.save(linear("w4a4", "INT4", "INT4")[0], tmp_path / "common.onnx")
    assert main([str(tmp_path / "common.onnx"), str(tmp_path / "out"), "--threads", "2"]) == 0
    said = capsys.readouterr().out
    assert "w4a4" in said
    assert "executes 100.0% int8 of 1,200 multiply-accumulates per sample; rung: emulated" in said
    assert "of their FP32 bytes" in said
    assert Path(tmp_path / "out" / "model.onnx").exists()


def test_the_script_reports_errors_with_the_designed_exit_code(tmp_path, capsys):
    from s2d_deploy.export.to_ort import main  # noqa: TID251

    assert main([str(tmp_path / "none.onnx"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    onnx.save(linear("w4a4", "INT4", "INT4")[0], tmp_path / "common.onnx")
    assert main([str(tmp_path / "common.onnx"), str(tmp_path / "out"), "--threads", "0"]) == 2
    assert "--threads. Expected: 1 or more. Found: 0." in capsys.readouterr().err
    assert main([str(tmp_path / "common.onnx"), str(tmp_path / "out"), "--provider", "NoSuchProvider"]) == 3
    assert "has no provider NoSuchProvider here" in capsys.readouterr().err


def test_help_teaches(capsys):
    from s2d_deploy.export.to_ort import main  # noqa: TID251

    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for word in ("COMMON.onnx", "OUT_FOLDER", "--threads", "InferenceSession", "example:"):
        assert word in said

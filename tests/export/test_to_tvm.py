"""The TVM target: packing, kernels against numpy, shape folding, fast functions, options, artifacts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from s2d_deploy.errors import ArtifactError, RecipeError, UnsupportedError
from s2d_deploy.registry import load_target
from s2d_deploy.session import Artifact

tvm = pytest.importorskip("tvm")

from s2d_deploy.export import _tvm_math as fast  # noqa: E402, TID251
from s2d_deploy.export import to_tvm  # noqa: E402, TID251
from s2d_deploy.export._tvm_epilogue import Epilogue, Place, Step  # noqa: E402, TID251
from s2d_deploy.export._tvm_integer import integer_kernel  # noqa: E402, TID251
from s2d_deploy.export._tvm_isa import isa_of, required_features, resolve_target  # noqa: E402, TID251
from s2d_deploy.export._tvm_kernels import Geometry, float_kernel  # noqa: E402, TID251
from s2d_deploy.export._tvm_panels import Panels, panel_width  # noqa: E402, TID251
from s2d_deploy.export._tvm_rows import layer_norm_kernel, softmax_kernel  # noqa: E402, TID251
from s2d_deploy.export._tvm_static import dynamic_names, fix_dimensions  # noqa: E402, TID251
from s2d_deploy.runtimes._cpu_features import missing_features  # noqa: E402, TID251

TARGET = load_target("tvm")
DEVICES = [
    "llvm -mcpu=x86-64-v4 -mattr=+avx512vnni",
    "llvm -mcpu=x86-64-v3 -mattr=+avxvnni",
    "llvm -mcpu=x86-64-v3",
    "llvm -mcpu=x86-64-v4",
    "llvm",
]


def silent(_: str) -> None: ...


def linear_model(
    k: int = 16, n: int = 24, storage: int = TensorProto.INT4, dim: str = "batch", second: int | str = 3
) -> onnx.ModelProto:
    """x (batch, 3, k) -> Q/DQ -> MatMul(INT4 weight) -> + bias -> y, as the common file has it."""
    rng = np.random.default_rng(0)
    kind = helper.tensor_dtype_to_np_dtype(storage)
    stored = [
        onnx.numpy_helper.from_array(np.float32(0.1).reshape(()), "x_scale"),
        onnx.numpy_helper.from_array(np.array(0, np.int8), "x_zero"),
        onnx.numpy_helper.from_array(rng.integers(-7, 8, (k, n)).astype(kind), "fc.weight.codes"),
        onnx.numpy_helper.from_array(rng.uniform(0.01, 0.1, n).astype(np.float32), "fc.weight.scale"),
        onnx.numpy_helper.from_array(np.zeros(n).astype(kind), "fc.weight.zero_point"),
        onnx.numpy_helper.from_array(rng.standard_normal(n).astype(np.float32), "bias"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["codes"], "fc.input.quantize"),
        helper.make_node("DequantizeLinear", ["codes", "x_scale", "x_zero"], ["x_dq"], "fc.input.dequantize"),
        helper.make_node(
            "DequantizeLinear",
            ["fc.weight.codes", "fc.weight.scale", "fc.weight.zero_point"],
            ["w_dq"],
            "fc.weight.dequantize",
            axis=1,
        ),
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["product"], "fc"),
        helper.make_node("Add", ["product", "bias"], ["y"], "add"),
    ]
    for node, key, value in ((0, "s2d.site", "fc.input"), (3, "s2d.op", "fc"), (3, "s2d.declared", "W4A8")):
        nodes[node].metadata_props.add(key=key, value=value)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [dim, second, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [dim, second, n])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model.metadata_props.add(key="s2d.precision", value="w4a8")
    onnx.checker.check_model(model)
    return model


def call(function: Any, target: Any, *arrays: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    library = tvm.compile(tvm.IRModule({"f": function.with_attr("global_symbol", "f")}), target=target)
    out = tvm.runtime.tensor(np.zeros(shape, dtype))
    library["f"](*[tvm.runtime.tensor(a) for a in arrays], out)
    return out.numpy()


def accumulators(isa: Any, panels: Panels, batch: int, rows: int, zero: int) -> Any:
    """The integer kernel that stores what it accumulates."""
    left = Place((batch, rows, panels.depth), (rows * panels.depth, 0, panels.depth, 0), "uint8")
    out = Place((batch, rows, panels.n), (rows * panels.n, 0, panels.n, 1), "int32")
    return integer_kernel(isa, Geometry((batch, 1), rows, left, panels, zero), Epilogue(outputs=((-1, out),)))


@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([4, 8]), st.sampled_from([1, 4]), st.sampled_from([8, 16])
)
@settings(max_examples=40, deadline=None)
def test_packing_puts_every_code_where_the_kernel_looks_for_it(
    k: int, n: int, bits: int, group: int, width: int
) -> None:
    panels = Panels(k, n, width, group, bits)
    codes = np.random.default_rng(k * n).integers(-8, 8, (1, k, n)).astype(np.int8)
    packed = panels.pack(codes)
    assert packed.shape == (1, *panels.stored_shape)
    for row in range(panels.depth):
        for column in range(panels.columns):
            run, place = row // group, (column % width) * group + row % group
            if bits == 8:
                found = int(packed[0, column // width, run, place])
            else:
                byte = int(packed[0, column // width, run // 2, place])
                nibble = byte >> 4 if run % 2 else byte & 15
                found = nibble - 16 if nibble > 7 else nibble
            assert found == (codes[0, row, column] if row < k and column < n else 0)


def test_panel_width_prefers_wide_panels_and_little_padding() -> None:
    assert [panel_width(n, (64, 48, 32, 16)) for n in (10, 64, 96, 384)] == [16, 64, 48, 64]


@pytest.mark.parametrize("device", DEVICES)
@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(1, 80),
    st.sampled_from([4, 8]),
    st.integers(0, 255),
)
@settings(max_examples=5, deadline=None)
def test_integer_kernel_is_exact(device: str, batch: int, m: int, k: int, n: int, bits: int, zero: int) -> None:
    target = tvm.target.Target(resolve_target(device))
    if missing_features(required_features(target)):
        pytest.skip("this processor cannot run it")
    isa = isa_of(target)
    panels = Panels(k, n, panel_width(n, isa.widths), isa.group, bits)
    rng = np.random.default_rng(m * k * n)
    a = rng.integers(0, 256, (batch, m, panels.depth)).astype(np.uint8)
    b = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (batch, k, n)).astype(np.int8)
    kernel = accumulators(isa, panels, batch, m, zero)
    got = call(kernel, target, a, panels.pack(b), shape=(batch, m, n), dtype="int32")
    expected = (a[..., :k].astype(np.int64) - zero) @ b.astype(np.int64)
    np.testing.assert_array_equal(got, expected)


def test_integer_kernel_does_not_saturate_and_wraps_only_at_32_bits() -> None:
    target = tvm.target.Target(resolve_target("native"))
    isa = isa_of(target)
    panels = Panels(4096, 16, 16, isa.group, 8)
    a = np.full((1, 1, panels.depth), 255, np.uint8)
    for value in (-128, 127):
        b = np.full((1, 4096, 16), value, np.int8)
        kernel = accumulators(isa, panels, 1, 1, 0)
        got = call(kernel, target, a, panels.pack(b), shape=(1, 1, 16), dtype="int32")
        assert set(got.ravel().tolist()) == {4096 * 255 * value}


def test_float_kernel() -> None:
    target = tvm.target.Target(resolve_target("native"))
    isa = isa_of(target)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 13, 33)).astype(np.float32), rng.standard_normal((2, 33, 70)).astype(np.float32)
    panels = Panels(33, 70, panel_width(70, isa.widths), 1, 32)
    got = call(
        float_kernel(isa, panels, 2, 13), target, a, panels.pack(b), shape=(2, 13, panels.columns), dtype="float32"
    )
    exact = a.astype(np.float64) @ b.astype(np.float64)
    # Any order of summation errs by at most K units in the last place of the sum of magnitudes.
    bound = 33 * np.finfo(np.float32).eps * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64))
    assert np.all(np.abs(got[..., :70] - exact) <= bound)


@pytest.mark.parametrize("width", [1, 16, 37])
def test_row_kernels(width: int) -> None:
    target = tvm.target.Target(resolve_target("native"))
    rng = np.random.default_rng(width)
    x = (rng.standard_normal((5, width)) * 10 + 100).astype(np.float32)
    gamma, beta = rng.standard_normal((2, width)).astype(np.float32)
    wide = x.astype(np.float64)
    normal = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * gamma + beta
    column, whole = Place((width,), (0, 0, 0, 1)), Place(x.shape, (0, 0, width, 1))
    steps = (Step("Mul", (("value", 0), ("operand", 0))), Step("Add", (("value", 1), ("operand", 1))))
    kernel = layer_norm_kernel(5, width, 1e-5, Epilogue((column, column), steps, ((2, whole),)))
    got = call(kernel, target, x, gamma, beta, shape=x.shape, dtype="float32")
    np.testing.assert_allclose(got, normal, rtol=1e-4, atol=1e-4)
    power = np.exp(wide - wide.max(-1, keepdims=True))
    got = call(softmax_kernel(5, width), target, x, shape=x.shape, dtype="float32")
    np.testing.assert_allclose(got, power / power.sum(-1, keepdims=True), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "exact", "relative", "absolute"),
    [
        ("exp", np.exp, 1.5e-7, 0.0),
        ("erf", np.vectorize(math.erf), 0.0, 4e-7),
        ("tanh", np.tanh, 0.0, 3e-7),
        ("sigmoid", lambda v: 1 / (1 + np.exp(-v)), 0.0, 3e-7),
    ],
)
def test_fast_functions_err_as_stated(name: str, exact: Any, relative: float, absolute: float) -> None:
    from tvm import te

    x = np.linspace(-30, 30, 100_001, dtype=np.float32)
    placeholder = te.placeholder(x.shape, "float32", "x")
    result = te.compute(x.shape, lambda i: getattr(fast, name)(placeholder[i]))
    function = te.create_prim_func([placeholder, result])
    got = call(function, tvm.target.Target(resolve_target("native")), x, shape=x.shape, dtype="float32").astype(
        np.float64
    )
    expected = exact(x.astype(np.float64))
    assert np.all(np.abs(got - expected) <= relative * np.abs(expected) + absolute)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gathered_elements_are_folded_whatever_their_number(axis: int) -> None:
    """BERT without token types gathers its position row; onnx's own evaluator fails above 64 columns."""
    data = np.arange(3 * 128, dtype=np.int64).reshape(3, 128)
    index = np.random.default_rng(0).integers(-3, 3, size=(2, 100), dtype=np.int64)
    expected = np.empty_like(index)
    for i in range(2):
        for j in range(100):
            expected[i, j] = data[index[i, j], j] if axis == 0 else data[i, index[i, j]]
    nodes = [
        helper.make_node("GatherElements", ["data", "index"], ["found"], axis=axis),
        helper.make_node("Add", ["x", "found"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [2, 100])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [2, 100])],
        [onnx.numpy_helper.from_array(data, "data"), onnx.numpy_helper.from_array(index, "index")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    fixed = fix_dimensions(model, {})
    assert [n.op_type for n in fixed.nodes] == ["Add"]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(fixed.constants["found"]), expected)


def test_shapes_are_folded_and_missing_sizes_are_named() -> None:
    shape = helper.make_node("Shape", ["x"], ["s"], "shape")
    gather = helper.make_node("Gather", ["s", "zero"], ["b"], "gather")
    concat = helper.make_node("Concat", ["b", "minus"], ["target"], "concat", axis=0)
    reshape = helper.make_node("Reshape", ["x", "target"], ["y"], "reshape")
    graph = helper.make_graph(
        [shape, gather, concat, reshape],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "rest"])],
        [
            onnx.numpy_helper.from_array(np.array([0], np.int64), "zero"),
            onnx.numpy_helper.from_array(np.array([-1], np.int64), "minus"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert dynamic_names(model) == ["batch", "sequence"]
    fixed = fix_dimensions(model, {"batch": 2, "sequence": 3})
    assert [n.op_type for n in fixed.nodes] == ["Reshape"]
    assert fixed.shapes["y"] == (2, 12)
    with pytest.raises(
        RecipeError, match=r"a dynamic dimension has no size.*batch, sequence.*shapes: \{sequence: 128\}"
    ):
        fix_dimensions(model, {"batch": 2})


def test_build_is_deterministic_small_and_described(tmp_path: Path) -> None:
    model = tmp_path / "common.onnx"
    onnx.save(linear_model(128, 192), model)
    artifacts = []
    for name in ("one", "two"):
        folder = tmp_path / name
        dialect = TARGET.dialect(model, folder, precision="w4a8")
        artifacts.append(TARGET.build(dialect, folder, precision="w4a8", options={"batch": [2, 1]}, progress=silent))
    one, two = (json.loads(a.path("description").read_text()) for a in artifacts)
    assert one["sha256"]["params.safetensors"] == two["sha256"]["params.safetensors"]
    assert {k: v for k, v in one.items() if k != "sha256"} == {k: v for k, v in two.items() if k != "sha256"}
    assert one["batches"] == [1, 2]
    assert one["ops"]["fc"]["storage"] == "int4, two a byte"
    from safetensors.numpy import load_file

    stored = load_file(artifacts[0].path("parameters"))
    quantized = sum(a.nbytes for name, a in stored.items() if name.startswith("fc::"))
    assert quantized <= 0.15 * 4 * 128 * 192
    assert one["disassembly"]["mnemonic"] in ("", "vpdpbusd")
    if one["disassembly"]["mnemonic"]:
        assert all(one["disassembly"]["kernels"].values())


def build_options(tmp_path: Path, options: dict[str, Any], model: onnx.ModelProto | None = None) -> Artifact:
    path = tmp_path / "model.onnx"
    onnx.save(model or linear_model(), path)
    return TARGET.build(path, tmp_path, precision="w4a8", options=options, progress=silent)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batches": 2}, "unknown option 'batches' for TVM. Expected: any of batch, shapes, device"),
        ({"batch": 0}, "at least 1. Found: 0"),
        ({"batch": []}, "at least 1. Found: none"),
        ({"shapes": {"sequence": "x"}}, "at least 1. Found: 'x'"),
        ({"device": "opencl"}, "unknown device 'opencl' for TVM"),
        ({"device": "llvm -mpcu=x"}, "unknown device 'llvm -mpcu=x' for TVM"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text.replace("(", r"\(")):
        build_options(tmp_path, options)


def test_an_operator_that_cannot_be_compiled_is_named(tmp_path: Path) -> None:
    model = linear_model()
    model.graph.node[-1].CopyFrom(helper.make_node("StringNormalizer", ["product"], ["y"], "odd"))
    with pytest.raises(UnsupportedError, match=r"odd"):
        build_options(tmp_path, {}, model)


def test_a_quantizer_with_computed_scale_is_refused_by_name(tmp_path: Path) -> None:
    model = linear_model()
    model.graph.node.insert(0, helper.make_node("Abs", ["x_scale"], ["computed"], "abs"))
    model.graph.node[1].input[1] = "computed"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match=r"quantizers that TVM cannot express.*fc\.input\.quantize"):
        TARGET.dialect(tmp_path / "m.onnx", tmp_path / "out", precision="w4a8")
    (tmp_path / "bad.onnx").write_bytes(b"no onnx")
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        TARGET.dialect(tmp_path / "bad.onnx", tmp_path / "out", precision="w4a8")


def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(linear_model(second="sequence"), tmp_path / "m.onnx")
    arguments = [str(tmp_path / "m.onnx"), str(tmp_path / "out")]
    assert to_tvm.main(arguments) == 2
    assert "a dynamic dimension has no size" in capsys.readouterr().err
    assert to_tvm.main([*arguments, "--shape", "sequence=3", "--batch", "2"]) == 0
    assert "batch sizes [2]" in capsys.readouterr().out
    assert to_tvm.main([*arguments, "--shape", "sequence"]) == 2
    assert "NAME=SIZE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        to_tvm.main(["--help"])
    assert "vm = tvm.runtime.vm.VirtualMachine" in capsys.readouterr().out

"""Kernels with epilogues against numpy, the layouts they read and write, and which nodes become one kernel."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_deploy.qgraph import contractions

tvm = pytest.importorskip("tvm")

from common_graphs import Common  # noqa: E402

from s2d_deploy.export._tvm_attention import panels_kernel, scores_kernel  # noqa: E402, TID251
from s2d_deploy.export._tvm_epilogue import Epilogue, Place, Step  # noqa: E402, TID251
from s2d_deploy.export._tvm_fusion import find_units, strides_of  # noqa: E402, TID251
from s2d_deploy.export._tvm_import import _live  # noqa: E402, TID251
from s2d_deploy.export._tvm_integer import integer_kernel, row_sums_kernel  # noqa: E402, TID251
from s2d_deploy.export._tvm_isa import isa_of, required_features, resolve_target  # noqa: E402, TID251
from s2d_deploy.export._tvm_kernels import Geometry  # noqa: E402, TID251
from s2d_deploy.export._tvm_panels import Panels, panel_width  # noqa: E402, TID251
from s2d_deploy.export._tvm_products import lower_product, token_operands  # noqa: E402, TID251
from s2d_deploy.export._tvm_static import fix_dimensions  # noqa: E402, TID251
from s2d_deploy.runtimes._cpu_features import missing_features  # noqa: E402, TID251

DEVICES = [
    "llvm -mcpu=x86-64-v4 -mattr=+avx512vnni",
    "llvm -mcpu=x86-64-v3 -mattr=+avxvnni",
    "llvm -mcpu=x86-64-v3",
    "llvm",
]
VALUE, OPERAND = "value", "operand"


def target_of(device: str) -> Any:
    target = tvm.target.Target(resolve_target(device))
    if missing_features(required_features(target)):
        pytest.skip("this processor cannot run it")
    return target


def call(kernel: Any, target: Any, *arrays: np.ndarray) -> None:
    """Compile and run; the last arrays are written to."""
    library = tvm.compile(tvm.IRModule({"f": kernel.with_attr("global_symbol", "f")}), target=target)
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    library["f"](*tensors)
    for array, tensor in zip(arrays, tensors, strict=True):
        array[...] = tensor.numpy()


def near_a_boundary(x: np.ndarray) -> np.ndarray:
    """Whether a quotient lies so near the middle of two codes that FP32 may fall to either side."""
    return np.abs(np.abs(x - np.trunc(x)) - 0.5) < 1e-4 * np.maximum(np.abs(x), 1)


@pytest.mark.parametrize("device", DEVICES)
@given(st.integers(1, 9), st.integers(1, 33), st.integers(1, 70), st.sampled_from([4, 8]), st.booleans())
@settings(max_examples=4, deadline=None)
def test_product_bias_gelu_residual_and_quantizer(device: str, m: int, k: int, n: int, bits: int, signed: bool) -> None:
    target = target_of(device)
    isa = isa_of(target)
    rng = np.random.default_rng(m * k * n)
    panels = Panels(k, n, panel_width(n, isa.widths), isa.group, bits)
    a = rng.integers(0, 256, (m, panels.depth)).astype(np.uint8)
    b = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (1, k, n)).astype(np.int8)
    scale, bias = rng.uniform(1e-4, 1e-3, n).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    step = np.float32(0.21)
    low, high, zero, offset = (-8, 7, 1, 128) if signed else (0, 15, 3, 0)
    row, column, whole = Place((), (0, 0, 0, 0)), Place((n,), (0, 0, 0, 1)), (0, 0, n, 1)
    epilogue = Epilogue(
        (column, column, Place((m, n), whole), row),
        (
            Step("Mul", ((VALUE, 0), (OPERAND, 0))),
            Step("Add", ((VALUE, 1), (OPERAND, 1))),
            Step("Gelu", ((VALUE, 2),)),
            Step("Add", ((OPERAND, 2), (VALUE, 3))),
            Step("quantize", ((VALUE, 4), (OPERAND, 3)), low, high, zero, offset),
        ),
        ((4, Place((m, n), whole)), (5, Place((m, n), whole, "uint8"))),
    )
    left = Place((m, panels.depth), (0, 0, panels.depth, 0), "uint8")
    kernel = integer_kernel(isa, Geometry((1, 1), m, left, panels, 128), epilogue)
    floats, codes = np.zeros((m, n), np.float32), np.zeros((m, n), np.uint8)
    call(kernel, target, a, panels.pack(b), scale, bias, residual, np.array(step), floats, codes)
    x = ((a[:, :k].astype(np.int64) - 128) @ b[0].astype(np.int64)) * scale.astype(np.float64) + bias
    x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) + residual
    np.testing.assert_allclose(floats, x, rtol=2e-5, atol=2e-5)
    expected = np.clip(np.rint(x / step) + zero, low, high) + offset
    clear = ~near_a_boundary(x / step)
    np.testing.assert_array_equal(codes[clear], expected[clear])


@pytest.mark.parametrize("device", DEVICES)
@given(
    st.integers(1, 9), st.integers(1, 4), st.sampled_from([8, 32, 40]), st.integers(1, 70), st.sampled_from([4, 8]),
    st.sampled_from(["none", "columns", "one"]),
)  # fmt: skip
@settings(max_examples=4, deadline=None)
def test_blocks_of_k_and_zero_points_of_the_right_operand(
    device: str, m: int, blocks: int, k: int, n: int, bits: int, factors: Any
) -> None:
    """sum over blocks of scale * sum_k (a - zero) * (b + factor), the integers exactly, for every instruction set."""
    target = target_of(device)
    isa = isa_of(target)
    rng = np.random.default_rng(m * k * n + blocks)
    panels = Panels(k, n, panel_width(n, isa.widths), isa.group, bits)
    a = rng.integers(0, 256, (m, blocks * k)).astype(np.uint8)
    b = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (blocks, k, n)).astype(np.int8)
    scales = rng.uniform(1e-4, 1e-3, (blocks, n)).astype(np.float32)
    factor = 5 if factors == "one" else 0
    table = rng.integers(-128, 129, (blocks, n)).astype(np.int32)
    left = Place(a.shape, (0, 0, blocks * k, 0), "uint8")
    geometry = Geometry((1, 1), m, left, panels, 131, blocks, factors, factor)
    sums = np.full((1, blocks, m), 9, np.int32)
    call(row_sums_kernel(isa, geometry), target, a, sums)
    rows = a.reshape(m, blocks, k).astype(np.int64) - 131
    np.testing.assert_array_equal(sums[0], rows.sum(2).T)
    shift = {"none": np.zeros_like(table), "columns": table, "one": np.full_like(table, factor)}[factors]
    exact = np.einsum("mjk,jkn->jmn", rows, b.astype(np.int64) + shift[:, None])
    given = {"sums": sums, "factors": table, "scales": scales}
    extra = [given[name] for name, _, _ in geometry.extra]
    whole = (0, 0, n, 1)
    if blocks == 1:
        out = np.zeros((m, n), np.int32)
        epilogue = Epilogue(outputs=((-1, Place((m, n), whole, "int32")),))
        call(integer_kernel(isa, geometry, epilogue), target, a, panels.pack(b), *extra, out)
        np.testing.assert_array_equal(out, exact[0])
        return
    found = np.zeros((m, n), np.float32)
    epilogue = Epilogue(outputs=((0, Place((m, n), whole)),))
    call(integer_kernel(isa, geometry, epilogue), target, a, panels.pack(b), *extra, found)
    expected = np.zeros((m, n), np.float32)
    for block in range(blocks):
        expected = expected + exact[block].astype(np.float32) * scales[block]
    # In this order, but a processor may add and multiply in one rounding.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * float(np.abs(exact).max() * scales.max()))


@pytest.mark.parametrize("device", DEVICES[:2])
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 8), st.integers(1, 9), st.sampled_from([16, 24, 32]))
@settings(max_examples=4, deadline=None)
def test_heads_are_read_and_written_in_place(device: str, outer: int, heads: int, m: int, k: int, n: int) -> None:
    """(outer, row, head, k) in, (outer, row, head, n) out: no transpose anywhere."""
    target = target_of(device)
    isa = isa_of(target)
    rng = np.random.default_rng(m * k * n)
    panels = Panels(k, n, panel_width(n, isa.widths), isa.group, 8)
    d = panels.depth
    a = rng.integers(0, 256, (outer, m, heads, d)).astype(np.uint8)
    b = rng.integers(-128, 128, (outer * heads, k, n)).astype(np.int8)
    left = Place(a.shape, (m * heads * d, d, heads * d, 0), "uint8")
    place = Place((outer, m, heads, n), (m * heads * n, n, heads * n, 1), "int32")
    kernel = integer_kernel(isa, Geometry((outer, heads), m, left, panels, 7), Epilogue(outputs=((-1, place),)))
    out = np.zeros(place.shape, np.int32)
    call(kernel, target, a, panels.pack(b), out)
    expected = np.einsum("omhk,ohkn->omhn", a[..., :k].astype(np.int64) - 7, b.reshape(outer, heads, k, n))
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize(("k", "n"), [(8, 16), (7, 48), (12, 20), (64, 197), (197, 64)])
def test_panels_of_an_activation(device: str, layout: str, k: int, n: int) -> None:
    target = target_of(device)
    isa = isa_of(target)
    panels = Panels(k, n, panel_width(n, isa.widths), isa.group, 8)
    codes = np.random.default_rng(k * n).integers(-128, 128, (2, 3, k, n)).astype(np.int8)
    stored = {"rows": codes, "columns": codes.transpose(0, 1, 3, 2), "neither": codes.transpose(2, 3, 0, 1)}[layout]
    raw = np.ascontiguousarray(stored.astype(np.int16) + 128).astype(np.uint8)
    places = np.arange(raw.size).reshape(raw.shape)
    logical = {"rows": places, "columns": places.transpose(0, 1, 3, 2), "neither": places.transpose(2, 3, 0, 1)}[layout]
    strides = strides_of(logical)
    assert strides is not None
    source = Place(raw.shape, (strides[0], strides[1], strides[2], strides[3]), "uint8")
    out = np.full((6, *panels.shape), 99, np.int8)
    call(panels_kernel(isa, (2, 3), panels, source, 128), target, raw, out)
    np.testing.assert_array_equal(out, panels.pack(codes.reshape(6, k, n)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "keys", "depth"), [(5, 5, 8), (7, 16, 8), (13, 37, 32), (3, 130, 64)])
def test_scores_are_masked_softmaxed_and_quantized(device: str, rows: int, keys: int, depth: int) -> None:
    target = target_of(device)
    isa = isa_of(target)
    rng = np.random.default_rng(rows * keys)
    outer, heads = 2, 3
    panels = Panels(depth, keys, panel_width(keys, isa.widths), isa.group, 8)
    q = rng.integers(0, 256, (outer, heads, rows, depth)).astype(np.uint8)
    k = rng.integers(-8, 8, (outer * heads, depth, keys)).astype(np.int8)
    scale = np.full((1, keys), 1e-3, np.float32)
    mask = np.where(rng.random((outer, 1, 1, keys)) < 0.2, -1e9, 0).astype(np.float32)
    left = Place(q.shape, (heads * rows * depth, rows * depth, depth, 0), "uint8")
    steps = (
        Step("Mul", ((VALUE, 0), (OPERAND, 0))),
        Step("Mul", ((VALUE, 1), ("constant", 0.5))),
        Step("Add", ((VALUE, 2), (OPERAND, 1))),
    )
    operands = (Place((1, keys), (0, 0, 0, 1)), Place(mask.shape, (keys, 0, 0, 1)))
    code = Step("quantize", (), 0, 15, 0, 0)
    padded = -(-keys // 8) * 8
    geometry = Geometry((outer, heads), rows, left, panels, 128)
    kernel = scores_kernel(isa, geometry, Epilogue(operands, steps, ()), code, padded)
    out = np.full((outer * heads, rows, padded), 77, np.uint8)
    step = np.float32(0.004)
    call(kernel, target, q, panels.pack(k), scale, mask, np.array(step), out)
    x = np.einsum("ohmk,ohkn->ohmn", q.astype(np.float64) - 128, k.reshape(outer, heads, depth, keys).astype(float))
    x = x * np.float64(np.float32(1e-3)) * 0.5 + mask
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    clear = ~near_a_boundary(p / step)
    got = out[..., :keys].reshape(p.shape)
    np.testing.assert_array_equal(got[clear], np.clip(np.rint(p / step), 0, 15)[clear])
    assert clear.mean() > 0.9
    assert not out[..., keys:].any()


@given(st.permutations(range(4)), st.tuples(*[st.integers(1, 4)] * 4))
def test_strides_describe_every_permuted_array(order: list[int], shape: tuple[int, ...]) -> None:
    places = np.arange(math.prod(shape)).reshape(shape).transpose(order)
    strides = strides_of(places)
    assert strides is not None
    for index in np.ndindex(places.shape):
        assert sum(i * s for i, s in zip(index, strides, strict=True)) == places[index]


def test_places_that_no_strides_describe() -> None:
    heads = np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2).reshape(3, 8)  # two runs of four, far apart
    assert strides_of(heads) is None


# Which nodes become one kernel


def block(
    tokens: int = 5, width: int = 16, heads: int = 2, *, also: str = "", zeros: bool = False, blocks: int = 1
) -> onnx.ModelProto:
    """LayerNorm, attention with mask, residual, in the common form.

    Args:
        tokens, width, heads: sizes.
        also: a value that is an output, too.
        zeros: all grids have zero points, and activations are unsigned.
        blocks: of K with a scale of their own.
    """
    rng = np.random.default_rng(0)
    g, head = Common("w4a4", x=(tokens, width)), width // heads
    vector = [g.constant(n, rng.standard_normal(width).astype(np.float32)) for n in ("gamma", "beta")]
    normal = g.add("LayerNormalization", ["x", *vector], "normal", epsilon=1e-5)

    def quantized(source: str, site: str, scale: float) -> str:
        return (
            g.activation(source, site, "UINT8", scale / 8, 117) if zeros else g.activation(source, site, "INT4", scale)
        )

    value = quantized(normal, "in", 0.3)

    def linear(source: str, name: str) -> str:
        codes = rng.integers(-7, 8, (width, width))
        shape = (width,) if blocks == 1 else (blocks, width)
        more = {"axis": 1} if blocks == 1 else {"axis": 0, "block_size": width // blocks}
        points = rng.integers(-3, 4, shape) if zeros else None
        weight = g.weight(f"{name}.weight", "INT4", codes, rng.uniform(0.05, 0.1, shape), points, **more)
        product = g.op("MatMul", name, [source, weight], "W4A4", tokens * width * width)
        bias = g.constant(f"{name}.bias", rng.standard_normal(width).astype(np.float32))
        return g.add("Add", [product, bias], f"{name}.sum")

    split = g.constant("split", np.array([0, tokens, heads, head], np.int64))
    joined = g.constant("joined", np.array([0, tokens, width], np.int64))

    def heads_of(name: str, perm: list[int]) -> str:
        parts = g.add("Reshape", [linear(value, name), split], f"{name}.parts")
        return quantized(g.add("Transpose", [parts], f"{name}.heads", perm=perm), f"{name}.out", 0.4)

    q, k, v = heads_of("q", [0, 2, 1, 3]), heads_of("k", [0, 2, 3, 1]), heads_of("v", [0, 2, 1, 3])
    scores = g.op("MatMul", "scores", [q, k], "W4A4", tokens * tokens * width)
    scaled = g.add("Mul", [scores, g.constant("c", np.float32(head**-0.5))], "scaled")
    mask = g.constant("mask", np.where(np.arange(tokens) < tokens - 1, 0, -1e4).astype(np.float32).reshape(1, 1, 1, -1))
    probs = g.add("Softmax", [g.add("Add", [scaled, mask], "masked")], "probs", axis=-1)
    mixed = g.op(
        "MatMul", "mix", [g.activation(probs, "probs.out", "UINT4", 1 / 15), v], "W4A4", tokens * tokens * width
    )
    together = g.add("Reshape", [g.add("Transpose", [mixed], "rows", perm=[0, 2, 1, 3]), joined], "together")
    out = linear(quantized(together, "o.in", 0.2), "o")
    g.add("Add", [out, "x"], "y")
    return g.model("y", *([also] if also else []))


def units(model: onnx.ModelProto, batch: int = 1) -> dict[str, list[str]]:
    """Op types of each unit, by the name of its first node."""
    graph = fix_dimensions(model, {"batch": batch})
    isa = isa_of(tvm.target.Target(resolve_target("native")))
    tokens = token_operands(graph)
    products = {c.node.name: lower_product(graph, c, tokens, isa, {}) for c in contractions(model)}
    found = find_units(graph, _live(graph, products), products, graph.outputs)
    return {unit.node.name: [n.op_type for n in unit.nodes] for unit in found}


@pytest.mark.parametrize(("batch", "zeros", "blocks"), [(1, False, 1), (3, False, 1), (1, True, 1), (2, True, 2)])
def test_a_block_is_seven_kernels(batch: int, zeros: bool, blocks: int) -> None:
    found = units(block(zeros=zeros, blocks=blocks), batch)
    moved = ["Reshape", "Transpose", "QuantizeLinear"]
    assert found == {
        "normal": ["LayerNormalization", "QuantizeLinear"],
        "q": ["MatMul", "Add", *moved],
        "k": ["MatMul", "Add", *moved],
        "v": ["MatMul", "Add", *moved],
        "scores": ["MatMul", "Mul", "Add", "Softmax", "QuantizeLinear"],
        "mix": ["MatMul", "Transpose", "Reshape", "QuantizeLinear"],
        "o": ["MatMul", "Add", "Add"],
    }


def test_a_value_that_is_wanted_ends_its_kernel() -> None:
    assert units(block(also="masked"))["scores"] == ["MatMul", "Mul", "Add"]
    assert units(block(also="rows"))["mix"] == ["MatMul"]
    assert units(block(also="normal"))["normal"] == ["LayerNormalization", "QuantizeLinear"]


def test_two_products_that_meet_in_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them takes the sum along, the other ends before it."""
    rng = np.random.default_rng(3)
    g = Common("w4a4", x=(5, 16))
    value = g.activation("x", "in", "INT4", 0.3)
    products = []
    for name in ("a", "b"):
        weight = g.weight(f"{name}.weight", "INT4", rng.integers(-7, 8, (16, 16)), rng.uniform(0.05, 0.1, 16), axis=1)
        products.append(g.op("MatMul", name, [value, weight], "W4A4", 5 * 256))
    g.add("Relu", [g.add("Add", products, "sum")], "y")
    path = tmp_path / "model.onnx"
    onnx.save(g.model("y"), path)
    assert sorted(units(onnx.load(path)).values()) == [["MatMul"], ["MatMul", "Add", "Relu"]]
    x = rng.standard_normal((2, 5, 16)).astype(np.float32)
    (_, y), (_, plain) = fused_and_not(path, {"x": x}, "y", monkeypatch)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-5)


def fused_and_not(
    model: Path, feeds: dict[str, np.ndarray], output: str, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Codes and output of `model` with fusion and without, built for the batch of `feeds`."""
    from s2d_deploy.export import _tvm_import  # noqa: TID251
    from s2d_deploy.registry import load_runtime, load_target

    target, runtime = load_target("tvm"), load_runtime("tvm")
    options = target.shape_options([next(iter(feeds.values())).shape[0]], {})
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(_tvm_import, "find_units", lambda *_: [])
        folder = model.parent / f"fused-{fused}"
        folder.mkdir()
        artifact = target.build(model, folder, precision="w4a4", options=options, progress=lambda _: None)
        with runtime.open(artifact, threads=2) as session:
            results.append((session.codes(feeds), session.run(feeds)[output]))
    return results


@pytest.mark.parametrize(
    ("batch", "zeros", "blocks"), [(1, False, 1), (3, False, 1), (3, True, 1), (1, False, 2), (2, True, 2)]
)
def test_fused_kernels_compute_what_single_operators_do(
    batch: int, zeros: bool, blocks: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes at every site and the output, with and without fusion."""
    model = tmp_path / "model.onnx"
    onnx.save(block(zeros=zeros, blocks=blocks), model)
    x = np.random.default_rng(1).standard_normal((batch, 5, 16)).astype(np.float32)
    (codes, y), (plain_codes, plain_y) = fused_and_not(model, {"x": x}, "y", monkeypatch)
    assert set(codes) == {"in", "q.out", "k.out", "v.out", "probs.out", "o.in"}
    for site, found in codes.items():
        assert found.dtype == plain_codes[site].dtype
        np.testing.assert_array_equal(found, plain_codes[site], err_msg=site)
    np.testing.assert_allclose(y, plain_y, rtol=1e-5, atol=1e-5)


def test_scales_of_each_token_are_part_of_the_kernel(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A BERT with run-time scales: every projection is one kernel, and computes what single operators do."""
    import tiny_quantized as tiny

    from s2d_deploy.registry import load_exporter

    quantized, context, _ = tiny.run("bert", "w4a4", [], activation_granularity="token")
    batch = next(iter(context.batches()))
    path = tmp_path / "model.onnx"
    load_exporter()(quantized.model, quantized.plan, batch, ["last_hidden_state"], path, dynamic={})
    model = onnx.load(path)
    sizes = {"batch": next(iter(batch.values())).shape[0]}
    graph = fix_dimensions(model, sizes)
    isa = isa_of(tvm.target.Target(resolve_target("native")))
    tokens = token_operands(graph)
    products = {c.node.name: lower_product(graph, c, tokens, isa, {}) for c in contractions(model)}
    found = find_units(graph, _live(graph, products), products, graph.outputs)
    scaled = [u for u in found if u.kind == "tail" and products[u.node.name][0].token_scale]
    assert len(scaled) == 12
    assert all(unit.steps[0].op == "Mul" and unit.operands[0][1].strides == (0, 0, 1, 0) for unit in scaled)
    feeds = {name: value.numpy() for name, value in batch.items()}
    (_, y), (_, plain_y) = fused_and_not(path, feeds, "last_hidden_state", monkeypatch)
    np.testing.assert_allclose(y, plain_y, rtol=1e-4, atol=1e-4)

"""TensorRT's dialect beyond INT8: NVFP4, a float part in 16 bits, INT4 blocks beside it, attention as one kernel."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from s2d_deploy import load_target
from s2d_deploy.attention import use_visible_attention
from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.errors import UnsupportedError
from s2d_deploy.plan import Plan
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.registry import load_exporter

attention = import_module("s2d_deploy.export._trt_attention")
compute = import_module("s2d_deploy.export._trt_compute")
files = import_module("s2d_deploy.export._trt_files")
fp4 = import_module("s2d_deploy.export._trt_fp4")
package = import_module("s2d_deploy.runtimes._trt_package")
script = import_module("s2d_deploy.export.to_tensorrt")
TARGET = load_target("tensorrt")
needs_tensorrt = pytest.mark.skipif(not package.installed(), reason=f"TensorRT is not installed ({package.INSTALL})")


@cache
def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
    module = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=16, **shape))
    use_visible_attention(module)
    return module.eval()


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


@cache
def common(precision: str, **config: object) -> Path:
    """The common file of a one-layer ViT."""
    import tempfile

    folder, model, batch = Path(tempfile.mkdtemp()), vit(), images()
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, "logits")
    if precision == "fp32":
        plan = Plan("fp32", dict(ops))
    else:
        plan = build_plan(model, ops, calibrate(model, ops, [batch]), precision, QuantizeConfig(**config))  # type: ignore[arg-type]
    load_exporter()(model, plan, {n: t[:2] for n, t in batch.items()}, ["logits"], folder / "model.onnx")
    return folder / "model.onnx"


def dialect(precision: str, folder: Path, **config: object) -> Path:
    return TARGET.dialect(common(precision, **config), folder, precision=precision)


@cache
def built(precision: str, capability: str = "8.6", **options: object):
    import tempfile

    folder = Path(tempfile.mkdtemp())
    return TARGET.build(
        dialect(precision, folder),
        folder,
        precision=precision,
        options={"compute_capabilities": capability.split(), **options},
        progress=lambda _: None,
    )


def run(model: onnx.ModelProto) -> np.ndarray:
    (logits,) = ReferenceEvaluator(model).run(None, {n: t.numpy() for n, t in images().items()})
    return logits


# ---- NVFP4 -----------------------------------------------------------------------------------------------------


def test_nvfp4_becomes_tensorrts_operator_and_keeps_every_code(tmp_path: Path) -> None:
    source, result = onnx.load(common("nvfp4")), onnx.load(dialect("nvfp4", tmp_path))
    quantizers = [n for n in result.graph.node if n.op_type == fp4.OPERATOR]
    assert len(quantizers) == 5  # q, k and v share one; o, fc1, fc2, classifier
    for node in quantizers:
        assert node.domain == "trt"
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert values == {"axis": -1, "block_size": 16, "scale_type": TensorProto.FLOAT8E4M3FN}
    assert not result.functions
    assert {i.domain: i.version for i in result.opset_import} == {"": 23, "trt": 1}
    before = {t.name: t.SerializeToString() for t in source.graph.initializer}
    for tensor in result.graph.initializer:
        if fp4.is_fp4(tensor):
            assert tensor.SerializeToString() == before[tensor.name]


@needs_tensorrt
@pytest.mark.parametrize(("kind", "rest"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_nvfp4_is_multiplied_natively_on_blackwell(kind: str, rest: str) -> None:
    artifact = built("nvfp4", "8.6 12.0", compute=kind)
    assert artifact.info["compute_capabilities"] == ["12.0"]
    assert artifact.info["rung"] == "native"
    audit = artifact.info["audit"]
    assert {(op["declared"], op["precision"]) for op in audit["ops"]} == {("NVFP4", "nvfp4"), ("float", rest)}
    assert sum(op["declared"] == "NVFP4" for op in audit["ops"]) == 7
    assert any("built without 8.6: FP4 begins with Blackwell" in note for note in audit["notes"])
    # 4.5 bits a weight, and what the kernels pad the scales with.
    weights = sum(op["macs"] for op in audit["ops"] if op["declared"] == "NVFP4") / 17
    assert artifact.info["weight_size_bytes"] < 0.75 * weights


@needs_tensorrt
def test_gpus_without_fp4_are_refused_before_any_work(tmp_path: Path) -> None:
    path = dialect("nvfp4", tmp_path)
    options = {"compute_capabilities": ["8.6", "8.9"]}
    with pytest.raises(UnsupportedError, match=r"none of 8\.6, 8\.9 has FP4\. Expected: 12\.0 or 12\.1.*use w4a4"):
        TARGET.build(path, tmp_path, precision="nvfp4", options=options, progress=lambda _: None)


@pytest.mark.parametrize("value", [0.0, float("nan"), 1e-40, float("inf")])
def test_bad_fp4_scales_are_named(tmp_path: Path, value: float) -> None:
    model = onnx.load(common("nvfp4"))
    bad = "vit.layers.0.mlp.fc1.input.tensor_scale"
    for tensor in model.graph.initializer:
        if tensor.name == bad:
            tensor.CopyFrom(numpy_helper.from_array(np.float32(value), bad))
    onnx.save_model(model, tmp_path / "bad.onnx")
    with pytest.raises(UnsupportedError, match=rf"cannot express 1 NVFP4 quantizer\(s\)\.\n  {bad}: 1 scale\(s\)"):
        TARGET.dialect(tmp_path / "bad.onnx", tmp_path / "out", precision="nvfp4")


def test_four_dimensions_are_refused_by_site() -> None:
    graph = helper.make_graph(
        [helper.make_node(fp4.FUNCTION, ["x", "g"], ["q", "s"], domain="s2d", name="deep.input.quantize")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 3, 16])],
        [helper.make_tensor_value_info("q", TensorProto.FLOAT4E2M1, None)],
        [numpy_helper.from_array(np.float32(0.01), "g")],
    )
    with pytest.raises(UnsupportedError, match=r"deep\.input\.quantize: 4 dimensions, TensorRT takes 2 or 3"):
        fp4.to_tensorrt(helper.make_model(graph))


# ---- 16 bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "kind"), [("w4a16", "bf16"), ("w8a8", "fp16")])
def test_16_bits_compute_what_32_do_up_to_their_rounding(tmp_path: Path, precision: str, kind: str) -> None:
    path = dialect(precision, tmp_path)
    wanted = run(onnx.load(path))
    model = compute.to_compute(onnx.load(path), kind)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True))
    found = run(model)
    assert found.dtype == np.float32
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    if precision == "w8a8":  # roundings flip codes; that must cost less than having codes at all
        exact = run(onnx.load(common("fp32")))
        limit = np.linalg.norm(wanted - exact) / np.linalg.norm(exact)
    else:  # some roundings in a row
        limit = 4 * (2.0**-11 if kind == "fp16" else 2.0**-8)
    assert 0 < error < limit


def elements(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    return {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}


def test_quantizers_keep_fp32_scales_and_attention_has_no_casts(tmp_path: Path) -> None:
    model = compute.to_compute(onnx.load(dialect("w8a8", tmp_path)), "fp16")
    stored = {t.name: t for t in model.graph.initializer}
    types = elements(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert stored[node.input[1]].data_type == TensorProto.FLOAT
    makers = {o: n for n in model.graph.node for o in n.output}
    context = next(n for n in model.graph.node if n.name.endswith("attention.context"))
    behind, queue = set(), [context]
    while queue:
        node = queue.pop()
        if node.name.endswith("attention.scores"):
            continue
        behind.add(node.op_type)
        queue += [makers[v] for v in node.input[:1] if v in makers]
    assert "Softmax" in behind
    assert "Cast" not in behind
    # The residual stream: what an addition leaves for two readers.
    residual = [
        n.output[0] for n in model.graph.node if n.op_type == "Add" and types[n.output[0]] == TensorProto.FLOAT16
    ]
    assert len(residual) >= 2


def test_weight_only_blocks_get_16_bit_scales(tmp_path: Path) -> None:
    block = 128
    path = dialect("w4a16", tmp_path, block_size=block, skip=("*projection*",))
    model = compute.to_compute(onnx.load(path), "bf16")
    stored = {t.name: t for t in model.graph.initializer}
    found = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert len(found) == 7
    for node in found:
        assert stored[node.input[0]].data_type == TensorProto.INT4
        assert stored[node.input[1]].data_type == TensorProto.BFLOAT16
        assert {a.name: helper.get_attribute_value(a) for a in node.attribute} == {"axis": 0, "block_size": block}


@needs_tensorrt
def test_weight_only_layers_are_one_kernel_that_reads_int4() -> None:
    artifact = built("w4a16")
    assert artifact.info["compute"] == "fp16"  # "auto": A16 says 16 bits
    ops = {op["name"]: op for op in artifact.info["audit"]["ops"] if op["declared"] == "W4A16"}
    assert {(op["precision"], op["kernel"]) for op in ops.values()} == {("float16", "runtime_fusion")}
    assert artifact.info["rung"] == "weight-only"


def test_weights_that_fp16_cannot_hold_are_named(tmp_path: Path) -> None:
    path = dialect("fp32", tmp_path)
    model = onnx.load(path)
    name = "vit.layers.0.mlp.fc1.bias"
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.full(256, 7e4, np.float32), name))
    onnx.save_model(model, path)
    with pytest.raises(UnsupportedError, match=rf"stored values of 1 tensor\(s\)\..*{name}: 70000.*compute: bf16"):
        compute.to_compute(model, "fp16")
    compute.to_compute(onnx.load(path), "bf16")


def test_a_mask_of_minus_infinity_stays_a_mask() -> None:
    lowest = np.float32(np.finfo(np.float32).min)
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "mask"], ["masked"], name="add"),
            helper.make_node("Softmax", ["masked"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.array([0, lowest, -np.inf], np.float32), "mask")],
        value_info=[helper.make_tensor_value_info("masked", TensorProto.FLOAT, ["batch", 3])],
    )
    model = compute.to_compute(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), "fp16")
    (y,) = ReferenceEvaluator(model).run(None, {"x": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(y, np.float32([[1, 0, 0]] * 2))


# ---- attention -------------------------------------------------------------------------------------------------


def test_fused_attention_has_signed_probabilities_of_128_steps(tmp_path: Path) -> None:
    exact, model = (onnx.load(dialect("w8a8", tmp_path)) for _ in range(2))
    assert attention.fuse_attention(model) == ["vit.layers.0.attention.probs"]
    assert not [n.name for n in model.graph.node if ".shift." in n.name or ".shifted" in n.name]
    node = next(n for n in model.graph.node if n.name == "vit.layers.0.attention.probs.quantize")
    assert next(n for n in model.graph.node if node.input[0] in n.output).op_type == "Softmax"
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    before = {t.name: numpy_helper.to_array(t) for t in exact.graph.initializer}
    step = before[next(n for n in exact.graph.node if n.name.endswith("probs.quantize.units")).input[1]]
    np.testing.assert_allclose(stored[node.input[1]], step * 255 / 127, rtol=1e-6)
    wanted, found = run(exact), run(model)
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.02


@needs_tensorrt
@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_fused_attention_is_one_kernel_and_says_what_it_changed(kind: str) -> None:
    apart, fused = built("w8a8"), built("w8a8", attention="fused", compute=kind)
    kernels = [
        {op["kernel"] for op in a.info["audit"]["ops"] if op["name"].endswith((".scores", ".context"))}
        for a in (apart, fused)
    ]
    assert kernels[0] == {"gemm"}
    assert len(kernels[1]) == 1
    assert "mha" in kernels[1].pop()
    assert set(fused.info["audit"]["executed"]) == {"int8"}
    assert any("attention as one kernel: 1 site(s)" in note for note in fused.info["audit"]["notes"])
    document = json.loads(fused.path("description").read_text())
    assert document["compute"] == kind


@needs_tensorrt
def test_float_attention_in_fp16_is_one_kernel() -> None:
    ops = built("fp32", compute="fp16").info["audit"]["ops"]
    assert {op["precision"] for op in ops} == {"float16"}
    assert all("mha" in op["kernel"] for op in ops if op["name"].endswith((".scores", ".context")))


# ---- large files -----------------------------------------------------------------------------------------------


@needs_tensorrt
def test_weights_beside_the_file_build_the_same_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precision = "nvfp4"
    engines, types = [], []
    for name, limit in (("inside", 1 << 30), ("beside", 1 << 12)):
        monkeypatch.setattr(files, "EXTERNAL_BEYOND", limit)
        folder = tmp_path / name
        path = dialect(precision, folder)
        types.append({v.name: v.type.SerializeToString() for v in onnx.load(path).graph.value_info})
        assert (folder / "model.onnx.data").exists() == (name == "beside")
        for _ in range(2):  # what lies there is replaced, not added to
            artifact = TARGET.build(
                path,
                folder,
                precision=precision,
                options={"compute_capabilities": ["12.0"], "compress": False, "compute": "fp32"},
                progress=lambda _: None,
            )
        engines.append({k: artifact.info[k] for k in ("audit", "weight_size_bytes", "engine_bytes")})
    assert types[0] == types[1]
    # The engine's bytes differ in the numbers that TensorRT gives to its own layers.
    assert abs(engines[0].pop("engine_bytes") - engines[1].pop("engine_bytes")) < 4096
    assert engines[0] == engines[1]
    size = (tmp_path / "beside" / "model.onnx.data").stat().st_size
    assert size < 1.1 * (tmp_path / "inside" / "model.onnx").stat().st_size

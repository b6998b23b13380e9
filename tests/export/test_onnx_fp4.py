"""NVFP4 in the common ONNX file: onnx's own evaluator computes what the simulation does, code by code."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from s2d_deploy import formats, load_runtime, load_target
from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.errors import UnsupportedError
from s2d_deploy.fake_quant import FakeQuantizer
from s2d_deploy.grid import Grid, PerTokenBlock
from s2d_deploy.plan import Plan
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.registry import load_exporter
from s2d_deploy.simulation import simulate, weight_codes

fp4 = import_module("s2d_deploy.export._onnx_fp4")
GRID = Grid(4, format="e2m1", scale_format="e4m3", granularity=PerTokenBlock(16))
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Twins(nn.Module):
    """Two Linears on one input, which share its quantizer, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.last = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.nn.functional.gelu(self.left(x) * self.right(x)))  # type: ignore[no-any-return]


def exported(folder: Path, **config: object) -> tuple[onnx.ModelProto, nn.Module, Plan, Tensor]:
    torch.set_num_threads(1)
    model = Twins().eval()
    x = torch.randn(6, 5, 64, generator=torch.Generator().manual_seed(1))
    ops = discover(model, {"x": x[:1]})
    plan = build_plan(model, ops, calibrate(model, ops, [{"x": x}]), "nvfp4", QuantizeConfig(**config))  # type: ignore[arg-type]
    path = folder / "model.onnx"
    return load_exporter()(model, plan, {"x": x[:2]}, ["y"], path), model, plan, x


def evaluated(x: np.ndarray, tensor_scale: Tensor) -> list[np.ndarray]:
    """Codes, block scales and values that the file's own function gives for `x`."""
    nodes = [
        helper.make_node(fp4.OPERATOR, ["x", "g"], ["q", "s"], domain=fp4.DOMAIN),
        helper.make_node("DequantizeLinear", ["s", "g"], ["e"]),
        helper.make_node("DequantizeLinear", ["q", "e"], ["y"], axis=-1, block_size=16),
    ]
    shape = ["batch", *x.shape[1:]]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("q", TensorProto.FLOAT4E2M1, shape),
            helper.make_tensor_value_info("s", TensorProto.FLOAT8E4M3FN, None),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, shape),
        ],
        [numpy_helper.from_array(tensor_scale.numpy(), "g")],
    )
    imports = [helper.make_opsetid("", fp4.OPSET), helper.make_opsetid(fp4.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=[fp4.dynamic_quantize()], ir_version=11)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True))
    return ReferenceEvaluator(model).run(None, {"x": x})


@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_the_files_function_is_the_simulation_bit_for_bit(spread: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 7, 64)).astype(np.float32) * np.exp(spread * rng.normal(size=(4, 7, 1))).astype(np.float32)
    x[0, 0, :16] = 0
    x[0, 1] *= np.float32(1e-30)
    x[0, 2, 16:32] = np.float32(2.5) * np.repeat(np.float32([1, -1]), 8)  # ties
    of_tensor = formats.tensor_scale(torch.from_numpy(x).abs().max() / 2)  # some blocks saturate
    codes, scales, values = evaluated(x, of_tensor)
    quantizer = FakeQuantizer(GRID, tensor_scale=of_tensor)
    np.testing.assert_array_equal(values, quantizer(torch.from_numpy(x)).numpy())
    assert set(np.abs(codes.astype(np.float32)).ravel()) <= set(VALUES)
    # The slow, obvious scale of one block.
    for b, t, k in [(0, 0, 0), (0, 2, 1), (3, 6, 3)]:
        largest = np.abs(x[b, t, 16 * k : 16 * k + 16]).max()
        wanted = torch.tensor(max(min(largest / (6 * float(of_tensor)), 448), 2**-9)).to(torch.float8_e4m3fn)
        assert float(scales[b, t, k]) == (1.0 if largest == 0 else float(wanted))


def test_an_exported_model_computes_what_the_simulation_computes(tmp_path: Path) -> None:
    proto, model, plan, x = exported(tmp_path)
    assert {i.domain: i.version for i in proto.opset_import} == {"": 23, "s2d": 1}
    nodes = {n.name: n for n in proto.graph.node}
    assert [n.name for n in proto.graph.node if n.op_type == fp4.OPERATOR] == [
        "left.input.quantize",
        "last.input.quantize",
    ]
    shared = next(p.value for p in nodes["left.input.quantize"].metadata_props if p.key == "s2d.site")
    assert shared == "left.input,right.input"
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    simulated = simulate(model, plan).eval()
    for site, codes in weight_codes(simulated).items():
        found = stored[f"{site}.codes"].astype(np.float32)
        wanted = formats.decode(codes, plan.sites[site].grid).numpy().T
        np.testing.assert_array_equal(found, wanted)
        assert stored[f"{site}.block_scale"].shape == (found.shape[0] // 16, found.shape[1])
        effective = stored[f"{site}.block_scale"].astype(np.float32) * stored[f"{site}.tensor_scale"]
        np.testing.assert_array_equal(effective, plan.sites[site].scale.numpy().T)
    (found,) = ReferenceEvaluator(proto).run(None, {"x": x.numpy()})
    wanted = simulated(x=x).detach().numpy()
    # 64 products in each sum; a flipped code would be a step of some 5 % away.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=64 * np.finfo(np.float32).eps * np.abs(wanted).max())


def test_integers_and_fp4_stand_in_one_file(tmp_path: Path) -> None:
    proto, model, plan, x = exported(tmp_path, overrides={"last": "w8a8"})
    declared = {p.value for n in proto.graph.node for p in n.metadata_props if p.key == "s2d.declared"}
    assert declared == {"NVFP4", "W8A8"}
    (found,) = ReferenceEvaluator(proto).run(None, {"x": x.numpy()})
    wanted = simulate(model, plan).eval()(x=x).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", ["ort", "tvm"])
def test_targets_without_fp4_refuse_it_by_name(target: str, tmp_path: Path) -> None:
    exported(tmp_path)
    with pytest.raises(UnsupportedError, match=r"has no NVFP4\. .* Found: left\.input,right\.input, last\.input\."):
        load_target(target).dialect(tmp_path / "model.onnx", tmp_path / "out", precision="nvfp4")


def test_the_reference_runs_it_and_says_that_its_products_are_floats(tmp_path: Path) -> None:
    _, model, plan, x = exported(tmp_path)
    target = load_target("reference")
    path = target.dialect(tmp_path / "model.onnx", tmp_path / "out", precision="nvfp4")
    built = target.build(path, tmp_path / "out", precision="nvfp4", options={}, progress=lambda _: None)
    with load_runtime("reference").open(built, threads=1) as session:
        found = session.run({"x": x.numpy()})["y"]
        audit = session.audit()
    np.testing.assert_allclose(found, simulate(model, plan).eval()(x=x).detach().numpy(), rtol=0, atol=1e-5)
    assert (audit.rung, set(audit.executed)) == ("dequantized", {"float32"})
    assert load_runtime("reference").rung("nvfp4") == "dequantized"

"""Faults planted in built artifacts: tiny models, and the edits of their common ONNX files.

A fault is planted in the common file (or, where it says so, in ONNX Runtime's own), and the runtime's own target builds
the artifact from that, so the runtime executes the fault for real. The truth beside it names the causes that are right
and the layers where it lies; some faults have two names (an activation that the artifact does not quantize *is* a
fallback), and a scale that three layers share lies in three layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.plan import Plan
from s2d_deploy.probing import quantizer_sources
from s2d_deploy.qgraph import contractions, initializers, metadata
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.registry import load_exporter, load_runtime, load_target
from s2d_deploy.session import Artifact, Session
from s2d_deploy.simulation import simulate

OUTPUT = "last_hidden_state"
WIDTH, HIDDEN, HEADS = 32, 64, 4
BATCH = 4


@dataclass
class Tiny:
    """A tiny quantized model, and what its common ONNX file is.

    Attributes:
        module: the float model.
        plan: its quantization.
        simulated: the simulation.
        batch: samples.
        common: the pristine common model.
        sources: see `probing.quantizer_sources`.
        dynamic: dynamic dimensions beside the batch.
    """

    kind: str
    precision: str
    module: nn.Module
    plan: Plan
    simulated: nn.Module
    batch: dict[str, Tensor]
    common: onnx.ModelProto
    sources: dict[str, tuple[str, ...]]
    float_batches: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Other dynamic dimensions."""
        return {"sequence": self.batch["input_ids"].shape[1]} if self.kind == "bert" else {}


@dataclass(frozen=True)
class Truth:
    """What a plant is.

    Attributes:
        fault: its kind.
        causes: names that are right.
        layers: ops that are right; "*" and "input" as in `explain.Finding`.
        where: in words.
    """

    fault: str
    causes: frozenset[str]
    layers: frozenset[str]
    where: str


def module_of(kind: str, seed: int, layers: int = 3) -> nn.Module:
    """A float model with biases that are not zero."""
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": HIDDEN,
        "initializer_range": 0.3,
    }
    module: Any
    if kind == "vit":
        module = ViTModel(ViTConfig(image_size=16, patch_size=4, **common), add_pooling_layer=False)
    else:
        module = BertModel(BertConfig(vocab_size=64, max_position_embeddings=16, **common), add_pooling_layer=False)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None:
                layer.bias.normal_(0.0, 0.3)
            if isinstance(layer, nn.LayerNorm):
                layer.weight.add_(0.2 * torch.randn_like(layer.weight))
    found: nn.Module = module.eval()
    return found


def batches_of(kind: str, seed: int, count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of `BATCH` samples; half of the texts end in padding."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return [{"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator) + 0.2} for _ in range(count)]
    mask = torch.ones(BATCH, 10, dtype=torch.long)
    mask[::2, 8:] = 0
    return [
        {"input_ids": torch.randint(1, 63, (BATCH, 10), generator=generator), "attention_mask": mask.clone()}
        for _ in range(count)
    ]


def tiny(kind: str, precision: str, folder: Path, seed: int = 0, calibration_seed: int = 1) -> Tiny:
    """Make a tiny quantized model and its common file in `folder`."""
    module, batches = module_of(kind, seed), batches_of(kind, calibration_seed)
    ops = discover(module, {n: t[:1] for n, t in batches[0].items()}, OUTPUT)
    plan = build_plan(module, ops, calibrate(module, ops, batches), precision, QuantizeConfig())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    batch = batches_of(kind, 7, 1)[0]
    dynamic = {name: {1: "sequence"} for name in batch} if kind == "bert" else {}
    load_exporter()(module, plan, batch, [OUTPUT], path, dynamic=dynamic)
    simulated = simulate(module, plan).eval()
    return Tiny(kind, precision, module, plan, simulated, batch, onnx.load(path), quantizer_sources(path))


def build(model: onnx.ModelProto, case: Tiny, target: str, folder: Path) -> Artifact:
    """The artifact of `model` for a target."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, folder / "common.onnx")
    exporter = load_target(target)
    out = folder / target
    dialect = exporter.dialect(folder / "common.onnx", out, precision=case.precision)
    options = exporter.shape_options([BATCH], case.sizes)
    return exporter.build(dialect, out, precision=case.precision, options=options, progress=lambda _text: None)


def opened(artifact: Artifact) -> Session:
    """Its session, on one thread."""
    return load_runtime(artifact.target).open(artifact, threads=1)  # type: ignore[return-value]


# ---- editing ------------------------------------------------------------------------------------------------


class Edit:
    """A copy of a common model with handles to its parts."""

    def __init__(self, case: Tiny, rng: np.random.Generator) -> None:
        self.case, self.rng, self.plan = case, rng, case.plan
        self.model = onnx.ModelProto()
        self.model.CopyFrom(case.common)
        self.nodes = self.model.graph.node
        self.stored = initializers(self.model)
        self.count = 0

    def quantizer(self, site: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
        """The Q and DQ nodes of an activation site."""
        q = next(n for n in self.nodes if n.op_type == "QuantizeLinear" and site in sites_of(n))
        dq = next(n for n in self.nodes if n.op_type == "DequantizeLinear" and n.input[0] == q.output[0])
        return q, dq

    def weight(self, op: str) -> onnx.NodeProto:
        """The DequantizeLinear of a weight."""
        return next(n for n in self.nodes if n.op_type == "DequantizeLinear" and f"{op}.weight" in sites_of(n))

    def product(self, op: str) -> onnx.NodeProto:
        """The contraction."""
        return next(n for n in self.nodes if metadata(n).get("s2d.op", "") == op)

    def array(self, name: str) -> Any:
        """A stored tensor."""
        return numpy_helper.to_array(self.stored[name])

    def constant(self, value: Any) -> str:
        """Store a tensor under a new name."""
        self.count += 1
        name = f"planted.{self.count}"
        tensor = numpy_helper.from_array(np.asarray(value), name)
        self.model.graph.initializer.append(tensor)
        self.stored[name] = self.model.graph.initializer[-1]
        return name

    def before(self, node: onnx.NodeProto, *new: onnx.NodeProto) -> None:
        """Insert nodes in front of one."""
        at = list(self.nodes).index(node)
        for i, made in enumerate(new):
            self.nodes.insert(at + i, made)

    def behind(self, node: onnx.NodeProto, make: Callable[[str, str], list[onnx.NodeProto]]) -> None:
        """Put nodes between a node and its readers: ``make(its new output, the old name)``."""
        old = node.output[0]
        node.output[0] = f"{old}.planted"
        at = list(self.nodes).index(node) + 1
        for i, made in enumerate(make(node.output[0], old)):
            self.nodes.insert(at + i, made)

    def choice(self, names: list[str]) -> str:
        """One of them."""
        return str(names[int(self.rng.integers(len(names)))])

    def activation(self) -> str:
        """A random activation site."""
        return self.choice([n for n, s in self.plan.sites.items() if s.role != "weight"])

    def linear(self, *, square: bool = False) -> str:
        """A random Linear."""
        names = [n for n, op in self.plan.ops.items() if op.kind == "linear" and (not square or op.k == op.n)]
        return self.choice(names)

    def readers(self, site: str) -> frozenset[str]:
        """Ops that read the quantizer of `site`, and the op in front of it does not count."""
        q, _ = self.quantizer(site)
        return frozenset(self.plan.sites[s].op for s in sites_of(q))

    def makers(self, site: str) -> frozenset[str]:
        """The product right in front of an attention operand or a context's reader, where only layout lies between."""
        role, op = self.plan.sites[site].role, self.plan.sites[site].op
        stem = op.rpartition(".")[0]
        if role in ("query", "key", "value"):
            short = {"query": ("q_proj", "query"), "key": ("k_proj", "key"), "value": ("v_proj", "value")}[role]
            return frozenset(o for o in self.plan.ops if o.startswith(stem) and o.rpartition(".")[2] in short)
        return frozenset()


def sites_of(node: onnx.NodeProto) -> list[str]:
    """Sites of a Q or DQ node."""
    return metadata(node).get("s2d.site", "").split(",")


def _factor(rng: np.random.Generator) -> float:
    value = float(rng.uniform(1.25, 2.0))
    return value if rng.random() < 0.5 else 1.0 / value


Planted = tuple[onnx.ModelProto, Truth]


def scale_of_quantizer(edit: Edit) -> Planted:
    """QuantizeLinear divides by another scale than DequantizeLinear multiplies by."""
    site, factor = edit.activation(), _factor(edit.rng)
    q, _ = edit.quantizer(site)
    q.input[1] = edit.constant(np.float32(edit.array(q.input[1]) * factor))
    return _done(edit, "wrong scale: quantizer", {"wrong-scale"}, edit.readers(site), f"{site} times {factor:.3f}")


def scale_of_rescale(edit: Edit) -> Planted:
    """DequantizeLinear multiplies by another scale."""
    site, factor = edit.activation(), _factor(edit.rng)
    _, dq = edit.quantizer(site)
    dq.input[1] = edit.constant(np.float32(edit.array(dq.input[1]) * factor))
    return _done(edit, "wrong scale: rescale", {"wrong-scale"}, edit.readers(site), f"{site} times {factor:.3f}")


def scale_of_both(edit: Edit) -> Planted:
    """A scale that another calibration chose."""
    site, factor = edit.activation(), _factor(edit.rng)
    q, dq = edit.quantizer(site)
    q.input[1] = dq.input[1] = edit.constant(np.float32(edit.array(q.input[1]) * factor))
    return _done(edit, "wrong scale: site", {"wrong-scale"}, edit.readers(site), f"{site} times {factor:.3f}")


def scale_of_channel(edit: Edit) -> Planted:
    """One output channel of a weight has another scale."""
    op, factor = edit.linear(), float(edit.rng.uniform(1.6, 3.0))
    dq = edit.weight(op)
    scale = np.array(edit.array(dq.input[1]))
    i = int(edit.rng.integers(scale.size))
    scale[i] *= np.float32(factor)
    dq.input[1] = edit.constant(scale)
    return _done(edit, "wrong scale: weight channel", {"wrong-scale"}, {op}, f"{op} channel {i} times {factor:.3f}")


def scale_of_weight(edit: Edit) -> Planted:
    """All scales of a weight are off by a factor."""
    op, factor = edit.linear(), _factor(edit.rng)
    dq = edit.weight(op)
    dq.input[1] = edit.constant((edit.array(dq.input[1]) * factor).astype(np.float32))
    return _done(edit, "wrong scale: weight", {"wrong-scale"}, {op}, f"{op} times {factor:.3f}")


def _shifted_zero(edit: Edit, name: str) -> tuple[str, int]:
    zero = edit.array(name)
    shift = int(edit.rng.choice([-2, -1, 1, 2]))
    wide = int(zero.astype(np.int32)) + shift
    info = (0, 255) if zero.dtype.name == "uint8" else (0, 15) if zero.dtype.name == "uint4" else (-8, 7)
    if not info[0] <= wide <= info[1]:
        wide = int(zero.astype(np.int32)) - shift
        shift = -shift
    return edit.constant(np.asarray(wide).astype(zero.dtype)), shift


def zero_of_quantizer(edit: Edit) -> Planted:
    """QuantizeLinear adds another zero point than DequantizeLinear takes away."""
    site = edit.activation()
    q, _ = edit.quantizer(site)
    q.input[2], shift = _shifted_zero(edit, q.input[2])
    return _done(edit, "wrong zero point: quantizer", {"wrong-zero-point"}, edit.readers(site), f"{site} {shift:+d}")


def zero_of_kernel(edit: Edit) -> Planted:
    """The product takes another zero point away than was added."""
    site = edit.activation()
    _, dq = edit.quantizer(site)
    dq.input[2], shift = _shifted_zero(edit, dq.input[2])
    return _done(edit, "wrong zero point: kernel", {"wrong-zero-point"}, edit.readers(site), f"{site} {shift:+d}")


def half_away(edit: Edit, site: str | None = None) -> Planted:
    """The quantizer rounds half away from zero."""
    site = site or edit.activation()
    q, _ = edit.quantizer(site)
    x, scale = q.input[0], q.input[1]
    base = f"{q.name}.planted"
    half, one = edit.constant(np.float32(0.5)), edit.constant(np.float32(1.0))
    edit.before(
        q,
        helper.make_node("Div", [x, scale], [f"{base}.u"], name=f"{base}.div"),
        helper.make_node("Abs", [f"{base}.u"], [f"{base}.abs"], name=f"{base}.abs"),
        helper.make_node("Add", [f"{base}.abs", half], [f"{base}.up"], name=f"{base}.add"),
        helper.make_node("Floor", [f"{base}.up"], [f"{base}.floor"], name=f"{base}.floor"),
        helper.make_node("Sign", [f"{base}.u"], [f"{base}.sign"], name=f"{base}.sign"),
        helper.make_node("Mul", [f"{base}.sign", f"{base}.floor"], [f"{base}.codes"], name=f"{base}.mul"),
    )
    q.input[0], q.input[1] = f"{base}.codes", one
    return _done(edit, "half-away rounding", {"rounding-mode"}, edit.readers(site), site)


def half_away_at_the_input(edit: Edit) -> Planted:
    """The same where the model's input is quantized."""
    return half_away(edit, next(n for n, s in edit.plan.sites.items() if s.role == "input"))


def saturated(edit: Edit) -> Planted:
    """Accumulators are held below a limit behind the product, where no forced accumulator shows it."""
    op = edit.linear()
    limit, unit = _limit(edit, op)
    node = edit.product(op)
    low, high = edit.constant((-limit * unit).astype(np.float32)), edit.constant((limit * unit).astype(np.float32))

    def make(value: str, old: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Max", [value, low], [f"{old}.low"], name=f"{node.name}.low"),
            helper.make_node("Min", [f"{old}.low", high], [old], name=f"{node.name}.high"),
        ]

    edit.behind(node, make)
    return _done(edit, "saturated accumulator", {"saturation"}, {op}, f"{op} at {limit:,.0f}")


def saturated_in_the_kernel(edit: Edit) -> Planted:
    """A truth only: `plant_in_ort` puts it into ONNX Runtime's own file, where accumulators show it."""
    op = edit.linear()
    limit, _ = _limit(edit, op)
    return _done(edit, "saturated accumulator: kernel", {"saturation"}, {op}, f"{op}@{int(limit)}")


def _limit(edit: Edit, op: str) -> tuple[float, Any]:
    from s2d_deploy.simulation import recorded_codes
    from s2d_deploy.verify import expected_accumulators

    with recorded_codes(edit.case.simulated) as codes:
        edit.case.simulated(**edit.case.batch)
    sums = expected_accumulators(edit.case.simulated, edit.plan, codes)[op]
    unit = (edit.plan.sites[f"{op}.input"].scale * edit.plan.sites[f"{op}.weight"].scale.flatten()).numpy()
    return float(np.floor(np.abs(sums).max() * edit.rng.uniform(0.25, 0.5))), unit


def plant_in_ort(artifact: Artifact, truth: Truth) -> None:
    """MatMulIntegerToFloat becomes MatMulInteger, a Clip of its accumulators, and the rescaling by hand."""
    op, _, limit = truth.where.rpartition("@")
    path = artifact.path("model")
    model = onnx.load(path)
    nodes = model.graph.node
    kernel = next(n for n in nodes if metadata(n).get("s2d.op") == op)
    left, right, left_scale, right_scale, left_zero, right_zero, bias = [*kernel.input, "", "", ""][:7]
    props = metadata(kernel)
    base = f"{op}.planted"
    for name, value in ((f"{base}.low", -int(limit)), (f"{base}.high", int(limit))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.int32), name))
    operands = [left, right, left_zero, right_zero]
    while not operands[-1]:
        operands.pop()
    last = kernel.output[0]
    made = [
        helper.make_node("MatMulInteger", operands, [f"{base}.sums"], name=kernel.name),
        helper.make_node(
            "Clip", [f"{base}.sums", f"{base}.low", f"{base}.high"], [f"{base}.held"], name=f"{base}.clip"
        ),
        helper.make_node("Cast", [f"{base}.held"], [f"{base}.float"], name=f"{base}.cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [left_scale, right_scale], [f"{base}.scale"], name=f"{base}.scales"),
        helper.make_node(
            "Mul", [f"{base}.float", f"{base}.scale"], [f"{base}.y" if bias else last], name=f"{base}.mul"
        ),
    ]
    if bias:
        made.append(helper.make_node("Add", [f"{base}.y", bias], [last], name=f"{base}.add"))
    for key, value in props.items():
        entry = made[0].metadata_props.add()
        entry.key, entry.value = key, value
    entry = made[1].metadata_props.add()
    entry.key, entry.value = "s2d.part", op
    at = list(nodes).index(kernel)
    nodes.remove(kernel)
    for i, node in enumerate(made):
        nodes.insert(at + i, node)
    onnx.save_model(model, path)


def transposed(edit: Edit) -> Planted:
    """A square weight's codes are transposed."""
    op = edit.linear(square=True)
    dq = edit.weight(op)
    dq.input[0] = edit.constant(np.ascontiguousarray(edit.array(dq.input[0]).T))
    return _done(edit, "swapped axis: weight", {"swapped-axis"}, {op}, op)


def axis_of_scales(edit: Edit) -> Planted:
    """A square weight's scales lie along K."""
    op = edit.linear(square=True)
    dq = edit.weight(op)
    for attribute in dq.attribute:
        if attribute.name == "axis":
            attribute.i = 0
    return _done(edit, "swapped axis: scales", {"swapped-axis"}, {op}, op)


def order_of_scales(edit: Edit) -> Planted:
    """The scales of the output channels stand in reverse order."""
    op = edit.linear()
    dq = edit.weight(op)
    dq.input[1] = edit.constant(np.ascontiguousarray(edit.array(dq.input[1])[::-1]))
    return _done(edit, "swapped axis: order of scales", {"swapped-axis", "wrong-scale"}, {op}, op)


def float_weight(edit: Edit) -> Planted:
    """A weight stays in float."""
    op = edit.linear()
    dq = edit.weight(op)
    weight = edit.case.module.get_submodule(op).weight.detach().numpy().T  # type: ignore[union-attr, operator]
    _redirect(edit, dq.output[0], edit.constant(np.ascontiguousarray(weight.astype(np.float32))))
    return _done(edit, "fallback: float weight", {"fallback"}, {op}, op)


def dequantized(edit: Edit) -> Planted:
    """The same numbers in float arithmetic."""
    op = edit.linear()
    dq = edit.weight(op)
    codes, scale = edit.array(dq.input[0]).astype(np.float32), edit.array(dq.input[1])
    _redirect(edit, dq.output[0], edit.constant((codes * scale).astype(np.float32)))
    return _done(edit, "fallback: dequantized", {"fallback"}, {op}, op)


def float_activation(edit: Edit) -> Planted:
    """An activation is not quantized."""
    site = edit.activation()
    layers = edit.readers(site)
    q, dq = edit.quantizer(site)
    _redirect(edit, dq.output[0], q.input[0])
    edit.nodes.remove(dq)
    edit.nodes.remove(q)
    return _done(edit, "fallback: float activation", {"fallback"}, layers, site)


def _redirect(edit: Edit, old: str, new: str) -> None:
    for node in edit.nodes:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def preprocessing(edit: Edit) -> Planted:
    """Other means and deviations; reversed channels; tokens one off; a mask that is ignored."""
    graph = edit.model.graph
    if edit.case.kind == "vit":
        name = "pixel_values"
        if edit.rng.random() < 0.5:
            order = edit.constant(np.array([2, 1, 0], np.int64))
            made = [helper.make_node("Gather", [name, order], ["planted.pixels"], name="planted.gather", axis=1)]
            where = "channels reversed"
        else:
            gain = edit.constant(edit.rng.uniform(0.5, 0.9, (1, 3, 1, 1)).astype(np.float32))
            offset = edit.constant(edit.rng.uniform(-0.5, 0.5, (1, 3, 1, 1)).astype(np.float32))
            made = [
                helper.make_node("Mul", [name, gain], ["planted.mul"], name="planted.mul"),
                helper.make_node("Add", ["planted.mul", offset], ["planted.pixels"], name="planted.add"),
            ]
            where = "normalized otherwise"
        new = "planted.pixels"
    elif edit.rng.random() < 0.5:
        name, new, where = "input_ids", "planted.ids", "tokens one off"
        made = [helper.make_node("Add", [name, edit.constant(np.int64(1))], [new], name="planted.add")]
    else:
        name, new, where = "attention_mask", "planted.mask", "mask ignored"
        zero, one = edit.constant(np.zeros((1, 1), np.int64)), edit.constant(np.ones((1, 1), np.int64))
        made = [
            helper.make_node("Mul", [name, zero], ["planted.zeros"], name="planted.mul"),
            helper.make_node("Add", ["planted.zeros", one], [new], name="planted.add"),
        ]
    _redirect(edit, name, new)
    for i, node in enumerate(made):
        graph.node.insert(i, node)
    return _done(edit, "wrong preprocessing", {"preprocessing"}, {"input"}, where)


def other_plan(edit: Edit) -> Planted:
    """A truth only: the artifact of another calibration (`stale`)."""
    return _done(edit, "stale engine: plan", {"stale-artifact"}, {"*"}, "another calibration")


def other_plan_disguised(edit: Edit) -> Planted:
    """The same with this plan's digest in it."""
    return _done(edit, "stale engine: plan, digest forged", {"stale-artifact"}, {"*"}, "another calibration")


def other_weights(edit: Edit) -> Planted:
    """Weights of another checkpoint under this plan's digest."""
    return _done(edit, "stale engine: weights", {"stale-artifact"}, {"*"}, "another checkpoint")


def stale(case: Tiny, truth: Truth, folder: Path, rng: np.random.Generator) -> onnx.ModelProto:
    """The common file of another plan or checkpoint."""
    seed = int(rng.integers(100, 1000))
    if truth.fault == "stale engine: weights":
        other = tiny(case.kind, case.precision, folder, seed=seed)
    else:
        other = tiny(case.kind, case.precision, folder, calibration_seed=seed)
    model = other.common
    if truth.fault != "stale engine: plan":
        for entry in model.metadata_props:
            if entry.key == "s2d.plan_sha256":
                entry.value = case.plan.digest()
    return model


def nothing(edit: Edit) -> Planted:
    """No fault."""
    return _done(edit, "none", set(), set(), "")


def _done(edit: Edit, fault: str, causes: set[str], layers: Any, where: str) -> Planted:
    return edit.model, Truth(fault, frozenset(causes), frozenset(layers), where)


PLANTS: dict[str, Callable[[Edit], Planted]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        scale_of_quantizer,
        scale_of_rescale,
        scale_of_both,
        scale_of_channel,
        scale_of_weight,
        zero_of_quantizer,
        zero_of_kernel,
        half_away,
        half_away_at_the_input,
        saturated,
        saturated_in_the_kernel,
        transposed,
        axis_of_scales,
        order_of_scales,
        float_weight,
        dequantized,
        float_activation,
        preprocessing,
        other_plan,
        other_plan_disguised,
        other_weights,
        nothing,
    )
}


def plant(name: str, case: Tiny, target: str, folder: Path, seed: int) -> tuple[Artifact, Truth]:
    """Plant one fault, and build the artifact that has it."""
    rng = np.random.default_rng(seed)
    model, truth = PLANTS[name](Edit(case, rng))
    if truth.fault.startswith("stale"):
        model = stale(case, truth, folder / "other", rng)
    artifact = build(model, case, target, folder)
    if name == "saturated-in-the-kernel":
        plant_in_ort(artifact, truth)
    return artifact, truth


__all__ = ["OUTPUT", "PLANTS", "Tiny", "Truth", "build", "contractions", "opened", "plant", "tiny"]

"""Which module makes the tensor that a quantized site sees: read from autograd's graph, not from names.

One forward pass with gradients. Every LayerNorm, Linear, Conv and activation module marks the graph node of its
output; from a site's tensor the graph is then walked backwards, through what only moves elements (views,
transposes, slices, concatenations) and, for the stream in front of a norm, through additions, until marked nodes
are reached. So post-LN (BERT) and pre-LN (ViT, SigLIP, CLIP) models need no table of names.

Assumptions: norms, Linears and activations are modules; an activation module is elementwise and has no weights;
attention is the visible one of `attention`, so that its context is a product of softmax and value. What does not
hold them (a gated unit, a functional GELU, a fused norm) is reported as "unknown", never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s2d_deploy.attention import use_visible_attention, watching
from s2d_deploy.discovery import recorded_by_autograd
from s2d_deploy.plan import Op
from s2d_deploy.spectral import LAYER_TYPES

ProducerKind = Literal["norm", "activation", "linear", "attention", "softmax", "input", "unknown"]
# Autograd nodes that move elements and compute nothing.
MOVES = frozenset(
    [
        "Alias",
        "AsStrided",
        "Clone",
        "Detach",
        "Expand",
        "Permute",
        "ReshapeAlias",
        "Select",
        "Slice",
        "Split",
        "SplitWithSizes",
        "Squeeze",
        "T",
        "ToCopy",
        "Transpose",
        "Unbind",
        "Unsqueeze",
        "UnsafeView",
        "View",
        "Cat",
        "Stack",
        "Copy",
        "Repeat",
    ]
)
ADDS = frozenset(["Add", "Sub"])
_PRODUCTS = frozenset(["Bmm", "Mm", "Matmul"])
_LINEARS = frozenset(["Addmm", "Mm", "Linear", "MkldnnLinear"])
_ACTIVATION_HOMES = ("torch.nn.modules.activation", "transformers.activations")
_NO_ACTIVATION = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.MultiheadAttention, nn.GLU)


@dataclass(frozen=True, slots=True)
class Producer:
    """What makes one site's tensor.

    Attributes:
        site: name of the site.
        kind: "norm", "activation", "linear" (views only in between), "attention" (its context), "softmax",
            "input" (the model's own input), or "unknown".
        module: path of that norm, activation, Linear or attention module; "" where there is none.
        linears: layers whose triplets reach the site: the one in front of the activation; the Linear itself; the
            one that makes attention's value; for a norm every Linear whose output is added into its input.
        shared: for a norm, whether something beside Linear sites reads its output (a residual sum): then its
            gain cannot be folded away in the weights alone.
        note: what stands in the way, for "unknown".
    """

    site: str
    kind: ProducerKind
    module: str = ""
    linears: tuple[str, ...] = ()
    shared: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class NormInput:
    """What is added up in front of a norm.

    Attributes:
        linears: every Linear whose output, unchanged in shape, is added in.
        norms: every norm whose output is added in (the residual of a post-LN model).
    """

    linears: tuple[str, ...]
    norms: tuple[str, ...]


@dataclass(slots=True)
class _Graph:
    """Marked nodes of one forward pass; the nodes are kept, so that their identity is stable."""

    owner: dict[Any, tuple[str, str]] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)


def trace_producers(model: nn.Module, ops: Mapping[str, Op], batch: Mapping[str, Tensor]) -> dict[str, Producer]:
    """The producer of every activation site of `ops`.

    Args:
        model: run once on `batch`, in eval mode with gradients; it is left as it was.
        ops: from `discovery.discover`.
        batch: tensors whose first dimension is the batch; one sample is enough.

    Returns:
        By site name, in the order of `ops`.
    """
    wanted = {site for op in ops.values() for site, role in op.sites if role != "weight"}
    graph, sites, result = _record(model, wanted, batch)
    readers: dict[Any, set[str]] = {}
    _count_readers(result, graph, readers)
    return {
        site: _producer(site, sites[site], graph, readers)
        for op in ops.values()
        for site, role in op.sites
        if role != "weight" and site in sites
    }


def trace_norm_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, NormInput]:
    """For every norm, in the order of the forward pass, what its input is the sum of.

    Args:
        model: as in `trace_producers`.
        batch: as there.
    """
    graph, _, _ = _record(model, set(), batch)
    found = {}
    for kind, name in graph.owner.values():
        if kind == "norm":
            added = _summands(graph.inputs[name], graph)
            linears = tuple(n for k, n in added if k == "linear")
            found[name] = NormInput(linears, tuple(n for k, n in added if k == "norm"))
    return found


def _record(model: nn.Module, wanted: set[str], batch: Mapping[str, Tensor]) -> tuple[_Graph, dict[str, Tensor], Any]:
    """One forward pass in eval mode with gradients: marked nodes, the tensors of the wanted sites, the result."""
    use_visible_attention(model)
    names = {module: name for name, module in model.named_modules()}
    graph = _Graph()
    sites: dict[str, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(args[0], Tensor):
            graph.inputs[names[module]] = args[0]
            if f"{names[module]}.input" in wanted:
                sites[f"{names[module]}.input"] = args[0]

    def after(kind: str) -> Callable[[nn.Module, Any, Any], None]:
        def mark(module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                graph.owner[output.grad_fn] = (kind, names[module])
                graph.shapes[names[module]] = output.shape

        return mark

    def on_operand(module: nn.Module, operand: str, x: Tensor) -> None:
        sites[f"{names[module]}.{operand}"] = x

    handles = []
    for module in model.modules():
        kind = module_kind(module)
        if kind is not None:
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after(kind))]
    try:
        with recorded_by_autograd(model), watching(on_operand):
            result = model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return graph, sites, result


def module_kind(module: nn.Module) -> str | None:
    """ "norm", "linear", "activation", or None: what a module is to this trace."""
    if isinstance(module, nn.LayerNorm):
        return "norm" if module.elementwise_affine else None
    if isinstance(module, LAYER_TYPES):
        return "linear"
    home = type(module).__module__
    leaf = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
    if leaf and home in _ACTIVATION_HOMES and not isinstance(module, _NO_ACTIVATION):
        return "activation"
    return None


def operation_name(node: Any) -> str:
    """``"View"`` of ``ViewBackward0``."""
    return str(node.name()).split("::")[-1].split("Backward")[0]


def parents_of(node: Any) -> list[Any]:
    """The nodes whose outputs `node` reads."""
    return [parent for parent, _ in node.next_functions if parent is not None]


def _producer(site: str, x: Tensor, graph: _Graph, readers: dict[Any, set[str]]) -> Producer:
    if x.grad_fn is None:
        return Producer(site, "input", note="the model's own input")
    node = _behind_moves(x.grad_fn, graph)
    if isinstance(node, str):
        return Producer(site, "unknown", note=node)
    if node in graph.owner:
        kind, name = graph.owner[node]
        if kind == "linear":
            whole = graph.shapes[name].numel() == x.numel()
            if not whole:
                return Producer(site, "unknown", name, (name,), note=f"a part of the output of {name}")
            return Producer(site, "linear", name, (name,))
        if kind == "activation":
            return Producer(site, "activation", name, tuple(_direct(graph.inputs[name], graph)))
        stream = tuple(n for k, n in _summands(graph.inputs[name], graph) if k == "linear")
        return Producer(site, "norm", name, stream, shared=readers.get(node, set()) != {"linear"})
    operation = operation_name(node)
    if operation in ("Softmax", "_Softmax"):
        return Producer(site, "softmax")
    if operation in _PRODUCTS:
        values = []
        for parent in parents_of(node):
            behind = _behind_moves(parent, graph)
            if not isinstance(behind, str) and behind in graph.owner and graph.owner[behind][0] == "linear":
                values.append(graph.owner[behind][1])
        if len(values) == 1:
            return Producer(site, "attention", "", tuple(values))
    return Producer(site, "unknown", note=f"made by {operation}, which no module owns")


def _behind_moves(node: Any, graph: _Graph) -> Any:
    """The first node behind `node` (itself included) that computes; a sentence where the way divides."""
    while node not in graph.owner and operation_name(node) in MOVES:
        parents = parents_of(node)
        if len(parents) != 1:
            return f"{operation_name(node)} joins {len(parents)} tensors"
        node = parents[0]
    return node


def _direct(x: Tensor, graph: _Graph) -> list[str]:
    if x.grad_fn is None:
        return []
    node = _behind_moves(x.grad_fn, graph)
    if isinstance(node, str) or node not in graph.owner:
        return []
    kind, name = graph.owner[node]
    return [name] if kind == "linear" else []


def _summands(x: Tensor, graph: _Graph) -> list[tuple[str, str]]:
    """Kind and name of every module whose output, unchanged in shape, is added into `x`, first added first."""
    found: dict[tuple[str, str], None] = {}
    seen: set[Any] = set()
    stack = [] if x.grad_fn is None else [x.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in graph.owner:
            if graph.shapes[graph.owner[node][1]] == x.shape:
                found[graph.owner[node]] = None
        elif operation_name(node) in MOVES | ADDS:
            stack += parents_of(node)
    return list(found)[::-1]


def _count_readers(result: Any, graph: _Graph, readers: dict[Any, set[str]]) -> None:
    """For each marked node, which kinds of operation read it: "linear", or the name of another operation.

    Walks the whole graph from the model's outputs. A Linear begins with a product of two matrices, which is what
    reads its input; anything else (an addition) is named.
    """
    values = [result] if isinstance(result, Tensor) else list(result.values() if hasattr(result, "values") else result)
    stack = [v.grad_fn for v in values if isinstance(v, Tensor) and v.grad_fn is not None]
    # An output of the model is read by whoever asked for it.
    for node in stack:
        readers.setdefault(_through(node, graph), set()).add("output")
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for parent in parents_of(node):
            source = _through(parent, graph)
            if source in graph.owner and operation_name(node) not in MOVES | {"AccumulateGrad"}:
                operation = operation_name(node)
                readers.setdefault(source, set()).add("linear" if operation in _LINEARS else operation)
            stack.append(parent)


def _through(node: Any, graph: _Graph) -> Any:
    """Behind moves where the way is single, else the node itself."""
    behind = _behind_moves(node, graph)
    return node if isinstance(behind, str) else behind


__all__ = [
    "ADDS",
    "MOVES",
    "NormInput",
    "Producer",
    "ProducerKind",
    "module_kind",
    "operation_name",
    "parents_of",
    "trace_norm_inputs",
    "trace_producers",
]

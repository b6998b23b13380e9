"""Who writes a residual stream and who reads it, from autograd's graph: what a rotation of the stream must change.

A stream is what LayerNorms read in front of attention and MLP in a pre-LN transformer: a sum of layer outputs,
embeddings and parameters (class token, positions). From every LayerNorm's input the graph is walked backwards through
additions and moves to what was added; LayerNorms that share any of it read one stream. Then it is walked forwards:
everything that uses the stream must be one of these LayerNorms, or an addition.

What the graph does not show: constants without gradient that are added, and moves that mix the channels. Who changes
weights on the strength of this must compare the outputs (`folding.Unchanged`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from s2d_deploy.attention import use_visible_attention
from s2d_deploy.discovery import recorded_by_autograd
from s2d_deploy.producers import ADDS, MOVES, operation_name, parents_of


@dataclass(slots=True)
class Stream:
    """One residual stream.

    Attributes:
        width: its channels.
        norms: the LayerNorms that read it, in execution order.
        layers: Linear and Conv2d modules whose outputs are added into it.
        embeddings: `nn.Embedding` modules whose rows are.
        parameters: parameters that are, such as a class token.
        reasons: why it cannot be rotated by changing weights; empty where it can.
    """

    width: int
    norms: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Trace:
    """Marked nodes of one forward pass; every node is kept, so that its identity is stable."""

    owner: dict[Any, tuple[nn.Module, str]] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    children: dict[Any, set[Any]] = field(default_factory=dict)
    outputs: set[Any] = field(default_factory=set)


def residual_streams(model: nn.Module, sample: Mapping[str, Tensor]) -> list[Stream]:
    """Every residual stream, by the first LayerNorm that reads it.

    Args:
        model: run once on `sample`, in eval mode with gradients; it is left as it was.
        sample: a batch of one is enough.
    """
    trace = _trace(model, sample)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[tuple[Stream, set[Any]]] = []
    for norm, node in trace.inputs.items():
        stream = Stream(model.get_submodule(norm).normalized_shape[-1], [norm])  # type: ignore[index, arg-type]
        nodes = _walk_back(node, trace, names, stream)
        for other, theirs in [pair for pair in found if pair[1] & nodes]:
            found.remove((other, theirs))
            stream, nodes = _merged(other, stream), theirs | nodes
        found.append((stream, nodes))
    for stream, nodes in found:
        if not stream.reasons:
            _check_readers(stream, nodes, trace)
    return [stream for stream, _ in found]


def _trace(model: nn.Module, sample: Mapping[str, Tensor]) -> _Trace:
    use_visible_attention(model)
    trace = _Trace()
    names = {module: name for name, module in model.named_modules()}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(args[0], Tensor) and args[0].grad_fn is not None:
            trace.inputs[names[module]] = args[0].grad_fn

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            trace.owner[output.grad_fn] = module, names[module]

    handles = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            handles.append(module.register_forward_pre_hook(before))
        if isinstance(module, nn.LayerNorm | nn.Linear | nn.Conv2d | nn.Embedding):
            handles.append(module.register_forward_hook(after))
    try:
        with recorded_by_autograd(model):
            result = model(**sample)
    finally:
        for handle in handles:
            handle.remove()
    values = [result] if isinstance(result, Tensor) else list(result.values() if hasattr(result, "values") else result)
    trace.outputs = {v.grad_fn for v in values if isinstance(v, Tensor) and v.grad_fn is not None}
    stack, seen = list(trace.outputs), set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for parent in parents_of(node):
            trace.children.setdefault(parent, set()).add(node)
            stack.append(parent)
    return trace


def _walk_back(node: Any, trace: _Trace, names: Mapping[int, str], stream: Stream) -> set[Any]:
    """Fill the writers of `stream`; the graph nodes that it consists of."""
    nodes: set[Any] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node in nodes:
            continue
        nodes.add(node)
        operation = operation_name(node)
        if node in trace.owner:
            module, name = trace.owner[node]
            if isinstance(module, nn.LayerNorm):
                stream.reasons.append(f"the gain of {name} acts on the stream")
            elif isinstance(module, nn.Embedding):
                stream.embeddings.append(name)
            else:
                stream.layers.append(name)
        elif operation == "AccumulateGrad":
            parameter = node.variable
            stream.parameters.append(names.get(id(parameter), "a tensor"))
            if id(parameter) not in names or parameter.shape[-1] != stream.width:
                stream.reasons.append(f"{stream.parameters[-1]} is added, whose last axis is not the channels")
        elif operation in MOVES | ADDS:
            stack += parents_of(node)
        else:
            stream.reasons.append(f"the output of {operation} is added, which no layer owns")
    return nodes


def _merged(first: Stream, second: Stream) -> Stream:
    def both(a: list[str], b: list[str]) -> list[str]:
        return list(dict.fromkeys([*a, *b]))

    return Stream(
        first.width,
        both(first.norms, second.norms),
        both(first.layers, second.layers),
        both(first.embeddings, second.embeddings),
        both(first.parameters, second.parameters),
        both(first.reasons, second.reasons),
    )


def _check_readers(stream: Stream, nodes: set[Any], trace: _Trace) -> None:
    """Everything that uses the stream must be one of its norms or an addition within it."""
    odd: dict[str, None] = {}
    for node in nodes:
        if node in trace.outputs:
            odd["the model gives the stream out"] = None
        for child in trace.children.get(node, ()):
            module, name = trace.owner.get(child, (None, ""))
            if child not in nodes and not (isinstance(module, nn.LayerNorm) and name in stream.norms):
                odd[f"{name or operation_name(child)} reads it directly"] = None
    stream.reasons += sorted(odd)


__all__ = ["Stream", "residual_streams"]

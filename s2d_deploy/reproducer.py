"""A fault as a folder that needs none of this project: a small ONNX model, inputs, what is expected, what comes out.

    layer.onnx    one layer (or one quantizer) as the built artifact has it, weights and scales included
    inputs.npz    what goes in, by input name: codes that the runtime itself made
    result.npz    `expected` (exact integers times the plan's scales; the plan's codes) and `got` (on this machine)
    run.py        a few lines that run the one and compare it with the other
    README.txt    the finding in words

Where a runtime cannot run a part of its artifact alone, there is no model, and `got` is what it showed in place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.helper import tensor_dtype_to_np_dtype

from s2d_deploy.errors import S2DDeployError, UnsupportedError, message
from s2d_deploy.explain import Explainer, Finding
from s2d_deploy.op_faults import accumulator_unit
from s2d_deploy.probing import LayerCut, OpValue, probe_values
from s2d_deploy.session import Array, as_codes
from s2d_deploy.simulation import weight_codes
from s2d_deploy.verify import expected_accumulator

_RUN_ORT = '''\
"""{title}"""
import numpy as np
import onnxruntime

inputs, result = dict(np.load("inputs.npz")), np.load("result.npz")
session = onnxruntime.InferenceSession("layer.onnx", providers=["CPUExecutionProvider"])
got = session.run(None, inputs)[0].astype(np.float64)
'''
_RUN_ONNX = '''\
"""{title}"""
import numpy as np
import onnx
from onnx.helper import tensor_dtype_to_np_dtype
from onnx.reference import ReferenceEvaluator

model, result = onnx.load("layer.onnx"), np.load("result.npz")
types = {{i.name: tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in model.graph.input}}
inputs = {{name: array.astype(types[name]) for name, array in np.load("inputs.npz").items()}}
got = np.asarray(ReferenceEvaluator(model).run(None, inputs)[0]).astype(np.float64)
'''
_RUN_STORED = '''\
"""{title}"""
import numpy as np

result = np.load("result.npz")
got = result["got"]
'''
_COMPARE = """\
expected = result["expected"]
off = np.abs(got - expected) > 1e-4 * np.abs(expected).max()
print(f"{off.sum():,} of {off.size:,} values differ, the largest by {np.abs(got - expected).max():.6g}")
for place in np.argwhere(off)[:5]:
    print(f"at {tuple(int(i) for i in place)}: expected {expected[tuple(place)]:.6g}, got {got[tuple(place)]:.6g}")
raise SystemExit(int(off.any()))
"""


def write_reproducer(folder: Path, explainer: Explainer, finding: Finding, values: dict[str, OpValue]) -> Path:
    """Write the reproducer of a finding.

    Args:
        folder: is made.
        explainer: that found it; its session is still open.
        finding: a fault of a layer or a quantizer.
        values: from `probing.op_values`.

    Returns:
        `folder`.

    Raises:
        UnsupportedError: the fault lies in no single layer, or the runtime has shown nothing that could be compared.
    """
    try:
        model, inputs, expected, got = _parts(explainer, finding, values)
    except S2DDeployError:
        model, inputs = None, {}
        expected, got = _shown(explainer, finding)
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        onnx.save_model(model, folder / "layer.onnx")
        np.savez(folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
    np.savez(folder / "result.npz", expected=expected, got=got)
    title = f"{finding.cause} in {finding.layer}: {finding.detail}"
    begin = _RUN_STORED if model is None else _RUN_ORT if _is_ort(model) else _RUN_ONNX
    (folder / "run.py").write_text(begin.format(title=title.replace('"', "'")) + _COMPARE)
    (folder / "README.txt").write_text(
        f"{title}\nFound by: {finding.evidence}.\n\nRun `python run.py` here; it needs "
        + ("numpy" if model is None else "numpy and onnxruntime" if _is_ort(model) else "numpy and onnx")
        + ", and ends with 1 while the fault is there.\n"
        + ("This runtime cannot run one layer alone: `got` is what it showed in place.\n" if model is None else "")
    )
    return folder


def _is_ort(model: onnx.ModelProto) -> bool:
    return any(o.domain == "com.microsoft" for o in model.opset_import)


def _parts(
    explainer: Explainer, finding: Finding, values: dict[str, OpValue]
) -> tuple[onnx.ModelProto, dict[str, Array], Array, Array]:
    session = explainer.session
    if not isinstance(session, LayerCut):
        raise UnsupportedError(message("this runtime cannot run a part of its artifact alone"))
    if finding.site in explainer.quantizers:
        return _quantizer(explainer, session, str(finding.site))
    if finding.layer not in values:
        raise UnsupportedError(message(f"{finding.layer}: no single layer"))
    return _layer(explainer, session, finding.layer, values[finding.layer])


def _quantizer(
    explainer: Explainer, session: LayerCut, name: str
) -> tuple[onnx.ModelProto, dict[str, Array], Array, Array]:
    site = explainer.plan.sites[name]
    model, shift = session.quantizer(name, explainer.sources.get(name, ()))
    x = probe_values(site)
    u = torch.from_numpy(x) / site.scale
    codes = (torch.round(u) + int(site.zero_point)).clamp(site.grid.qmin, site.grid.qmax).numpy()
    inputs = {model.graph.input[0].name: x}
    return model, inputs, codes.astype(np.float64) + shift, _run(model, inputs)


def _layer(
    explainer: Explainer, session: LayerCut, op: str, value: OpValue
) -> tuple[onnx.ModelProto, dict[str, Array], Array, Array]:
    plan = explainer.plan
    model, meaning = session.layer(op, value.name)
    unit = accumulator_unit(explainer.forced, op)
    if unit is None:
        raise UnsupportedError(message(f"{op}: no integer product"))
    codes = {site: torch.from_numpy(as_codes(c).astype(np.int32)) for site, c in explainer.codes.items()}
    weights = {n: c.numpy() for n, c in weight_codes(explainer.simulated).items()}
    sums = expected_accumulator(explainer.simulated, plan, plan.ops[op], codes, weights)
    expected = sums * unit.numpy() * value.factor
    if value.bias:
        bias = explainer.simulated.get_submodule(op).bias
        if not isinstance(bias, torch.Tensor):
            raise UnsupportedError(message(f"{op}: no bias to compare with"))
        shape = (1, -1, 1, 1) if plan.ops[op].kind == "conv" else (-1,)
        expected = expected + bias.detach().double().numpy().reshape(shape)
    inputs = {name: _bytes(model, name, codes[site].numpy(), shift) for name, (site, shift) in meaning.items()}
    return model, inputs, expected, _run(model, inputs)


def _bytes(model: onnx.ModelProto, name: str, codes: Array, shift: int) -> Array:
    kind = next(i.type.tensor_type.elem_type for i in model.graph.input if i.name == name)
    unsigned = np.dtype(tensor_dtype_to_np_dtype(kind)).name.startswith("u")
    result: Array = (codes + shift).astype(np.uint8 if unsigned else np.int8)
    return result


def _run(model: onnx.ModelProto, inputs: dict[str, Array]) -> Array:
    try:
        if _is_ort(model):
            import onnxruntime

            session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            found: Any = session.run(None, inputs)[0]
        else:
            from onnx.reference import ReferenceEvaluator

            types = {i.name: tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in model.graph.input}
            given = {name: array.astype(types[name]) for name, array in inputs.items()}
            found = ReferenceEvaluator(model).run(None, given)[0]  # type: ignore[index]
    except Exception as error:  # neither package has one class for its errors
        raise UnsupportedError(message("the layer does not run alone", found=str(error)[:300])) from error
    result: Array = np.asarray(found).astype(np.float64)
    return result


def _shown(explainer: Explainer, finding: Finding) -> tuple[Array, Array]:
    """Codes at the site, expected and seen; else accumulators of the op."""
    site, op = finding.site, finding.layer
    if site in explainer.codes:
        seen: dict[str, Array] = {}
        plan = explainer.reference_pass()
        plan.run(
            explainer.batch,
            explainer.output,
            explainer.codes,
            lambda v: seen.__setitem__(v.site, v.codes().numpy()),
            site,
        )
        return seen[str(site)].astype(np.float64), explainer.codes[str(site)].astype(np.float64)
    if op in explainer.accumulators:
        codes = {n: torch.from_numpy(as_codes(c).astype(np.int32)) for n, c in explainer.codes.items()}
        weights = {n: c.numpy() for n, c in weight_codes(explainer.simulated).items()}
        plan_op = explainer.plan.ops[op]
        (left, _), (right, role) = plan_op.sites
        given = None if role == "weight" else explainer.codes[right]
        want = expected_accumulator(explainer.simulated, explainer.plan, plan_op, codes, weights)
        return want.astype(np.float64), explainer.session.accumulate(op, explainer.codes[left], given).astype(
            np.float64
        )
    raise UnsupportedError(message(f"{op}: nothing to show of {finding.cause}"))

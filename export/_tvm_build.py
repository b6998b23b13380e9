"""The common ONNX file through TVM: one VM executable with an entry for each batch size, and its parameters.

Entries, for each batch size b: ``run_b`` (the outputs), ``codes_b`` (the codes at every activation site, by the very
functions that ``run_b`` calls), and ``accumulate_i`` (one for each kind of integer product: the kernel alone).
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import onnx

from s2d_deploy.errors import RuntimeUnavailable, UnsupportedError, message
from s2d_deploy.qgraph import contractions, metadata
from s2d_deploy.session import Array, Progress

from ._tvm_cuda_compile import DeviceCode, require_cuda_compiler
from ._tvm_cuda_isa import CudaIsa, cuda_target, is_cuda, parse_device
from ._tvm_cuda_link import device_code, own_compiler
from ._tvm_cuda_schedule import schedule_threads
from ._tvm_emit import Emitter
from ._tvm_import import GraphImporter, product_params
from ._tvm_isa import Isa, host_name, isa_of, require_known_processor, required_features, resolve_target
from ._tvm_products import Product, Stored, lower_product, token_operands
from ._tvm_quiet import muted_stderr
from ._tvm_schedule import schedule_loops
from ._tvm_static import StaticGraph, fix_dimensions
from ._tvm_tune import Tuned, Tuning, tune_loops

logger = logging.getLogger(__name__)
Loops = Callable[[Any], Any]


@dataclass
class Built:
    """What the compiler made.

    Attributes:
        executable: TVM's VM executable.
        parameters: by name.
        description: JSON document that the runtime adapter reads (see `runtimes/_tvm_artifact.py`).
        code: of the GPU, for CUDA.
    """

    executable: Any
    parameters: dict[str, Array]
    description: dict[str, Any]
    code: DeviceCode | None = None


def require_compiler() -> None:
    """Check that TVM is installed.

    Raises:
        RuntimeUnavailable: it is not.
    """
    try:
        for name in ("tvm", "tvm.relax"):
            import_module(name)
    except ImportError as error:
        raise RuntimeUnavailable(
            message("TVM is not installed", found=str(error), fix="pip install 's2d-deploy[tvm]'")
        ) from error


def compile_model(
    model: onnx.ModelProto,
    batches: Sequence[int],
    sizes: Mapping[str, int],
    device: str,
    progress: Progress,
    tuning: Tuning | None = None,
) -> Built:
    """Compile `model` for every batch size of `batches`.

    Args:
        model: the common ONNX model.
        batches: batch sizes, all at least 1.
        sizes: sizes of further dynamic dimensions, by name.
        device: see `resolve_target` and `parse_device`.
        progress: is told what is being done.
        tuning: budget for trying loops on this machine; None: none are tried.

    Raises:
        RecipeError: an unknown device, or a dynamic dimension without a size.
        RuntimeUnavailable: no CUDA compiler, or one that knows no such architecture.
        UnsupportedError: an operator cannot be compiled; the message names it.
    """
    import tvm
    from tvm import relax

    isa: Isa | CudaIsa
    if is_cuda(device):
        isa = parse_device(device)
        require_cuda_compiler(isa)
        attributes = cuda_target(isa)
        target = tvm.target.Target(attributes)
    else:
        attributes = resolve_target(device)
        require_known_processor(attributes)
        target = tvm.target.Target(attributes)
        isa = isa_of(target)
    builder = relax.BlockBuilder()
    emitter = Emitter(builder, isa)
    found = contractions(model)
    batch_name = _batch_name(model)
    functions: dict[str, dict[str, Any]] = {}
    accumulators: dict[tuple[object, ...], str] = {}
    parameters: dict[str, Array] = {}
    ops: dict[str, dict[str, Any]] = {}
    packed: dict[str, Stored | None] = {}
    graph: StaticGraph | None = None
    for batch in sorted(batches):
        progress(f"TVM: importing the graph for batch {batch}")
        graph = fix_dimensions(model, {**sizes, batch_name: batch})
        tokens = token_operands(graph)
        products = {c.node.name: lower_product(graph, c, tokens, isa, packed) for c in found}
        importer = GraphImporter(graph, products, emitter, parameters)
        functions[f"run_{batch}"] = {"parameters": importer.function(f"run_{batch}", graph.outputs)}
        sites = _sites(importer.nodes)
        if sites:
            wanted = list(dict.fromkeys(sites.values()))
            names = importer.function(f"codes_{batch}", wanted)
            places = {site: wanted.index(value) for site, value in sites.items()}
            functions[f"codes_{batch}"] = {"parameters": names, "sites": places}
        for product, stored in products.values():
            _describe(ops, product, stored, emitter, batch)
            if product.arithmetic == "integer":
                key = _signature(product, stored)
                if key not in accumulators:
                    accumulators[key] = f"accumulate_{len(accumulators)}"
                    _accumulate_function(accumulators[key], product, stored, emitter)
                ops[product.name]["accumulate"][str(batch)] = {
                    "function": accumulators[key],
                    "left_shape": list(product.left_shape),
                    "right_shape": list(product.right_shape) if product.right is not None else None,
                    "out_shape": list(product.out_shape),
                    "parameters": [
                        n for n in product_params(product, stored) if n.endswith(("::packed", "::correction"))
                    ],
                }
    if graph is None:
        raise ValueError("no batch size")
    progress("TVM: optimizing and compiling")
    made: dict[str, DeviceCode] = {}
    tuned: list[Tuned] = []

    def loops(module: Any) -> Any:
        if isinstance(isa, CudaIsa):
            return schedule_threads(module)
        if tuning is not None:
            module, found = tune_loops(module, target, isa.lanes, tuning, progress)
            tuned.extend(found)
        return schedule_loops(module, isa.lanes)

    executable = _compile(builder.get(), target, isa, made, loops)
    code = device_code(executable, isa, made) if isinstance(isa, CudaIsa) else None
    description = {
        "precision": metadata(model).get("s2d.precision", "fp32"),
        "plan_sha256": metadata(model).get("s2d.plan_sha256", ""),
        "batch_dimension": batch_name,
        "batches": sorted(batches),
        "sizes": dict(sizes),
        "inputs": [_value(v, batch_name, sizes) for v in model.graph.input if v.name in graph.inputs],
        "outputs": [o.name for o in model.graph.output],
        "batched_outputs": _batched_outputs(model, batch_name),
        "functions": functions,
        "ops": ops,
        "target": attributes,
        "isa": isa.name,
        "features": required_features(target) if isinstance(isa, Isa) else [],
        "built_on": host_name(),
        "tvm": tvm.__version__,
    }
    if tuning is not None:
        description["tuning"] = [asdict(found) for found in tuned]
    if isinstance(isa, CudaIsa) and code is not None:
        description |= {"compute_capability": isa.capability, **code.description()}
    elif isinstance(isa, Isa):
        description["disassembly"] = _instructions(executable, isa)
    return Built(executable, parameters, description, code)


def _batch_name(model: onnx.ModelProto) -> str:
    known = {t.name for t in model.graph.initializer}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in known and dims and dims[0].dim_param:
            return str(dims[0].dim_param)
    return ""


def _value(value: onnx.ValueInfoProto, batch: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    tensor = value.type.tensor_type
    dims = [-1 if d.dim_param == batch and batch else sizes.get(d.dim_param, d.dim_value) for d in tensor.shape.dim]
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    return {"name": value.name, "dtype": dtype, "shape": dims}


def _batched_outputs(model: onnx.ModelProto, batch: str) -> list[bool]:
    """Whether an output's first dimension is the batch."""
    firsts = [o.type.tensor_type.shape.dim[:1] for o in model.graph.output]
    return [bool(d) and d[0].dim_param == batch and bool(batch) for d in firsts]


def _sites(nodes: Sequence[onnx.NodeProto]) -> dict[str, str]:
    """Graph values that hold codes, by activation site."""
    sites: dict[str, str] = {}
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            for site in metadata(node).get("s2d.site", "").split(","):
                if site:
                    sites[site] = node.output[0]
    return sites


def _signature(product: Product, stored: Stored | None) -> tuple[object, ...]:
    """What an accumulate function depends on."""
    bare = replace(
        product,
        name="",
        macs=0,
        declared="",
        left="",
        right=None if product.right is None else "right",
        token_scale=None,
        note="",
    )
    return bare, stored is not None and stored.correction is not None


def _accumulate_function(name: str, product: Product, stored: Stored | None, emitter: Emitter) -> None:
    from tvm import relax

    builder = emitter.builder
    emitter.start_function()
    left = relax.Var("left", relax.TensorType(product.left_shape, "int8" if product.left_signed else "uint8"))
    inputs, right = [left], None
    if product.right is not None:
        right = relax.Var("right", relax.TensorType(product.right_shape, "int8" if product.right_signed else "uint8"))
        inputs.append(right)
    params = {}
    for key, array in product_params(product, stored).items():
        role = key.rsplit("::", 1)[1]
        if role in ("packed", "correction"):
            params[role] = relax.Var(role, relax.TensorType(array.shape, array.dtype.name))
    with builder.function(name, params=[*inputs, *params.values()]):
        with builder.dataflow():
            out = builder.emit_output(relax.Tuple([emitter.accumulators(product, left, right, params)]))
        builder.emit_func_output(out)
    gvar = builder.get().get_global_var(name)
    builder.update_func(gvar, builder.get()[gvar].with_attr("num_input", len(inputs)))


def _describe(
    ops: dict[str, dict[str, Any]],
    product: Product,
    stored: Stored | None,
    emitter: Emitter,
    batch: int,
) -> None:
    executed = "int8" if product.arithmetic == "integer" else "float32"
    entry = ops.setdefault(
        product.name,
        {
            "declared": product.declared,
            "macs": product.macs,
            "precision": executed,
            "arithmetic": product.arithmetic,
            "kernels": {},
            "accumulate": {},
            "storage": _storage(product, stored),
            "weight_size_bytes": _weight_bytes(product, stored),
            "left_dtype": "int8" if product.left_signed else "uint8",
            "right_dtype": "int8" if product.right_signed else "uint8",
            "note": product.note,
        },
    )
    entry["kernels"][str(batch)] = emitter.kernel_name(product)


def _weight_bytes(product: Product, stored: Stored | None) -> int:
    """Bytes of a quantized weight as the parameters hold it: padded panels, scales and corrections. 0 for others."""
    if product.declared == "float" or product.right is not None or stored is None:
        return 0
    parts = (stored.packed, stored.scale, stored.correction, stored.offset)
    return sum(part.nbytes for part in parts if part is not None)


def _storage(product: Product, stored: Stored | None) -> str:
    if product.right is not None:
        return "activation"
    if stored is None:
        return "none"
    return {"uint8": "int4, two a byte", "int8": "int8", "float32": "float32"}[stored.packed.dtype.name]


def _compile(module: Any, target: Any, isa: Isa | CudaIsa, made: dict[str, DeviceCode], loops: Loops) -> Any:
    import tvm
    from tvm import relax

    t = relax.transform
    # A reshape stays an operator of the VM, which makes a view of it: as a function of its own it would copy.
    front = [
        t.BundleModelParams(),
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        t.LegalizeOps(skip_ops=["relax.reshape"]),
        t.AnnotateTIROpPattern(),
        t.FuseOps(),
        t.FuseTIR(),
        t.DeadCodeElimination(),
    ]
    back = [
        t.ToNonDataflow(),
        t.RemovePurityChecking(),
        t.CallTIRRewrite(),
        t.StaticPlanBlockMemory(),
        t.LowerAllocTensor(),
        t.KillAfterLastUse(),
        t.LowerRuntimeBuiltin(),
        t.ComputePrimValue(),
        t.VMShapeLower(),
        t.AttachGlobalSymbol(),
    ]
    try:
        with target, muted_stderr(), own_compiler(isa, made) if isinstance(isa, CudaIsa) else contextlib.nullcontext():
            module = tvm.transform.Sequential(front)(module)
            module = loops(module)
            module = tvm.transform.Sequential(back)(module)
            return relax.build(module, target=target, relax_pipeline=None)
    except tvm.error.InternalError as error:
        raise UnsupportedError(
            message(
                "TVM cannot compile this graph",
                found=str(error).strip().splitlines()[-1],
                fix="build with another target, or report the model",
            )
        ) from error


def _instructions(executable: Any, isa: Isa) -> dict[str, Any]:
    """How often the dot-product instruction stands in each compiled kernel, read from the assembly."""
    if not isa.mnemonic:
        return {"mnemonic": "", "kernels": {}}
    bodies: dict[str, str] = {}
    for library in executable.mod.imports:
        with contextlib.suppress(Exception):
            bodies |= _functions(library.inspect_source("asm"))
    counts: dict[str, int] = {}
    for name, body in bodies.items():
        called = set(re.findall(r"__tvm_parallel_lambda[\w.]*", body)) - {name}
        if name.startswith(("integer_", "__tvm_ffi_integer_")):
            texts = [body, *(bodies.get(c, "") for c in called)]
            clean = name.removeprefix("__tvm_ffi_").removesuffix("_compute_")
            counts[clean] = counts.get(clean, 0) + sum(t.count(isa.mnemonic) for t in texts)
    return {"mnemonic": isa.mnemonic, "kernels": counts}


def _functions(assembly: str) -> dict[str, str]:
    pieces = re.split(r"^([A-Za-z_][\w.]*):", assembly, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=False))

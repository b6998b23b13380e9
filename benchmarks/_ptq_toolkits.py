"""What is compared by `ptq_peers.py`: every quantizer as one function, float model -> something that runs.

Ours starts from the torch module and ends as the simulation, or as the artifact that ONNX Runtime executes. The peers
get what they are made for: modelopt the torch module (its result is fake-quantized torch), ONNX Runtime's quantizers
the FP32 ONNX export of the same module, NNCF what OpenVINO itself converts the module into (of an ONNX file its GPTQ
refuses the weights' layout, and its scale estimation destroyed both models that it was tried on). All see the same
calibration samples; NNCF one at a time, as it asks for, the others in batches. Each keeps its own defaults, but for
the block size of INT4, and what would make another format of it: embeddings stay float, every Linear has four bits.

`seconds` is from float model and data to quantized model, calibration included; writing a runtime's file is apart
(`export_seconds`), and so are imports, loading a session and the held-out samples.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from s2d_deploy.errors import RuntimeUnavailable, message
from s2d_deploy.precision import BASELINE

if TYPE_CHECKING:
    from _ptq_data import Evidence, Run

    from s2d_deploy.ptq.passes import Quantized
    from s2d_deploy.session import Array

Format = Literal["int8", "int4"]
PRECISION: dict[Format, str] = {"int8": "w8a8", "int4": "w4a16"}
TOKEN = {"activation_granularity": "token"}


@dataclass(frozen=True)
class Made:
    """A quantized model.

    Attributes:
        run: one batch of arrays -> outputs by name.
        seconds: quantization with calibration, wall clock.
        cpu_seconds: the same, processor time of this process.
        layers: Linears and convolutions whose weights (and, for INT8, inputs) are quantized.
        products: products of two activations that are quantized (attention).
        export_seconds: from the quantized model to the runtime's file; of a peer, from torch to the FP32 file.
        note: what a reader should know.
    """

    run: Run
    seconds: float
    cpu_seconds: float
    layers: int
    products: int = 0
    export_seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Candidate:
    """One line of the table.

    Attributes:
        name: unique.
        format: "int8" (W8A8) or "int4" (W4A16).
        ours: of this project, or a peer.
        executed: on a runtime's own kernels, or simulated in float.
        how: quantizer and settings, in words.
        make: does it; called once a round.
        needs: packages that must be installed.
        counterpart: of a peer, the recipe of ours that it is compared with whatever came out best.
    """

    name: str
    format: Format
    ours: bool
    executed: bool
    how: str
    make: Callable[[Bench], Made] = field(repr=False)
    needs: tuple[str, ...] = ()
    counterpart: str | None = None

    def check(self) -> None:
        """Raise RuntimeUnavailable where a package is missing."""
        missing = [name for name in self.needs if find_spec(name) is None]
        if missing:
            extra = "bench" if "nncf" in missing else "modelopt" if "modelopt" in missing else "ort"
            raise RuntimeUnavailable(
                message(f"{' and '.join(missing)} not installed", fix=f"pip install 's2d-deploy[{extra}]'")
            )


class Bench:
    """What quantizers are given.

    Args:
        evidence: model and samples.
        folder: for files.
        threads: of every session.
        block: weights that share an INT4 scale, along K.
        seed: of ours.
    """

    def __init__(self, evidence: Evidence, folder: Path, threads: int, block: int, seed: int) -> None:
        self.evidence, self.folder, self.threads, self.block, self.seed = evidence, folder, threads, block, seed
        # Our own passes change how a module's attention is called; peers get it as transformers loads it.
        self.original = copy.deepcopy(evidence.module)
        self.only_seconds = False
        self._kept: dict[str, tuple[Quantized, tuple[float, float]]] = {}

    def next_round(self, only_seconds: bool) -> None:
        """Forget what was quantized; where only seconds are asked for, ours makes nothing that could run."""
        self.only_seconds = only_seconds
        self._kept.clear()

    def quantized(
        self, form: Format, passes: list[Any], keys: Mapping[str, Any]
    ) -> tuple[Quantized, tuple[float, float]]:
        """Our recipe, once a round (the simulation and the artifact share it), and its seconds."""
        key = repr((form, passes, keys))
        if key not in self._kept:
            clock = Clock()
            made = _quantized(self, form, passes, keys)
            self._kept[key] = made, clock.stop()
        return self._kept[key]

    @property
    def sample(self) -> dict[str, Any]:
        """A batch of two, to export with."""
        return {name: tensor[:2] for name, tensor in self.evidence.held_out[0].items()}

    @property
    def dynamic(self) -> dict[str, dict[int, str]]:
        """Dimensions beside the batch that may vary."""
        return {name: {1: "sequence"} for name in self.sample} if self.evidence.task == "embedding" else {}

    def feeds(self, size: int | None = None) -> Iterator[dict[str, Array]]:
        """Calibration samples as arrays, in the batches that they come in, or in batches of `size`."""
        for batch in self.evidence.calibration:
            arrays = {name: tensor.numpy() for name, tensor in batch.items()}
            count = len(next(iter(arrays.values())))
            for start in range(0, count, size or count):
                yield {name: array[start : start + (size or count)] for name, array in arrays.items()}

    @cached_property
    def float_onnx(self) -> tuple[Path, float]:
        """The FP32 export that peers quantize, and the seconds that writing it took."""
        from s2d_deploy.plan import Plan
        from s2d_deploy.registry import load_exporter

        start = time.perf_counter()
        path = self.folder / "float" / "model.onnx"
        plan = Plan(BASELINE, {})
        load_exporter()(self.evidence.module, plan, self.sample, [self.evidence.output], path, dynamic=self.dynamic)
        return path, time.perf_counter() - start

    def openvino_model(self, onnx: bool) -> tuple[Any, float]:
        """The float model for OpenVINO, a new one each time, and the seconds that conversion or export took."""
        import openvino

        if onnx:
            path, seconds = self.float_onnx
            return openvino.Core().read_model(path), seconds
        start = time.perf_counter()
        with quiet():
            model = openvino.convert_model(copy.deepcopy(self.original), example_input=self.sample)
        return model, time.perf_counter() - start


class Clock:
    """Wall clock and processor time, together."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        """Seconds since it was made: wall, processor."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Toolkits log, warn and draw bars; errors still come through."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# ---- ours ---------------------------------------------------------------------------------------------------


def ours(
    name: str, form: Format, passes: list[Any], keys: Mapping[str, Any], how: str, executed: bool = False
) -> Candidate:
    """A recipe of this project."""

    def make(bench: Bench) -> Made:
        from s2d_deploy.evaluate import torch_run
        from s2d_deploy.simulation import simulate

        quantized, spent = bench.quantized(form, passes, keys)
        layers = sum(f"{name}.weight" in quantized.plan.sites for name in quantized.plan.ops)
        pairs = [op for op in quantized.plan.ops.values() if op.kind in ("scores", "context")]
        products = sum(all(site in quantized.plan.sites for site, _ in op.sites) for op in pairs)
        if bench.only_seconds:
            return Made(_nothing, *spent, layers, products)
        if not executed:
            run = torch_run(simulate(quantized.model, quantized.plan).eval(), bench.evidence.output)
            return Made(run, *spent, layers, products)
        begin = time.perf_counter()
        run, note = _on_onnx_runtime(bench, name, quantized)
        return Made(run, *spent, layers, products, time.perf_counter() - begin, note)

    needs = ("onnxruntime",) if executed else ()
    return Candidate(name, form, True, executed, how, make, needs)


def _nothing(feeds: Mapping[str, Array]) -> dict[str, Array]:
    raise RuntimeError(f"only seconds were asked for, not outputs of {', '.join(feeds)}")


def _quantized(bench: Bench, form: Format, passes: list[Any], keys: Mapping[str, Any]) -> Quantized:
    from s2d_deploy.discovery import discover
    from s2d_deploy.ptq.passes import Context, parse_steps, run_passes
    from s2d_deploy.quantize import QuantizeConfig

    e = bench.evidence
    ops = discover(e.module, {n: t[:1] for n, t in e.calibration[0].items()}, e.output)
    config = QuantizeConfig(**{"block_size": bench.block, **keys})
    context = Context(lambda: iter(e.calibration), e.output, config, bench.seed)
    return run_passes(e.module, ops, PRECISION[form], parse_steps(passes), context)


def _on_onnx_runtime(bench: Bench, name: str, quantized: Quantized) -> tuple[Run, str]:
    from s2d_deploy.registry import load_exporter, load_runtime, load_target

    folder = bench.folder / name
    common, precision = folder / "common.onnx", quantized.plan.precision
    outputs = [bench.evidence.output]
    load_exporter()(quantized.model, quantized.plan, bench.sample, outputs, common, dynamic=bench.dynamic)
    target = load_target("ort")
    dialect = target.dialect(common, folder, precision=precision)
    artifact = target.build(dialect, folder, precision=precision, options={}, progress=lambda _: None)
    session: Any = load_runtime("ort").open(artifact, threads=bench.threads)
    audit = session.audit()
    return session.run, f"rung {audit.rung}, executed {', '.join(f'{k} {v:.1%}' for k, v in audit.executed.items())}"


# ---- modelopt -----------------------------------------------------------------------------------------------


def modelopt(name: str, form: Format, config: str, how: str, counterpart: str, method: str | None = None) -> Candidate:
    """A preset of modelopt on the torch module; `method` replaces the preset's algorithm."""

    def make(bench: Bench) -> Made:
        with quiet():
            import modelopt.torch.quantization as mtq
            import torch

        from s2d_deploy.evaluate import torch_run

        chosen = copy.deepcopy(getattr(mtq, config))
        for entry in chosen["quant_cfg"]:
            blocks = (entry.get("cfg") or {}).get("block_sizes")
            if blocks:
                blocks[-1] = bench.block
        if form == "int4":  # as in every other row, convolutions stay float
            chosen["quant_cfg"].append({"quantizer_name": "*", "parent_class": "nn.Conv2d", "enable": False})
        if method is not None:
            chosen["algorithm"] = {"method": method}

        def loop(model: Any) -> None:
            with torch.no_grad():
                for batch in bench.evidence.calibration:
                    model(**batch)

        clock = Clock()
        with quiet():
            model = mtq.quantize(copy.deepcopy(bench.original), chosen, loop)
        spent = clock.stop()
        return Made(torch_run(model, bench.evidence.output), *spent, *_modelopt_layers(model, form))

    return Candidate(name, form, False, False, how, make, ("modelopt",), counterpart)


def _modelopt_layers(model: Any, form: Format) -> tuple[int, int]:
    layers = products = 0
    for module in model.modules():
        weight, left = getattr(module, "weight_quantizer", None), getattr(module, "input_quantizer", None)
        if weight is not None and weight.is_enabled:
            layers += form == "int4" or bool(left is not None and left.is_enabled)
        query, value = getattr(module, "q_bmm_quantizer", None), getattr(module, "v_bmm_quantizer", None)
        products += sum(bool(q is not None and q.is_enabled) for q in (query, value))
    return layers, products


# ---- ONNX Runtime's quantizers ------------------------------------------------------------------------------


class _Reader:
    """Batches as onnxruntime's CalibrationDataReader gives them."""

    def __init__(self, feeds: list[dict[str, Array]]) -> None:
        self._feeds, self._left = feeds, iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._left, None)

    def rewind(self) -> None:
        self._left = iter(self._feeds)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return iter(self._feeds)

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._feeds[start_index:end_index])


def ort_static(name: str, method: str, counterpart: str) -> Candidate:
    """`quantize_static` with one of its calibration methods."""

    def make(bench: Bench) -> Made:
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

        CalibrationDataReader.register(_Reader)
        source, exported = bench.float_onnx
        folder = bench.folder / name
        folder.mkdir(exist_ok=True)
        clock = Clock()
        with quiet():
            # Its symbolic shape inference knows no opset 21; onnx's own is enough for static weights.
            quant_pre_process(source, folder / "prepared.onnx", skip_symbolic_shape=True)
            quantize_static(
                folder / "prepared.onnx",
                folder / "model.onnx",
                _Reader(list(bench.feeds())),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=["MatMul", "Gemm", "Conv"],
                calibrate_method=getattr(CalibrationMethod, method),
            )
        spent = clock.stop()
        path = folder / "model.onnx"
        return Made(_session(path, bench), *spent, *_qdq_layers(path), exported)

    how = (
        "quantize_static after quant_pre_process, QDQ of MatMul, Gemm and Conv, "
        f"UINT8 activations ({method}), INT8 weights per channel"
    )
    return Candidate(name, "int8", False, True, how, make, ("onnxruntime",), counterpart)


def ort_nbits(name: str, how: str, counterpart: str, config: Callable[[Bench], Any], symmetric: bool) -> Candidate:
    """`MatMulNBitsQuantizer` with one of its algorithms."""

    def make(bench: Bench) -> Made:
        from onnxruntime.quantization import CalibrationDataReader
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        CalibrationDataReader.register(_Reader)
        source, exported = bench.float_onnx
        path = bench.folder / f"{name}.onnx"
        clock = Clock()
        with quiet():
            quantizer = MatMulNBitsQuantizer(
                str(source),
                block_size=bench.block,
                is_symmetric=symmetric,
                accuracy_level=1,  # float products: its default level rounds activations to INT8 on some processors
                algo_config=config(bench),
            )
            quantizer.process()
            quantizer.model.save_model_to_file(str(path), False)
        spent = clock.stop()
        import onnx

        nodes = onnx.load(path).graph.node
        return Made(_session(path, bench), *spent, sum(n.op_type == "MatMulNBits" for n in nodes), 0, exported)

    return Candidate(name, "int4", False, True, how, make, ("onnxruntime",), counterpart)


def nbits_config(kind: str, **keys: Any) -> Callable[[Bench], Any]:
    """A configuration class of `matmul_nbits_quantizer` by name, with the block size; GPTQ reads calibration data."""

    def config(bench: Bench) -> Any:
        from onnxruntime.quantization import matmul_nbits_quantizer

        if kind == "GPTQ":
            return matmul_nbits_quantizer.GPTQWeightOnlyQuantConfig(_Reader(list(bench.feeds())), **keys)
        if kind == "KQuant":
            return matmul_nbits_quantizer.KQuantWeightOnlyQuantConfig(**keys)
        made: Any = getattr(matmul_nbits_quantizer, f"{kind}WeightOnlyQuantConfig")
        if kind == "Default":
            keys_here = {"accuracy_level": 1, **keys}
            return made(block_size=bench.block, **keys_here)
        return made(block_size=bench.block, **keys)

    return config


def _session(path: Path, bench: Bench) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = bench.threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    known, name = {i.name for i in session.get_inputs()}, bench.evidence.output

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {name: session.run([name], {k: v for k, v in feeds.items() if k in known})[0]}

    return run


def _qdq_layers(path: Path) -> tuple[int, int]:
    """Layers and products with both operands dequantized, of a Q/DQ file."""
    import onnx

    graph = onnx.load(path).graph
    stored = {i.name for i in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    layers = products = 0
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        sources = [made.get(name) for name in node.input[:2]]
        if any(s is None or s.op_type != "DequantizeLinear" for s in sources):
            continue
        constant = any(s is not None and s.input[0] in stored for s in sources)
        layers, products = layers + constant, products + (not constant)
    return layers, products


# ---- NNCF on OpenVINO ---------------------------------------------------------------------------------------


def nncf(name: str, form: Format, how: str, counterpart: str, *, onnx: bool = False, **keys: Any) -> Candidate:
    """`nncf.quantize` for INT8, `nncf.compress_weights` for INT4; of the OpenVINO model, or of the ONNX file."""

    def make(bench: Bench) -> Made:
        with quiet():
            import nncf as toolkit
            import openvino
        model, exported = bench.openvino_model(onnx)
        samples = list(bench.feeds(1))
        clock = Clock()
        with quiet():
            dataset = toolkit.Dataset(samples)
            if form == "int8":
                model = toolkit.quantize(
                    model, dataset, model_type=toolkit.ModelType.TRANSFORMER, subset_size=len(samples), **keys
                )
            else:
                model = toolkit.compress_weights(
                    model,
                    mode=toolkit.CompressWeightsMode.INT4_SYM,
                    group_size=bench.block,
                    ratio=1.0,
                    all_layers=True,
                    ignored_scope=toolkit.IgnoredScope(types=["Gather", "Convolution"], validate=False),
                    backup_mode=toolkit.BackupMode.NONE,
                    dataset=dataset if keys else None,
                    subset_size=len(samples),
                    **keys,
                )
        spent = clock.stop()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(bench.threads),
            # On processors with bfloat16 OpenVINO would take it by default: another precision than the one compared.
            "INFERENCE_PRECISION_HINT": "f32",
            # And it would round the inputs of compressed layers to INT8 in groups: W4A8, not W4A16.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        names, output = {i.get_any_name() for i in model.inputs}, bench.evidence.output

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            request.infer({k: v for k, v in feeds.items() if k in names})
            return {output: request.get_tensor(output).data.copy()}

        return Made(run, *spent, *_openvino_layers(model, form), exported)

    return Candidate(name, form, False, True, how, make, ("nncf", "openvino"), counterpart)


_PASS_THROUGH = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose", "Unsqueeze")


def _openvino_layers(model: Any, form: Format) -> tuple[int, int]:
    """Layers and products whose operands come from a fake quantizer or from codes of the format's width."""

    def source(node: Any) -> str:
        while True:
            kind = node.get_type_name()
            if kind == "Constant":
                return str(node.get_element_type().get_type_name())
            if kind not in _PASS_THROUGH:
                return str(kind)
            node = node.input_value(0).get_node()

    layers = products = 0
    for node in model.get_ops():
        if (
            node.get_type_name() == "ScaledDotProductAttention"
        ):  # two products in one node; query and key may have codes
            products += all(source(node.input_value(i).get_node()) == "FakeQuantize" for i in (0, 1))
            continue
        if node.get_type_name() not in ("MatMul", "Convolution", "GroupConvolution"):
            continue
        found = [source(node.input_value(i).get_node()) for i in (0, 1)]
        if form == "int4":
            layers += any(f in ("i4", "u4") for f in found)
        elif "FakeQuantize" in found:
            layers += any(f in ("i8", "u8") for f in found)
            products += found == ["FakeQuantize", "FakeQuantize"]
    return layers, products

"""Common ONNX -> TVM: a shared library and packed parameters that run without a compiler.

Integer contractions run on kernels of our own that are generated for the target's byte dot product: weights are stored
as 4-bit codes, two a byte (8-bit: one), unpacked inside the kernel; accumulators are int32 and exact. Everything
between them is FP32: sums in another order, exponentials by polynomials (errors in `_tvm_math.py`), nothing else lost.

TVM builds for fixed shapes: one entry for each batch size that the options list. The runtime serves other batch sizes
by splitting and padding, which changes no sample's result.

Run as a script: ``python -m s2d_deploy.export.to_tvm COMMON.onnx OUT_FOLDER``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2d_deploy.errors import RecipeError, S2DDeployError, UnsupportedError, message
from s2d_deploy.qgraph import initializers, load_model, metadata, require_integer_codes
from s2d_deploy.runtimes._tvm_artifact import DESCRIPTION, PARAMETERS, write_description
from s2d_deploy.runtimes._tvm_cuda import gpu_audit
from s2d_deploy.session import Artifact, Progress

from ._tvm_cuda_link import link_cuda
from ._tvm_isa import NATIVE
from ._tvm_link import link
from ._tvm_tune import Tuning, require_sound_ffi

DEFAULT_BATCHES = (1,)
# What `--help` and docs/tvm.md show; the tests run these very lines.
PYTHON = """\
import json, numpy, tvm.runtime.vm
from safetensors.numpy import load_file

about = json.load(open("OUT_FOLDER/model.json"))
library = tvm.runtime.load_module("OUT_FOLDER/model.so")
vm = tvm.runtime.vm.VirtualMachine(library, tvm.cpu())
stored = load_file("OUT_FOLDER/params.safetensors")
names = about["functions"]["run_1"]["parameters"]
parameters = tuple(tvm.runtime.tensor(stored[name]) for name in names)
batch = numpy.load("batch.npy")  # one sample, of the type and shape that about["inputs"] gives
outputs = [y.numpy() for y in vm["run_1"](tvm.runtime.tensor(batch), parameters)]
"""
_OPTIONS = ("batch", "shapes", "device", "tune")
_TUNE_OPTIONS = ("seconds", "trials", "folder")


class TvmTarget:
    """Implements `session.Target` for TVM."""

    name = "tvm"

    def dialect(self, model: Path, folder: Path, *, precision: str) -> Path:  # noqa: ARG002 - the protocol's
        """Check that every quantizer of the common file can be compiled, and copy it: TVM reads it as it is.

        Raises:
            ArtifactError: `model` is no ONNX file.
            UnsupportedError: a quantizer with scales that are neither stored nor per token; every one is named.
        """
        proto = load_model(model)
        require_integer_codes(proto, "TVM")
        stored = initializers(proto)
        offenders = [
            node.name
            for node in proto.graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear")
            and any(value and value not in stored for value in node.input[1:])
        ]
        if offenders:
            raise UnsupportedError(
                message(
                    "quantizers that TVM cannot express",
                    expected="stored scales and zero points, or per-token scales as the common file writes them",
                    found=", ".join(offenders),
                    fix="calibrate them, or use a per-token grid",
                )
            )
        folder.mkdir(parents=True, exist_ok=True)
        for file in (model, model.with_name(f"{model.name}.data")):
            if file.is_file() and file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)
        return folder / model.name

    def shape_options(self, batches: Sequence[int], sizes: Mapping[str, int]) -> dict[str, Any]:
        """One entry for each batch size; other dimensions fixed."""
        return {"batch": sorted(set(batches)), "shapes": dict(sizes)}

    def build(
        self,
        dialect: Path,
        folder: Path,
        *,
        precision: str,
        options: Mapping[str, Any],
        progress: Progress,
    ) -> Artifact:
        """Compile `dialect` into ``model.so``, ``params.safetensors`` and ``model.json`` inside `folder`.

        Args:
            dialect: the file that `dialect` wrote.
            folder: exists.
            precision: name for the manifest.
            options: ``batch``: a size or a list of sizes (default 1); ``shapes``: sizes of further dynamic dimensions,
                by name; ``device``: ``"native"`` (default), ``"llvm -mcpu=... -mattr=... -mtriple=..."``, or for a GPU
                ``"cuda -arch=sm_86 -kernels=..."``; ``tune``: seconds to try loops for on this machine, or a mapping
                with ``seconds``, ``trials`` (for each function, default 32) and ``folder`` (of the database).
            progress: is told what is being done.

        Raises:
            RecipeError: an unknown option, or a wrong value.
            RuntimeUnavailable: TVM is not installed, the linker refuses the target's code, or no CUDA compiler.
            UnsupportedError: an operator cannot be compiled; the message names it.
        """
        batches, sizes, device = _options(options)
        tuning = _tuning(options.get("tune"), device)
        from ._tvm_build import compile_model, require_compiler

        require_compiler()
        if tuning is not None:
            require_sound_ffi()
        folder.mkdir(parents=True, exist_ok=True)
        built = compile_model(load_model(dialect), batches, sizes, device, progress, tuning)
        progress("TVM: linking")
        import tvm

        target = tvm.target.Target(built.description["target"])
        if built.code is None:
            files, note = link(built.executable, folder, target)
        else:
            files, note = link_cuda(built.executable, folder, target, built.code), ""
        from safetensors.numpy import save_file

        save_file(built.parameters, folder / PARAMETERS)
        files |= {"parameters": PARAMETERS, "description": DESCRIPTION}
        write_description(folder, files, built.description)
        description = built.description
        info = {
            "batches": description["batches"],
            "target": description["target"],
            "isa": description["isa"],
            "features": description["features"],
            "tvm": description["tvm"],
            "weight_size_bytes": sum(op["weight_size_bytes"] for op in description["ops"].values()) or None,
            "notes": [f"{name}: {op['note']}" for name, op in description["ops"].items() if op["note"]],
        }
        for tuned in description.get("tuning", ()):
            if tuned["best_us"] < tuned["plain_us"]:
                info["notes"].append(
                    f"{tuned['function']}: {tuned['plain_us']:.1f} us, by tuning {tuned['best_us']:.1f} us"
                )
        if built.code is not None:
            audit = gpu_audit(description, description["batches"][0])
            info |= {"compute_capabilities": [description["compute_capability"]], "compiler": built.code.compiler}
            info |= {"audit": audit.to_dict(), "rung": audit.rung}
        if note:
            info["notes"].append(note)
        return Artifact(folder, self.name, precision, files, info)


def _options(options: Mapping[str, Any]) -> tuple[list[int], dict[str, int], str]:
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise RecipeError(message(f"unknown option {unknown[0]!r} for TVM", expected=f"any of {', '.join(_OPTIONS)}"))
    batch = options.get("batch", DEFAULT_BATCHES)
    batches = [batch] if isinstance(batch, int) else list(batch)
    sizes = dict(options.get("shapes") or {})
    wrong = [b for b in [*batches, *sizes.values()] if not isinstance(b, int) or isinstance(b, bool) or b < 1]
    if wrong or not batches:
        raise RecipeError(
            message("TVM builds for batch sizes and shapes of at least 1", found=", ".join(map(repr, wrong)) or "none")
        )
    return sorted(set(batches)), sizes, str(options.get("device", NATIVE))


def _tuning(given: Any, device: str) -> Tuning | None:
    """The option ``tune``."""
    if given is None or given == 0:
        return None
    options = {"seconds": given} if isinstance(given, int | float) else given
    if not isinstance(options, Mapping) or set(options) - set(_TUNE_OPTIONS) or "seconds" not in options:
        raise RecipeError(
            message(
                "tune: seconds to spend, or a mapping with seconds, trials and folder",
                found=repr(given),
                fix="write tune: 60, or tune: {seconds: 60, trials: 32}",
            )
        )
    seconds, trials = options["seconds"], options.get("trials", 32)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or seconds <= 0:
        raise RecipeError(message("tune.seconds", expected="a number above 0", found=repr(seconds)))
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise RecipeError(message("tune.trials", expected="an integer of at least 1", found=repr(trials)))
    if device != NATIVE:
        raise RecipeError(
            message(
                "tune tries loops on this machine",
                expected=f"device {NATIVE!r}",
                found=f"device {device!r}",
                fix="leave the option tune out, or build on the device itself",
            )
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Tuning(float(seconds), Path(str(options.get("folder") or cache / "s2d-deploy" / "tvm-tuning")), trials)


TARGET = TvmTarget()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: a common ONNX file becomes an artifact; prints its size and what it executes."""
    parser = argparse.ArgumentParser(
        prog="python -m s2d_deploy.export.to_tvm",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Compile a common ONNX file (written by s2d_deploy.export.to_onnx) with TVM into OUT_FOLDER:\n"
            "  model.so             compiled functions and the program that calls them\n"
            "  params.safetensors   weights as the kernels read them; 4-bit codes lie two a byte\n"
            "  model.json           inputs, batch sizes, entries, required processor features"
        ),
        epilog=(
            "The result needs TVM's runtime only, no compiler (docs/tvm.md: C++, other machines):\n\n"
            f"{textwrap.indent(PYTHON, '  ')}\n"
            "TVM_NUM_THREADS sets the number of threads.\n\n"
            "examples:\n"
            "  python -m s2d_deploy.export.to_tvm quantized/model.onnx out/tvm --batch 1 --batch 64\n"
            "  python -m s2d_deploy.export.to_tvm bert/model.onnx out/tvm --shape sequence=128\n"
            "  python -m s2d_deploy.export.to_tvm model.onnx out/tvm --device 'llvm -mcpu=x86-64-v3'\n"
            "  python -m s2d_deploy.export.to_tvm model.onnx out/tvm \\\n"
            "    --device 'llvm -mtriple=aarch64-linux-gnu -mattr=+neon,+dotprod'\n"
            "  python -m s2d_deploy.export.to_tvm model.onnx out/tvm --device 'cuda -arch=sm_86'"
        ),
    )
    parser.add_argument(
        "model", type=Path, metavar="COMMON.onnx", help="the common ONNX file; its metadata names the precision"
    )
    parser.add_argument("folder", type=Path, metavar="OUT_FOLDER", help="made where it does not exist")
    parser.add_argument(
        "--batch", type=int, action="append", metavar="N", help="a batch size to build for, repeatable (default: 1)"
    )
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=SIZE",
        help="size of a further dynamic dimension, repeatable, e.g. sequence=128",
    )
    parser.add_argument(
        "--device",
        default=NATIVE,
        help="native: the best instruction set of this machine (default); 'llvm -mcpu=... -mattr=... -mtriple=...'; "
        "or a GPU: 'cuda -arch=sm_86', with -kernels=dp4a, int8 or int4 for less than its best (needs nvcc or NVRTC)",
    )
    parser.add_argument(
        "--tune",
        type=float,
        metavar="SECONDS",
        help="try loops of what has no kernel of its own on this machine for so long (default: none; what was found "
        "is kept for later builds)",
    )
    arguments = parser.parse_args(argv)
    try:
        options = {
            "batch": arguments.batch or list(DEFAULT_BATCHES),
            "shapes": dict(map(_shape, arguments.shape)),
            "device": arguments.device,
            "tune": arguments.tune,
        }
        precision = metadata(load_model(arguments.model)).get("s2d.precision", "fp32")
        arguments.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            dialect = TARGET.dialect(arguments.model, Path(scratch), precision=precision)
            artifact = TARGET.build(dialect, arguments.folder, precision=precision, options=options, progress=print)
    except S2DDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    about = f"for {artifact.info['isa']}, batch sizes {artifact.info['batches']}"
    print(f"{artifact.folder}: {artifact.size_bytes} bytes {about}")
    for name in sorted(artifact.files.values()):
        print(f"  {name}: {(artifact.folder / name).stat().st_size} bytes")
    for note in artifact.info["notes"]:
        print(f"  {note}")
    return 0


def _shape(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name or not size.isdigit():
        raise RecipeError(message(f"--shape {text!r}", expected="NAME=SIZE, for example sequence=128"))
    return name, int(size)


if __name__ == "__main__":
    raise SystemExit(main())

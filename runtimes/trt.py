"""Runtime `tensorrt`: engines that `s2d_deploy.export.to_tensorrt` built, on an NVIDIA GPU.

An engine is bound to the library's version and to the GPUs that it was built for; both are checked before it is
loaded, and a refusal says what would fit. Without a GPU nothing is run and nothing is measured: `available` says so.

Device memory and streams come from the CUDA driver itself (`_cuda_driver`), so neither torch with CUDA nor a CUDA
toolkit is needed. What is done with a loaded engine stands in `_trt_session`.
"""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from typing import Any

from s2d_deploy.errors import ArtifactError, DeviceUnavailable, message
from s2d_deploy.files import read_json
from s2d_deploy.precision import FP4
from s2d_deploy.session import Artifact, Rung

from . import _trt_cache as cache
from . import _trt_package as package
from ._cuda_driver import Device, Driver
from ._trt_session import TensorRTSession

_RUNGS: dict[str, Rung] = {"fp32": "float", "w8a8": "native"}
_DISTRIBUTIONS = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt-rtx", "tensorrt_rtx")}
FORMAT = 1  # of engine.json
_NOT_RTX = ("9.0", "10.0", "10.3", "11.0")  # data-center GPUs: TensorRT-RTX 1.7 has no such compute capability
FP4_SINCE = 10  # major compute capability: Blackwell


class TensorRTRuntime:
    """See `s2d_deploy.session.Runtime`."""

    name = "tensorrt"

    def available(self) -> str | None:
        """None where an engine can run; else the reason. Asks for the driver first: that loads no package."""
        if not package.installed():
            return message("TensorRT is not installed", fix=package.INSTALL)
        try:
            Driver()
        except DeviceUnavailable as error:
            return str(error)
        return None

    def version(self) -> str:
        """Package and version, as ``"tensorrt_rtx 1.7.1.116"``; "" where none is installed."""
        for name, distributions in _DISTRIBUTIONS.items():
            for distribution in distributions:
                try:
                    return f"{name} {distribution_version(distribution)}"
                except PackageNotFoundError:
                    continue
        return ""

    def device(self) -> str:
        """The GPU, or that there is none."""
        try:
            found = Driver().device()
        except DeviceUnavailable:
            return "no NVIDIA GPU"
        return f"{found.name}, compute capability {found.capability}, CUDA driver {found.driver}"

    def rung(self, precision: str) -> Rung | None:
        """What TensorRT offers: every GPU that it builds for multiplies INT8, none INT4, and Blackwell NVFP4."""
        if precision in _RUNGS:
            return _RUNGS[precision]
        if precision == "nvfp4":
            return "native" if self._has_fp4() else None
        if precision in FP4:  # simulated only; no exporter writes it
            return None
        return "weight-only" if precision.endswith("a16") else "emulated"

    def _has_fp4(self) -> bool:
        """Whether the GPU here multiplies NVFP4; without a GPU, what the library builds for counts."""
        try:
            return int(Driver().device().capability.split(".")[0]) >= FP4_SINCE
        except DeviceUnavailable:
            return True

    def open(self, artifact: Artifact, *, threads: int) -> TensorRTSession:  # noqa: ARG002 - the GPU has no such setting
        """Load an engine onto the GPU.

        Raises:
            ArtifactError: truncated, foreign, built by another version, or for other GPUs; says what would fit.
            RuntimeUnavailable, DeviceUnavailable: the package, or the GPU with its driver, is missing.
        """
        description = read_description(artifact)
        trt = package.load()
        driver = Driver()
        device = driver.device()
        misfit = why_not(description, trt.__name__, str(trt.__version__), device)
        if misfit:
            raise ArtifactError(misfit)
        for plugin in description.get("plugins", ()):
            if reason := package.load_plugin(trt, plugin):
                raise ArtifactError(
                    message(
                        f"the engine needs the plugin library {plugin}, which does not load",
                        found=reason,
                        fix="put the library there, built for this version of TensorRT",
                    )
                )
        engine = _engine_bytes(artifact)
        return TensorRTSession(trt, driver, description, engine, cache.place(engine, device.capability))


RUNTIME = TensorRTRuntime()


def read_description(artifact: Artifact) -> dict[str, Any]:
    """The artifact's ``engine.json``.

    Raises:
        ArtifactError: missing, truncated, or not written by this project's TensorRT target.
    """
    if artifact.target != "tensorrt" or not {"engine", "description"} <= set(artifact.files):
        raise ArtifactError(
            message(
                f"{artifact.folder}: not a TensorRT artifact",
                expected="target 'tensorrt' with the files engine and description",
                found=f"target {artifact.target!r} with {', '.join(artifact.files) or 'no files'}",
                fix="build it with s2d-deploy build, or python -m s2d_deploy.export.to_tensorrt",
            )
        )
    path = artifact.path("description")
    if not path.is_file():
        raise ArtifactError(message(f"{path}: missing", fix="build the artifact again"))
    document = read_json(path)
    needed = {"format", "package", "version", "compute_capabilities", "inputs", "outputs", "ops", "shapes", "audit"}
    if document.get("format") != FORMAT or not needed <= set(document):
        raise ArtifactError(
            message(
                f"{path}: not the description of a TensorRT engine",
                expected=f"format {FORMAT}",
                found=f"format {document.get('format')!r}",
                fix="build the artifact again",
            )
        )
    return document


def why_not(description: Mapping[str, Any], name: str, version: str, device: Device) -> str | None:
    """None where an engine fits this library and this GPU; else a sentence that says what would."""
    rebuild = f"build it again for {device.capability}"
    if (description["package"], description["version"]) != (name, version):
        return message(
            "the engine was built by another version of TensorRT",
            expected=f"{description['package']} {description['version']}",
            found=f"{name} {version}",
            fix=f"install that version, or {rebuild} here",
        )
    capabilities, gpu = list(description["compute_capabilities"]), description.get("gpu")
    if capabilities == ["current"] and gpu:
        capabilities = [gpu["capability"]]
    if device.capability in capabilities or capabilities == ["current"]:
        return None  # what else an engine is bound to, TensorRT checks itself
    fix = f'add "{device.capability}" to targets[tensorrt].options.compute_capabilities and build again'
    if name == "tensorrt_rtx" and device.capability in _NOT_RTX:
        fix = (
            f"TensorRT-RTX has no kernels for {device.capability}: install the package tensorrt on this machine and "
            'build with compute_capabilities: "current"'
        )
    return message(
        f"the engine does not fit {device.name}",
        expected=f"compute capability {' or '.join(capabilities)}" + (f" (built on {gpu['name']})" if gpu else ""),
        found=device.capability,
        fix=fix,
    )


def _engine_bytes(artifact: Artifact) -> bytes:
    path = artifact.path("engine")
    try:
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise ArtifactError(
            message(f"{path}: not a whole engine file", found=str(error), fix="build it again")
        ) from error

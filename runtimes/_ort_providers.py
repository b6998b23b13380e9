"""Execution providers of ONNX Runtime: short names, what is here, plugins, and no silent way back to the CPU.

ONNX Runtime goes on with the CPU where a provider does not load or does not know an operator, and says so in a log at
most. Here both are errors: `new_session` refuses a session that lacks a provider which was asked for, and operators on
the CPU are allowed only where the CPU is in the list: ``[cuda]`` is all on CUDA or nothing, ``[cuda, cpu]`` is not.

A provider may come as a plugin library: ``[[my_ep, {library: /path/libmy_ep.so, key: value}]]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2d_deploy.errors import DeviceUnavailable, message

CPU = "CPUExecutionProvider"
_SUFFIX = "ExecutionProvider"
LIBRARY = "library"  # an option of ours: the plugin that brings the provider
# Provider -> what brings it. Those that are not named need a build of onnxruntime of one's own.
_BRINGS = {
    "CUDA": "pip install onnxruntime-gpu",
    "Tensorrt": "pip install onnxruntime-gpu",
    "OpenVINO": "pip install onnxruntime-openvino",
    "Dml": "pip install onnxruntime-directml (Windows)",
    "QNN": "pip install onnxruntime-qnn",
    "Xnnpack": "build onnxruntime with --use_xnnpack",
    "Dnnl": "build onnxruntime with --use_dnnl",
    "CoreML": "the onnxruntime of macOS has it",
}
_OTHERS = (
    "ACL", "ArmNN", "Azure", "CANN", "Js", "MIGraphX", "Nnapi", "NvTensorRTRTX", "Rknpu", "VSINPU", "VitisAI", "WebGpu",
    "WebNN",
)  # fmt: skip
_SHORT = {name.lower(): f"{name}{_SUFFIX}" for name in ("CPU", *_BRINGS, *_OTHERS)}

Provider = Any  # a name, or a pair of name and options, as YAML and JSON give them


def full_name(name: str) -> str:
    """``"cuda"`` -> ``"CUDAExecutionProvider"``; a name that is not known stays as it is."""
    return _SHORT.get(name.lower().removesuffix(_SUFFIX.lower()), name)


def short_name(name: str) -> str:
    """``"CUDAExecutionProvider"`` -> ``"cuda"``."""
    return name.removesuffix(_SUFFIX).lower()


def normalized(providers: Sequence[Provider]) -> list[tuple[str, dict[str, Any]]]:
    """Pairs of full name and options, in order of preference, each provider once."""
    pairs = [(p, {}) if isinstance(p, str) else (str(p[0]), dict(p[1])) for p in providers]
    found: dict[str, dict[str, Any]] = {}
    for name, options in pairs:
        found.setdefault(full_name(name), options)
    return list(found.items())


def asked_for(info: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The providers of an artifact's facts; the CPU where there are none."""
    return normalized(info.get("providers") or [CPU])


def inventory() -> dict[str, list[str]]:
    """Providers that this onnxruntime has, and those that it knows but was built without; both by short name."""
    import onnxruntime

    here = list(onnxruntime.get_available_providers())
    missing = [name for name in onnxruntime.get_all_providers() if name not in here]
    return {"here": [short_name(n) for n in here], "missing": [short_name(n) for n in missing]}


def configure(options: Any, providers: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, dict[str, str]]]:
    """Check the providers, load plugins into `options`, and return the list for ``InferenceSession(providers=...)``.

    Raises:
        DeviceUnavailable: a provider is not in this build, or its plugin does not load.
    """
    plugins = [name for name, settings in providers if LIBRARY in settings]
    check_present([name for name, _ in providers if name not in plugins])
    if CPU not in (name for name, _ in providers):
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    result = []
    for name, settings in providers:
        texts = {str(key): _text(value) for key, value in settings.items() if key != LIBRARY}
        if name in plugins:
            options.add_provider_for_devices(_plugin_devices(name, Path(str(settings[LIBRARY]))), texts)
        else:
            result.append((name, texts))
    # Beside a plugin, a list would replace it; the CPU is there without being named.
    return [] if plugins else result


def check_present(names: Sequence[str]) -> None:
    """Raise DeviceUnavailable where this onnxruntime lacks one of `names`; the message says what brings it."""
    import onnxruntime

    present = onnxruntime.get_available_providers()
    missing = [name for name in names if name not in present]
    if not missing:
        return
    known = onnxruntime.get_all_providers()
    ways = {_BRINGS.get(n.removesuffix(_SUFFIX), "use a build of onnxruntime that has it") for n in missing}
    strange = [n for n in missing if n not in known]
    raise DeviceUnavailable(
        message(
            f"onnxruntime {onnxruntime.__version__} has no provider {', '.join(missing)} here",
            expected=f"one of {', '.join(present)}",
            found=f"{', '.join(strange)}: no provider of this name is known" if strange else None,
            fix=f"{'; '.join(sorted(ways))}; or choose another provider",
        )
    )


def check_loaded(session: Any, names: Sequence[str]) -> None:
    """Raise DeviceUnavailable where a session came up without a provider that it was made for."""
    loaded = session.get_providers()
    missing = [name for name in names if name not in loaded]
    if missing:
        raise DeviceUnavailable(
            message(
                f"provider {', '.join(missing)} did not load; onnxruntime went on without it",
                found=f"a session on {', '.join(loaded)}",
                fix="install its libraries and driver (`s2d-deploy doctor` lists GPUs), or choose another provider",
            )
        )


def refusal(error: Exception, names: Sequence[str]) -> DeviceUnavailable | None:
    """What a failed session means where the provider is the reason; None where it is the model."""
    text = " ".join(str(error).split())
    shown = ", ".join(map(short_name, names))
    if "fallback to CPU EP has been explicitly disabled" in text:
        return DeviceUnavailable(
            message(
                f"provider {shown} does not run all operators of this model, and the CPU was not allowed to",
                fix=f"set providers: [{shown}, cpu] to allow it (the audit says what runs where), or another provider",
            )
        )
    others = [name for name in names if name != CPU]
    # onnxruntime's own wording where a provider's shared library or driver is missing.
    signs = ("Failed to load library", "Failed to create", "CUDA failure", "cannot open shared object", "no device")
    if others and any(sign in text for sign in signs):
        return DeviceUnavailable(
            message(
                f"provider {shown} does not load",
                found=f"{type(error).__name__}: {text[:300]}",
                fix="install its libraries and driver, or choose another provider",
            )
        )
    return None


def _plugin_devices(name: str, library: Path) -> list[Any]:
    import onnxruntime

    def refused(found: str, fix: str) -> DeviceUnavailable:
        return DeviceUnavailable(message(f"provider {name}: plugin {library} does not load", found=found, fix=fix))

    if not library.is_file():
        raise refused("no such file", "give the path of the plugin's shared library")
    try:
        devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == name]
        if not devices:
            onnxruntime.register_execution_provider_library(name, str(library.resolve()))
            devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == name]
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise refused(
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            f"use a plugin that was built for onnxruntime {onnxruntime.__version__}",
        ) from error
    if not devices:
        here = sorted({d.ep_name for d in onnxruntime.get_ep_devices()})
        raise refused(f"no device of {name}; there are devices of {', '.join(here)}", "plug the device in")
    return devices


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)

"""Kernels for CUDA without a GPU: their source run on the CPU; instructions in what the compiler makes; refusals."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

tvm = pytest.importorskip("tvm")

import cuda_emulator  # noqa: E402
from common_graphs import linear  # noqa: E402

from s2d_deploy.errors import (  # noqa: E402
    ArtifactError,
    DeviceUnavailable,
    RecipeError,
    RuntimeUnavailable,
    UnsupportedError,
)
from s2d_deploy.export import _tvm_cuda_rows as rows_  # noqa: E402, TID251
from s2d_deploy.export import to_tvm  # noqa: E402, TID251
from s2d_deploy.export._tvm_cuda_compile import compile_source, require_cuda_compiler  # noqa: E402, TID251
from s2d_deploy.export._tvm_cuda_floats import float_kernel  # noqa: E402, TID251
from s2d_deploy.export._tvm_cuda_isa import CudaIsa, best_unit, cuda_target, parse_device  # noqa: E402, TID251
from s2d_deploy.export._tvm_cuda_link import replace_source  # noqa: E402, TID251
from s2d_deploy.export._tvm_cuda_products import SmallGeometry, integer_kernel  # noqa: E402, TID251
from s2d_deploy.export._tvm_epilogue import Epilogue, Place, Step  # noqa: E402, TID251
from s2d_deploy.export._tvm_kernels import Geometry  # noqa: E402, TID251
from s2d_deploy.export._tvm_panels import Panels, panel_width  # noqa: E402, TID251
from s2d_deploy.registry import load_runtime, load_target  # noqa: E402
from s2d_deploy.runtimes._tvm_cuda import gpu_audit, multiplies_4_bits, runs_on  # noqa: E402, TID251
from s2d_deploy.runtimes._tvm_cuda_toolkit import cuda_compiler, nvrtc_bindings  # noqa: E402, TID251
from s2d_deploy.runtimes._tvm_rpc import RemoteMachine  # noqa: E402, TID251
from s2d_deploy.session import Artifact  # noqa: E402

emulation = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing()))
compiler = pytest.mark.skipif(cuda_compiler() is None, reason="no nvcc and no NVRTC")
VALUE, OPERAND = "value", "operand"
SM80 = "cuda -arch=sm_80"


def product(isa: CudaIsa, m: int, k: int, n: int, bits: int, zero: int, batch: int = 1, **more: Any) -> tuple[Any, Any]:
    """Panels, and the kernel that stores its accumulators."""
    panels = Panels(k, n, panel_width(n, isa.widths), isa.group, bits)
    stride = more.get("stride", panels.depth)
    left = Place((batch, m, stride), (m * stride, 0, stride, 0), "uint8")
    out = Place((batch, m, n), (m * n, 0, n, 1), "int32")
    kind = SmallGeometry if more.get("small") else Geometry
    return panels, integer_kernel(isa, kind((batch, 1), m, left, panels, zero), Epilogue(outputs=((-1, out),)))


def reference(a: np.ndarray, b: np.ndarray, zero: int) -> np.ndarray:
    return (a.astype(np.int64) - zero) @ b.astype(np.int64)


# Kernels, their source run on the CPU


@emulation
@pytest.mark.parametrize(
    ("device", "small"),
    [
        (f"{SM80} -kernels=dp4a", False),
        ("cuda -arch=sm_75 -kernels=int8", False),
        (f"{SM80} -kernels=int8", False),
        ("cuda -arch=sm_75", True),
        (SM80, True),
    ],
)
def test_products_are_exact(device: str, small: bool, tmp_path: Path) -> None:
    """Odd sizes, several stages of K, every width of a panel, 4-bit codes packed and not, every zero point."""
    isa, rng = parse_device(device), np.random.default_rng(0)
    kernels, cases = {}, []
    shapes = [(1, 1, 1), (5, 7, 9), (16, 64, 64), (33, 65, 16), (70, 130, 70), (17, 201, 33)]
    shapes += [tuple(int(rng.integers(1, most)) for most in (100, 300, 140)) for _ in range(3)]
    for i, (m, k, n) in enumerate(shapes):
        zero = (128, 0, 131, 3)[i % 4] if small else (128, 0, 200, 255)[i % 4]
        bits, batch = (4, 8)[i // 2 % 2], 1 + i % 2
        panels, kernels[f"f{i}"] = product(isa, m, k, n, bits, zero, batch, small=small)
        low, high = ((120, 136) if zero >= 120 else (0, 16)) if small else (0, 256)
        a = np.full((batch, m, panels.depth), 255, np.uint8)  # what lies in the padding must not matter
        a[..., :k] = rng.integers(low, high, (batch, m, k))
        most = 8 if small or bits == 4 else 128
        b = rng.integers(-most, most, (batch, k, n)).astype(np.int8)
        cases.append((f"f{i}", a, panels.pack(b), reference(a[..., :k], b, zero)))
    emulator = cuda_emulator.Emulator(isa, tmp_path, kernels)
    for name, a, b, expected in cases:
        found = np.full(expected.shape, -1, np.int32)
        emulator(name, a, b, found)
        np.testing.assert_array_equal(found, expected, err_msg=name)


@emulation
@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_missing_barrier_is_noticed(which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation finds races: without any one of its barriers the kernel fails."""
    emulated = cuda_emulator.emulated

    def without(source: str) -> str:
        parts = source.split("__syncthreads();")
        assert len(parts) == 4
        return emulated("__syncthreads();".join(parts[:which]) + "__syncthreads();".join(parts[which:]))

    monkeypatch.setattr(cuda_emulator, "emulated", without)
    isa = parse_device(SM80)
    panels, kernel = product(isa, 40, 200, 20, 4, 128, small=True)
    emulator = cuda_emulator.Emulator(isa, tmp_path, {"f": kernel})
    a, b = np.full((1, 40, panels.depth), 130, np.uint8), np.ones((1, 200, 20), np.int8)
    with pytest.raises(AssertionError, match="f: threads race for shared memory"):
        emulator("f", a, panels.pack(b), np.zeros((1, 40, 20), np.int32))


@emulation
def test_extreme_codes_and_rows_at_any_address(tmp_path: Path) -> None:
    isa, k = parse_device(SM80), 4100
    a = np.stack([np.full(k, 255), np.zeros(k), np.arange(k) % 2 * 255]).astype(np.uint8)[None]
    small_a = np.stack([np.full(k, 120), np.full(k, 135), np.arange(k) % 2 * 15 + 120]).astype(np.uint8)[None]
    b = np.stack([np.full(k, -128), np.full(k, 127), np.where(np.arange(k) % 2, -128, 127)], -1).astype(np.int8)[None]
    odd = np.random.default_rng(0).integers(0, 256, (1, 9, 23)).astype(np.uint8)  # rows of 23 bytes: no word is aligned
    panels, wide = product(isa, 3, k, 3, 8, 0)
    small_panels, small = product(isa, 3, k, 3, 4, 128, small=True)
    odd_panels, unaligned = product(isa, 9, 19, 10, 8, 128, stride=23)
    emulator = cuda_emulator.Emulator(isa, tmp_path, {"wide": wide, "small": small, "unaligned": unaligned})
    found = np.zeros((1, 3, 3), np.int32)
    emulator("wide", a, panels.pack(b), found)
    np.testing.assert_array_equal(found, reference(a, b, 0))
    b4 = np.clip(b, -8, 7)
    emulator("small", np.pad(small_a, ((0, 0), (0, 0), (0, small_panels.depth - k))), small_panels.pack(b4), found)
    np.testing.assert_array_equal(found, reference(small_a, b4, 128))
    right = np.random.default_rng(1).integers(-128, 128, (1, 19, 10)).astype(np.int8)
    out = np.zeros((1, 9, 10), np.int32)
    emulator("unaligned", odd, odd_panels.pack(right), out)
    np.testing.assert_array_equal(out, reference(odd[..., :19], right, 128))


@emulation
def test_epilogues_blocks_and_zero_points(tmp_path: Path) -> None:
    """Scale, bias, GELU, residual, quantizer; blocks of K with scales; zero points of the right operand."""
    isa, rng = parse_device(SM80), np.random.default_rng(1)
    m, k, n, blocks, step = 21, 40, 70, 3, np.float32(0.21)
    whole, column = (0, 0, n, 1), Place((n,), (0, 0, 0, 1))
    panels = Panels(k, n, panel_width(n, isa.widths), isa.group, 4)
    left = Place((m, panels.depth), (0, 0, panels.depth, 0), "uint8")
    steps = (
        Step("Mul", ((VALUE, 0), (OPERAND, 0))),
        Step("Add", ((VALUE, 1), (OPERAND, 1))),
        Step("Gelu", ((VALUE, 2),)),
        Step("Add", ((OPERAND, 2), (VALUE, 3))),
        Step("quantize", ((VALUE, 4), (OPERAND, 3)), -8, 7, 1, 128),
    )
    operands = (column, column, Place((m, n), whole), Place((), (0, 0, 0, 0)))
    outputs = ((4, Place((m, n), whole)), (5, Place((m, n), whole, "uint8")))
    tail = integer_kernel(isa, SmallGeometry((1, 1), m, left, panels, 128), Epilogue(operands, steps, outputs))
    blocked_left = Place((m, blocks * k), (0, 0, blocks * k, 0), "uint8")
    geometry = Geometry((1, 1), m, blocked_left, panels, 131, blocks, "columns")
    blocked = integer_kernel(isa, geometry, Epilogue(outputs=((0, Place((m, n), whole)),)))
    kernels = {"tail": tail, "blocked": blocked, "sums": rows_.row_sums_kernel(geometry)}
    emulator = cuda_emulator.Emulator(isa, tmp_path, kernels)

    a = rng.integers(120, 136, (m, panels.depth)).astype(np.uint8)
    b = rng.integers(-8, 8, (1, k, n)).astype(np.int8)
    scale, bias = rng.uniform(1e-2, 1e-1, n).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    floats, codes = np.zeros((m, n), np.float32), np.zeros((m, n), np.uint8)
    emulator("tail", a, panels.pack(b), scale, bias, residual, np.array(step), floats, codes)
    x = reference(a[:, :k], b[0], 128) * scale.astype(np.float64) + bias
    x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) + residual
    np.testing.assert_allclose(floats, x, rtol=2e-5, atol=2e-5)
    clear = np.abs(np.abs(x / step - np.trunc(x / step)) - 0.5) > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(codes[clear], (np.clip(np.rint(x / step) + 1, -8, 7) + 128)[clear])

    a = rng.integers(0, 256, (m, blocks * k)).astype(np.uint8)
    b = rng.integers(-8, 8, (blocks, k, n)).astype(np.int8)
    factors = rng.integers(-8, 8, (blocks, n)).astype(np.int32)
    scales = rng.uniform(1e-4, 1e-3, (blocks, n)).astype(np.float32)
    sums, found = np.zeros((1, blocks, m), np.int32), np.zeros((m, n), np.float32)
    emulator("sums", a, sums)
    rows = a.reshape(m, blocks, k).astype(np.int64) - 131
    np.testing.assert_array_equal(sums[0], rows.sum(2).T)
    emulator("blocked", a, panels.pack(b), sums, factors, scales, found)
    exact = np.einsum("mjk,jkn->jmn", rows, b.astype(np.int64) + factors[:, None])
    expected = np.zeros((m, n), np.float32)
    for block in range(blocks):
        expected += exact[block].astype(np.float32) * scales[block]
    np.testing.assert_array_equal(found, expected)


@emulation
def test_rows_panels_and_floats(tmp_path: Path) -> None:
    """LayerNorm, softmax, codes of probabilities, panels of an activation, FP32 products."""
    isa, rng = parse_device(SM80), np.random.default_rng(2)
    rows, width, depth = 7, 77, 80
    place, column = Place((rows, width), (0, 0, width, 1)), Place((width,), (0, 0, 0, 1))
    steps = (Step("Mul", ((VALUE, 0), (OPERAND, 0))), Step("Add", ((VALUE, 1), (OPERAND, 1))))
    code = Step("quantize", (), 0, 15, 0, 0)
    panels = Panels(13, 37, 64, 4, 8)
    floats = Panels(33, 70, 64, 1, 32)
    source = Place(
        (2, 13, 3, 37), (13 * 3 * 37, 37, 3 * 37, 1), "uint8"
    )  # (outer, k, inner, n) as (outer, inner, k, n)
    kernels = {
        "norm": rows_.layer_norm_kernel(rows, width, 1e-5, Epilogue((column, column), steps, ((2, place),))),
        "softmax": rows_.softmax_kernel(rows, width),
        "codes": rows_.softmax_codes_kernel((1, rows, width), code, depth),
        "panels": rows_.panels_kernel((2, 3), panels, source, 128),
        "floats": float_kernel(floats, 2, 67),
    }
    emulator = cuda_emulator.Emulator(isa, tmp_path, kernels)

    x = (rng.standard_normal((rows, width)) * 4 + 20).astype(np.float32)
    gamma, beta = rng.standard_normal((2, width)).astype(np.float32)
    wide, out = x.astype(np.float64), np.zeros((rows, width), np.float32)
    emulator("norm", x, gamma, beta, out)
    normal = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * gamma + beta
    np.testing.assert_allclose(out, normal, rtol=1e-4, atol=1e-4)
    emulator("softmax", x, out)
    p = np.exp(wide - wide.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, p, rtol=2e-6, atol=1e-7)
    bytes_, step = np.full((1, rows, depth), 77, np.uint8), np.float32(0.01)
    emulator("codes", x, np.array(step), bytes_)
    clear = np.abs(np.abs(p / step - np.trunc(p / step)) - 0.5) > 1e-3
    np.testing.assert_array_equal(bytes_[0, :, :width][clear], np.clip(np.rint(p / step), 0, 15)[clear])
    assert not bytes_[..., width:].any()

    raw = rng.integers(0, 256, source.shape).astype(np.uint8)
    packed = np.full((6, *panels.shape), 99, np.int8)
    emulator("panels", raw, packed)
    codes = (raw.astype(np.int16) - 128).astype(np.int8).transpose(0, 2, 1, 3).reshape(6, 13, 37)
    np.testing.assert_array_equal(packed, panels.pack(codes))

    a, b = rng.standard_normal((2, 67, 33)).astype(np.float32), rng.standard_normal((2, 33, 70)).astype(np.float32)
    found = np.zeros((2, 67, floats.columns), np.float32)
    emulator("floats", a, floats.pack(b), found)
    # Any order of summation errs by at most K units in the last place of the sum of magnitudes.
    bound = 33 * np.finfo(np.float32).eps * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64))
    assert np.all(np.abs(found[..., :70] - a.astype(np.float64) @ b.astype(np.float64)) <= bound)


# Devices


@pytest.mark.parametrize(
    ("device", "unit", "capability"),
    [
        ("cuda", "int4", "8.0"),
        ("cuda -arch=sm_61", "dp4a", "6.1"),
        ("cuda -arch=sm_75", "int4", "7.5"),
        ("cuda -arch=sm_89", "int4", "8.9"),
        ("cuda -arch=sm_90", "int8", "9.0"),
        ("cuda -arch=sm_120", "int8", "12.0"),
        ("cuda -arch=sm_86 -kernels=int8", "int8", "8.6"),
    ],
)
def test_devices(device: str, unit: str, capability: str) -> None:
    isa = parse_device(device)
    assert (isa.unit, isa.capability) == (unit, capability)
    assert cuda_target(isa)["arch"] == isa.arch


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("cuda sm_80", r"unknown device 'cuda sm_80' for TVM.*-arch=sm_NN.*cuda -arch=sm_86"),
        ("cuda -arch=sm_52", r"no GPU that multiplies bytes.*sm_61 or later.*Found: sm_52"),
        ("cuda -arch=ampere", r"no GPU that multiplies bytes.*Found: ampere"),
        ("cuda -arch=sm_90 -kernels=int4", r"sm_90 has no such kernels.*one of dp4a, int8\. Found: int4"),
        ("cuda -arch=sm_61 -kernels=tensor", r"sm_61 has no such kernels.*one of dp4a\. Found: tensor"),
    ],
)
def test_wrong_devices(device: str, text: str, tmp_path: Path) -> None:
    onnx.save(linear("w4a4", "INT4", "INT4")[0], tmp_path / "m.onnx")
    with pytest.raises(RecipeError, match=text):
        load_target("tvm").build(
            tmp_path / "m.onnx", tmp_path, precision="w4a4", options={"device": device}, progress=lambda _: None
        )


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if cuda_compiler() is not None and not str(cuda_compiler()).startswith("nvcc"):
        pytest.skip("NVRTC is installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    if cuda_compiler() is not None:
        pytest.skip("NVRTC is installed")
    with pytest.raises(RuntimeUnavailable, match=r"no CUDA compiler. Expected: nvcc on PATH, or NVRTC.*pip install"):
        require_cuda_compiler(parse_device("cuda"))
    lines = load_runtime("tvm").details()
    assert lines[0].startswith("CUDA: cannot be built: no nvcc on PATH")


@compiler
def test_an_architecture_that_the_compiler_does_not_know() -> None:
    with pytest.raises(RuntimeUnavailable, match=r"makes no code for sm_999. Expected: .*sm_80"):
        require_cuda_compiler(CudaIsa("sm_999", "int8"))


@pytest.mark.parametrize(
    ("built", "device", "runs"),
    [("8.0", "8.0", True), ("8.0", "8.6", True), ("8.6", "8.0", False), ("7.5", "8.0", False), ("12.0", "12.1", True)],
)
def test_machine_code_runs_on_the_same_major_number(built: str, device: str, runs: bool) -> None:
    assert runs_on(built, device) == runs


# What the compiler makes

WANTED = {  # PTX and machine code for bytes, then for 4-bit codes
    "sm_75": ("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32", "IMMA.8816.S8.S8"),
    "sm_80": ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "IMMA.16832.S8.S8"),
    "sm_75 s4": ("mma.sync.aligned.m8n8k32.row.col.s32.s4.s4.s32", "IMMA.8832.S4.S4"),
    "sm_80 s4": ("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32", "IMMA.16864.S4.S4"),
}


@compiler
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"])
def test_kernels_hold_the_instruction(arch: str) -> None:
    isa = parse_device(f"cuda -arch={arch}")
    kernels = {"bytes": product(isa, 16, 64, 16, 8, 128)[1]}
    kernels["dp4a"] = product(parse_device(f"cuda -arch={arch} -kernels=dp4a"), 16, 64, 16, 4, 128)[1]
    if isa.int4:
        kernels["small"] = product(isa, 16, 64, 16, 4, 128, small=True)[1]
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    built = tvm.compile(tvm.IRModule(named), target=tvm.target.Target(cuda_target(isa)))
    code = compile_source(built.mod.imports[0].inspect_source("cuda"), isa)
    assert code.binary[:4] == b"\x7fELF"
    generation = arch if arch == "sm_75" else "sm_80"
    which = 1 if code.read_from == "SASS" else 0
    assert set(code.instructions["bytes"]) == {WANTED[generation][which]}
    assert set(code.instructions["dp4a"]) == {("dp4a.s32.s32", "IDP.4A.S8.S8")[which]}
    if isa.int4:
        assert set(code.instructions["small"]) == {WANTED[f"{generation} s4"][which]}
        assert multiplies_4_bits(code.instructions["small"])
    assert not multiplies_4_bits(code.instructions["bytes"])
    for name in kernels:
        assert code.resources[name]["registers"] > 16
        assert code.resources[name]["shared_bytes"] > 0
        assert code.resources[name]["spill_bytes"] == 0


@pytest.mark.skipif(nvrtc_bindings() is None, reason="NVRTC is not installed")
def test_nvrtc_makes_the_same_instructions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert str(cuda_compiler()).startswith("NVRTC")
    isa = parse_device(SM80)
    kernel = product(isa, 16, 64, 16, 4, 128, small=True)[1].with_attr("global_symbol", "small")
    built = tvm.compile(tvm.IRModule({"small": kernel}), target=tvm.target.Target(cuda_target(isa)))
    code = compile_source(built.mod.imports[0].inspect_source("cuda"), isa)
    assert set(code.instructions["small"]) == {WANTED["sm_80 s4"][0]}
    assert code.binary[:4] == b"\x7fELF"
    assert code.resources["small"]["registers"] > 16


def test_the_table_of_units_names_what_hardware_has() -> None:
    assert [best_unit(n) for n in (61, 70, 72, 75, 80, 86, 87, 89, 90, 100, 120)] == (
        ["dp4a"] * 3 + ["int4"] * 5 + ["int8"] * 3
    )


# Artifacts


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``artifacts(device, activation)``: one W4A4 or W4A8 product, built once."""
    made: dict[tuple[str, str], Artifact] = {}

    def build(device: str, activation: str) -> Artifact:
        if (device, activation) not in made:
            folder = tmp_path_factory.mktemp("cuda")
            precision = "w4a4" if activation == "INT4" else "w4a8"
            onnx.save(linear(precision, "INT4", activation)[0], folder / "m.onnx")
            options = {"device": device, "batch": [1]}
            made[device, activation] = load_target("tvm").build(
                folder / "m.onnx", folder, precision=precision, options=options, progress=lambda _: None
            )
        return made[device, activation]

    return build


@compiler
@pytest.mark.parametrize(
    ("device", "activation", "rung", "precision"),
    [
        ("cuda -arch=sm_86", "INT4", "native", "int4"),
        ("cuda -arch=sm_90", "INT4", "emulated", "int8"),
        ("cuda -arch=sm_86", "INT8", "emulated", "int8"),
    ],
)
def test_an_artifact_says_what_it_executes(
    artifacts: Any, device: str, activation: str, rung: str, precision: str
) -> None:
    artifact = artifacts(device, activation)
    about = json.loads(artifact.path("description").read_text())
    capability = parse_device(device).capability
    assert about["compute_capability"] == capability
    assert artifact.info["compute_capabilities"] == [capability]
    assert about["features"] == []
    assert about["ops"]["fc"]["storage"] == "int4, two a byte"
    assert about["disassembly"]["compiler"] == cuda_compiler()
    kernel = about["ops"]["fc"]["kernels"]["1"]
    assert kernel.endswith("_int4") == (precision == "int4")
    assert about["resources"][kernel]["registers"] > 16
    audit = gpu_audit(about, 1)
    assert (audit.rung, audit.executed) == (rung, {precision: 1.0})
    assert not audit.mismatches()
    (instruction,) = about["disassembly"]["instructions"][kernel]
    assert f"{instruction} in 1 of 1" in audit.evidence
    assert audit.ops[0].instruction == instruction
    assert artifact.info["rung"] == rung
    assert artifact.info["audit"]["ops"][0]["kernel"] == kernel


@compiler
def test_the_library_holds_machine_code_and_no_source(artifacts: Any) -> None:
    library = artifacts("cuda -arch=sm_86", "INT4").path("library").read_bytes()
    assert b"__CUDACC_RTC__" not in library
    assert b"\x05\0\0\0\0\0\0\0cubin" in library


@compiler
def test_without_a_gpu_an_artifact_is_refused(artifacts: Any) -> None:
    runtime = load_runtime("tvm")
    if not runtime.details()[1].startswith("CUDA: cannot be run"):
        pytest.skip("there is a GPU")
    expected = (
        r"built for CUDA, and there is no GPU to run it. Expected: a GPU of compute capability 8.6, or a later 8.x"
    )
    with pytest.raises(DeviceUnavailable, match=expected) as caught:
        runtime.open(artifacts("cuda -arch=sm_86", "INT4"), threads=1)
    assert caught.value.exit_code == 3


@compiler
def test_no_gpu_is_reached_over_rpc(artifacts: Any) -> None:
    artifact = artifacts("cuda -arch=sm_86", "INT4")
    about = json.loads(artifact.path("description").read_text())
    link: Any = SimpleNamespace(address="rpc://board:9190", features=None)
    with pytest.raises(UnsupportedError, match=r"for CUDA are not run over RPC. Found: .*capability 8\.6"):
        RemoteMachine(artifact, about, link, 1)


def test_the_device_of_a_report_is_the_gpu_that_was_built_for() -> None:
    runtime = load_runtime("tvm")
    assert runtime.device_for({"device": "cuda -arch=sm_86"}) == "gpu: cuda -arch=sm_86"
    assert runtime.device_for({"device": "llvm"}) == runtime.device() == runtime.device_for({})


@compiler
def test_a_changed_artifact_is_refused_before_a_gpu_is_asked_for(artifacts: Any, tmp_path: Path) -> None:
    artifact = artifacts("cuda -arch=sm_86", "INT4")
    for name in artifact.files.values():
        shutil.copyfile(artifact.folder / name, tmp_path / name)
    (tmp_path / "model.so").write_bytes(b"no library")
    with pytest.raises(ArtifactError, match=r"model\.so: truncated or changed"):
        load_runtime("tvm").open(
            Artifact(tmp_path, "tvm", artifact.precision, artifact.files, artifact.info), threads=1
        )


@compiler
def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(linear("w8a8", "INT8", "INT8")[0], tmp_path / "m.onnx")
    arguments = [str(tmp_path / "m.onnx"), str(tmp_path / "out"), "--device", "cuda -arch=sm_75 -kernels=dp4a"]
    assert to_tvm.main(arguments) == 0
    assert "for CUDA sm_75, dp4a" in capsys.readouterr().out
    assert to_tvm.main([*arguments[:2], "--device", "cuda -arch=sm_99"]) == 3
    assert "makes no code for sm_99" in capsys.readouterr().err


def serialized(*modules: tuple[bytes, bytes]) -> bytes:
    """Modules as TVM packs them into a library: the first imports the second, and so on."""

    def string(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text

    count = len(modules)
    tree = struct.pack(f"<{count + 2}Q", count + 1, *range(count), count - 1)
    body = tree + struct.pack(f"<{count}Q", count - 1, *range(1, count))
    for kind, content in modules:
        body += string(kind) + (b"" if kind == b"_lib" else string(content))
    return struct.pack("<Q", len(body)) + body


def test_source_becomes_machine_code_in_place() -> None:
    def cuda(form: bytes, code: bytes) -> bytes:
        return b"".join(struct.pack("<Q", len(x)) + x if len(x) > 3 else x for x in (form, b"\1\2\3", code))

    source = b"\n#ifdef __CUDACC_RTC__ ..."
    packed = serialized((b"relax.VMExecutable", b"program"), (b"_lib", b""), (b"cuda", cuda(b"cuda", source)))
    compiled = serialized((b"relax.VMExecutable", b"program"), (b"_lib", b""), (b"cuda", cuda(b"cubin", b"machine")))
    assert replace_source(packed, b"machine") == compiled
    assert replace_source(compiled, b"machine") == compiled
    for broken in (packed[:-1], serialized((b"_lib", b"")), packed.replace(b"#ifdef", b"#ifnot")):
        with pytest.raises(RuntimeUnavailable, match=r"a form that is not known here. Expected: the form of TVM 0.27"):
            replace_source(broken, b"machine")

"""Kernels for each instruction set: the instructions that they must hold, extreme codes, other processors' exactness.

Arm code runs here under qemu, linked with a cross compiler; where either is missing, only its assembly is read.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tvm = pytest.importorskip("tvm")

from common_graphs import Common  # noqa: E402

from s2d_deploy.errors import DeviceUnavailable, RecipeError, RuntimeUnavailable  # noqa: E402
from s2d_deploy.export import _tvm_isa, to_tvm  # noqa: E402, TID251
from s2d_deploy.export import _tvm_math as fast  # noqa: E402, TID251
from s2d_deploy.export._tvm_attention import panels_kernel  # noqa: E402, TID251
from s2d_deploy.export._tvm_epilogue import Epilogue, Place, Step  # noqa: E402, TID251
from s2d_deploy.export._tvm_integer import integer_kernel  # noqa: E402, TID251
from s2d_deploy.export._tvm_isa import isa_of, required_features, resolve_target  # noqa: E402, TID251
from s2d_deploy.export._tvm_kernels import Geometry  # noqa: E402, TID251
from s2d_deploy.export._tvm_link import linker_of  # noqa: E402, TID251
from s2d_deploy.export._tvm_multiply import NARROW_RUNS  # noqa: E402, TID251
from s2d_deploy.export._tvm_panels import Panels, panel_width  # noqa: E402, TID251
from s2d_deploy.registry import load_runtime, load_target  # noqa: E402
from s2d_deploy.runtimes._cpu_features import missing_features  # noqa: E402, TID251

ARM = "llvm -mtriple=aarch64-linux-gnu -mattr="
VNNI, AVX_VNNI = "llvm -mcpu=x86-64-v4 -mattr=+avx512vnni", "llvm -mcpu=x86-64-v3 -mattr=+avxvnni"
V4, V3, V2 = (f"llvm -mcpu=x86-64-v{level}" for level in (4, 3, 2))
NEON, DOTPROD, I8MM = f"{ARM}+neon", f"{ARM}+neon,+dotprod", f"{ARM}+neon,+dotprod,+i8mm"
PAIRS = [V4, V3, V2]


def target_of(device: str) -> Any:
    return tvm.target.Target(resolve_target(device))


def runnable(device: str) -> Any:
    target = target_of(device)
    if missing_features(required_features(target)):
        pytest.skip("this processor cannot run it")
    return target


def product(target: Any, batch: int, m: int, k: int, n: int, bits: int, zero: int) -> tuple[Panels, Any]:
    """The kernel that stores its accumulators."""
    isa = isa_of(target)
    panels = Panels(k, n, panel_width(n, isa.widths), isa.group, bits)
    left = Place((batch, m, panels.depth), (m * panels.depth, 0, panels.depth, 0), "uint8")
    out = Place((batch, m, n), (m * n, 0, n, 1), "int32")
    return panels, integer_kernel(isa, Geometry((batch, 1), m, left, panels, zero), Epilogue(outputs=((-1, out),)))


def compiled(target: Any, **kernels: Any) -> Any:
    functions = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    return tvm.compile(tvm.IRModule(functions), target=target)


def computed(target: Any, a: np.ndarray, b: np.ndarray, bits: int, zero: int) -> np.ndarray:
    """What the kernel makes of left bytes (batch, m, k) and right codes (batch, k, n)."""
    (batch, m, k), n = a.shape, b.shape[-1]
    panels, kernel = product(target, batch, m, k, n, bits, zero)
    bytes_ = np.full((batch, m, panels.depth), 255, np.uint8)  # what lies in the padding must not matter
    bytes_[..., :k] = a
    out = tvm.runtime.tensor(np.zeros((batch, m, n), np.int32))
    compiled(target, f=kernel)["f"](tvm.runtime.tensor(bytes_), tvm.runtime.tensor(panels.pack(b)), out)
    return out.numpy()


def reference(a: np.ndarray, b: np.ndarray, zero: int) -> np.ndarray:
    return (a.astype(np.int64) - zero) @ b.astype(np.int64)


@functools.cache
def assembly(device: str, bits: int) -> str:
    return compiled(target_of(device), f=product(target_of(device), 1, 13, 70, 40, bits, 128)[1]).mod.inspect_source(
        "asm"
    )


@pytest.mark.parametrize(
    ("device", "bits", "wanted"),
    [
        *((device, bits, {"vpdpbusd"}) for device in (VNNI, AVX_VNNI) for bits in (4, 8)),
        *((device, 8, {"vpmaddwd"}) for device in (V4, V3)),
        *((device, 4, {"vpmaddubsw", "vpmaddwd"}) for device in (V4, V3)),
        (V2, 8, {"pmaddwd"}),
        (V2, 4, {"pmaddubsw", "pmaddwd"}),
        *((DOTPROD, bits, {"sdot"}) for bits in (4, 8)),
        *((I8MM, bits, {"sudot"}) for bits in (4, 8)),
    ],
)
def test_the_inner_loop_holds_the_instruction(device: str, bits: int, wanted: set[str]) -> None:
    isa, text = isa_of(target_of(device)), assembly(device, bits)
    assert isa.mnemonic in wanted
    for mnemonic in wanted:
        found = re.findall(rf"^\s+(?:{{vex}}\s+)?{mnemonic}\s.*$", text, re.MULTILINE)
        assert len(found) >= isa.rows
        if device in (V4, VNNI):
            assert any("zmm" in line for line in found)
        if device in (DOTPROD, I8MM):  # groups come from lanes, without a copy to all of them
            assert sum("[3]" in line for line in found) >= isa.rows
    if bits == 8:
        assert "maddubsw" not in text  # it would saturate


@pytest.mark.parametrize("device", PAIRS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [8 * NARROW_RUNS * 4, 4099])
def test_extreme_codes_do_not_saturate(device: str, bits: int, k: int) -> None:
    target = runnable(device)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    a = np.stack([np.full(k, 255), np.zeros(k), np.arange(k) % 2 * 255, (np.arange(k) + 1) % 2 * 255])[None]
    b = np.stack([np.full(k, least), np.full(k, most), np.where(np.arange(k) % 2, least, most)], axis=-1)[None]
    a, b = a.astype(np.uint8), b.astype(np.int8)
    for zero in (0, 128, 255):
        np.testing.assert_array_equal(computed(target, a, b, bits, zero), reference(a, b, zero))


def test_sums_in_16_bits_are_as_long_as_they_may_be() -> None:
    """|byte * 4-bit code| <= 255 * 8; a lane adds two products for each group."""
    largest = 255 * 8 * 2
    assert NARROW_RUNS * largest <= 2**15 - 1 < (NARROW_RUNS + 1) * largest


@pytest.mark.parametrize("device", PAIRS)
@given(
    st.integers(1, 3),
    st.integers(1, 15),
    st.integers(1, 150),
    st.integers(1, 70),
    st.sampled_from([4, 8]),
    st.integers(0, 255),
)
@settings(max_examples=6, deadline=None)
def test_pairs_are_exact(device: str, batch: int, m: int, k: int, n: int, bits: int, zero: int) -> None:
    target, rng = runnable(device), np.random.default_rng(m * k * n)
    a = rng.integers(0, 256, (batch, m, k)).astype(np.uint8)
    b = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (batch, k, n)).astype(np.int8)
    np.testing.assert_array_equal(computed(target, a, b, bits, zero), reference(a, b, zero))


def gelu_and_codes(n: int) -> Epilogue:
    """Scale, GELU, and a quantizer to INT4 with zero point 1."""
    steps = (
        Step("Mul", (("value", 0), ("operand", 0))),
        Step("Gelu", (("value", 1),)),
        Step("quantize", (("value", 2), ("operand", 1)), -8, 7, 1, 128),
    )
    row, column = Place((1,), (0, 0, 0, 0)), Place((n,), (0, 0, 0, 1))
    return Epilogue((column, row), steps, ((3, Place((5, n), (0, 0, n, 1), "uint8")),))


@pytest.mark.parametrize("device", [VNNI, V4, V3, V2, "llvm", NEON, DOTPROD])
def test_epilogues_stay_in_vectors(device: str) -> None:
    """No libm, and no arithmetic on single floats: each would cost a factor of the lanes."""
    target = target_of(device)
    isa = isa_of(target)
    panels = Panels(24, 64, panel_width(64, isa.widths), isa.group, 4)
    left = Place((5, panels.depth), (0, 0, panels.depth, 0), "uint8")
    kernel = integer_kernel(isa, Geometry((1, 1), 5, left, panels, 128), gelu_and_codes(64))
    text = compiled(target, f=kernel).mod.inspect_source("asm")
    arm = _tvm_isa.is_arm(target)
    vector, single = (
        (r"\tf(?:mul|mla|add)\tv", r"\tf\w+\ts\d") if arm else (r"\tv?(?:mul|add|f\w+)ps\t", r"\tv?\w+ss\t")
    )
    assert len(re.findall(vector, text)) > 10
    found = {
        line for line in re.findall(rf"{single}.*", text) if not re.match(r"\t(?:v?(?:mov|broadcast)ss|fmov)\t", line)
    }
    assert not found
    assert not re.search(r"\b(?:callq?|bl)\s+\*?(?:nearbyint|rint|exp|erf|tanh)", text)


@pytest.mark.parametrize("device", [VNNI, "llvm"])
def test_rounding_by_addition_is_half_to_even(device: str) -> None:
    from tvm import te

    target = runnable(device)
    whole = np.arange(-1024, 1025, dtype=np.float32) / 2
    x = np.concatenate([whole, np.nextafter(whole, np.float32(1e9)), np.nextafter(whole, np.float32(-1e9))])
    placeholder = te.placeholder(x.shape, "float32", "x")
    result = te.compute(x.shape, lambda i: fast.small_integer(placeholder[i]))
    out = tvm.runtime.tensor(np.zeros(x.shape, np.int32))
    compiled(target, f=te.create_prim_func([placeholder, result]))["f"](tvm.runtime.tensor(x), out)
    np.testing.assert_array_equal(out.numpy(), np.rint(x).astype(np.int32))


# Arm

HARNESS = r"""
#include <stdio.h>
#include <stdlib.h>
#include <tvm/runtime/c_backend_api.h>

typedef int (*Lambda)(int, TVMParallelGroupEnv*, void*);
void* allocate(int type, int id, uint64_t bytes, int code, int bits) {
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}
int release(int type, int id, void* memory) { free(memory); return 0; }
int launch(Lambda lambda, void* data, int tasks) {
  TVMParallelGroupEnv alone = {0, 1};
  return lambda(0, &alone, data);
}
void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  for (int i = 0; i < count; ++i) fputs(parts[i], stderr);
}
__attribute__((weak)) void* __TVMBackendAllocWorkspace;
__attribute__((weak)) void* __TVMBackendFreeWorkspace;
__attribute__((weak)) void* __TVMBackendParallelLaunch;
FUNCTIONS
int main(void) {
  __TVMBackendAllocWorkspace = allocate;
  __TVMBackendFreeWorkspace = release;
  __TVMBackendParallelLaunch = launch;
  int32_t head[2], about[8];
  while (fread(head, sizeof(head), 1, stdin) == 1) {  // the function's number, and how many arrays
    static int64_t shapes[16][4];
    DLTensor tensors[16];
    TVMFFIAny values[16], result = {0};
    for (int i = 0; i < head[1]; ++i) {  // type (code, bits), bytes, dimensions, four sizes
      if (fread(about, sizeof(about), 1, stdin) != 1) return 3;
      for (int d = 0; d < 4; ++d) shapes[i][d] = about[4 + d];
      void* data = allocate(1, 0, about[2], 0, 0);
      if (about[2] && fread(data, about[2], 1, stdin) != 1) return 3;
      tensors[i] = (DLTensor){data, {kDLCPU, 0}, about[3], {about[0], about[1], 1}, shapes[i], 0, 0};
      // Dense strides, which TVM wants spelled out.
      int64_t* strides = malloc(4 * sizeof(int64_t));
      for (int64_t d = about[3] - 1, step = 1; d >= 0; step *= shapes[i][d--]) strides[d] = step;
      tensors[i].strides = strides;
      values[i] = (TVMFFIAny){.type_index = kTVMFFIDLTensorPtr, .v_ptr = &tensors[i]};
    }
    if (functions[head[0]](0, values, head[1], &result)) return 4;
    fwrite(tensors[head[1] - 1].data, about[2], 1, stdout);
  }
  return 0;
}
"""


def under_qemu(
    target: Any, folder: Path, kernels: list[Any], calls: list[tuple[int, list[np.ndarray]]]
) -> list[np.ndarray]:
    """Run kernels that were compiled for Arm; the last array of each call is its output.

    Skips where there is no qemu, or no compiler for Arm.
    """
    import tvm_ffi.libinfo as ffi

    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    compiler = linker_of(target)
    if qemu is None or compiler is None:
        pytest.skip("no qemu-aarch64, or no compiler for aarch64")
    names = [f"f{i}" for i in range(len(kernels))]
    compiled(target, **dict(zip(names, kernels, strict=True))).mod.write_to_file(str(folder / "kernels.o"))
    declared = "".join(f"int __tvm_ffi_{n}(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);\n" for n in names)
    table = ", ".join(f"__tvm_ffi_{n}" for n in names)
    source = HARNESS.replace("FUNCTIONS", f"{declared}static const TVMFFISafeCallType functions[] = {{{table}}};")
    (folder / "main.c").write_text(source)
    headers = [Path(tvm.__file__).parent / "include", ffi.find_include_path(), ffi.find_dlpack_include_path()]
    options = ["-static", "-O1", *(f"-I{h}" for h in headers), "main.c", "kernels.o", "-lm", "-o", "main"]
    command = [compiler[0].replace("g++", "gcc"), *compiler[1:], *options]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    data = b""
    for function, arrays in calls:
        data += struct.pack("2i", function, len(arrays))
        for array in arrays:
            code = {"i": 0, "u": 1, "f": 2}[array.dtype.kind]
            sizes = [*array.shape, *[0] * (4 - array.ndim)]
            data += struct.pack("8i", code, array.itemsize * 8, array.nbytes, array.ndim, *sizes) + array.tobytes()
    done = subprocess.run([qemu, "-cpu", "max", "main"], cwd=folder, input=data, capture_output=True, check=True)
    results, at = [], 0
    for _, arrays in calls:
        out = arrays[-1]
        results.append(np.frombuffer(done.stdout, out.dtype, out.size, at).reshape(out.shape))
        at += out.nbytes
    assert at == len(done.stdout)
    return results


@pytest.mark.parametrize("device", [DOTPROD, I8MM, NEON])
def test_arm_products_are_exact(device: str, tmp_path: Path) -> None:
    target, rng = target_of(device), np.random.default_rng(0)
    kernels, calls, expected = [], [], []
    for batch, m, k, n, bits in [(1, 1, 1, 1, 8), (2, 5, 19, 7, 8), (1, 9, 64, 40, 4), (3, 4, 37, 16, 4)]:
        for zero in (128, int(rng.integers(0, 256))):
            panels, kernel = product(target, batch, m, k, n, bits, zero)
            kernels.append(kernel)
            least, most = -(2 ** (bits - 1)), 2 ** (bits - 1)
            for low, high in ((0, 256), (255, 256)):  # any bytes, and the largest
                a = rng.integers(low, high, (batch, m, panels.depth)).astype(np.uint8)
                b = rng.integers(least, most if low == 0 else least + 1, (batch, k, n)).astype(np.int8)
                calls.append((len(kernels) - 1, [a, panels.pack(b), np.zeros((batch, m, n), np.int32)]))
                expected.append(reference(a[..., :k], b, zero))
    for found, wanted in zip(under_qemu(target, tmp_path, kernels, calls), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_arm_epilogue_quantizes_as_numpy_does(tmp_path: Path) -> None:
    target, rng = target_of(DOTPROD), np.random.default_rng(1)
    isa, (m, k, n) = isa_of(target), (5, 24, 19)
    panels = Panels(k, n, panel_width(n, isa.widths), isa.group, 4)
    left = Place((m, panels.depth), (0, 0, panels.depth, 0), "uint8")
    kernel = integer_kernel(isa, Geometry((1, 1), m, left, panels, 128), gelu_and_codes(n))
    a = rng.integers(0, 256, (m, panels.depth)).astype(np.uint8)
    b = rng.integers(-8, 8, (1, k, n)).astype(np.int8)
    scale, step = rng.uniform(1e-4, 1e-3, n).astype(np.float32), np.array([0.11], np.float32)
    arrays = [a, panels.pack(b), scale, step, np.zeros((m, n), np.uint8)]
    (found,) = under_qemu(target, tmp_path, [kernel], [(0, arrays)])
    x = reference(a[:, :k], b[0], 128) * scale.astype(np.float64)
    x = 0.5 * x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / step.astype(np.float64)
    clear = np.abs(np.abs(x - np.trunc(x)) - 0.5) > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found[clear], (np.clip(np.rint(x) + 1, -8, 7) + 128)[clear])


def test_arm_panels_of_an_activation(tmp_path: Path) -> None:
    target, (k, n) = target_of(DOTPROD), (12, 20)
    isa = isa_of(target)
    panels = Panels(k, n, panel_width(n, isa.widths), isa.group, 8)
    codes = np.random.default_rng(2).integers(-128, 128, (6, k, n)).astype(np.int8)
    stored = {(k * n, n, 1): codes, (k * n, 1, k): codes.transpose(0, 2, 1)}
    kernels, calls = [], []
    for (matrix, row, column), values in stored.items():
        raw = (np.ascontiguousarray(values).astype(np.int16) + 128).astype(np.uint8)
        kernels.append(panels_kernel(isa, (6, 1), panels, Place(raw.shape, (matrix, 0, row, column), "uint8"), 128))
        calls.append((len(calls), [raw, np.full((6, *panels.shape), 99, np.int8)]))
    for found in under_qemu(target, tmp_path, kernels, calls):
        np.testing.assert_array_equal(found, panels.pack(codes))


@pytest.mark.parametrize(
    ("device", "name", "features"),
    [
        (NEON, "plain vectors of 128 bits", {"asimd"}),
        (DOTPROD, "Arm dotprod", {"asimd", "asimddp"}),
        (I8MM, "Arm i8mm", {"asimd", "asimddp", "i8mm"}),
        ("llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-n1", "Arm dotprod", {"asimddp", "atomics"}),
        ("llvm -mtriple=arm64-apple-darwin -mcpu=apple-m2", "Arm i8mm", {"asimddp", "i8mm"}),
        ("llvm -mtriple=riscv64-unknown-linux-gnu", "plain vectors of 128 bits", set()),
        (V3, "AVX2", {"avx2", "fma"}),
        (V2, "SSSE3", {"sse4_2"}),
    ],
)
def test_what_a_target_offers_and_requires(device: str, name: str, features: set[str]) -> None:
    target = target_of(device)
    assert isa_of(target).name == name
    required = set(required_features(target))
    assert features <= required
    assert ("avx2" in required) == (device == V3)


@pytest.mark.parametrize(
    ("features", "target"),
    [
        ({"fp", "asimd", "asimddp", "i8mm"}, {"kind": "llvm", "mattr": ["+neon", "+dotprod", "+i8mm"]}),
        ({"fp", "asimd", "asimddp"}, {"kind": "llvm", "mattr": ["+neon", "+dotprod"]}),
        ({"fp", "asimd"}, {"kind": "llvm", "mattr": ["+neon"]}),
    ],
)
def test_native_on_an_arm(features: set[str], target: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tvm_isa, "cpu_features", lambda: frozenset(features))
    assert resolve_target("native") == target


def save_linear(path: Path) -> None:
    """One product of 4-bit weights and 8-bit activations, with a bias."""
    g, rng = Common("w4a8", x=(3, 16)), np.random.default_rng(0)
    value = g.activation("x", "in", "INT8", 0.1)
    weight = g.weight("fc.weight", "INT4", rng.integers(-7, 8, (16, 24)), rng.uniform(0.05, 0.1, 24), axis=1)
    bias = g.constant("bias", np.zeros(24, np.float32))
    g.add("Add", [g.op("MatMul", "fc", [value, weight], "W4A8", 3 * 16 * 24), bias], "y")
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(g.nodes, "g", g.inputs, [output], list(g.stored.values()))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    model.metadata_props.add(key="s2d.precision", value="w4a8")
    onnx.save(model, path)


def build(tmp_path: Path, device: str) -> Any:
    save_linear(tmp_path / "m.onnx")
    options = {"device": device}
    return load_target("tvm").build(
        tmp_path / "m.onnx", tmp_path / "out", precision="w4a8", options=options, progress=lambda _: None
    )


def test_an_arm_artifact_without_a_linker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code is LLVM's; the note says what was missing, and a processor that cannot run it refuses by features."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    artifact = build(tmp_path, DOTPROD)
    assert set(artifact.files) == {"program", "code", "parameters", "description"}
    assert "no compiler for aarch64-linux-gnu on PATH (aarch64-linux-gnu-g++ or zig" in artifact.info["notes"][-1]
    assert "aarch64" in artifact.path("code").read_text()
    if missing_features(["asimddp"]):
        with pytest.raises(DeviceUnavailable, match=r"Expected: Arm dotprod, with asimd, asimddp"):
            load_runtime("tvm").open(artifact, threads=1)


def test_an_arm_artifact_with_a_linker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if linker_of(target_of(DOTPROD)) is None:
        pytest.skip("no compiler for aarch64")
    save_linear(tmp_path / "m.onnx")
    assert to_tvm.main([str(tmp_path / "m.onnx"), str(tmp_path / "out"), "--device", DOTPROD]) == 0
    assert "for Arm dotprod" in capsys.readouterr().out
    header = (tmp_path / "out" / "model.so").read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert struct.unpack("<H", header[18:]) == (183,)  # EM_AARCH64


@pytest.mark.parametrize(
    ("command", "found"), [("g++", "(file in wrong format|incompatible)"), ("no-such-compiler", "FileNotFoundError")]
)
def test_a_linker_of_another_platform_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, found: str
) -> None:
    foreign = DOTPROD if _tvm_isa.is_foreign(target_of(DOTPROD)) else "llvm -mtriple=x86_64-linux-gnu"
    if command == "g++" and shutil.which("g++") is None:
        pytest.skip("no g++")
    monkeypatch.setenv("CXX", command)
    with pytest.raises(RuntimeUnavailable, match=rf"cannot link TVM's code.*{found}.*CXX='zig c\+\+ -target"):
        build(tmp_path, foreign)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("llvm -mcpu=x86-64-v3 -mattr=+avx512vni", r"'\+avx512vni' for x86_64"),
        ("llvm -mcpu=x86-64-v3 -mattr=+avx512f,+nonsense", r"no feature '\+nonsense'"),
        ("llvm -mtriple=aarch64-linux-gnu -mattr=+neon,+i8m", r"'\+i8m' for aarch64"),
        ("llvm -mcpu=x86-64-v3 -mattr=avx2", r"no feature 'avx2'.*\+name or -name"),
    ],
)
def test_features_that_llvm_does_not_know_are_refused(device: str, words: str) -> None:
    """LLVM would ignore them, and the artifact would run slower than its name says."""
    if "x86" in device and not _tvm_isa.is_x86(tvm.target.Target("llvm")):
        pytest.skip("names of x86-64")
    with pytest.raises(RecipeError, match=words):
        _tvm_isa.require_known_processor(resolve_target(device))


def test_features_that_llvm_knows_pass(capfd: pytest.CaptureFixture[str]) -> None:
    _tvm_isa.require_known_processor(resolve_target("llvm -mtriple=aarch64-linux-gnu -mattr=+neon,+dotprod,-sve"))
    assert not capfd.readouterr().err

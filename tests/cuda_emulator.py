"""CUDA source, as TVM generates it, compiled with g++ and run on the CPU: for tests on machines without a GPU.

Every thread of a block is a fiber; blocks run one after the other. Barriers and warp operations make fibers wait for
each other. Each inline PTX instruction becomes a call of a slow definition, written from the PTX manual's tables of
fragments (section "Matrix fragments for mma").
What this proves: indices, layouts, barriers, arithmetic. What it cannot: races that only parallel warps have (a fiber
runs until it waits, but fibers are also run in reverse order), speed, and what the hardware does.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm.relax
import tvm_ffi

from s2d_deploy.export import _tvm_build  # noqa: TID251
from s2d_deploy.export._tvm_cuda_compile import DeviceCode  # noqa: TID251
from s2d_deploy.export._tvm_cuda_isa import CudaIsa, cuda_target, parse_device  # noqa: TID251
from s2d_deploy.export._tvm_cuda_schedule import schedule_threads  # noqa: TID251

HEADER = r"""
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
using std::max;
using std::min;
template <class A, class B> auto max(A a, B b) { return a > b ? a : b; }
template <class A, class B> auto min(A a, B b) { return a < b ? a : b; }
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(4) char4 { signed char x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) longlong2 { long long x, y; };
#define CUDART_INF_F INFINITY

struct Index { int x, y; };
static Index blockIdx, blockDim;
struct Fiber { ucontext_t context; std::vector<char> stack; bool done; long blocks, warps; };
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static long block_arrivals, block_number;
static std::vector<long> warp_arrivals;
static const std::function<void()>* body;
struct Column { operator int() const { return current % blockDim.x; } };
struct Row { operator int() const { return current / blockDim.x; } };
static struct { Column x; Row y; } threadIdx;
static void yield() { swapcontext(&fibers[current].context, &scheduler); }
static void entry() { (*body)(); fibers[current].done = true; yield(); }
static void __syncthreads() {
  ++block_arrivals;
  long wanted = ++fibers[current].blocks * (long)fibers.size();
  while (block_arrivals < wanted) yield();
}
static void warp_barrier() {
  int warp = current / 32;
  long size = std::min<long>(32, (long)fibers.size() - 32 * warp);
  ++warp_arrivals[warp];
  long wanted = ++fibers[current].warps * size;
  while (warp_arrivals[warp] < wanted) yield();
}
static void launch(Index grid, Index size, const std::function<void()>& f) {
  body = &f;
  blockDim = size;
  int threads = size.x * size.y;
  fibers.resize(threads);
  for (int block = 0; block < grid.x * grid.y; ++block) {
    blockIdx = {block % grid.x, block / grid.x};
    ++block_number;
    block_arrivals = 0;
    warp_arrivals.assign((threads + 31) / 32, 0);
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[i];
      fiber.stack.resize(1 << 15);
      fiber.done = false;
      fiber.blocks = fiber.warps = 0;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, entry, 0);
    }
    int left = threads;
    for (int round = 0; left; ++round) {
      left = 0;
      for (int i = 0; i < threads; ++i) {  // every other round backwards, for what depends on the order to show
        current = (round + block) % 2 ? threads - 1 - i : i;
        if (fibers[current].done) continue;
        swapcontext(&scheduler, &fibers[current].context);
        left += !fibers[current].done;
      }
    }
  }
}

// Shared memory that watches its users: between two barriers no thread may touch what another has written,
// or write what another has read. The fibers' order hides such races; a GPU's does not.
static long faults;
template <class T, int N> struct Shared {
  T data[N];
  long written[N], read[N];  // block and barrier, and the thread below (in `read`, -1 for several)
  int writer[N], reader[N];
  static long now() { return block_number * 100000 + fibers[current].blocks + 1; }
  struct Element {
    Shared& shared;
    int i;
    operator T() const {
      long time = now();
      faults += shared.written[i] == time && shared.writer[i] != current;
      shared.reader[i] = shared.read[i] == time && shared.reader[i] != current ? -1 : current;
      shared.read[i] = time;
      return shared.data[i];
    }
    T operator=(T value) {
      long time = now();
      faults += shared.written[i] == time && shared.writer[i] != current;
      faults += shared.read[i] == time && shared.reader[i] != current;
      shared.written[i] = time;
      shared.writer[i] = current;
      return shared.data[i] = value;
    }
    T operator=(const Element& other) { return *this = (T)other; }
  };
  Element operator[](int i) {
    if (i < 0 || i >= N) abort();
    return {*this, i};
  }
};
extern "C" long race_count() { return faults; }

// A warp's operands, twice, so that one barrier is enough.
struct Held { int a[4], b[2]; char x[8]; };
static Held held[2][1024];
template <class F> static Held* exchanged(F write) {
  int parity = fibers[current].warps % 2;
  write(held[parity][current]);
  warp_barrier();
  return held[parity] + current / 32 * 32;
}
// What lane `from` holds; the own value where there is no such lane.
template <class T> static T of_lane(T x, int from, bool valid = true) {
  Held* warp = exchanged([&](Held& h) { memcpy(h.x, &x, sizeof x); });
  if (!valid || current / 32 * 32 + from >= (int)fibers.size()) return x;
  memcpy(&x, warp[from].x, sizeof x);
  return x;
}
static unsigned __activemask() { return ~0u; }
template <class T> static T __shfl_xor_sync(unsigned, T x, int mask, int = 32) {
  return of_lane(x, current % 32 ^ mask);
}
template <class T> static T __shfl_sync(unsigned, T x, int from, int width = 32) {
  return of_lane(x, current % 32 / width * width + from % width);
}
template <class T> static T __shfl_down_sync(unsigned, T x, int by, int width = 32) {
  int lane = current % 32;
  return of_lane(x, lane + by, lane % width + by < width);
}
// Element i of a register that holds codes of some type.
static int code(int word, int i, const char* type) {
  int bits = type[1] - '0', value = (word >> (bits * i)) & ((1 << bits) - 1);
  return type[0] == 's' && value >> (bits - 1) ? value - (1 << bits) : value;
}
// mma.sync m{rows}n8k{..}: registers hold 4 bytes, or 8 codes of 4 bits, of K. The fragments, from the PTX manual:
//   A  m16: a0 a1 a2 a3 hold rows g, g + 8, g, g + 8, the last two the second half of K;  m8: a0 holds row g
//   B  b0 (and b1: the second half of K) hold column g
//   C  row g (and, of m16, g + 8): columns 2 t and 2 t + 1                      with g = lane / 4, t = lane % 4
static void ptx_mma(int rows, const char* left, const char* right, std::vector<int*> c, std::vector<int> a,
                    std::vector<int> b) {
  Held* warp = exchanged([&](Held& h) {
    std::copy(a.begin(), a.end(), h.a);
    std::copy(b.begin(), b.end(), h.b);
  });
  int lane = current % 32, each = 32 / (left[1] - '0'), halves = (int)b.size();
  for (int i = 0; i < (int)c.size(); ++i) {
    int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 4 * each * halves; ++k) {
      int half = k / (4 * each), owner = k % (4 * each) / each;
      int x = warp[row % 8 * 4 + owner].a[half * (rows / 8) + row / 8], y = warp[column * 4 + owner].b[half];
      *c[i] += code(x, k % each, left) * code(y, k % each, right);
    }
  }
}
static void ptx_dp4a(int& c, int a, int b, const char* left) {
  for (int i = 0; i < 4; ++i) c += code(a, i, left) * code(b, i, "s8");
}
"""


def missing() -> str | None:
    """Why nothing can be emulated here."""
    return None if shutil.which("g++") else "no g++"


ASM = re.compile(r'asm(?: volatile)?\("([\w.]+) "?([^:]*):([^:]*):([^;]*)\);')


def _instruction(found: re.Match[str]) -> str:
    """One inline PTX instruction as a call of its emulation."""
    opcode, _, written, read = found.groups()
    outputs, inputs = (re.findall(r'"\+?r"\(([^)]*)\)', part) for part in (written, read))
    mma = re.fullmatch(r"mma\.sync\.aligned\.m(\d+)n8k(\d+)\.row\.col\.s32\.(\w+)\.(\w+)\.s32", opcode)
    if mma:
        rows, k, left, right = mma.groups()
        registers = int(k) * int(left[1:]) // (32 * 4)  # of B; A has one for each 8 rows
        a, b = inputs[: registers * int(rows) // 8], inputs[registers * int(rows) // 8 :]
        assert len(b) == registers
        assert len(outputs) == int(rows) // 4
        c = ", ".join(f"&{name}" for name in outputs)
        return f'ptx_mma({rows}, "{left}", "{right}", {{{c}}}, {{{", ".join(a)}}}, {{{", ".join(b)}}});'
    kind = {"dp4a.u32.s32": "u8", "dp4a.s32.s32": "s8"}[opcode]
    return f'ptx_dp4a({outputs[0]}, {inputs[0]}, {inputs[1]}, "{kind}");'


def emulated(source: str) -> str:
    """`source` for g++."""
    source = ASM.sub(_instruction, source)
    assert "asm" not in source.split("#define ushort", 2)[-1], "an instruction was not replaced"
    start = source.index("#define uint unsigned int")
    end = source.index("#endif", start)
    prelude = "\n".join(source[start:end].splitlines())
    body = source[end + len("#endif") :]
    shared = re.findall(r"__shared__ alignas\(\d+\) \w+ (\w+)\[", body)
    watched = not any(re.search(rf"\(?{name}\b(?!\[)", body) for name in shared)  # not where it is cast
    if watched:
        body = re.sub(r"__shared__ alignas\(\d+\) (\w+) (\w+)\[(\d+)\];", r"static Shared<\1, \3> \2;", body)
    body = re.sub(r"__shared__ alignas\((\d+)\)", r"alignas(\1) static", body)
    wrappers = []
    for name, arguments in re.findall(r'extern "C" __global__ void [^;{]*?(\w+)\(([^)]*)\) \{', body):
        types = [a.strip().rsplit(" ", 1)[0].replace("__restrict__", "").strip() for a in arguments.split(",")]
        given = ", ".join(f"({t})pointers[{i}]" for i, t in enumerate(types))
        wrappers.append(
            f'extern "C" void launch_{name}(const int* d, void** pointers) '
            f"{{ launch({{d[0], d[1]}}, {{d[2], d[3]}}, [=] {{ {name}({given}); }}); }}"
        )
    return "\n".join([HEADER, prelude, body, *wrappers])


@dataclass(frozen=True)
class Launch:
    """One kernel of a function.

    Attributes:
        kernel: its name.
        places: which of the function's arguments it gets, in its own order.
        sizes: blocks in x and y, threads in x and y.
    """

    kernel: str
    places: tuple[int, ...]
    sizes: tuple[int, int, int, int]


class Emulator:
    """Functions of a module, for CUDA, on the CPU.

    Args:
        isa: they were generated for.
        folder: for the library.
        functions: PrimFuncs by name, all bound to threads.
    """

    def __init__(self, isa: CudaIsa, folder: Path, functions: Mapping[str, Any]) -> None:
        target = tvm.target.Target(cuda_target(isa))
        named = {name: f.with_attr("global_symbol", name).with_attr("target", target) for name, f in functions.items()}
        module = tvm.IRModule(named)
        source = str(tvm.compile(module, target=target).mod.imports[0].inspect_source("cuda"))
        with target:
            lowered = tvm.tirx.get_default_tir_pipeline(target)[0](module)
        self.launches = {name: _launches(lowered[name].script(), named[name]) for name in named}
        path, library = folder / "kernels.cc", folder / "kernels.so"
        path.write_text(emulated(source))
        options = [
            "-std=c++17",
            "-O0",
            "-fno-strict-aliasing",
            "-fwrapv",
            "-ffp-contract=off",
            "-w",
            "-shared",
            "-fPIC",
        ]
        command = [str(shutil.which("g++")), *options, str(path), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        self._library = ctypes.CDLL(str(library))

    def __call__(self, name: str, *arrays: np.ndarray) -> None:
        """Run a function; outputs are written in place."""
        assert all(a.flags.c_contiguous for a in arrays)
        self.at(name, [a.ctypes.data for a in arrays])

    def at(self, name: str, addresses: Sequence[int]) -> None:
        """Run a function on memory. No two threads may have touched shared memory without a barrier between them."""
        for launch in self.launches[name]:
            pointers = (ctypes.c_void_p * len(launch.places))(*(addresses[i] for i in launch.places))
            getattr(self._library, f"launch_{launch.kernel}")((ctypes.c_int * 4)(*launch.sizes), pointers)
        assert self._library.race_count() == 0, f"{name}: threads race for shared memory"


def _launches(host: str, function: Any) -> list[Launch]:
    """What the lowered host function does, read from its text."""
    names = [str(p.name) for p in function.params]

    def place(buffer: str) -> int:
        while buffer not in names:
            found = re.search(
                rf"^\s*{buffer} = (?:(\w+)\.view\(|T\.decl_buffer\(.*data=(\w+)\.data)", host, re.MULTILINE
            )
            assert found is not None, buffer
            buffer = found.group(1) or found.group(2)
        return names.index(buffer)

    launches = []
    for kernel, rest, axes in re.findall(r'call_ffi_kernel\("(\w+)", (.*?), launch_params=\[(.*?)\]', host):
        arguments = [re.sub(r"^T\.int\d+\((\d+)\)$", r"\1", a.strip()) for a in rest.split(",")]
        keys = [a.strip().strip('"') for a in axes.split(",")]
        sizes = dict(zip(keys, map(int, arguments[len(arguments) - len(keys) :]), strict=True))
        buffers = [a.removesuffix(".data") for a in arguments[: len(arguments) - len(keys)]]
        assert set(keys) <= {"blockIdx.x", "blockIdx.y", "threadIdx.x", "threadIdx.y"}, keys
        x, y, tx, ty = (sizes.get(k, 1) for k in ("blockIdx.x", "blockIdx.y", "threadIdx.x", "threadIdx.y"))
        launches.append(Launch(kernel, tuple(map(place, buffers)), (x, y, tx, ty)))
    assert launches
    return launches


class EmulatedGraph:
    """A model that was compiled for CUDA, its program run by TVM's virtual machine and its kernels emulated.

    Args:
        model: the common ONNX model.
        batches: batch sizes.
        sizes: of further dynamic dimensions.
        device: ``"cuda -arch=..."``.
        folder: for what is made.
        monkeypatch: the build is stopped where the CUDA compiler would be called.
    """

    def __init__(
        self, model: Any, batches: Sequence[int], sizes: Mapping[str, int], device: str, folder: Path, monkeypatch: Any
    ) -> None:
        caught: dict[str, Any] = {}

        def scheduled(module: Any) -> Any:
            caught["module"] = schedule_threads(module)
            return caught["module"]

        def compiled(executable: Any, *_: Any) -> DeviceCode:
            caught["executable"] = executable
            return DeviceCode(b"", "none", {}, "PTX", {})

        monkeypatch.setattr(_tvm_build, "schedule_threads", scheduled)
        monkeypatch.setattr(_tvm_build, "device_code", compiled)
        monkeypatch.setattr(_tvm_build, "require_cuda_compiler", lambda _: "none")
        built = _tvm_build.compile_model(model, batches, sizes, device, lambda _: None)
        self.about, self._parameters = built.description, built.parameters
        functions = {g.name_hint: f for g, f in caught["module"].functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
        self.emulator = Emulator(parse_device(device), folder, functions)
        caught["executable"].mod.write_to_file(str(folder / "program.vm"), "bin")
        program = tvm.get_global_func("ffi.Module.load_from_file.relax.VMExecutable")(str(folder / "program.vm"))
        for name in functions:
            tvm_ffi.register_global_func(name, self._function(name), override=True)
        self._vm = tvm.runtime.vm.VirtualMachine(program, tvm.cpu())

    def _function(self, name: str) -> Any:
        def run(*tensors: Any) -> None:
            self.emulator.at(name, [t.data_ptr() for t in tensors])

        return run

    def __call__(
        self, entry: str, inputs: Sequence[np.ndarray], parameters: Sequence[str] | None = None
    ) -> list[np.ndarray]:
        """What `entry` returns."""
        names = self.about["functions"][entry]["parameters"] if parameters is None else parameters
        given = tuple(tvm.runtime.tensor(np.ascontiguousarray(self._parameters[n])) for n in names)
        return [o.numpy() for o in self._vm[entry](*map(tvm.runtime.tensor, inputs), given)]

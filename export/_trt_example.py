"""The script beside an engine that loads and runs it with TensorRT and NumPy, without this project.

Device memory comes from the CUDA driver, as in `runtimes`, so that the script needs neither torch nor a CUDA toolkit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXAMPLE = "example.py"
_NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}
_TEXT = '''"""Runs {engine} with {package} {version} and NumPy on a GPU of compute capability {capabilities}."""
import ctypes{imports}
from pathlib import Path

import numpy as np
import {package} as trt

data = {read}
engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(data)
if engine is None:
    raise SystemExit("no engine: it needs {package} {version}, and an NVIDIA GPU of {capabilities} with its driver")
context, cuda, buffers = engine.create_execution_context(), ctypes.CDLL("{driver}"), {{}}
arrays = {{{feeds}}}
for name, array in arrays.items():
    context.set_input_shape(name, array.shape)
arrays |= {{{results}}}
for name, array in arrays.items():
    buffers[name] = ctypes.c_uint64()
    assert cuda.cuMemAlloc_v2(ctypes.byref(buffers[name]), ctypes.c_size_t(array.nbytes)) == 0, "out of memory"
    cuda.cuMemcpyHtoD_v2(buffers[name], ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
    context.set_tensor_address(name, buffers[name].value)
context.execute_async_v3(0)
cuda.cuCtxSynchronize()
for name in [{outputs}]:
    array = arrays[name]
    cuda.cuMemcpyDtoH_v2(ctypes.c_void_p(array.ctypes.data), buffers[name], ctypes.c_size_t(array.nbytes))
    print(name, array.shape, array.dtype)
'''


def write_example(folder: Path, engine: str, description: Mapping[str, Any]) -> Path:
    """Write ``example.py`` into the artifact's folder.

    Args:
        folder: where the engine lies.
        engine: its file name.
        description: the artifact's ``engine.json``; the example feeds the shapes that the engine is tuned for.
    """
    shapes = description["shapes"]

    def feed(tensor: Mapping[str, Any]) -> str:
        name = tensor["name"]
        sizes = tuple(shapes[name][1] if name in shapes else tensor["shape"])
        make = "ones" if "mask" in name.lower() else "zeros"
        return f'"{name}": np.{make}({sizes}, np.{_NUMPY[tensor["dtype"]]})'

    def result(tensor: Mapping[str, Any]) -> str:
        name = tensor["name"]
        return f'"{name}": np.empty(tuple(context.get_tensor_shape("{name}")), np.{_NUMPY[tensor["dtype"]]})'

    packed = engine.endswith(".xz")
    path = folder / EXAMPLE
    here = f'Path(__file__).with_name("{engine}")'
    text = _TEXT.format(
        engine=engine,
        package=description["package"],
        version=description["version"],
        capabilities=" or ".join(description["compute_capabilities"]),
        imports="\nimport lzma" if packed else "",
        read=f"lzma.open({here}).read()" if packed else f"{here}.read_bytes()",
        driver="libcuda.so.1",
        feeds=", ".join(feed(t) for t in description["inputs"]),
        results=", ".join(result(t) for t in description["outputs"]),
        outputs=", ".join(f'"{t["name"]}"' for t in description["outputs"]),
    )
    path.write_text(text, encoding="utf-8")
    return path


__all__ = ["EXAMPLE", "write_example"]

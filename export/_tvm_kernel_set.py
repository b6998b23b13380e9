"""The kernels of one target, by what they compute: what emits a graph asks for them here and knows no processor."""

from __future__ import annotations

from typing import Any, Protocol

from ._tvm_attention import panels_kernel, scores_kernel
from ._tvm_cuda_isa import CudaIsa
from ._tvm_cuda_kernels import CudaKernels
from ._tvm_epilogue import Epilogue, Place, Step
from ._tvm_integer import integer_kernel, row_sums_kernel
from ._tvm_isa import Isa
from ._tvm_kernels import Geometry, float_kernel
from ._tvm_math import nearbyint
from ._tvm_panels import Panels
from ._tvm_products import Product
from ._tvm_rows import layer_norm_kernel, softmax_kernel


class KernelSet(Protocol):
    """PrimFuncs of one target; see the CPU's functions for arguments and results."""

    def geometry(self, geometry: Geometry, product: Product) -> Geometry:
        """`geometry`, with what the target has to know of `product` besides."""
        ...

    def integer(self, geometry: Geometry, epilogue: Epilogue) -> Any: ...
    def row_sums(self, geometry: Geometry) -> Any: ...

    def scores(self, geometry: Geometry, epilogue: Epilogue, code: Step, depth: int) -> tuple[Any, Any | None]:
        """`_tvm_attention.scores_kernel`; or two: up to the scores, float32 ``(products, rows, n)``, and softmax."""
        ...

    def floats(self, panels: Panels, batch: int, rows: int) -> Any: ...
    def panels(self, batch: tuple[int, int], panels: Panels, source: Place, offset: int) -> Any: ...
    def layer_norm(self, rows: int, width: int, epsilon: float, epilogue: Epilogue) -> Any: ...
    def softmax(self, rows: int, width: int) -> Any: ...

    def nearbyint(self, x: Any) -> Any:
        """Round half to even, as an expression."""
        ...


class CpuKernels:
    """Kernels for an instruction set of a CPU."""

    def __init__(self, isa: Isa) -> None:
        self.isa = isa

    def geometry(self, geometry: Geometry, product: Product) -> Geometry:  # noqa: ARG002 - the protocol's
        return geometry

    def integer(self, geometry: Geometry, epilogue: Epilogue) -> Any:
        return integer_kernel(self.isa, geometry, epilogue)

    def row_sums(self, geometry: Geometry) -> Any:
        return row_sums_kernel(self.isa, geometry)

    def scores(self, geometry: Geometry, epilogue: Epilogue, code: Step, depth: int) -> tuple[Any, Any | None]:
        return scores_kernel(self.isa, geometry, epilogue, code, depth), None

    def floats(self, panels: Panels, batch: int, rows: int) -> Any:
        return float_kernel(self.isa, panels, batch, rows)

    def panels(self, batch: tuple[int, int], panels: Panels, source: Place, offset: int) -> Any:
        return panels_kernel(self.isa, batch, panels, source, offset)

    def layer_norm(self, rows: int, width: int, epsilon: float, epilogue: Epilogue) -> Any:
        return layer_norm_kernel(rows, width, epsilon, epilogue)

    def softmax(self, rows: int, width: int) -> Any:
        return softmax_kernel(rows, width)

    def nearbyint(self, x: Any) -> Any:
        return nearbyint(x)


def kernels_of(isa: Isa | CudaIsa) -> KernelSet:
    """The kernels for `isa`."""
    return CudaKernels(isa) if isinstance(isa, CudaIsa) else CpuKernels(isa)

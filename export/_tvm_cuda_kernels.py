"""The kernels for CUDA, under the names that `_tvm_kernel_set` gives them."""

from __future__ import annotations

from typing import Any

from . import _tvm_cuda_products as products
from . import _tvm_cuda_rows as rows_
from ._tvm_cuda_floats import float_kernel
from ._tvm_cuda_isa import CudaIsa
from ._tvm_epilogue import Epilogue, Place, Step
from ._tvm_kernels import Geometry
from ._tvm_panels import Panels
from ._tvm_products import Product


class CudaKernels:
    """Kernels for a GPU. Scores go through memory to softmax, because a row of them need not fit a block's share."""

    def __init__(self, isa: CudaIsa) -> None:
        self.isa = isa

    def geometry(self, geometry: Geometry, product: Product) -> Geometry:
        """INT4 tensor cores where the device has them and all codes of both operands are 4-bit ones."""
        if not (self.isa.int4 and is_small(product)):
            return geometry
        values = {name: getattr(geometry, name) for name in Geometry.__dataclass_fields__}
        return products.SmallGeometry(**values)

    def integer(self, geometry: Geometry, epilogue: Epilogue) -> Any:
        return products.integer_kernel(self.isa, geometry, epilogue)

    def row_sums(self, geometry: Geometry) -> Any:
        return rows_.row_sums_kernel(geometry)

    def scores(self, geometry: Geometry, epilogue: Epilogue, code: Step, depth: int) -> tuple[Any, Any | None]:
        shape = (geometry.products, geometry.rows, geometry.panels.n)
        whole = Place(shape, (geometry.batch[1] * shape[1] * shape[2], shape[1] * shape[2], shape[2], 1))
        stored = Epilogue(epilogue.operands, epilogue.steps, ((len(epilogue.steps), whole),))
        return self.integer(geometry, stored), rows_.softmax_codes_kernel(shape, code, depth)

    def floats(self, panels: Panels, batch: int, rows: int) -> Any:
        return float_kernel(panels, batch, rows)

    def panels(self, batch: tuple[int, int], panels: Panels, source: Place, offset: int) -> Any:
        return rows_.panels_kernel(batch, panels, source, offset)

    def layer_norm(self, rows: int, width: int, epsilon: float, epilogue: Epilogue) -> Any:
        return rows_.layer_norm_kernel(rows, width, epsilon, epilogue)

    def softmax(self, rows: int, width: int) -> Any:
        return rows_.softmax_kernel(rows, width)

    def nearbyint(self, x: Any) -> Any:
        from tvm import tirx

        return tirx.nearbyint(x)


def is_small(product: Product) -> bool:
    """Whether every code of both operands fits 4 bits, the right ones with a sign."""
    if product.arithmetic != "integer" or not product.left_small:
        return False
    return product.panels.bits == 4 if product.right is None else product.right_small and product.right_signed

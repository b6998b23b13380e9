"""How the right operand of a matrix product lies in memory, so that a kernel reads it in whole vectors.

The columns are cut into panels of `width`; inside a panel, `group` consecutive rows of K lie side by side for each
column, because a dot-product instruction takes them together:

    weights (batch, K, N)  ->  (batch, N / width, K / group, width * group)

4-bit codes are stored two a byte: the low nibble belongs to an even run of `group` rows, the high one to the next.
K and N are padded with zeros, which add nothing to a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s2d_deploy.session import Array


@dataclass(frozen=True, slots=True)
class Panels:
    """Geometry of one packed operand.

    Attributes:
        k, n: inner length and columns, as the model has them.
        width: columns of a panel.
        group: rows of K side by side.
        bits: 4 (two a byte), 8, or 32 (float).
    """

    k: int
    n: int
    width: int
    group: int
    bits: int

    @property
    def depth(self) -> int:
        """K, padded to whole groups (pairs of groups for 4-bit codes)."""
        step = self.group * (2 if self.bits == 4 else 1)
        return -(-self.k // step) * step

    @property
    def count(self) -> int:
        """Number of panels."""
        return -(-self.n // self.width)

    @property
    def columns(self) -> int:
        """N, padded to whole panels."""
        return self.count * self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one packed matrix, unpacked to one code a byte."""
        return self.count, self.depth // self.group, self.width * self.group

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of one packed matrix as it is stored."""
        count, runs, line = self.shape
        return count, runs // 2 if self.bits == 4 else runs, line

    def pack(self, matrices: Array) -> Array:
        """Pack ``(batch, K, N)`` codes (int8) or floats into ``(batch, *stored_shape)`` (uint8, int8 or float32)."""
        batch = matrices.shape[0]
        padded = np.zeros((batch, self.depth, self.columns), np.float32 if self.bits == 32 else np.int8)
        padded[:, : self.k, : self.n] = matrices
        runs = self.depth // self.group
        tiled = padded.reshape(batch, runs, self.group, self.count, self.width).transpose(0, 3, 1, 4, 2)
        packed = np.ascontiguousarray(tiled).reshape(batch, *self.shape)
        if self.bits != 4:
            return packed
        nibbles = packed.view(np.uint8) & 15
        return np.ascontiguousarray(nibbles[:, :, 0::2] | (nibbles[:, :, 1::2] << 4))


def panel_width(n: int, widths: tuple[int, ...]) -> int:
    """The width that wastes least, of equal ones the first: padding costs work.

    The narrowest panel pays for itself only where the others waste a fifth: each loaded activation is used once. All
    others run alike, because narrow panels have higher tiles (`Isa.rows_of`).
    """
    narrowest = min(widths) if len(widths) > 1 else 0
    return min(widths, key=lambda w: -(-n // w) * w / (0.8 if w == narrowest else 1.0))

"""Whether the arrays of an .npz file hold what their headers promise, before NumPy makes room for the promise."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

from numpy.lib import format as npy

_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def check_promises(path: Path) -> None:
    """Refuse an archive with an array that is shorter than its shape, or with objects.

    Raises:
        ValueError: which array, and why.
        zipfile.BadZipFile, OSError: no readable archive.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as stream:
                read = _READERS.get(npy.read_magic(stream))
                if read is None:
                    continue  # version 3: field names in UTF-8, which no array of ours has; NumPy reads or refuses it
                shape, _, dtype = read(stream)
                promised = math.prod(shape) * dtype.itemsize
                if any(size < 0 for size in shape) or promised > info.file_size:
                    raise ValueError(
                        f"{info.filename}: shape {shape} of {dtype} takes {promised} bytes, and the file holds "
                        f"{info.file_size}"
                    )
                if dtype.hasobject:
                    raise ValueError(f"{info.filename}: Python objects")

"""What every test runs under: no network, one thread, repeatable examples."""

from __future__ import annotations

import os

from hypothesis import settings

# Set before torch, NumPy or transformers is imported, since they read these once; subprocesses inherit them.
# One thread makes float sums repeatable bit for bit; a test about threads asks for its own number.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ.update({**OFFLINE, "HF_HUB_DISABLE_TELEMETRY": "1", "MPLBACKEND": "Agg"})
for _name, _value in SINGLE_THREADED.items():
    os.environ.setdefault(_name, _value)

# The same examples in every run, so that a red build can be repeated; no deadline, since shared machines stall.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")

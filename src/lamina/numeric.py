"""numpy with a fast import: all modules with columns use `from .numeric import np`.

When numpy is loaded, its linear algebra library (OpenBLAS), which Lamina does not use, starts a thread for each further core,
and each thread spins for up to 0.1 s of CPU time before it sleeps: longer than most commands. An environment variable during
the import makes them sleep immediately, without other effects on the process. Measured on 1,048,576 extents as columns,
start-up included: 0.12 s of CPU time instead of 0.20.
"""

from __future__ import annotations

import os

_SPIN = "OPENBLAS_THREAD_TIMEOUT"
_ours = _SPIN not in os.environ
if _ours:
    os.environ[_SPIN] = "4"  # the least: 2**4 cycles
try:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray
finally:
    if _ours:
        del os.environ[_SPIN]

__all__ = ["ArrayLike", "NDArray", "np"]

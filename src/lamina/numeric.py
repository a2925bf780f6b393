"""numpy, imported so that it costs no more than it must: `from .numeric import np` wherever columns are worked on.

The linear algebra that numpy brings, which nothing here uses, starts a thread for every further core when it is loaded, and
each spins for up to 0.1 s of CPU before it sleeps: more than most commands take. Told so while it is loaded, they sleep at
once; who uses it later in this process notices nothing but that. Measured on 1,048,576 extents as columns, start-up
included: 0.12 s of CPU instead of 0.20.
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

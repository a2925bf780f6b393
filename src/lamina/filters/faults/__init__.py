"""The filter `faults`: injects errors, delays, lost writes, false flushes and corrupt bytes, by rules and a random seed.

`rule.py` selects the operations; `driver.py` injects the faults.
"""

from __future__ import annotations

from .driver import Clock, Faults
from .rule import Injected

__all__ = ["Clock", "Faults", "Injected"]

"""The filter `faults`: makes chosen operations fail, lie, wait or damage bytes, by rules and a seed.

`rule.py` decides whether something happens to an operation, `driver.py` lets it happen.
"""

from __future__ import annotations

from .driver import Clock, Faults
from .rule import Injected

__all__ = ["Clock", "Faults", "Injected"]

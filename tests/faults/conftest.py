"""The fixture of the tests that look for what an interrupt leaves."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What only the garbage collector could close stays open, and is found."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

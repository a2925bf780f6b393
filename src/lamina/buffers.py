"""Buffers of callers: any object with contiguous bytes, as a memoryview that Lamina can slice."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]  # Python 3.12


def byte_view(buffer: Buffer) -> memoryview:
    """The bytes of `buffer`, whatever items it has; not a copy. Raises TypeError for what is not a contiguous buffer."""
    view = buffer if type(buffer) is memoryview else memoryview(buffer)
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    # A shape with a zero in it cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")

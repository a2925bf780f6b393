"""The references of persistent bitmaps, for the check. After "Bitmaps" of the published specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import LaminaError
from ...report import ERROR
from . import bitmap_directory

if TYPE_CHECKING:
    from .references import References, Use


def add(found: References, use: Use) -> None:
    """Add the references to the bitmap directory, to bitmap tables, and of these to clusters with bits, all by
    `use`. A directory that the header calls out of date has none."""
    try:
        entries = bitmap_directory.read(found.storage, found.header)
    except LaminaError as error:
        found.report.add(ERROR, error.message, error.offset)
        return
    where = bitmap_directory.extension(found.header)
    if where is None:
        return
    found.region(use.kind, *where[1:])
    for entry in entries:
        length = 8 * entry.table_size
        if not length or not found.may_walk(length, "bitmap table"):
            continue
        found.region(use.kind, entry.table_offset, length)
        table = found.entries(entry.table_offset, entry.table_size, "bitmap table")
        offsets = table[table > 1]
        if len(offsets):
            found.point(use, offsets, "a cluster of a bitmap")

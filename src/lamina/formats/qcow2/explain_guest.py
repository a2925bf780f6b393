"""Where a byte of the disk of a qcow2 image is: its L1 entry, its L2 entry, and its place in the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import LaminaError, OptionError
from ...explanation import Part, Step
from ...limits import align_up
from . import l2_entry
from .explain_found import l1_words, l2_words, status_of
from .explain_uses import Entry
from .references import L1_TABLE, L2_TABLE, NAMES

if TYPE_CHECKING:
    from .explain_uses import Uses
    from .header import Header

_ENTRY = 8


def find(uses: Uses, header: Header, offset: int) -> Step:
    """Where the byte at `offset` of the disk with this header is. OptionError if the disk ends before it."""
    path, layout = uses.path, uses.layout
    if not 0 <= offset < header.size:
        raise OptionError(f"the disk ends at {header.size}, before {offset}", path=path)
    index = offset >> header.l1_covers_bits
    at = header.l1_table_offset + _ENTRY * index
    span = min((index + 1 << header.l1_covers_bits) - offset, header.size - offset)

    def step(status: str, length: int, parts: tuple[Part, ...], **more: object) -> Step:
        return Step(0, "qcow2", path, offset, length, status, parts, problems=uses.problems, **more)  # type: ignore[arg-type]

    value = uses.value(at)
    if value is None:  # reads as zero: the table is past the end of the file
        return step(
            "unallocated", span, (Part(NAMES[L1_TABLE], at, 0, text="past the end of the file: there is no entry"),)
        )
    text, details = l1_words(value)
    l1 = Part(NAMES[L1_TABLE], at, _ENTRY, None, f"entry {index}", value, text, details)
    table = details["l2-table"]
    if table is None:
        return step("unallocated", span, (l1,))
    if table % header.cluster_size or table + header.cluster_size > align_up(uses.size, header.cluster_size):
        return step("invalid: the L2 table is misaligned or outside the file", span, (l1,))
    width = 1 << layout.entry_bits
    number = offset >> header.cluster_bits & layout.per_table - 1
    raw = uses.read(table + number * width, width).ljust(width, b"\0")
    entry = Entry(table, number, int.from_bytes(raw[:8]), int.from_bytes(raw[8:]))
    text, details = l2_words(header, entry)
    l2 = Part(
        NAMES[L2_TABLE], table + number * width, width, None, f"entry {number}", int.from_bytes(raw), text, details
    )
    unit_bits = header.cluster_bits - layout.units_bits
    within = offset & (1 << unit_bits) - 1
    length = min((1 << unit_bits) - within, header.size - offset)
    try:
        entries = layout.load(uses.storage, table)
        if layout.external:
            layout.adopt(layout.column(entries), index << layout.index_bits, strict=False)
        unit = (number << layout.units_bits) + (offset >> unit_bits & (1 << layout.units_bits) - 1)
        flags, host, _, _ = layout.run(entries, unit, unit + 1)
    except l2_entry.InvalidEntry as error:
        return step(f"invalid: {error}", length, (l1, l2))
    except LaminaError as error:
        return step(f"unreadable: {error.message}", length, (l1, l2))
    status = status_of(flags)
    if status == "compressed":
        inside = offset & header.cluster_size - 1
        length = min(header.cluster_size - inside, header.size - offset)
        return step(status, length, (l1, l2), stored=l2_entry.compressed_range(entry.entry, header.cluster_bits))
    if host < 0:
        return step(status, length, (l1, l2))
    file = header.data_file or "the data file" if header.external_data else path
    return step(status, length, (l1, l2), host=host + within, file=file)

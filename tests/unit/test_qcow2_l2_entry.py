"""Entries of L2 tables: entries and columns say what the bits of the specification say, and only one module reads them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lamina
from lamina.formats.qcow2 import l2_entry
from lamina.formats.qcow2.l2_entry import InvalidEntry, L2Layout
from lamina.status import COMPRESSED, DATA, PRESENT, ZERO

PACKAGE = Path(lamina.__file__).parent / "formats" / "qcow2"
#: What only these modules use of `layout`: one owner for each kind of table.
BITS = {"COPIED", "COMPRESSED", "ZERO", "OFFSET_MASK"}
OWNERS = {"layout.py", "l1_table.py", "l2_entry.py", "l2_extended.py", "l2_external.py"}


def told(entry: int) -> tuple[int, int]:
    """(flags, offset or -1), read from the bits as the specification words it."""
    if entry >> 62 & 1:
        return DATA | PRESENT | COMPRESSED, -1
    offset = sum(1 << bit for bit in range(9, 56) if entry >> bit & 1)
    if entry & 1:
        return ZERO | PRESENT, offset or -1
    return (DATA | PRESENT, offset) if offset else (0, -1)


@st.composite
def tables(draw: st.DrawFn) -> tuple[L2Layout, Any]:
    """A layout, and the entries of some clusters, among them runs that go on and runs that nearly do."""
    layout = L2Layout(draw(st.integers(9, 21)))
    size = layout.cluster_size
    entries: list[int] = []
    for _ in range(draw(st.integers(1, 8))):
        bits = draw(st.sampled_from([0, 0, 1, 1 << 63, 1 << 63 | 1, 1 << 62 | draw(st.integers(0, (1 << 62) - 1))]))
        first = draw(st.sampled_from([0, 1, 2, 3, (1 << 56) // size - 2]))
        step = draw(st.sampled_from([0, 1, 1, 1]))
        for number in range(draw(st.integers(1, 4))):
            host = (first + number * step) * size & (1 << 56) - 1
            entries.append(bits if bits >> 62 & 1 else bits | host)
    return layout, np.array(entries, np.uint64)


@given(tables())
def test_columns_and_single_entries_say_what_the_bits_say(given_: tuple[L2Layout, Any]) -> None:
    layout, column = given_
    entries, size = column.tolist(), layout.cluster_size
    wanted = [told(entry) for entry in entries]
    first, flags, offset = layout.runs(column, 0, len(column))
    expanded = []
    for at, stop, flag, place in zip(first, [*first[1:], len(entries)], flags, offset, strict=True):
        expanded += [(flag, place + number * size if place >= 0 else -1) for number in range(stop - at)]
    assert expanded == wanted
    goes_on = [one == other if one[1] < 0 else other == (one[0], one[1] + size) for one, other in pairwise(wanted)]
    assert len(first) == 1 + goes_on.count(False), "neighbours that are alike are one run"
    for index in range(len(entries)):
        flag, place, clusters, entry = layout.run(entries, index, len(entries))
        assert entry == entries[index]
        assert (flag, place) == wanted[index]
        assert 1 <= clusters <= len(entries) - index
        assert all(goes_on[index : index + clusters - 1])
        mapping = layout.map_one(entries[index], 5, 7, None)  # type: ignore[arg-type]
        if flag & COMPRESSED:
            assert mapping is None
        else:
            assert mapping == (flag, 7, place + 5 if place >= 0 else -1, None, None)
            assert layout.reads_zero(entries[index]) == bool(flag & ZERO)
            assert told(layout.zeroed(entries[index])) == (ZERO | PRESENT, place)
    assert (l2_entry.compressed_mask(column) == [bool(flag & COMPRESSED) for flag, _ in wanted]).all()
    assert [l2_entry.data_cluster(entry) for entry in entries] == [max(place, 0) for _, place in wanted]
    own = [max(place, 0) if entry >> 63 else 0 for entry, (_, place) in zip(entries, wanted, strict=True)]
    assert [l2_entry.own_cluster(entry) for entry in entries] == own
    assert (l2_entry.copied_mask(column) == [bool(entry >> 63) for entry in entries]).all()


@pytest.mark.parametrize("bits", range(10, 22))
def test_a_misaligned_offset_is_refused_and_not_mapped(bits: int) -> None:
    layout = L2Layout(bits)
    bad = (5 << bits) + 512
    entries = [0, 1 << 63 | 1 << bits, 1 << 63 | bad]
    with pytest.raises(InvalidEntry, match=f"{bad:#x}"):
        layout.runs(np.array(entries, np.uint64), 0, 3)
    with pytest.raises(InvalidEntry, match=f"{bad:#x}"):
        layout.run(entries, 2, 3)
    assert layout.map_one(bad, 0, 1, None) is None  # type: ignore[arg-type]
    packed = np.array([1 << 62 | bad], np.uint64)
    assert layout.runs(packed, 0, 1)[1].tolist() == [DATA | PRESENT | COMPRESSED], "these bits mean something else"


@given(st.integers(9, 21), st.data())
def test_compressed_data_is_named_up_to_the_end_of_its_last_sector(bits: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, (1 << bits) - 1))
    offset = data.draw(st.integers(0, l2_entry.max_compressed_offset(bits) - length))
    entry = l2_entry.compressed_entry(offset, length, bits)
    assert entry >> 62 == 1
    assert l2_entry.is_compressed(entry)
    start, named = l2_entry.compressed_range(entry, bits)
    end = -(-(offset + length) // 512) * 512
    assert (start, start + named) == (offset, end)
    begins, ends = l2_entry.compressed_ranges(np.array([entry], np.uint64), bits)
    assert (begins.tolist(), ends.tolist()) == ([offset], [end])
    first, clusters = l2_entry.compressed_clusters(entry, bits)
    assert (first, first + clusters - 1) == (offset >> bits, end - 1 >> bits)


def test_a_table_is_a_cluster_and_is_stored_big_endian() -> None:
    layout = L2Layout(9)
    assert (layout.per_table, layout.per_sector, layout.entry_bits) == (64, 64, 3)
    entries = layout.own_entries(3 << 9, 2)
    assert entries.tolist() == [1 << 63 | 3 << 9, 1 << 63 | 4 << 9]
    assert layout.to_disk(entries) == b"".join(entry.to_bytes(8, "big") for entry in entries)
    assert layout.blank().tolist() == [0] * 64


def uses_of_bits(source: str) -> Iterator[str]:
    """Names of `BITS` that are taken from the module `layout`, and numbers that are one of them."""
    tree = ast.parse(source)
    aliases = {"layout"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in (None, "layout"):
            aliases |= {name.asname or name.name for name in node.names if name.name == "layout"}
            yield from (name.name for name in node.names if node.module == "layout" and name.name in BITS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in aliases and node.attr in BITS:
                yield ast.unparse(node)
        elif isinstance(node, ast.BinOp) and ast.unparse(node) in ("1 << 62", "1 << 63"):
            yield ast.unparse(node)


def test_no_other_module_reads_the_bits_of_entries() -> None:
    found = {file.name: set(uses_of_bits(file.read_text())) for file in PACKAGE.glob("*.py") if file.name not in OWNERS}
    assert len(found) > 8
    assert not {name: uses for name, uses in found.items() if uses}, "ask l2_entry or l1_table"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from . import layout as q\nentry & q.COPIED", ["q.COPIED"]),
        ("from .layout import OFFSET_MASK", ["OFFSET_MASK"]),
        ("entry & 1 << 62", ["1 << 62"]),
        ("from . import layout as q\nq.SECTOR\nfrom ...status import ZERO\nflags & ZERO", []),
    ],
)
def test_uses_of_bits_are_found(source: str, found: list[str]) -> None:
    assert list(uses_of_bits(source)) == found

"""The drivers `memory` (against a flat model) and `null`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import Closed
from lamina.graph import Opener
from lamina.limits import GIB, TIB
from lamina.node import FUA
from lamina.storage.memory import PAGE, MemoryStorage
from lamina.storage.null import NullStorage

SPAN = 5 * PAGE
places = st.one_of(st.integers(0, SPAN), st.integers(0, 5).map(lambda page: page * PAGE))


@given(st.lists(st.tuples(st.sampled_from(["write", "zero", "discard", "truncate"]), places, places), max_size=20))
def test_against_a_flat_model(steps: list[tuple[str, int, int]]) -> None:
    node, model = MemoryStorage(), bytearray()
    for number, (what, one, other) in enumerate(steps):
        lo, hi = sorted((one, other))
        if what == "discard":
            hi = min(hi, len(model))
        if what == "truncate":
            node.truncate(one)
            model = model[:one] + bytes(max(one - len(model), 0))
        elif lo < hi:
            piece = bytes([number + 1]) * (hi - lo) if what == "write" else bytes(hi - lo)
            if what == "write":
                node.write(lo, memoryview(piece))
            elif what == "zero":
                node.zero(lo, hi - lo)
            else:
                node.discard(lo, hi - lo)
            model += bytes(max(hi - len(model), 0))
            model[lo:hi] = piece
    assert node.size == len(model)
    if not model:
        return
    buffer = bytearray(b"\xee" * len(model))
    node.read_into(0, memoryview(buffer))
    assert buffer == model
    first, last = len(model) // 3, len(model)
    found = node.extents(first, last - first) if last > first else node.extents(0, last)
    assert found.contiguous
    assert found == found.coalesce()
    assert found.end == last
    for extent in found:
        assert extent.data != extent.zero
        assert (extent.file, extent.offset) == (node, extent.start)
        assert node.reads_zero(extent.start, extent.length) == extent.zero
        if extent.zero:
            assert not any(model[extent.start : extent.end])
        else:
            assert not (extent.start % PAGE and extent.start != first)
            assert not (extent.end % PAGE and extent.end != last)


def test_a_large_node_costs_nothing() -> None:
    node = MemoryStorage.open(MemoryStorage.schema.parse({"size": "1T"}), Opener(read_only=False))
    assert (node.size, node.allocated) == (TIB, 0)
    assert len(node.extents(0, TIB)) == 1
    node.write(TIB - 1, memoryview(b"x"), FUA)
    node.write(TIB // 2, memoryview(b"x"))
    assert node.allocated == 2 * PAGE
    assert [(e.start, e.length) for e in node.extents(0, TIB).where(data=True)] == [
        (TIB // 2, PAGE),
        (TIB - PAGE, PAGE),
    ]
    assert node.reads_zero(0, TIB // 2)
    node.discard(TIB // 2, TIB // 2)
    assert node.allocated == 0


def test_the_last_page_is_dropped_at_the_end() -> None:
    node = MemoryStorage()
    node.write(0, memoryview(b"x" * 100))
    node.discard(0, 100)
    assert (node.size, node.allocated) == (100, 0)


def test_closed() -> None:
    node = MemoryStorage(10)
    node.close()
    node.close()
    with pytest.raises(Closed):
        node.read_into(0, memoryview(bytearray(1)))


def test_null() -> None:
    node = NullStorage.open(NullStorage.schema.parse({}), Opener(read_only=False))
    assert (node.size, node.growable) == (GIB, False)
    node.write(0, memoryview(b"x" * 10))
    node.zero(0, 10)
    node.discard(0, 10)
    buffer = bytearray(b"x" * 200_000)
    node.read_into(5, memoryview(buffer))
    assert not any(buffer)
    assert [(e.start, e.length, e.zero, e.data, e.present) for e in node.extents(7, 9)] == [(7, 9, True, False, True)]
    assert node.reads_zero(0, GIB)
    assert NullStorage.open(NullStorage.schema.parse({"size": "3k", "read-zeroes": "off"}), Opener()).size == 3072

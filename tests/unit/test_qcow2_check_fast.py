"""The check of qcow2 has shorter ways for tables and counts without a finding: they never change a report."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.formats.qcow2 import check as check_module
from lamina.formats.qcow2 import l2_entry
from lamina.formats.qcow2 import layout as q

from .test_qcow2_check import HOLE, PACKED, PREALLOCATED, STORED, ZERO, Image

KINDS = st.lists(st.sampled_from([HOLE, ZERO, PREALLOCATED, STORED, STORED, STORED, PACKED]), min_size=1, max_size=150)


@given(st.data())
def test_a_report_does_not_depend_on_the_shorter_ways(data: st.DataObject) -> None:
    kinds = data.draw(st.one_of(KINDS, st.lists(st.just(STORED), min_size=1, max_size=150)))
    order = data.draw(st.sampled_from([0, 1, 3, 4, 5, 6]))
    image = Image(kinds, order=order)
    for _ in range(data.draw(st.integers(0, 3))):
        entry = image.entry(data.draw(st.integers(0, len(kinds) - 1)))
        change = data.draw(st.integers(0, 5))
        if change == 0:
            image.put(entry, image.get(entry) ^ q.COPIED)
        elif change == 1:
            image.put(entry, image.get(image.entry(data.draw(st.integers(0, len(kinds) - 1)))))
        elif change == 2:
            image.put(entry, data.draw(st.integers(0, image.clusters + 3)) * image.cs | q.COPIED)
        elif change == 3:
            image.put(entry, image.get(entry) ^ 1 << data.draw(st.integers(0, 63)))
        else:
            value = data.draw(st.integers(0, min((1 << (1 << order)) - 1, 3)))
            image.count(data.draw(st.integers(0, image.clusters - 1)), value)
    short = image.check()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(l2_entry, "owned_clusters", lambda *_: None)
        patch.setattr(check_module, "_as_expected", lambda *_: -1)
        long = image.check()
    assert {**vars(short), "findings": set(short.findings)} == {**vars(long), "findings": set(long.findings)}


def test_the_shorter_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above compares one way with itself."""
    taken: list[Any] = []
    owned, expected = l2_entry.owned_clusters, check_module._as_expected
    monkeypatch.setattr(l2_entry, "owned_clusters", lambda *given: taken.append(found := owned(*given)) or found)
    monkeypatch.setattr(check_module, "_as_expected", lambda *given: taken.append(found := expected(*given)) or found)
    assert Image([STORED] * 100).check().clean
    assert taken
    assert None not in taken
    assert -1 not in taken

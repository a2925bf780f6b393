"""The set of metadata clusters: a `set` of Python at little more than eight bytes a cluster, wherever it is interrupted."""

from __future__ import annotations

import random
import tracemalloc
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.formats.qcow2 import cluster_set
from lamina.formats.qcow2.cluster_set import ClusterSet, join, merge, sorted_arrays
from lamina.testing.interrupts import interrupts

CLUSTERS = st.integers(0, 300) | st.integers(0, (1 << 47) - 1)
STEPS = st.lists(st.tuples(st.sampled_from(("add", "discard")), CLUSTERS, st.integers(1, 9)), max_size=60)


LENGTHS = ("_LONGEST", "_BATCH", "_RECENT")
REAL = [getattr(cluster_set, name) for name in LENGTHS]


@pytest.fixture(scope="module")
def short() -> Iterator[None]:
    """Arrays so short that few clusters make many."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(LENGTHS, (8, 20, 3), strict=True):
            patch.setattr(cluster_set, name, value)
        yield


def of(clusters: list[int]) -> ClusterSet:
    return ClusterSet(merge(sorted_arrays([clusters])))


@given(st.sets(CLUSTERS), STEPS, st.lists(CLUSTERS))
def test_it_is_a_set(short: None, first: set[int], steps: list[tuple[str, int, int]], asked: list[int]) -> None:
    model, found = set(first), of(list(first))
    for what, cluster, count in steps:
        if what == "add":
            model |= set(range(cluster, cluster + count))
            found.add(cluster, count)
        else:
            model -= {cluster}
            found.discard(cluster)
    for cluster in [*asked, *model]:
        assert (cluster in found) is (cluster in model)
        inside = [one for one in model if cluster <= one < cluster + 7]
        assert found.first_of(cluster, cluster + 7) == min(inside, default=-1)
    assert len(found) == len(model)
    for cluster in [*asked, *model]:
        assert (cluster in found) is (cluster in model)


@given(st.lists(st.lists(CLUSTERS)))
def test_merging(short: None, batches: list[list[int]]) -> None:
    every = [cluster for batch in batches for cluster in batch]
    once = merge(sorted_arrays(batches, repeated=True), repeated=True)
    assert list(join(once)) == sorted(set(every))
    assert once == []
    if len(set(every)) < len(every):
        with pytest.raises(ValueError, match="twice"):
            merge(sorted_arrays(batches))
    else:
        assert list(join(merge(sorted_arrays(batches)))) == sorted(every)


def test_a_cluster_that_is_in_two_arrays() -> None:
    with pytest.raises(ValueError, match="twice"):
        merge([array("Q", [1, 5, 9]), array("Q", [2, 5])])


def test_an_interrupt_anywhere_loses_no_cluster(short: None) -> None:
    first = list(range(0, 200, 5))
    for interrupt in interrupts():
        found = of(first)
        found.add(31, 3)

        def work(found: ClusterSet = found) -> None:
            found.add(41, 4)
            found.discard(50)
            found.add(67)
            found.add(71, 4)

        interrupt.run(work)
        kept = [cluster for cluster in [*first, 31, 32, 33] if cluster != 50]
        assert all(cluster in found for cluster in kept), interrupt.struck
        may_be = {*first, *range(31, 34), *range(41, 45), *range(67, 75)}
        assert {cluster for cluster in range(300) if cluster in found} <= may_be
        found.add(90, 9)
        assert all(cluster in found for cluster in kept), interrupt.struck


def test_it_takes_twice_the_memory_of_the_table_that_names_the_clusters(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(LENGTHS, REAL, strict=True):
        monkeypatch.setattr(cluster_set, name, value)
    count = 1 << 17
    dice = random.Random(seed)
    tables = array("Q", (first * 65 + 7 for first in range(count)))
    dice.shuffle(tables)
    for repeated in (False, True):
        tracemalloc.start()
        try:
            batches = (tables[at : at + 4096] for at in range(0, count, 4096))
            found = ClusterSet(merge(sorted_arrays(batches, repeated=repeated), repeated=repeated))
            now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert now < 2 * 8 * count
        assert peak < 2 * 8 * count + (3 << 20)  # what is sorted at a time, as numbers of Python
        assert len(found) == count

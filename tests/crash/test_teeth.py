"""The teeth of the power-loss harness: qcow2 with its writes deliberately in a wrong order, caught each time.

Five mistakes that writers of this format have made, one of them in two places. Each must be found within 60 seconds; it
takes a few. The last test holds that the same work in the right order passes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.freeing import Freeing
from lamina.formats.qcow2.tables import Tables
from lamina.testing.persistence import Bounds, CrashState, Persistence, apply
from lamina.testing.power_loss import PowerLossFailure, Recording, record

from .workloads import Geometry, Work

LIMIT = 60.0


def barrier_skipped(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Counts, tables and mappings without a flush between them."""

    def write_out(self: Any) -> bool:
        storage = self.file.node
        storage.flush = lambda: None
        try:
            done = original(self)
        finally:
            del storage.flush
        storage.flush()
        return done

    return write_out


def mapping_first(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The mapping is durable before the counts of what it names."""

    def write_out(self: Any) -> bool:
        if self.mappings.dirty and self.mappings.l1.published:
            self.mappings.write_tables()
            self.file.flush()
            self.mappings.write_links()
            self.file.flush()
        return original(self)

    return write_out


def freed_before_unlinked(self: Any, entry: int) -> None:
    """A count falls while the reference is still on disk."""
    if entry & q.OFFSET_MASK:
        self.refcounts.lower(entry & q.OFFSET_MASK)


def pointer_before_table(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The header points to an L1 table that is still on its way."""

    def write_out(self: Any) -> bool:
        if not self.mappings.l1.published:
            self.refcounts.write_counts()
            self.refcounts.write_links()
            self.file.flush()
            self.mappings.write_tables()
            self.header.l1_table_offset, self.header.l1_size = self.mappings.l1.offset, len(self.mappings.l1)
            self.header.store(self.file, "l1_size", "l1_table_offset")
        return original(self)

    return write_out


def pointer_before_reftable(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """The header points to a refcount table that is still on its way."""

    def write_counts(self: Any) -> None:
        original(self)
        if self._moved:
            self._header.store(self._file, "refcount_table_offset", "refcount_table_clusters")

    return write_counts


def discard_after_reuse(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """What was unlinked is free at once: it may be in use again before the discard of it reaches the disk."""

    def flushed(self: Any, counts: Any) -> None:
        original(self, counts)
        for stretch in self._discarded:
            counts.lower(*stretch)
        self._discarded = []

    return flushed


SMALL = Geometry({"cluster_size": 512, "refcount_bits": 16}, (64 << 10,))
GROWING = Geometry({"cluster_size": 512, "refcount_bits": 16}, (24 << 10,), grow=True)
FULL = Geometry({"cluster_size": 512, "refcount_bits": 64}, (2100 << 10,), filled=1976 << 10)


def caught(geometry: Geometry, seed: int, model: Persistence) -> PowerLossFailure:
    """The first state, of any workload, that is found wrong within the time; fails the test where there is none."""
    end = time.monotonic() + LIMIT
    states = number = 0
    while time.monotonic() < end:
        rng = random.Random(f"{seed}/{number}")
        work = Work(rng, geometry, 12 if geometry.filled else 30)
        recording = record(work, start=work.start, model=model, seed=seed, bounds=Bounds(at_cut=100))
        without_a_cut(recording, work)
        try:
            states += recording.examine(work.verify)
        except PowerLossFailure as failure:
            print(f"caught in workload {number}, after {states + failure.state.number} states:\n{failure}")
            return failure
        number += 1
    pytest.fail(f"not caught in {LIMIT} s: {number} workloads, {states} states")


def without_a_cut(recording: Recording, work: Work) -> None:
    """The mistake is of the kind that nobody sees until the power is cut."""
    content = bytearray(recording.start)
    for one in recording.log:
        apply(content, one)
    moment = work.history.moment
    work.verify(bytes(content), CrashState(0, bytes(content), (moment,), (moment,), len(recording.log), ()))


def test_a_skipped_barrier(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tables, "write_out", barrier_skipped(Tables.write_out))
    caught(SMALL, seed, Persistence.P1)


def test_a_mapping_published_first(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tables, "write_out", mapping_first(Tables.write_out))
    caught(SMALL, seed, Persistence.P0)


def test_freed_before_unlinked(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tables, "give_up", freed_before_unlinked)
    caught(SMALL, seed, Persistence.P1)


def test_the_header_pointer_before_the_l1_table(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tables, "write_out", pointer_before_table(Tables.write_out))
    caught(GROWING, seed, Persistence.P1)


def test_the_header_pointer_before_the_refcount_table(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.formats.qcow2.refcounts import Refcounts

    monkeypatch.setattr(Refcounts, "write_counts", pointer_before_reftable(Refcounts.write_counts))
    caught(FULL, seed, Persistence.P1)


def test_a_discard_after_reuse(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Freeing, "flushed", discard_after_reuse(Freeing.flushed))
    failure = caught(SMALL, seed, Persistence.P4)
    assert any(" late" in line for line in failure.state.story), "only a late discard can do this"


@pytest.mark.parametrize("geometry", [SMALL, GROWING], ids=str)
def test_the_right_order_passes(geometry: Geometry, seed: int) -> None:
    rng = random.Random(seed)
    work = Work(rng, geometry, 30)
    assert record(work, start=work.start, seed=seed, bounds=Bounds(at_cut=50)).examine(work.verify) > 100

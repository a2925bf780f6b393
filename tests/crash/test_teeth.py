"""The teeth of the power-loss harness: qcow2 with its writes deliberately in a wrong order, caught each time.

Five mistakes that writers of this format have made, one of them in two places, and four in what changes all metadata:
snapshots, bitmaps, options, repair. Each must be found within 60 seconds of processor time; it takes a few. The last test
holds that the same work in the right order passes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.bitmaps import Bitmaps
from lamina.formats.qcow2.freeing import Freeing
from lamina.formats.qcow2.rewrite import Rewrite
from lamina.formats.qcow2.tables import Tables
from lamina.testing.persistence import Bounds, CrashState, Persistence, apply
from lamina.testing.power_loss import PowerLossFailure, Recording, record

from .amend_workload import AmendWork
from .test_repair_power_loss import RepairWork
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


def tables_after_the_header(original: Callable[..., None]) -> Callable[..., None]:
    """The header names the tables of a rewrite that are still on their way."""

    def publish(self: Any, *arguments: Any, **named: Any) -> None:
        storage = self._file.node
        storage.flush = lambda: None
        try:
            original(self, *arguments, **named)
        finally:
            del storage.flush
        storage.flush()

    return publish


def discarded_before_the_header(self: Any) -> dict[str, int]:
    """What a rewrite frees is discarded while the header still names it."""
    for offset, length in self.freed():
        self._file.discard(offset, length)
    return {}


def in_use_too_late(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """The disk changes before the image says that its bitmaps are in use."""

    def begin(self: Any) -> None:
        storage = self._tables.file.node
        storage.flush = lambda: None
        try:
            original(self)
        finally:
            del storage.flush

    return begin


SMALL = Geometry({"cluster_size": 512, "refcount_bits": 16}, (64 << 10,))
GROWING = Geometry({"cluster_size": 512, "refcount_bits": 16}, (24 << 10,), grow=True)
FULL = Geometry({"cluster_size": 512, "refcount_bits": 64}, (2100 << 10,), filled=1976 << 10)


def caught(geometry: Geometry, seed: int, model: Persistence) -> PowerLossFailure:
    """As `caught_in`, in requests of the guest."""
    return caught_in(lambda rng: Work(rng, geometry, 12 if geometry.filled else 30), seed, model)


def caught_in(
    make: Callable[[random.Random], Any], seed: int, model: Persistence, *, at_cut: int = 100
) -> PowerLossFailure:
    """The first state, of any workload, that is found wrong within LIMIT; fails the test where there is none."""
    end = time.process_time() + LIMIT
    states = number = 0
    while time.process_time() < end:
        work = make(random.Random(f"{seed}/{number}"))
        recording = record(work, start=work.start, model=model, seed=seed, bounds=Bounds(at_cut=at_cut))
        without_a_cut(recording, work)
        try:
            states += recording.examine(work.verify)
        except PowerLossFailure as failure:
            print(f"caught in workload {number}, after {states + failure.state.number} states:\n{failure}")
            return failure
        number += 1
    pytest.fail(f"not caught in {LIMIT} s: {number} workloads, {states} states")


def without_a_cut(recording: Recording, work: Any) -> None:
    """The mistake is of the kind that nobody sees until the power is cut."""
    content = bytearray(recording.start)
    for one in recording.log:
        apply(content, one)
    moment = work.moment
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


def amending(rng: random.Random) -> AmendWork:
    return AmendWork(rng, {"cluster_size": 512}, 5)


def test_tables_of_a_change_of_options_after_the_header(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rewrite, "publish", tables_after_the_header(Rewrite.publish))
    caught_in(amending, seed, Persistence.P1)


def test_a_bitmap_that_is_in_use_too_late(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bitmaps, "begin", in_use_too_late(Bitmaps.begin))
    failure = caught_in(amending, seed, Persistence.P1, at_cut=20)  # more workloads: few store a bitmap and go on
    assert "the bitmap" in str(failure)


def test_tables_of_a_repair_after_the_header(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rewrite, "publish", tables_after_the_header(Rewrite.publish))
    caught_in(lambda rng: RepairWork(rng, tmp_path / "made.qcow2", 512, 16), seed, Persistence.P1)


def test_a_repair_that_discards_first(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rewrite, "_header_values", discarded_before_the_header)
    caught_in(lambda rng: RepairWork(rng, tmp_path / "made.qcow2", 512, 16), seed, Persistence.P1)


@pytest.mark.parametrize("geometry", [SMALL, GROWING], ids=str)
def test_the_right_order_passes(geometry: Geometry, seed: int) -> None:
    rng = random.Random(seed)
    work = Work(rng, geometry, 30)
    assert record(work, start=work.start, seed=seed, bounds=Bounds(at_cut=50)).examine(work.verify) > 100

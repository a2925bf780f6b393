"""A storage that remembers everything done to it, and the states in which a power cut could leave it.

What was issued before the last flush that returned is durable. Of what was issued since, any part may be there: the order
in which a disk writes is its own. Writes that overlap keep their order. A discard may come as late as the next flush.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lamina.extents import Extents
from lamina.node import StorageNode

SECTOR = 512
#: Up to this many records between two flushes every subset is tried; of more, a choice.
EXHAUSTIVE = 6


@dataclass(frozen=True)
class Record:
    kind: str  #: write, discard, truncate, flush, operation, synced
    offset: int = 0
    data: bytes = b""
    length: int = 0


class Recorder(StorageNode):
    """Storage in memory, and the log of what reached it. `mark` adds what the workload knows."""

    driver = "recorder"

    def __init__(self, content: bytes = b"") -> None:
        super().__init__()
        self.content = bytearray(content)
        self.log: list[Record] = []

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def growable(self) -> bool:
        return True

    def mark(self, kind: str, number: int) -> None:
        self.log.append(Record(kind, number))

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self.content[offset : offset + len(view)]

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self._do(Record("write", offset, bytes(view)))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self._do(Record("write", offset, bytes(length)))

    def discard(self, offset: int, length: int) -> None:
        self._do(Record("discard", offset, length=length))

    def truncate(self, size: int) -> None:
        self._do(Record("truncate", length=size))

    def flush(self) -> None:
        self.log.append(Record("flush"))

    def extents(self, offset: int, length: int) -> Extents:
        return Extents.single(offset, length, data=True, present=True, file=self, offset=offset)

    def _do(self, record: Record) -> None:
        self.log.append(record)
        apply(self.content, record)


def apply(content: bytearray, record: Record) -> None:
    if record.kind == "write":
        end = record.offset + len(record.data)
        if end > len(content):
            content.extend(bytes(end - len(content)))
        content[record.offset : end] = record.data
    elif record.kind == "discard":
        end = min(record.offset + record.length, len(content))
        if end > record.offset:
            content[record.offset : end] = bytes(end - record.offset)
    elif record.kind == "truncate":
        del content[record.length :]
        content.extend(bytes(record.length - len(content)))


def torn(record: Record, rng: random.Random) -> Record:
    """The record with only its first sectors on disk."""
    first = SECTOR - record.offset % SECTOR
    cuts = range(first, len(record.data), SECTOR)
    return Record("write", record.offset, record.data[: rng.choice(cuts)]) if cuts else record


def crash_states(start: bytes, log: list[Record], rng: random.Random) -> Iterator[tuple[bytes, int, int]]:
    """(content, last operation that had begun, last flush of the workload that had returned) of every state tried."""
    durable = bytearray(start)
    epoch: list[Record] = []
    begun = synced = -1
    for record in [*log, Record("flush")]:
        if record.kind == "operation":
            begun = record.offset
        elif record.kind == "synced":
            synced = record.offset
        elif record.kind != "flush":
            epoch.append(record)
        if record.kind in ("flush", "operation", "synced"):
            # A state holds for what had begun when its last record was issued; looking at marks too keeps that exact.
            for chosen in _subsets(epoch, rng):
                content = bytearray(durable)
                for one in chosen:
                    apply(content, one)
                yield bytes(content), begun, synced
        if record.kind == "flush":
            for one in epoch:
                apply(durable, one)
            epoch = []


def _subsets(epoch: list[Record], rng: random.Random) -> Iterator[list[Any]]:
    count = len(epoch)
    if count <= EXHAUSTIVE:
        picks = [set(pick) for size in range(count + 1) for pick in itertools.combinations(range(count), size)]
    else:
        everything = set(range(count))
        picks = [set(range(size)) for size in range(count + 1)]
        picks += [everything - {gone} for gone in everything] + [{kept} for kept in everything]
        picks += [{at for at in everything if rng.random() < 0.5} for _ in range(16)]
    for pick in picks:
        chosen = [epoch[at] for at in sorted(pick)]
        yield chosen
        late = [one for one in chosen if one.kind == "discard"]
        if late and late != chosen[-len(late) :]:
            yield [one for one in chosen if one.kind != "discard"] + late
        writes = [at for at, one in enumerate(chosen) if one.kind == "write" and len(one.data) > SECTOR]
        if writes:
            at = rng.choice(writes)
            yield [*chosen[:at], torn(chosen[at], rng), *chosen[at + 1 :]]

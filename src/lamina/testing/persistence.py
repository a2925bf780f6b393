"""The states that a power cut can leave, computed from the ordered records of a storage.

No I/O and no pytest: `recorder.Recorder` makes the records, and `power_loss` runs a check on every state. Requests issued
before the last completed flush are durable. For the requests since then, the *epoch*, a model defines the possible states
(`Persistence`). Overlapping writes keep their order in every model but P4. A sector is written atomically: of two writes to
one sector, the later includes the earlier.

Marks record the knowledge of the code under test: from `begin(label)` the effects may be found after a cut; from
`durable(label)` they must be. A state is checked against the marks before the cut, so a premature guarantee is detected.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

SECTOR = 512  #: the bytes that a disk writes atomically


class Persistence(IntEnum):
    """The possible effects of a cut on an epoch. Each model includes the previous ones."""

    P0 = 0  #: a prefix: the disk writes in order
    P1 = 1  #: any subset
    P2 = 2  #: and a write may be torn: only some of its sectors of 512 bytes are stored
    P3 = 3  #: and the length of the file is lost or kept independently
    P4 = 4  #: and discards, and zero requests that may unmap, take effect after later requests, until a flush


class Bounds(NamedTuple):
    """Limits of the search where the number of states is too large."""

    exhaustive: int = 8  #: the most records of an epoch, and sectors of a write, for which every subset is tried
    random: int = 64  #: for longer ones: prefixes, one or two dropped, one kept, and this number of random subsets
    at_cut: int = 1000  #: the most states at one moment, chosen at random from more; 0: all


DEFAULT_BOUNDS = Bounds()
#: The most outcomes that are followed after a flush where late discards are visible.
MOST_BASES = 8
#: The number of states, in an epoch that changes the length of the file, that are tried with every length.
MOST_RESIZED = 512


class Record(NamedTuple):
    """One operation on a storage."""

    kind: str  #: write, zero, discard, truncate, flush_start, flush_done; begin, durable (marks)
    offset: int = 0  #: for a truncate: the new size
    length: int = 0
    data: bytes = b""
    fua: bool = False  #: durable when it has returned
    unmap: bool = False  #: for a zero request: it may be executed as a discard
    label: Any = None  #: the label of a mark; for a flush: the number of its start

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def slow(self) -> bool:
        """Whether it may take effect after later requests."""
        return self.kind == "discard" or (self.kind == "zero" and self.unmap and not self.fua)

    @property
    def sectors(self) -> int:
        """The number of sectors that it overlaps."""
        return -(-self.end // SECTOR) - self.offset // SECTOR

    def __str__(self) -> str:
        if self.kind in ("begin", "durable"):
            return f"{self.kind} {self.label!r}"
        if self.kind == "truncate":
            return f"truncate to {self.offset}"
        if self.kind in ("flush_start", "flush_done"):
            return self.kind
        return f"{self.kind} of {self.length} at {self.offset}{' (FUA)' if self.fua else ''}"


class CrashState(NamedTuple):
    """The state after one power cut."""

    number: int  #: from 0; the same log, model, seed and bounds give the same states
    content: bytes
    begun: tuple[Any, ...]  #: the labels of `begin` marks before the cut
    durable: tuple[Any, ...]  #: the labels of `durable` marks before the cut
    cut: int  #: the number of records before the cut
    story: tuple[str, ...]  #: the outcome of each record of the epoch


class _Recipe(NamedTuple):
    kept: tuple[int, ...]  # indexes in the epoch, in the order in which they took effect
    torn: tuple[int, int] | None = None  # (index, mask of the stored sectors)
    length: int = -1  # the length of the file, if it is independent


def apply(content: bytearray, record: Record, mask: int = -1) -> None:
    """Apply `record` to `content`; for a write or a zero request only the sectors in `mask`."""
    if record.kind == "truncate":
        del content[record.offset :]
        content.extend(bytes(record.offset - len(content)))
    elif record.kind == "discard":
        end = min(record.end, len(content))
        if end > record.offset:
            content[record.offset : end] = bytes(end - record.offset)
    elif mask == -1:
        _put(content, record.offset, record.data if record.kind == "write" else bytes(record.length))
    else:
        data = record.data if record.kind == "write" else bytes(record.length)
        first = record.offset // SECTOR
        for at in range(record.sectors):
            if mask >> at & 1:
                lo = max((first + at) * SECTOR, record.offset)
                hi = min((first + at + 1) * SECTOR, record.end)
                _put(content, lo, data[lo - record.offset : hi - record.offset])


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def crash_states(
    start: bytes,
    log: Sequence[Record],
    *,
    model: Persistence = Persistence.P4,
    seed: int = 0,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> Iterator[CrashState]:
    """Every state, each once, that a power cut during `log` can leave on storage with the content `start`, within
    `bounds`."""
    walk = _Walk(start, model, seed, bounds)
    for index, record in enumerate(log):
        kind = record.kind
        if kind == "begin":
            # This mark extends the legal states: the previous records are checked without it.
            yield from walk.cut(index)
            walk.settle()
            walk.begun += (record.label,)
        elif kind == "durable":
            if walk.in_flight:
                yield from walk.cut(index)
                walk.settle()
            walk.durable += (record.label,)
            walk.again = True
        elif kind == "flush_start":
            walk.starts[record.label] = index
        elif kind == "flush_done":
            yield from walk.cut(index)
            walk.settle()
            walk.flushed(record.label)
        elif record.length or kind == "truncate":
            walk.add(index, record)
    yield from walk.cut(len(log))


class _Walk:
    """The position in the log, the durable content, and the requests that are not durable."""

    def __init__(self, start: bytes, model: Persistence, seed: int, bounds: Bounds) -> None:
        # The durable content; several if a discard took effect late or early, with a visible difference.
        self.bases: list[tuple[bytes, str]] = [(bytes(start), "")]
        self.live = bytearray(start)  # with all requests
        self.model = model
        self.seed = seed
        self.bounds = bounds
        self.epoch: list[Record] = []
        self.effects: list[Record] = []  # the same, in whole sectors
        self.where: list[int] = []  # their indexes in the log
        self.must: set[int] = set()  # indexes in the epoch of FUA writes that have returned
        self.in_flight = False  # whether an FUA write may still be in progress
        self.starts: dict[Any, int] = {}
        self.begun: tuple[Any, ...] = ()
        self.durable: tuple[Any, ...] = ()
        self.new = 0  # the first record of the epoch that no cut has examined
        self.again = True  # whether examined states must be examined again, since more is guaranteed now
        self.seen: set[tuple[int, int, int]] = set()
        self.number = 0

    def add(self, index: int, record: Record) -> None:
        apply(self.live, record)
        self.epoch.append(record)
        self.effects.append(self._whole(record))
        self.where.append(index)
        self.in_flight = self.in_flight or record.fua

    def _whole(self, record: Record) -> Record:
        """Its effect on the disk in whole sectors: with the other bytes of its first and last sectors."""
        lo, hi = record.offset - record.offset % SECTOR, min(record.end + -record.end % SECTOR, len(self.live))
        if record.kind not in ("write", "zero") or (lo == record.offset and hi <= record.end):
            return record
        return Record("write", lo, hi - lo, bytes(self.live[lo:hi]), record.fua)

    def settle(self) -> None:
        """All requests so far have returned."""
        if self.in_flight:
            self.must.update(at for at, record in enumerate(self.epoch) if record.fua)
            self.in_flight = False

    def flushed(self, label: Any) -> None:
        """Requests issued before that flush began are durable."""
        began = self.starts.pop(label)
        count = sum(index < began for index in self.where)
        if count:
            self.bases = list(self._settled(count))[:MOST_BASES]
        del self.epoch[:count], self.effects[:count], self.where[:count]
        self.must = {at - count for at in self.must if at >= count}
        self.new = max(self.new - count, 0)

    def _settled(self, count: int) -> Iterator[tuple[bytes, str]]:
        """The durable contents after the first `count` records, each once: the first is the one in order."""
        orders = [_Recipe(tuple(range(count)))]
        if self.model >= Persistence.P4:
            orders += self._late(orders[0].kept)
        found = set()
        for recipe in orders:
            for base, note in self.bases:
                content = self._made(recipe, base)
                if content not in found:
                    found.add(content)
                    late = [
                        at for at in recipe.kept if any(other > at for other in recipe.kept[: recipe.kept.index(at)])
                    ]
                    told = [
                        f"record {self.where[at]}: {self.epoch[at]}: took effect late, before the last flush"
                        for at in late
                    ]
                    yield content, "; ".join([note, *told] if note else told)

    def cut(self, index: int) -> Iterator[CrashState]:
        """The states after a power cut before record `index` of the log that no earlier cut produced."""
        if self.again or self.new < len(self.epoch):
            rng = random.Random(f"{self.seed}/{index}")
            legal = [recipe for recipe in self._recipes(rng) if self._legal(recipe.kept)]
            recipes = [(base, recipe) for base in self.bases for recipe in legal]
            most = self.bounds.at_cut
            if most and len(recipes) > most:
                recipes = [recipes[at] for at in sorted(rng.sample(range(len(recipes)), most))]
            for (base, note), recipe in recipes:
                content = self._made(recipe, base)
                key = (hash(content), len(self.begun), len(self.durable))
                if key not in self.seen:
                    self.seen.add(key)
                    story = self._story(recipe, note)
                    yield CrashState(self.number, content, self.begun, self.durable, index, story)
                    self.number += 1
        self.new, self.again = len(self.epoch), False

    def _legal(self, kept: tuple[int, ...]) -> bool:
        """Whether a cut can leave these records: those that have returned, and, unless all are due, a new one."""
        if not self.must.issubset(kept):
            return False
        last = max(kept, default=-1)
        if not self.again and last < self.new:
            return False
        # An FUA write that precedes another request had returned before that request was issued.
        return all(at in kept or at > last for at, record in enumerate(self.epoch) if record.fua)

    def _made(self, recipe: _Recipe, base: bytes) -> bytes:
        content = bytearray(base)
        last = -1
        for at in recipe.kept:
            # A late record changes no other byte of its sectors.
            record = self.effects[at] if at > last else self.epoch[at]
            last = max(last, at)
            apply(content, record, recipe.torn[1] if recipe.torn and recipe.torn[0] == at else -1)
        if recipe.length >= 0:
            del content[recipe.length :]
            content.extend(bytes(recipe.length - len(content)))
        return bytes(content)

    # -- the tried states

    def _recipes(self, rng: random.Random) -> Iterator[_Recipe]:
        count = len(self.epoch)
        if self.model is Persistence.P0:
            yield from (_Recipe(tuple(range(length))) for length in range(count + 1))
            return
        picks = list(self._picks(count, rng))
        recipes = list(map(_Recipe, picks))
        if self.model >= Persistence.P2:
            recipes += self._torn(count, rng)
        yield from recipes
        if self.model >= Persistence.P3:
            yield from self._lengths(recipes, rng)
        if self.model >= Persistence.P4:
            for kept in picks:
                yield from self._late(kept)

    def _picks(self, count: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
        if count <= self.bounds.exhaustive:
            for size in range(count + 1):
                yield from itertools.combinations(range(count), size)
            return
        everything = range(count)
        yield from (tuple(range(length)) for length in range(count + 1))
        yield from ((kept,) for kept in everything)
        for lost in (1, 2):
            for gone in itertools.combinations(everything, lost):
                yield tuple(at for at in everything if at not in gone)
        for _ in range(self.bounds.random):
            yield tuple(at for at in everything if at in self.must or rng.random() < 0.5)

    def _torn(self, count: int, rng: random.Random) -> Iterator[_Recipe]:
        for at in range(count):
            record = self.epoch[at]
            sectors = record.sectors
            if record.kind not in ("write", "zero") or sectors < 2 or at in self.must:
                continue
            if sectors <= self.bounds.exhaustive:
                masks: Sequence[int] = range(1, (1 << sectors) - 1)
            else:
                masks = [(1 << first) - 1 for first in range(1, sectors)]
            around = {tuple(range(count)), tuple(range(at + 1)), (at,)}
            around.add(tuple(other for other in range(count) if other == at or rng.random() < 0.5))
            for kept in sorted(around):
                yield from (_Recipe(kept, (at, mask)) for mask in masks)

    def _lengths(self, recipes: list[_Recipe], rng: random.Random) -> Iterator[_Recipe]:
        """Each length of the file since the last flush, with the bytes of another moment."""
        lengths = [len(self.bases[0][0])]
        for record in self.epoch:
            longest = lengths[-1] if record.kind == "discard" else max(lengths[-1], record.end)
            lengths.append(record.offset if record.kind == "truncate" else longest)
        different = sorted(set(lengths))
        if len(different) > 1:
            for recipe in recipes if len(recipes) <= MOST_RESIZED else rng.sample(recipes, MOST_RESIZED):
                yield from (recipe._replace(length=length) for length in different)

    def _late(self, kept: tuple[int, ...]) -> Iterator[_Recipe]:
        """The same with all discards last, and with each single discard last."""
        late = tuple(at for at in kept if self.epoch[at].slow)
        for group in dict.fromkeys([late, *((at,) for at in late)]):
            if group and group != kept[-len(group) :]:
                yield _Recipe((*(at for at in kept if at not in group), *group))

    def _story(self, recipe: _Recipe, note: str) -> tuple[str, ...]:
        """A line for each record of the epoch."""
        lines = [note] if note else []
        for at, record in enumerate(self.epoch):
            fate = "kept" if at in recipe.kept else "lost"
            if recipe.torn and recipe.torn[0] == at and at in recipe.kept:
                there = [f"{sector}" for sector in range(record.sectors) if recipe.torn[1] >> sector & 1]
                fate = f"torn, only sectors {' '.join(there)} of {record.sectors} are stored"
            elif fate == "kept" and any(other > at for other in recipe.kept[: recipe.kept.index(at)]):
                fate = "late"
            lines.append(f"record {self.where[at]}: {record}: {fate}")
        if recipe.length >= 0:
            lines.append(f"the file is {recipe.length} bytes long")
        return tuple(lines)

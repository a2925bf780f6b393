"""Random work that mixes requests of the guest with all that changes the metadata of a qcow2 image, and what a power cut may
leave of it.

After each operation the model adds a `Moment`. What a header names is published by one write of one sector: a state has the
size, the version, the width of the counts, the names, the list of bitmaps and the snapshots of one moment. Guest data is
published sector by sector: each sector is that of some moment since the last flush.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from lamina.errors import LimitExceeded, OptionError
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.bitmap_directory import IN_USE
from lamina.formats.qcow2.bitmap_directory import read as read_directory
from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.qcow2.header import Header
from lamina.graph import Opener
from lamina.image import Image
from lamina.request import Child
from lamina.testing.image_checks import check_whole
from lamina.testing.persistence import SECTOR, CrashState
from lamina.testing.recorder import Marks, Recorder

from .workloads import fresh, open_on

SIZES = [24 << 10, 40 << 10, 48 << 10, 70 << 10]
MOST_SNAPSHOTS = MOST_BITMAPS = 3
#: Names of the backing file, all of one file: the header stores the longest behind its first sector.
BACKING_NAMES = ["base", "./base", "./" * 400 + "base"]

REQUESTS = ["write"] * 9 + ["zero", "zero", "unmap", "discard", "discard", "flush", "flush"]
CHANGES = ["truncate", "truncate", "preallocate", "create", "create", "apply", "delete"]
CHANGES += ["add", "add", "remove", "clear", "enable", "disable", "merge"] + ["amend"] * 9


class Named(NamedTuple):
    """What the first sector of an image says."""

    size: int
    version: int
    refcount_bits: int
    lazy: bool
    backing: tuple[str | None, str | None]
    #: The bitmaps that were stored, which exist in the image.
    bitmaps: tuple[str, ...] = ()


class Bitmap(NamedTuple):
    """What a bitmap promises, by sectors: `dirty` (1) are those that it must know of, the others read as `clean` has them.
    `written` (1): those of which it promises nothing, since they were written while it was disabled."""

    enabled: bool
    dirty: bytes
    written: bytes
    clean: bytes

    def changed(self, offset: int, length: int) -> Bitmap:
        """The same after a write of these bytes."""
        sectors = slice(offset // SECTOR, -(-(offset + length) // SECTOR))
        known = bytearray(self.dirty if self.enabled else self.written)
        known[sectors] = b"\1" * len(known[sectors])
        return self._replace(dirty=bytes(known)) if self.enabled else self._replace(written=bytes(known))

    def resized(self, size: int) -> Bitmap:
        count = size // SECTOR
        dirty, written = (one[:count].ljust(count, b"\0") for one in (self.dirty, self.written))
        return Bitmap(self.enabled, dirty, written, self.clean[:size].ljust(size, b"\0"))

    def fits(self, enabled: bool, known: bytes, disk: bytes) -> bool:
        """Whether a bitmap of an image that knows of these sectors keeps this promise, where the disk reads as `disk`."""
        if enabled != self.enabled or len(disk) != len(self.clean):
            return False
        for sector, (dirty, written) in enumerate(zip(self.dirty, self.written, strict=True)):
            part = slice(sector * SECTOR, (sector + 1) * SECTOR)
            if not known[sector] and (dirty or (not written and disk[part] != self.clean[part])):
                return False
        return True


class Moment(NamedTuple):
    named: Named
    disk: bytes
    snapshots: dict[str, bytes]
    #: Those of the node: the image has them once they are stored.
    bitmaps: dict[str, Bitmap]


class AmendWork:
    """Random operations on one image in several openings. Call it with a storage that holds `start`; `verify` judges what a
    power cut left. `backing`: half of the disk lies in a layer below, which the header names."""

    def __init__(
        self, rng: random.Random, options: dict[str, Any], operations: int, *, backing: bool = False, openings: int = 4
    ) -> None:
        """`operations` in each of the openings."""
        self.rng, self.operations, self.openings = rng, operations, openings
        size = rng.choice(SIZES)
        self.backing = rng.randbytes(size // 2 & -SECTOR) if backing else None
        self.start = fresh(options, size)
        version = 2 if options.get("compat") == "0.10" else 3
        named = Named(size, version, options.get("refcount_bits", 16), False, (None, None))
        if backing:
            node = Recorder(self.start)
            with open_on(node, read_only=False, backing=self.backing) as image:
                image.amend(backing_file=BACKING_NAMES[0], backing_fmt="raw")
            self.start = bytes(node.content)
            named = named._replace(backing=(BACKING_NAMES[0], "raw"))
        self.moments = [Moment(named, (self.backing or b"").ljust(size, b"\0"), {}, {})]
        #: How often each operation took place.
        self.done: dict[str, int] = {}

    @property
    def moment(self) -> int:
        """The number of the last moment so far."""
        return len(self.moments) - 1

    # -- the work

    def __call__(self, storage: Recorder, marks: Marks) -> None:
        for opening in range(self.openings):
            with open_on(storage, read_only=False, backing=self.backing) as image:
                for number in range(self.operations):
                    self._one(image, storage, marks, f"{opening}.{number}")
                    assert image.read(0, image.size) == self.moments[-1].disk
                marks.begin(len(self.moments))
            self._stored()
            if opening % 2:  # a close alone promises no stable storage
                storage.flush()
                marks.durable(len(self.moments) - 1)

    def _one(self, image: Image, storage: Recorder, marks: Marks, label: str) -> None:
        kind = self.rng.choice(REQUESTS if self.rng.random() < 0.5 else CHANGES)
        if kind == "flush":
            image.flush()
            marks.durable(len(self.moments) - 1)
            return
        marks.begin(len(self.moments))
        before, began = self.moments[-1], bytes(storage.content)
        try:
            durable: Moment | None = getattr(self, f"_{kind}")(image, marks, label)
        except OptionError:
            assert storage.content == began, f"{kind} was refused after it wrote"
            return
        except LimitExceeded:
            assert kind in ("create", "apply", "amend"), "counts are too narrow for references of snapshots"
            return
        if self.moments[-1] is not before:
            self.done[kind] = self.done.get(kind, 0) + 1
        if durable is not None:
            marks.durable(self._number(durable))

    def _number(self, moment: Moment) -> int:
        return next(at for at in range(len(self.moments) - 1, -1, -1) if self.moments[at] is moment)

    def _range(self) -> tuple[int, int]:
        size = self.moments[-1].named.size
        offset = self.rng.randrange(size // SECTOR) * SECTOR
        return offset, min(self.rng.choice([1, 2, 9, 30]) * SECTOR, size - offset)

    def _changed(self, offset: int, data: bytes) -> None:
        """The guest wrote these bytes."""
        last = self.moments[-1]
        disk = last.disk[:offset] + data + last.disk[offset + len(data) :]
        bitmaps = {name: one.changed(offset, len(data)) for name, one in last.bitmaps.items()}
        self.moments.append(last._replace(disk=disk, bitmaps=bitmaps))

    def _write(self, image: Image, marks: Marks, label: str) -> None:
        offset, length = self._range()
        data = bytes([len(self.moments) % 255 + 1]) * length
        image.write(offset, data)
        self._changed(offset, data)

    def _zero(self, image: Image, marks: Marks, label: str, unmap: bool = False) -> None:
        offset, length = self._range()
        image.zero(offset, length, unmap=unmap)
        self._changed(offset, bytes(length))

    def _unmap(self, image: Image, marks: Marks, label: str) -> None:
        self._zero(image, marks, label, unmap=True)

    def _discard(self, image: Image, marks: Marks, label: str) -> None:
        offset, length = self._range()
        image.discard(offset, length)
        before, old = len(self.moments), self.moments[-1].disk
        for at in range(offset, offset + length, SECTOR):
            found = image.read(at, SECTOR)
            if found != old[at : at + SECTOR]:
                assert found == bytes(SECTOR), "what is discarded reads as before, or as zero"
                self._changed(at, found)
        del self.moments[before:-1]  # one operation

    def _resized(self, size: int) -> None:
        last = self.moments[-1]
        disk = last.disk[:size].ljust(size, b"\0")
        bitmaps = {name: one.resized(size) for name, one in last.bitmaps.items()}
        self.moments.append(last._replace(named=last.named._replace(size=size), disk=disk, bitmaps=bitmaps))

    def _truncate(self, image: Image, marks: Marks, label: str, preallocation: str = "off") -> None:
        size = self.rng.choice(SIZES)
        if size != image.size:
            image.truncate(size, preallocation)
            self._resized(size)

    def _preallocate(self, image: Image, marks: Marks, label: str) -> None:
        self._truncate(image, marks, label, "metadata")

    # -- snapshots

    def _create(self, image: Image, marks: Marks, label: str) -> Moment | None:
        last = self.moments[-1]
        if len(last.snapshots) == MOST_SNAPSHOTS:
            return None
        made = image.create_snapshot(label)
        self.moments.append(last._replace(snapshots={**last.snapshots, made.id: last.disk}))
        return self.moments[-1]

    def _apply(self, image: Image, marks: Marks, label: str) -> Moment | None:
        last = self.moments[-1]
        if not last.snapshots:
            return None
        chosen = self.rng.choice(sorted(last.snapshots))
        image.apply_snapshot(chosen)
        disk = last.snapshots[chosen]
        size = max(last.named.size, len(disk))
        bitmaps = {n: one.resized(size).changed(0, size).resized(len(disk)) for n, one in last.bitmaps.items()}
        self.moments.append(Moment(last.named._replace(size=len(disk)), disk, last.snapshots, bitmaps))
        return self.moments[-1]

    def _delete(self, image: Image, marks: Marks, label: str) -> Moment | None:
        last = self.moments[-1]
        if not last.snapshots:
            return None
        chosen = self.rng.choice(sorted(last.snapshots))
        image.delete_snapshot(chosen)
        self.moments.append(last._replace(snapshots={n: d for n, d in last.snapshots.items() if n != chosen}))
        return self.moments[-1]

    # -- bitmaps

    def _with_bitmap(self, name: str, bitmap: Bitmap) -> None:
        last = self.moments[-1]
        self.moments.append(last._replace(bitmaps={**last.bitmaps, name: bitmap}))

    def _any_bitmap(self) -> str | None:
        return self.rng.choice(sorted(self.moments[-1].bitmaps) or [None])  # type: ignore[list-item]

    def _stored(self) -> None:
        """All bitmaps of the node are in the image now."""
        last = self.moments[-1]
        self.moments.append(last._replace(named=last.named._replace(bitmaps=tuple(last.bitmaps))))

    def _add(self, image: Image, marks: Marks, label: str) -> None:
        last, enabled = self.moments[-1], self.rng.random() < 0.7
        if len(last.bitmaps) == MOST_BITMAPS:
            return
        image.add_bitmap(label, self.rng.choice((512, 1024, 4096)), enabled=enabled)
        none = bytes(last.named.size // SECTOR)
        self._with_bitmap(label, Bitmap(enabled, none, none, last.disk))

    def _remove(self, image: Image, marks: Marks, label: str) -> None:
        if (name := self._any_bitmap()) is not None:
            image.remove_bitmap(name)
            last = self.moments[-1]
            self.moments.append(last._replace(bitmaps={n: b for n, b in last.bitmaps.items() if n != name}))
            self._stored()
            del self.moments[-2]  # the image has one directory or the other

    def _clear(self, image: Image, marks: Marks, label: str) -> None:
        if (name := self._any_bitmap()) is not None:
            image.clear_bitmap(name)
            last = self.moments[-1]
            none = bytes(last.named.size // SECTOR)
            self._with_bitmap(name, Bitmap(last.bitmaps[name].enabled, none, none, last.disk))

    def _enable(self, image: Image, marks: Marks, label: str, enabled: bool = True) -> None:
        if (name := self._any_bitmap()) is not None:
            image.enable_bitmap(name, enabled)
            self._with_bitmap(name, self.moments[-1].bitmaps[name]._replace(enabled=enabled))

    def _disable(self, image: Image, marks: Marks, label: str) -> None:
        self._enable(image, marks, label, False)

    def _merge(self, image: Image, marks: Marks, label: str) -> None:
        name, other = self._any_bitmap(), self._any_bitmap()
        if name is not None and other is not None:
            image.merge_bitmaps(name, [image.bitmaps[other]])
            bitmaps = self.moments[-1].bitmaps
            both = zip(bitmaps[name].dirty, bitmaps[other].dirty, strict=True)
            self._with_bitmap(name, bitmaps[name]._replace(dirty=bytes(a | b for a, b in both)))

    # -- options

    def _amend(self, image: Image, marks: Marks, label: str) -> Moment | None:
        rng, last = self.rng, self.moments[-1]
        choices: dict[str, Any] = {
            "refcount_bits": rng.choice([1, 2, 4, 8, 16, 16, 32, 64]),
            "compat": rng.choice(["0.10", "1.1"]),
            "lazy_refcounts": rng.random() < 0.5,
            "size": rng.choice(SIZES),
        }
        if self.backing is not None:
            choices["backing_file"] = rng.choice([*BACKING_NAMES, ""])
        options = {name: choices[name] for name in rng.sample(sorted(choices), rng.choice([1, 1, 1, 2, 3]))}
        if options.get("backing_file"):
            options["backing_fmt"] = "raw"
        steps = list(self._steps(last.named, options))
        marks.begin(len(self.moments) - 1 + len(steps))
        for step in steps:
            self._resized(step.size)
            self.moments[-1] = self.moments[-1]._replace(named=step)
        try:
            image.amend(**options)
        except OptionError:
            del self.moments[len(self.moments) - len(steps) :]
            raise
        except LimitExceeded:
            found, before = named(image), len(self.moments) - len(steps)
            while self.moments[-1].named != found:
                assert len(self.moments) > before, f"{found} is no step of {options} on {last.named}"
                del self.moments[-1]
            raise
        # Each but the flag and the size is on stable storage when it returns.
        durable = last
        for old, new in pairwise(self.moments[-len(steps) - 1 :]):
            if old.named._replace(lazy=new.named.lazy, size=new.named.size) != new.named:
                durable = new
        return None if durable is last else durable

    @staticmethod
    def _steps(now: Named, options: dict[str, Any]) -> Iterator[Named]:
        """What the header says one after the other while the node changes these options: each step is one write."""
        version = {"0.10": 2, "1.1": 3, None: now.version}[options.get("compat")]
        name = options.get("backing_file")
        new = now._replace(version=max(now.version, version))
        new = new if name is None else new._replace(backing=(name, "raw") if name else (None, None))
        steps = [new, new := new._replace(refcount_bits=options.get("refcount_bits", now.refcount_bits))]
        if now.version > 2 or version > 2:
            steps.append(new := new._replace(lazy=options.get("lazy_refcounts", now.lazy)))
        steps.append(new := new._replace(size=options.get("size", now.size)))
        if version == 2:
            steps.append(new._replace(version=2, lazy=False))
        for old, step in zip([now, *steps], steps, strict=False):
            if step != old:
                yield step

    # -- the verdict

    def opened(self, content: bytes) -> Any:
        """How the image in `content` is opened, again and again: what is written to it stays."""
        node = Recorder(content)
        return lambda *, read_only: open_on(node, read_only=read_only, backing=self.backing)

    def verify(self, content: bytes, state: CrashState) -> None:
        possible = self.moments[state.durable[-1] if state.durable else 0 :]
        possible = possible[: len(possible) - len(self.moments) + (state.begun[-1] if state.begun else 0) + 1]
        with self.opened(content)(read_only=True) as image:
            check_whole(image)
            node: Any = image.node
            assert not node.header.incompatible_features & (q.DIRTY | q.CORRUPT), "counts are never late"
            disk, found = image.read(0, image.size), named(image)
            kept = {one.id: self._snapshot(content, one.id) for one in node.snapshots()}
            flags = {entry.name: entry.flags for entry in read_directory(node.file, node.header)}
            known = {name: sectors(one.dirty(0, len(disk)), len(disk)) for name, one in node.bitmaps.items()}
            enabled = {name: one.enabled for name, one in node.bitmaps.items()}
        assert set(known) == {name for name in flags if not flags[name] & IN_USE}
        assert any(found == one.named and kept == one.snapshots for one in possible), (
            f"{found} with the snapshots {sorted(kept)} is of no moment: {[one.named for one in possible]}"
        )
        for at in range(0, len(disk), SECTOR):
            sector = disk[at : at + SECTOR]
            assert any(sector == one.disk[at : at + SECTOR] for one in possible), f"the sector at {at}"
        for name, marks in known.items():
            promises = [one.bitmaps[name] for one in possible if name in one.bitmaps]
            assert any(one.fits(enabled[name], marks, disk) for one in promises), f"the bitmap {name} is wrong"

    def _snapshot(self, content: bytes, id: str) -> bytes:
        spec: dict[str, Any] = {"file": Child(Recorder(content), "file", grows=True), "snapshot-id": id}
        if self.backing is not None:
            spec["backing"] = Child(Recorder(self.backing), "backing")
        with Image(Qcow2.open(Qcow2.schema.parse(spec), Opener(read_only=True))) as image:
            return image.read(0, image.size)


def named(image: Image) -> Named:
    """What the header in the file says."""
    node: Any = image.node
    header = Header.read(node.file)
    listed = tuple(entry.name for entry in read_directory(node.file, header))
    lazy = bool(header.compatible_features & q.LAZY_REFCOUNTS) if header.version > 2 else False
    backing = (header.backing_file, header.backing_format)
    return Named(header.size, header.version, header.refcount_bits, lazy, backing, listed)


def sectors(ranges: Any, size: int) -> bytes:
    """A byte for each sector of a disk: 1 where these ranges have it."""
    known = bytearray(size // SECTOR)
    for begin, end in ranges:
        known[begin // SECTOR : -(-end // SECTOR)] = b"\1" * (-(-end // SECTOR) - begin // SECTOR)
    return bytes(known)

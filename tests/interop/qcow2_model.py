"""A qcow2 image in memory beside a model of everything that it contains: the disk, its snapshots, and its dirty bitmaps.

Each method of `Modelled` changes both, and `compare` asserts that they agree. `judge` asks QEMU about the image.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lamina
from lamina.bitmap import DirtyBitmap
from lamina.creation import create_driver
from lamina.crypto.secret import Secret
from lamina.errors import LimitExceeded, OptionError
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.image import Image
from lamina.node import COMPRESS
from lamina.policy import Policy
from lamina.request import Child
from lamina.testing.model import check_first_extents, check_status
from tests.attacks.layout_images import Kept, content_of, storage_of
from tests.conftest import Qemu

SECTOR = 512
SECRET = Secret(b"hunter2")
#: Wider counts are never too small here.
_WIDE = 16


def granules(offset: int, end: int, size: int) -> set[int]:
    """The granules of `size` bytes that these bytes lie in."""
    return set(range(offset // size, -(-end // size))) if offset < end else set()


def _dirty(bitmap: DirtyBitmap, size: int) -> set[int]:
    found: set[int] = set()
    for begin, end in bitmap.dirty(0, size):
        found |= granules(begin, end, bitmap.granularity)
    return found


@dataclass
class Bitmap:
    """`must`: the granules that are dirty; `may`: those that may be, since a write is widened to clusters."""

    granularity: int
    enabled: bool
    must: set[int] = field(default_factory=set)
    may: set[int] = field(default_factory=set)

    def mark(self, offset: int, end: int, unit: int) -> None:
        if self.enabled:
            self.must |= granules(offset, end, self.granularity)
            self.may |= granules(offset // unit * unit, -(-end // unit) * unit, self.granularity)

    def cut(self, size: int) -> None:
        last = -(-size // self.granularity)
        self.must, self.may = ({one for one in marks if one < last} for marks in (self.must, self.may))

    def merge(self, other: Bitmap, size: int) -> None:
        for ours, theirs in ((self.must, other.must), (self.may, other.may)):
            for one in theirs:
                begin = one * other.granularity
                ours |= granules(begin, min(begin + other.granularity, size), self.granularity)


class Modelled:
    """An image that is open for writing. `options` as of `lamina create`; `backing`: the length of the backing file."""

    def __init__(self, size: int, options: dict[str, Any], backing: int | None, encrypted: bool) -> None:
        self.encrypted = encrypted
        self.backing = None if backing is None else random.Random(backing).randbytes(backing)
        self.version = 2 if options["compat"] == "0.10" else 3
        self.bits: int = options["refcount_bits"]
        self.lazy: bool = options["lazy_refcounts"]
        self.cluster: int = options["cluster_size"]
        values = {**options, "size": size}
        if backing is not None:
            values |= {"backing_file": "base", "backing_fmt": "raw", "backing_unchecked": True}
        if encrypted:
            values["encrypt"] = {"format": "luks", "key-secret": SECRET, "iter-time": 1}
        self.disk = bytearray((self.backing or b"")[:size].ljust(size, b"\0"))
        self.snapshots: dict[str, tuple[str, bytes]] = {}
        self.bitmaps: dict[str, Bitmap] = {}
        self.number = 0
        self.storage = Kept()
        kind: Any = create_driver("qcow2")
        kind.create(Child(self.storage, "file", grows=True), size, kind.create_schema.parse(values))
        self.image = self.open(self.storage, read_only=False)

    def open(self, storage: Kept, *, read_only: bool, snapshot: str | None = None) -> Image:
        spec: dict[str, Any] = {"file": Child(storage, "file", grows=True)}
        if self.backing is not None:
            spec["backing"] = Child(storage_of(self.backing), "backing")
        if self.encrypted:
            spec["encrypt"] = {"key-secret": SECRET}
        if snapshot is not None:
            spec["snapshot-id"] = snapshot
        opener = Opener(policy=Policy.none(), read_only=read_only)
        return Image(Qcow2.open(Qcow2.schema.parse(spec), opener))

    # -- the disk

    def _marks(self, offset: int, length: int) -> None:
        for one in self.bitmaps.values():
            one.mark(offset, offset + length, max(self.cluster, SECTOR))

    def write(self, offset: int, data: bytes, *, compress: bool = False) -> None:
        node: Any = self.image.node
        compress = compress and bool(node.supported_flags & COMPRESS)
        self._marks(offset, len(data))
        self.image.write(offset, data, compress=compress)
        self.disk[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        self._marks(offset, length)
        self.image.zero(offset, length, unmap=unmap)
        self.disk[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        """A discarded byte reads as before, or as zero."""
        must = {name: set(one.must) for name, one in self.bitmaps.items()}
        self._marks(offset, length)
        self.image.discard(offset, length)
        found, before = self.image.read(offset, length), self.disk[offset : offset + length]
        if found != before:
            assert all(new in (0, old) for new, old in zip(found, before, strict=True)), "a discard shows other bytes"
        for name, one in self.bitmaps.items():
            one.must = must[name]
            for granule in granules(offset, offset + length, one.granularity) if one.enabled else ():
                begin = max(granule * one.granularity - offset, 0)
                part = slice(begin, (granule + 1) * one.granularity - offset)
                if found[part] != before[part]:
                    one.must.add(granule)
        self.disk[offset : offset + length] = found

    def resize(self, size: int, *, amend: bool = False) -> None:
        if amend:
            self.image.amend(size=size)
        else:
            self.image.truncate(size)
        del self.disk[size:]
        self.disk += bytes(size - len(self.disk))
        for one in self.bitmaps.values():
            one.cut(size)

    # -- snapshots

    def _counted(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, or None where narrow counts refuse it."""
        try:
            return work()
        except LimitExceeded:
            assert self.bits < _WIDE
            return None

    def create_snapshot(self) -> None:
        self.number += 1
        made = self._counted(lambda: self.image.create_snapshot(f"at {self.number}"))
        if made is not None:
            self.snapshots[made.id] = (f"at {self.number}", bytes(self.disk))

    def apply_snapshot(self, id: str) -> None:
        disk = self.snapshots[id][1]
        most = max(len(disk), len(self.disk))
        for one in self.bitmaps.values():
            if one.enabled:
                one.may |= granules(0, most, one.granularity)
        try:
            self.image.apply_snapshot(id)
        except LimitExceeded:
            assert self.bits < _WIDE
            return
        for one in self.bitmaps.values():
            one.mark(0, most, 1)
            one.cut(len(disk))
        self.disk[:] = disk

    def delete_snapshot(self, id: str) -> None:
        self.image.delete_snapshot(id)
        del self.snapshots[id]

    # -- bitmaps

    def add_bitmap(self, granularity: int, *, enabled: bool) -> None:
        self.number += 1
        name = f"b{self.number}"
        try:
            self.image.add_bitmap(name, granularity, enabled=enabled)
        except OptionError:
            assert self.version == 2
            return
        assert self.version == 3
        self.bitmaps[name] = Bitmap(granularity, enabled)

    def remove_bitmap(self, name: str) -> None:
        self.image.remove_bitmap(name)
        del self.bitmaps[name]

    def clear_bitmap(self, name: str) -> None:
        self.image.clear_bitmap(name)
        one = self.bitmaps[name]
        one.must, one.may = set(), set()

    def enable_bitmap(self, name: str, enabled: bool) -> None:
        self.image.enable_bitmap(name, enabled)
        self.bitmaps[name].enabled = enabled

    def merge_bitmaps(self, name: str, sources: Iterable[str]) -> None:
        sources = list(sources)
        self.image.merge_bitmaps(name, [self.image.bitmaps[source] for source in sources])
        for source in sources:
            self.bitmaps[name].merge(self.bitmaps[source], len(self.disk))

    # -- the image

    def amend_width(self, bits: int) -> None:
        try:
            self.image.amend(refcount_bits=bits)
        except OptionError:
            assert self.version == 2
            assert bits != 16
        except LimitExceeded:
            assert bits < _WIDE
        else:
            self.bits = bits

    def amend_lazy(self, lazy: bool) -> None:
        try:
            self.image.amend(lazy_refcounts=lazy)
        except OptionError:
            assert self.version == 2
            assert lazy
        else:
            self.lazy = lazy and self.version == 3

    def reopen(self) -> None:
        self.image.close()
        self.image = self.open(self.storage, read_only=False)

    def cut_power(self) -> None:
        """The file, as it is after a flush without a close: whole, with at most a leak, and as good as this one."""
        self.image.flush()
        storage = storage_of(content_of(self.storage))
        expected = bytes(self.disk)
        for data in (b"", b"after"):
            with self.open(storage, read_only=False) as image:
                image.write(0, data)
            expected = data + expected[len(data) :]
            with self.open(storage, read_only=True) as image:
                report: Any = image.node.check()  # type: ignore[attr-defined]
                assert report.corruptions == report.check_errors == 0, report.findings
                assert image.read(0, image.size) == expected
                for name, found in image.bitmaps.items():  # those that it does not list are known to be incomplete
                    missed = self.bitmaps[name].must - _dirty(found, image.size)
                    assert not missed, f"bitmap {name} lost granules {sorted(missed)[:5]}"

    # -- agreement

    def compare(self) -> None:
        """The image and the model agree."""
        image, node = self.image, self.image.node
        header = node.header  # type: ignore[attr-defined]
        assert (image.size, header.refcount_bits) == (len(self.disk), self.bits)
        assert bool(header.compatible_features & q.LAZY_REFCOUNTS) == self.lazy
        content = image.read(0, image.size)
        if content != self.disk:
            wrong = next(at for at, (one, other) in enumerate(zip(content, self.disk, strict=True)) if one != other)
            raise AssertionError(f"byte {wrong} is {content[wrong]}, not {self.disk[wrong]}")
        status = image.extents()
        check_status(status, 0, content)
        check_first_extents(image.root, status, 3)
        report: Any = node.check()  # type: ignore[attr-defined]
        assert report.corruptions == report.check_errors == 0, report.findings
        # What an open image frees is given back when it is closed, if not before.
        assert not report.leaks or not image.read_only, report.findings
        assert {one.id: one.name for one in image.snapshots()} == {id: name for id, (name, _) in self.snapshots.items()}
        assert {one.id: one.size for one in image.snapshots()} == {
            id: len(disk) for id, (_, disk) in self.snapshots.items()
        }
        self._compare_bitmaps(image)

    def _compare_bitmaps(self, image: Image) -> None:
        found = image.bitmaps
        assert set(found) == set(self.bitmaps)
        for name, one in self.bitmaps.items():
            assert found[name].granularity == one.granularity
            dirty = _dirty(found[name], image.size)
            assert one.must <= dirty, f"bitmap {name} has no bit for granules {sorted(one.must - dirty)[:5]}"
            assert dirty <= one.may, f"bitmap {name} has bits for granules {sorted(dirty - one.may)[:5]}"

    def compare_snapshots(self) -> None:
        """Each snapshot reads as the disk did, beside the image."""
        self.image.flush()
        for id, (_, disk) in self.snapshots.items():
            with self.open(self.storage, read_only=True, snapshot=id) as image:
                assert image.read(0, image.size) == disk, f"snapshot {id}"
                check_status(image.extents(), 0, disk)

    def close(self) -> None:
        """Close the image; what was stored agrees with the model."""
        self.image.close()
        self.image = self.open(self.storage, read_only=True)
        self.compare()
        self.compare_snapshots()
        self.image.close()

    # -- QEMU

    def judge(self, qemu: Qemu, folder: Path, rng: random.Random) -> None:
        """QEMU finds the closed image clean, tells of it what Lamina tells, and reads the same bytes, also of a snapshot."""
        path, raw = folder / "disk.qcow2", folder / "disk.raw"
        path.write_bytes(content_of(self.storage))
        if self.backing is not None:
            (folder / "base").write_bytes(self.backing)
        (folder / "word").write_bytes(SECRET.reveal())
        secret = ("--object", f"secret,id=s,file={folder / 'word'}") if self.encrypted else ()
        named = f"driver=qcow2,file.filename={path}" + ",encrypt.key-secret=s" * self.encrypted
        qemu.img("check", *secret, "--image-opts", named)
        qemu.img("convert", *secret, "--image-opts", named, "-O", "raw", raw)
        assert raw.read_bytes() == self.disk, f"{qemu} reads other bytes"
        if self.snapshots:
            id = rng.choice(sorted(self.snapshots))
            qemu.img("convert", *secret, "-l", f"snapshot.id={id}", "--image-opts", named, "-O", "raw", raw)
            found, disk = raw.read_bytes(), self.snapshots[id][1]  # QEMU reads it with the size of the disk
            length = min(len(found), len(disk))
            assert found[:length] == disk[:length], f"{qemu} reads other bytes of snapshot {id}"
        told = json.loads(qemu.img("info", "--output=json", "-f", "qcow2", path).stdout)
        ours = lamina.info(path, format="qcow2").to_json()
        told["format-specific"]["data"].get("encrypt", {}).pop("detached-header", None)
        for one in ours.get("snapshots", []):
            one.pop("disk-size", None)  # QEMU does not tell it
        for key in ours.keys() & told.keys() - {"children", "actual-size"}:
            assert ours[key] == told[key], f"{key} is {ours[key]} for us, and {told[key]} for {qemu}"
        if self.bitmaps and not self.encrypted:
            self._judge_bitmap(qemu, path, rng.choice(sorted(self.bitmaps)))

    def _judge_bitmap(self, qemu: Qemu, path: Path, name: str) -> None:
        """QEMU merges the bitmap into one of its own, which is equal."""
        one = self.bitmaps[name]
        qemu.img("bitmap", "--add", "--disable", "-g", str(one.granularity), "--merge", name, path, "copy")
        with self.open(storage_of(path.read_bytes()), read_only=True) as image:
            ours, theirs = (list(image.bitmaps[which].dirty(0, image.size)) for which in (name, "copy"))
            assert ours == theirs, f"bitmap {name} for us, and for {qemu}"

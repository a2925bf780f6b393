"""KeyboardInterrupt at every function entry and C return inside `lamina`, for each kind of operation on a qcow2 image.

After each interrupt the image is used on by another thread, closed, checked by us (and by QEMU) and read anew: nothing hangs,
it is not marked corrupt, clusters may leak but none is freed that is in use, and only bytes of the interrupted request are
new. Without `LAMINA_INTERRUPTS=all` (`make soak` sets it) a share of the points is drawn by the seed of the run, and QEMU
checks one image in forty.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.qcow2.header import Header
from lamina.graph import Opener
from lamina.image import Image
from lamina.limits import Budget
from lamina.node import NO_FALLBACK
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.image_checks import check_whole
from lamina.testing.interrupts import interrupts
from tests import evidence

KIB = 1024
PATIENCE = 20
ALL = os.environ.get("LAMINA_INTERRUPTS") == "all"
#: One point in so many is tried; QEMU is asked about one image in so many.
STEP, PEER_EVERY = (1, 1) if ALL else (6, 40)


class Case(NamedTuple):
    """One operation: `work` is interrupted; it may change only [start, end), to the bytes `to` (None: a byte value each)."""

    work: Callable[[Image], Any]
    start: int = 0
    end: int = 0
    to: bytes | None = None
    before: Callable[[Image], Any] = lambda image: None  # is not interrupted, nor flushed
    options: dict[str, Any] = {}
    size: int = 96 * KIB
    filled: int = 64 * KIB
    resized: int | None = None
    backing: bool = False
    budget: Budget = Budget()


def pattern(length: int, value: int) -> bytes:
    return bytes((value + at * 7) % 255 + 1 for at in range(251)) * (length // 251) + bytes([value]) * (length % 251)


def soft(length: int, value: int) -> bytes:
    """Bytes that compress."""
    return bytes([value, 0, 0, value]) * (length // 4)


def write(start: int, data: bytes, **flags: bool) -> Any:
    return lambda image: image.write(start, data, **flags)


def then(*steps: Callable[[Image], Any]) -> Callable[[Image], None]:
    def work(image: Image) -> None:
        for step in steps:
            step(image)

    return work


ZEROS = bytes(96 * KIB)
SUBCLUSTERS = {"cluster_size": 16 * KIB, "extended_l2": True}
DIRTY = then(
    write(1 * KIB, pattern(KIB, 3)), lambda image: image.discard(20 * KIB, 2 * KIB), write(70 * KIB, b"d" * KIB)
)
PACKED = then(write(30 * KIB, soft(8 * KIB, 5), compress=True), lambda image: image.flush())


def edit(image: Image) -> None:
    with image.edit() as changes:
        changes.insert("blkdebug", {"align": 512})


def node_of(image: Image) -> Any:
    return image.node


CASES: dict[str, Case] = {
    "write, new clusters and tables": Case(
        write(60 * KIB, pattern(36 * KIB, 1)), 60 * KIB, 96 * KIB, pattern(36 * KIB, 1)
    ),
    "write in place": Case(write(3 * KIB, pattern(9 * KIB, 2)), 3 * KIB, 12 * KIB, pattern(9 * KIB, 2)),
    "write, part of a new cluster": Case(write(80 * KIB + 100, b"n" * 77), 80 * KIB + 100, 80 * KIB + 177, b"n" * 77),
    "write over a backing file": Case(
        write(70 * KIB + 300, pattern(3000, 4)), 70 * KIB + 300, 70 * KIB + 3300, pattern(3000, 4), backing=True
    ),
    "write, FUA": Case(write(65 * KIB, pattern(KIB, 5), fua=True), 65 * KIB, 66 * KIB, pattern(KIB, 5), before=DIRTY),
    "write, new refcount blocks": Case(
        write(64 * KIB, pattern(30 * KIB, 6)), 64 * KIB, 94 * KIB, pattern(30 * KIB, 6), options={"refcount_bits": 64}
    ),
    "write, growing the refcount table": Case(
        write(1900 * KIB, pattern(150 * KIB, 7)),
        1900 * KIB,
        2050 * KIB,
        pattern(150 * KIB, 7),
        options={"refcount_bits": 64},
        size=2100 * KIB,
        filled=1890 * KIB,
    ),
    "write into zero clusters that keep their place": Case(
        write(4 * KIB, pattern(5 * KIB, 8)),
        4 * KIB,
        9 * KIB,
        pattern(5 * KIB, 8),
        before=lambda image: image.zero(2 * KIB, 8 * KIB),
    ),
    "write with few tables in memory": Case(
        write(1 * KIB, pattern(90 * KIB, 9)),
        1 * KIB,
        91 * KIB,
        pattern(90 * KIB, 9),
        budget=Budget(cache_bytes=2 * KIB),
    ),
    "compressed write": Case(write(70 * KIB, soft(6 * KIB, 9), compress=True), 70 * KIB, 76 * KIB, soft(6 * KIB, 9)),
    "compressed write over data": Case(
        write(8 * KIB, soft(6 * KIB, 10), compress=True), 8 * KIB, 14 * KIB, soft(6 * KIB, 10), before=DIRTY
    ),
    "compressed write over compressed": Case(
        write(31 * KIB, soft(6 * KIB, 11), compress=True), 31 * KIB, 37 * KIB, soft(6 * KIB, 11), before=PACKED
    ),
    "write over compressed": Case(
        write(31 * KIB, pattern(6 * KIB, 12)), 31 * KIB, 37 * KIB, pattern(6 * KIB, 12), before=PACKED
    ),
    "write beside allocated subclusters": Case(
        write(21 * KIB + 100, pattern(20 * KIB, 13)),
        21 * KIB + 100,
        41 * KIB + 100,
        pattern(20 * KIB, 13),
        before=then(lambda image: image.zero(16 * KIB, 16 * KIB), write(20 * KIB, b"s" * KIB), write(40 * KIB, b"t")),
        options=SUBCLUSTERS,
    ),
    "zero of subclusters": Case(
        lambda image: image.zero(5 * KIB, 30 * KIB, unmap=True),
        5 * KIB,
        35 * KIB,
        ZEROS[: 30 * KIB],
        before=write(30 * KIB, soft(34 * KIB, 5), compress=True),
        options=SUBCLUSTERS,
    ),
    "zero": Case(lambda image: image.zero(5 * KIB + 100, 9 * KIB), 5 * KIB + 100, 14 * KIB + 100, ZEROS[: 9 * KIB]),
    "zero, unmap": Case(
        lambda image: image.zero(5 * KIB, 9 * KIB, unmap=True), 5 * KIB, 14 * KIB, ZEROS[: 9 * KIB], before=DIRTY
    ),
    "zero, version 2": Case(
        lambda image: image.zero(5 * KIB, 9 * KIB, unmap=True),
        5 * KIB,
        14 * KIB,
        ZEROS[: 9 * KIB],
        options={"compat": "0.10"},
    ),
    "zero, fast": Case(lambda image: image.root.zero(6 * KIB, KIB, NO_FALLBACK), 6 * KIB, 7 * KIB, ZEROS[:KIB]),
    "discard": Case(lambda image: image.discard(5 * KIB, 50 * KIB), 5 * KIB, 55 * KIB, ZEROS[: 50 * KIB], before=DIRTY),
    "discard of compressed": Case(
        lambda image: image.discard(30 * KIB, 8 * KIB), 30 * KIB, 38 * KIB, ZEROS[: 8 * KIB], before=PACKED
    ),
    "discard over a backing file": Case(
        lambda image: image.discard(50 * KIB, 30 * KIB), 50 * KIB, 80 * KIB, ZEROS[: 30 * KIB], backing=True
    ),
    "flush": Case(lambda image: image.flush(), before=DIRTY),
    "flush, twice": Case(then(lambda image: image.flush(), lambda image: image.flush()), before=DIRTY),
    "flush of a refcount table that grew": Case(
        lambda image: image.flush(),
        before=write(1900 * KIB, pattern(150 * KIB, 7)),
        options={"refcount_bits": 64},
        size=2100 * KIB,
        filled=1890 * KIB,
    ),
    "grow": Case(lambda image: image.truncate(3000 * KIB), before=DIRTY, resized=3000 * KIB),
    "grow over a longer backing file": Case(
        lambda image: image.truncate(100 * KIB), size=95 * KIB, filled=20 * KIB, resized=100 * KIB, backing=True
    ),
    "shrink": Case(lambda image: image.truncate(33 * KIB + 512), before=DIRTY, resized=33 * KIB + 512),
    "shrink and grow": Case(
        then(lambda image: image.truncate(33 * KIB), lambda image: image.truncate(90 * KIB)),
        33 * KIB,
        96 * KIB,
        ZEROS[: 63 * KIB],
        before=DIRTY,
        resized=90 * KIB,
    ),
    "create a snapshot": Case(lambda image: node_of(image).create_snapshot("one"), before=DIRTY),
    "apply a snapshot": Case(
        lambda image: node_of(image).apply_snapshot("1"),
        20 * KIB,
        24 * KIB,
        pattern(64 * KIB, 42)[20 * KIB : 24 * KIB],
        before=then(lambda image: node_of(image).create_snapshot("one"), write(20 * KIB, b"after" * 800 + bytes(96))),
    ),
    "delete a snapshot": Case(
        lambda image: node_of(image).delete_snapshot("1"),
        before=then(lambda image: node_of(image).create_snapshot("one"), write(20 * KIB, pattern(9 * KIB, 13))),
    ),
    "read": Case(lambda image: image.read(0, 64 * KIB), before=PACKED),
    "extents": Case(lambda image: image.extents(), before=DIRTY),
    "an edit that puts a filter in": Case(edit, before=DIRTY),
    "close": Case(lambda image: image.close(), before=DIRTY),
}


class Disk:
    """The file of one image, in memory, and how it is opened."""

    def __init__(self, case: Case, content: bytes | None = None) -> None:
        self.case = case
        self.storage = _Kept()
        if content is not None:
            self.storage.write(0, memoryview(content))
        else:
            values = Qcow2.create_schema.parse({"cluster_size": 512, **case.options})
            Qcow2.create(Child(self.storage, "file", grows=True), case.size, values)

    def open(self, *, read_only: bool = False) -> Image:
        options: dict[str, Any] = {"file": Child(self.storage, "file", grows=True)}
        if self.case.backing:
            below = MemoryStorage()
            below.write(0, memoryview(pattern(120 * KIB, 99)))
            options["backing"] = Child(below, "backing")
        opener = Opener(read_only=read_only, budget=self.case.budget)
        return Image(Qcow2.open(Qcow2.schema.parse(options), opener))

    @property
    def content(self) -> bytes:
        found = bytearray(self.storage.size)
        self.storage.read_into(0, memoryview(found))
        return bytes(found)


class _Kept(MemoryStorage):
    """Survives the close of its image."""

    def close(self) -> None:
        pass


def everything(image: Image) -> bytes:
    return image.read(0, image.size)


def as_it_may_be(case: Case, old: bytes, got: bytes, where: str) -> None:
    """Outside the request the bytes are old, inside each is old or new."""
    if case.resized is None:
        assert len(got) == len(old), where
    else:
        assert len(got) in {len(old), case.resized} or (case.to and len(got) == case.start), where
    reach = min(case.start, len(got), len(old))
    assert got[:reach] == old[:reach], where
    if case.resized is not None and len(got) > len(old):
        assert not any(got[max(len(old), case.end) :]), where
    new = case.to or b""
    if got[case.start : case.end] != old[case.start : case.end]:
        for at in range(case.start, min(case.end, len(got))):
            before = old[at] if at < len(old) else 0
            assert got[at] in (before, new[at - case.start]), f"{where}: byte {at}"
    stop = min(len(got), len(old))
    assert got[case.end : stop] == old[case.end : stop], where


def use_on(image: Image, where: str) -> bytes:
    """Another thread writes, zeroes, discards and flushes, in places that no case touches; returns what the disk reads as."""
    found: list[bytes] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            before = bytearray(everything(image))
            image.flush()
            for at, data in ((0, b"first"), (len(before) - 700, b"z" * 700)):
                image.write(at, data)
                before[at : at + len(data)] = data
            image.write(2 * KIB, soft(2 * KIB, 77), compress=True)
            before[2 * KIB : 4 * KIB] = soft(2 * KIB, 77)
            image.zero(16 * KIB, 3 * KIB, unmap=True)
            before[16 * KIB : 19 * KIB] = bytes(3 * KIB)
            image.flush()
            image.write(16 * KIB, pattern(3 * KIB, 55))
            before[16 * KIB : 19 * KIB] = pattern(3 * KIB, 55)
            image.truncate(image.size + KIB)
            before += bytes(KIB)
            found.append(everything(image))
            assert found[0] == before, where
            image.close()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), f"{where}: the image hangs"
    if errors:
        raise AssertionError(where) from errors[0]
    return found[0]


@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_anywhere(name: str, request: pytest.FixtureRequest, tmp_path: Path, seed: int) -> None:
    case = CASES[name]
    made = Disk(case)
    with made.open() as image:
        image.write(0, pattern(case.filled, 42))
    prepared = made.content
    with Disk(case, prepared).open() as image:
        case.before(image)
        old = everything(image)
    tried = 0
    step = STEP if ALL or case.size < 1000 * KIB else 25 * STEP
    for interrupt in interrupts(seed % step, step):
        disk = Disk(case, prepared)
        image = disk.open()
        case.before(image)
        interrupt.run(lambda image=image: case.work(image))  # type: ignore[misc]
        where = f"{name}, interrupted at {interrupt.struck}"
        if name == "close":
            image.close()
            with disk.open(read_only=True) as again:
                check_whole(again)
                as_it_may_be(case, old, everything(again), where)
            image = disk.open()
        as_it_may_be(case, old, everything(image), where)
        expected = use_on(image, where)
        header = Header.read(Child(disk.storage, "file"))
        assert not header.incompatible_features & q.CORRUPT, f"{where}: marked"
        with disk.open(read_only=True) as again:
            check_whole(again)
            assert everything(again) == expected, where
        if tried % PEER_EVERY == 0 and not case.backing:
            peer(request, tmp_path, disk.content, where)
        tried += 1
    assert tried > 10 // step
    evidence.count("interrupts", tried)


def peer(request: pytest.FixtureRequest, folder: Path, content: bytes, where: str) -> None:
    qemu = request.getfixturevalue("qemu10")
    path = folder / "image.qcow2"
    path.write_bytes(content)
    report = qemu.img("check", "-f", "qcow2", path, check=False)
    assert report.returncode in (0, 3), f"{where}: {report.stdout}"

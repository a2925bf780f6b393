"""The filter `quorum`: votes, failures, what is logged and rewritten, and its cautious status."""

from __future__ import annotations

import errno
import random
import threading
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import BlockIOError, LaminaError, NotSupported, OptionError
from lamina.extents import Extents
from lamina.filters import quorum as quorum_module
from lamina.filters.quorum import Quorum, RangeSet
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import PAGE, MemoryStorage
from lamina.testing.interrupts import interrupted_at_call

SIZE = 4 * PAGE


class Copy(MemoryStorage):
    """Memory of which chosen operations fail."""

    fails: tuple[str, ...] = ()

    def _require_open(self, operation: str) -> dict[int, bytearray]:
        if operation in self.fails:
            raise BlockIOError(f"no {operation}", errno=errno.ENOSPC)
        return super()._require_open(operation)

    def flush(self) -> None:
        self._require_open("flush")
        super().flush()


def quorum(count: int, threshold: int, **options: Any) -> tuple[Image, list[Copy]]:
    copies = [Copy(SIZE) for _ in range(count)]
    return Image(Quorum([Child(copy, "copy") for copy in copies], threshold, **options)), copies


def test_all_copies_get_every_change() -> None:
    image, copies = quorum(3, 2)
    image.write(100, b"x" * PAGE, fua=True)
    image.zero(1000, 1000)
    image.flush()
    image.truncate(2 * PAGE)
    image.discard(0, PAGE)
    expected = bytes(100) + b"x" * 900 + bytes(1000) + b"x" * (PAGE - 1900) + bytes(PAGE - 100)
    assert image.read(0, image.size) == expected
    assert all(Image(copy).read(0, copy.size) == expected for copy in copies)
    with pytest.raises(NotSupported):
        image.zero(0, 10, fast=True)


@pytest.mark.parametrize("rewrite", [False, True])
def test_the_majority_wins_block_by_block(rewrite: bool, caplog: pytest.LogCaptureFixture) -> None:
    image, copies = quorum(3, 2, rewrite_corrupted=rewrite)
    image.write(0, b"x" * SIZE)
    for number, copy in enumerate(copies):
        Image(copy).write(1000 + 1024 * number, b"bad")  # each is wrong, in a block of its own
    assert image.read(100, 10_000) == b"x" * 10_000
    assert [record.message for record in caplog.records] == [
        f"children.{number} differs in the 512 bytes at offset {512 + 1024 * number}" for number in range(3)
    ]
    healed = all(Image(copy).read(0, SIZE) == b"x" * SIZE for copy in copies)
    assert healed is rewrite


def test_without_a_majority_a_read_fails() -> None:
    image, copies = quorum(4, 3)
    for copy in copies[:2]:
        Image(copy).write(5000, b"x")
    assert image.read(0, 4608) == bytes(4608)
    with pytest.raises(BlockIOError, match="only 2 of 4 copies agree, and 3 are needed") as caught:
        image.read(0, 6000)
    assert (caught.value.errno, caught.value.offset, caught.value.length) == (errno.EIO, 4608, 512)


@pytest.mark.parametrize("operation", ["read", "write", "zero", "truncate", "extents"])
def test_copies_that_fail(operation: str, caplog: pytest.LogCaptureFixture) -> None:
    image, copies = quorum(3, 2)
    image.write(0, b"x" * PAGE)

    def do() -> object:
        if operation == "read":
            return image.read(0, 100)
        if operation == "write":
            return image.write(0, b"y")
        if operation == "zero":
            return image.zero(0, 100)
        return image.truncate(2 * PAGE) if operation == "truncate" else image.extents()

    copies[1].fails = (operation,)
    do()
    assert f"{operation} of children.1 failed" in caplog.text
    copies[2].fails = (operation,)
    with pytest.raises(LaminaError, match=f"only 1 of 3 copies succeed, and 2 are needed: no {operation}") as caught:
        do()
    assert caught.value.errno == errno.ENOSPC


def test_a_copy_that_missed_a_write_is_outvoted() -> None:
    image, copies = quorum(3, 2, rewrite_corrupted=True)
    copies[0].fails = ("write",)
    image.write(10, b"x" * 1000)
    copies[0].fails = ()
    assert image.read(0, 1010) == bytes(10) + b"x" * 1000
    assert Image(copies[0]).read(0, 1010) == bytes(10) + b"x" * 1000


def test_a_copy_whose_flush_failed_has_no_vote_on_what_was_not_flushed() -> None:
    image, copies = quorum(2, 1)
    image.write(0, b"old" + bytes(PAGE - 3))
    image.flush()
    image.write(0, b"new")
    copies[0].fails = ("flush",)
    image.flush()
    copies[0].fails = ()
    Image(copies[0]).write(0, b"old")  # as storage that lost what it had not written
    assert image.read(0, 3) == b"new"
    assert image.read(PAGE, 3) == bytes(3)
    image.write(0, b"newest" + bytes(PAGE - 6))  # complete blocks: the copy votes again
    copies[1].fails = ("read",)
    assert image.read(0, 6) == b"newest"


def test_a_flush_that_is_interrupted_anywhere_forgets_nothing() -> None:
    number, interrupted = 0, True
    while interrupted:
        number += 1
        image, copies = quorum(2, 1)
        image.write(0, b"new" + bytes(PAGE - 3))
        with interrupted_at_call(number, lambda code: code.co_filename == quorum_module.__file__):
            try:
                image.flush()
                interrupted = False
            except KeyboardInterrupt:
                copies[0].fails = ("flush",)
                image.flush()
                copies[0].fails = ()
                Image(copies[0]).write(0, b"old")  # as storage that lost what it had not written
                assert image.read(0, 3) == b"new", f"interrupt {number}"
    assert number > 8


def test_a_flush_that_fails_as_a_whole_leaves_the_votes() -> None:
    image, copies = quorum(2, 2)
    image.write(0, b"x" * PAGE)
    copies[0].fails = ("flush",)
    with pytest.raises(BlockIOError):
        image.flush()
    assert image.read(0, 1) == b"x"
    copies[0].fails = ()
    image.flush()
    assert image.read(0, 1) == b"x"


@pytest.mark.parametrize("missed", [0, 1])
def test_a_copy_that_missed_a_write_has_no_vote(missed: int) -> None:
    """One vote is enough here: the old bytes would win as well as the new ones."""
    image, copies = quorum(2, 1)
    image.write(0, b"old" * 1000)
    copies[missed].fails = ("write",)
    image.write(0, b"new" * 1000)
    image.write(4096, b"x")
    copies[missed].fails = ()
    assert image.read(0, 3000) == b"new" * 1000
    assert image.read(100, 10) == (b"new" * 1000)[100:110]
    assert image.read(4096, 2) == b"x\0"
    copies[1 - missed].fails = ("read",)
    with pytest.raises(BlockIOError, match="only 0 of 2 copies agree"):
        image.read(0, 512)  # only old bytes are left
    assert image.read(8192, 512) == bytes(512)  # nothing was missed there
    copies[1 - missed].fails = ()
    image.write(0, b"third" * 800)  # whole blocks, up to a part of one that it has no vote about
    copies[1 - missed].fails = ("read",)
    assert image.read(0, 3584) == (b"third" * 800)[:3584]
    with pytest.raises(BlockIOError, match="only 0 of 2"):
        image.read(4096, 1)


def test_a_part_of_a_block_that_was_missed_makes_no_good_copy() -> None:
    image, copies = quorum(3, 2)
    copies[0].fails = ("write",)
    image.write(0, b"a" * 512)
    copies[0].fails, copies[1].fails = (), ("write",)
    with pytest.raises(BlockIOError, match="only 1 of 3 copies are up to date"):
        image.write(10, b"b")
    image.write(0, b"c" * 512)  # copies 0 and 2
    assert image.read(0, 512) == b"c" * 512
    copies[1].fails = ()
    assert Image(copies[1]).read(0, 512) == b"a" * 512
    image.write(0, b"d" * 512)
    assert all(Image(copy).read(0, 512) == b"d" * 512 for copy in copies)


@pytest.mark.parametrize("operation", ["zero", "truncate"])
def test_a_copy_that_missed_zeroes_or_a_new_size_has_no_vote(operation: str) -> None:
    image, copies = quorum(2, 1)
    image.write(0, b"x" * SIZE)
    copies[0].fails = (operation,)
    if operation == "zero":
        image.zero(PAGE, PAGE)
    else:
        image.truncate(PAGE)
        copies[0].fails = ()
        copies[1]._size = copies[1].size
        image.truncate(SIZE)
    copies[0].fails = ()
    assert image.read(0, PAGE) == b"x" * PAGE
    assert image.read(PAGE, PAGE) == bytes(PAGE)


def test_a_copy_that_is_rewritten_votes_again() -> None:
    image, copies = quorum(3, 2, rewrite_corrupted=True)
    image.write(0, b"old" * 1024)
    copies[0].fails = ("write",)
    image.write(0, b"new" * 1024)
    copies[0].fails = ()
    assert image.read(0, 3072) == b"new" * 1024
    copies[2].fails = ("read",)
    assert image.read(0, 3072) == b"new" * 1024  # copies 0 and 1


@pytest.mark.parametrize(
    ("count", "threshold", "fine"), [(2, 1, False), (2, 2, True), (3, 1, False), (4, 2, False), (4, 3, True)]
)
def test_only_a_majority_writes_over_copies(count: int, threshold: int, fine: bool) -> None:
    if fine:
        quorum(count, threshold, rewrite_corrupted=True)
    else:
        with pytest.raises(OptionError, match="needs a majority"):
            quorum(count, threshold, rewrite_corrupted=True)


def test_ranges_that_are_remembered(seed: int) -> None:
    rng = random.Random(seed)
    stretches, model = RangeSet(), set()
    for _ in range(400):
        start = rng.randrange(200)
        end = start + rng.randrange(20)
        if rng.random() < 0.5 and start < end:
            stretches.add(start, end)
            model |= set(range(start, end))
        else:
            stretches.remove(start, end)
            model -= set(range(start, end))
        for at in range(0, 220, 7):
            length = rng.randrange(1, 9)
            assert stretches.overlaps(at, at + length) == any(byte in model for byte in range(at, at + length))


def test_of_too_many_ranges_neighbours_are_joined() -> None:
    stretches = RangeSet()
    for number in range(10_000):
        stretches.add(number * 10, number * 10 + 1)
    assert len(stretches._ranges) <= 4096
    assert all(stretches.overlaps(number * 10, number * 10 + 1) for number in range(10_000))
    assert not stretches.overlaps(100_000, 100_001)


def test_a_read_asks_all_copies_before_the_next_write(monkeypatch: pytest.MonkeyPatch) -> None:
    image, copies = quorum(2, 2)
    read = copies[0].read_into
    writer = threading.Thread(target=image.write, args=(0, b"x" * 100))

    def late(offset: int, view: memoryview) -> None:
        read(offset, view)
        writer.start()
        writer.join(0.05)

    with monkeypatch.context() as patched:
        patched.setattr(copies[0], "read_into", late)
        assert image.read(0, 100) == bytes(100)
        writer.join()
    assert image.read(0, 100) == b"x" * 100


def test_the_status_is_cautious() -> None:
    image, copies = quorum(3, 2)
    Image(copies[0]).write(PAGE, b"x")
    Image(copies[1]).write(2 * PAGE, b"x")
    rows = [(row.start, row.length, row.data, row.zero, row.present, row.offset) for row in image.extents()]
    assert rows == [
        (0, PAGE, False, True, True, None),
        (PAGE, 2 * PAGE, True, False, True, None),
        (3 * PAGE, PAGE, False, True, True, None),
    ]
    assert image.root.reads_zero(0, PAGE)
    assert not image.root.reads_zero(0, PAGE + 1)
    assert image.node.host_base is None
    part = image.extents(PAGE - 5, 10)
    assert Extents.concat([image.extents(0, PAGE - 5), part, image.extents(PAGE + 5, SIZE - PAGE - 5)]).coalesce() == (
        image.extents()
    )


def test_one_copy_keeps_its_answer() -> None:
    image, copies = quorum(1, 1)
    image.write(0, b"x")
    assert image.extents() == Image(copies[0]).extents()


@pytest.mark.parametrize(("count", "threshold"), [(3, 0), (3, 4), (0, 1)])
def test_thresholds_that_cannot_be(count: int, threshold: int) -> None:
    with pytest.raises(OptionError, match="but there are"):
        quorum(count, threshold)


def test_copies_of_different_lengths_are_refused() -> None:
    with pytest.raises(OptionError, match=r"children differ: \[1, 2\]"):
        Quorum([Child(MemoryStorage(1), "a"), Child(MemoryStorage(2), "b")], 1)


def test_by_its_name(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.raw" for number in range(3)]
    for path in paths:
        path.write_bytes(bytes(PAGE))
    children = [{"driver": "raw", "file.filename": str(path)} for path in paths]
    spec = {"driver": "quorum", "vote-threshold": 2, "children": children}
    with lamina.open(spec, read_only=False) as image:
        image.write(0, b"x")
    assert all(path.read_bytes()[:2] == b"x\0" for path in paths)
    flat = {"driver": "quorum", "vote-threshold": "3", "children.0.driver": "memory", "children.1.driver": "memory"}
    with pytest.raises(OptionError, match="vote-threshold is 3, but there are 2"):
        lamina.open(flat)

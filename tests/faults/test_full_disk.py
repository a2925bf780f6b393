"""A disk that fills up: everything that was acknowledged before the first ENOSPC can be flushed, and the image stays clean.

On storage where a block that was written can always be written again (`Quota` is a model of it; tmpfs and ext4 where this
process may mount them), the flush after ENOSPC succeeds. Afterwards the image is of use again once there is room.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import BlockIOError
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.image import Image
from lamina.limits import KIB, MIB
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.image_checks import check_whole

BLOCK = 4096


class Quota(MemoryStorage):
    """Memory with room for so many blocks. A block that was written is kept until it is discarded, whatever is in it."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.room = blocks
        self.blocks: set[int] = set()
        self.fixed: int | None = None

    @property
    def growable(self) -> bool:
        return self.fixed is None

    @property
    def size(self) -> int:
        return super().size if self.fixed is None else self.fixed

    def _claim(self, offset: int, length: int) -> None:
        new = set(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1)) - self.blocks
        if new and len(self.blocks) + len(new) > self.room:
            raise BlockIOError("no space left on device", errno=errno.ENOSPC)
        self.blocks |= new

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self._claim(offset, len(view))
        super().write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self._claim(offset, length)
        super().write(offset, memoryview(bytes(length)))

    def discard(self, offset: int, length: int) -> None:
        first, last = -(-offset // BLOCK), (offset + length) // BLOCK
        self.blocks -= set(range(first, last))
        if first < last:
            super().discard(first * BLOCK, (last - first) * BLOCK)

    def reads_zero(self, offset: int, length: int) -> bool:
        return self.blocks.isdisjoint(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))

    def close(self) -> None:
        pass


def opened(storage: Quota, *, read_only: bool = False, **more: str) -> Image:
    options = Qcow2.schema.parse({"file": Child(storage, "file", grows=True), **more})
    return Image(Qcow2.open(options, Opener(read_only=read_only)))


def sparse(storage: Quota) -> None:
    """The file as a copy that leaves holes would be: blocks of zeros are given back."""
    for block in sorted(storage.blocks):
        content = bytearray(min(BLOCK, storage.size - block * BLOCK))
        storage.read_into(block * BLOCK, memoryview(content))
        if not any(content):
            storage.blocks.discard(block)


def random_writes(rng: random.Random, size: int, piece: int) -> Iterator[tuple[int, int]]:
    while True:
        length = rng.choice([piece, piece // 3, 4 * piece])
        yield rng.randrange(size - length), length


def in_order(_rng: random.Random, size: int, piece: int) -> Iterator[tuple[int, int]]:
    return ((at, piece) for at in range(0, size - piece, piece))


def write_until_full(image: Image, expected: bytearray, places: Iterator[tuple[int, int]], rng: random.Random) -> range:
    """Write until there is no room; `expected` follows, but for the request that failed, whose place is returned."""
    for at, length in places:
        data = bytes([rng.randrange(1, 256)]) * length
        if (error := no_room(lambda at=at, data=data: image.write(at, data))) is None:  # type: ignore[misc]
            expected[at : at + length] = data
            continue
        assert error.errno == errno.ENOSPC
        expected[at : at + length] = image.read(at, length)  # old or new
        return range(at, at + length)
    raise AssertionError("it never filled up")


def no_room(work: Callable[[], Any]) -> BlockIOError | None:
    try:
        work()
    except BlockIOError as error:
        return error
    return None


@pytest.mark.parametrize("holes", [False, True], ids=["", "sparse"])
@pytest.mark.parametrize("order", [in_order, random_writes], ids=["in-order", "random"])
@pytest.mark.parametrize(
    ("options", "room", "piece"),
    [
        ({"cluster_size": 512}, 60, 700),
        ({"cluster_size": 512, "refcount_bits": 64}, 700, 3000),
        ({"cluster_size": 512, "compat": "0.10"}, 60, 1000),
        ({"cluster_size": 4096}, 300, 9000),
        ({"cluster_size": 65536}, 700, 70000),
        ({"cluster_size": 2 * MIB}, 5000, 300000),
    ],
    ids=str,
)
def test_what_was_acknowledged_can_be_flushed(
    options: dict[str, Any], room: int, piece: int, order: Any, holes: bool, seed: int
) -> None:
    rng = random.Random(f"{seed}/{options}/{holes}")
    storage = Quota(10**9)
    size = 3 * room * BLOCK + 2 * MIB
    Qcow2.create(Child(storage, "file", grows=True), size, Qcow2.create_schema.parse(options))
    if holes:
        sparse(storage)
    storage.room = len(storage.blocks) + room
    image = opened(storage)
    expected = bytearray(size)
    for _ in range(2):  # the second time it is full at once, or soon
        failed = write_until_full(image, expected, order(rng, size, piece), rng)
        image.flush()
        assert same(image, expected, failed)
    image.flush()
    image.close()
    with opened(storage, read_only=True) as again:
        report = check_whole(again)
        assert not report.leaks
    storage.room = 10**9
    with opened(storage) as again:
        again.write(size - 1000, b"y" * 1000)
        again.flush()
    with opened(storage, read_only=True) as again:
        check_whole(again)
        assert again.read(size - 1000, 1000) == b"y" * 1000


def same(image: Image, expected: bytearray, failed: range) -> bool:
    """Whether the disk reads as expected, the bytes of the request that failed excepted: old or new."""
    step = MIB
    for at in range(0, len(expected), step):
        got = bytearray(image.read(at, min(step, len(expected) - at)))
        lo, hi = max(failed.start, at), min(failed.stop, at + len(got))
        if lo < hi:
            got[lo - at : hi - at] = expected[lo:hi]
        if got != expected[at : at + len(got)]:
            return False
    return True


def mounted(folder: Path, kind: str) -> Path:
    """A small file system of this kind, mounted in `folder`; skips where this process may not."""
    if os.geteuid():
        pytest.skip("only root mounts file systems")
    where = folder / kind
    where.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(where)]
    else:
        disk = folder / "disk"
        with disk.open("wb") as file:
            file.truncate(24 * MIB)
        made = subprocess.run(["mkfs.ext4", "-q", "-F", str(disk)], capture_output=True, check=False)
        if made.returncode:
            pytest.skip(f"mkfs.ext4: {made.stderr.decode()}")
        command = ["mount", "-o", "loop", str(disk), str(where)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{kind} cannot be mounted here: {done.stderr.strip()}")
    return where


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    where = mounted(tmp_path, request.param)
    yield where
    subprocess.run(["umount", str(where)], check=True)


def fill(write: Callable[[int], None], pieces: int) -> int:
    """How many pieces were written before there was no room."""
    for number in range(pieces):
        if error := no_room(lambda number=number: write(number)):  # type: ignore[misc]
            assert error.errno == errno.ENOSPC
            return number
    raise AssertionError("it never filled up")


def kept(path: Path, pieces: int, piece: int, qemu: Any) -> None:
    with lamina.open(path, format="qcow2") as image:
        for number in range(pieces):
            assert image.read(number * piece, piece) == bytes([number % 255 + 1]) * piece
    status, report = qemu.check(path)
    assert status == 0, report


@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB])
def test_a_real_file_system(small: Path, cluster_size: int, qemu10: Any) -> None:
    path = small / "disk.qcow2"
    piece = 64 * KIB if cluster_size == 512 else MIB
    lamina.create(path, "qcow2", 100 * MIB, cluster_size=cluster_size)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        count = fill(lambda n: image.write(n * piece, bytes([n % 255 + 1]) * piece), 100 * MIB // piece)
        image.flush()
        assert count * piece > 8 * MIB
        kept_before = [image.read(n * piece, 1)[0] for n in range(count)]
        assert kept_before == [n % 255 + 1 for n in range(count)]
    kept(path, count, piece, qemu10)
    with lamina.open(path, format="qcow2", read_only=False) as image:  # and there is room again
        image.discard(0, 4 * piece)
        image.flush()
        image.flush()
        image.write(50 * MIB, b"again" * 1000)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(50 * MIB, 5000) == b"again" * 1000
    assert qemu10.check(path)[0] == 0


def test_convert_into_an_image_that_is_there(small: Path, tmp_path: Path, qemu10: Any) -> None:
    source, target = tmp_path / "source.raw", small / "target.qcow2"
    source.write_bytes(b"".join(bytes([n % 255 + 1]) * MIB for n in range(30)))
    lamina.create(target, "qcow2", 30 * MIB)
    command = [sys.executable, "-m", "lamina", "convert", "-n", "-f", "raw", "-O", "qcow2", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "o space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    status, report = qemu10.check(target)
    assert status == 0, report
    with lamina.open(target, format="qcow2") as image:
        stored = [n for n in range(30) if image.read(n * MIB, MIB) == bytes([n % 255 + 1]) * MIB]
    assert len(stored) >= 10, "what was converted before the disk was full is there"


def test_over_nbd(small: Path, tmp_path: Path, qemu10: Any) -> None:
    """The qcow2 image lies on an export whose server's disk fills up."""
    from lamina.nbd import Export, Server

    disk, socket = small / "disk.raw", tmp_path / "socket"
    with disk.open("wb") as file:
        file.truncate(60 * MIB)
    uri = f"nbd+unix:///?socket={socket}"
    with (
        lamina.open(disk, format="raw", read_only=False) as raw,
        Server([Export(raw, writable=True)], unix=str(socket)),
    ):
        lamina.create(tmp_path / "new.qcow2", "qcow2", 50 * MIB, cluster_size=4096)
        raw.write(0, (tmp_path / "new.qcow2").read_bytes())
        with lamina.open(uri, format="qcow2", read_only=False) as image:
            count = fill(lambda n: image.write(n * MIB, bytes([n % 255 + 1]) * MIB), 50)
            assert count > 8
            image.flush()
    kept(disk, count, MIB, qemu10)


def test_a_full_disk_does_not_keep_an_image_from_shrinking() -> None:
    """Moving refcount blocks only makes the file shorter, and needs room: without it the disk shrinks all the same."""
    storage = Quota(1 << 20)
    Qcow2.create(Child(storage, "file", grows=True), 64 * MIB, Qcow2.create_schema.parse({"cluster_size": 512}))
    with opened(storage) as image:
        for at in range(0, 40 * MIB, MIB):
            image.write(at, b"x" * MIB)
        image.flush()
        storage.room = 0
        image.truncate(4096)
        assert (image.size, image.read(0, 4096)) == (4096, b"x" * 4096)
        check_whole(image)
        storage.room = 1 << 20
        image.write(0, b"y" * 4096)
    with opened(storage, read_only=True) as image:
        assert image.read(0, 4096) == b"y" * 4096
        report = check_whole(image)
        assert (report.corruptions, report.leaks) == (0, 0)


def test_a_full_disk_does_not_keep_an_image_with_snapshots_from_shrinking() -> None:
    """The tables behind the new end are shared with a snapshot, and there is no room to copy them: none is copied. Where the
    new end is inside of what a table describes, it is, or nothing changes."""
    storage = Quota(1 << 20)
    Qcow2.create(Child(storage, "file", grows=True), 4 * MIB, Qcow2.create_schema.parse({"cluster_size": 4096}))
    with opened(storage) as image:
        for at in range(0, 4 * MIB, MIB // 4):
            image.write(at, b"x" * 70_000)
        image.create_snapshot("one")
        image.create_snapshot("two")
        image.flush()
        for _ in range(3):  # what the snapshot freed has other uses now
            storage.room = len(storage.blocks)
            with pytest.raises(BlockIOError):
                image.write(0, b"y" * MIB)
            image.flush()
        storage.room = len(storage.blocks)
        before = image.read(0, 4 * MIB)
        with pytest.raises(BlockIOError, match="no space left"):
            image.truncate(3 * MIB + 4096)
        assert image.size == 4 * MIB
        assert image.read(0, 4 * MIB) == before
        image.truncate(2 * MIB)
        assert image.size == 2 * MIB
        assert image.read(0, 2 * MIB) == before[: 2 * MIB]
        check_whole(image)
        storage.room = 1 << 20
        image.truncate(4 * MIB)
        assert not any(image.read(2 * MIB, 2 * MIB))
        assert image.node.check().clean  # type: ignore[attr-defined]
    with opened(storage, read_only=True) as image:
        assert image.read(0, 4 * MIB) == before[: 2 * MIB] + bytes(2 * MIB)
        check_whole(image)
    for name in ("one", "two"):
        with opened(storage, read_only=True, **{"snapshot-name": name}) as image:
            assert image.read(0, 70_000) == b"x" * 70_000
            assert image.read(3 * MIB, 70_000) == b"x" * 70_000


def test_bitmaps_without_room_do_not_keep_the_disk_from_being_written() -> None:
    """The close fails, since they cannot be stored; what the image acknowledged is there."""
    storage = Quota(1 << 20)
    Qcow2.create(Child(storage, "file", grows=True), MIB, Qcow2.create_schema.parse({"cluster_size": 4096}))
    with opened(storage) as image:
        image.add_bitmap("one", 512)
    image = opened(storage)
    image.write(300 * KIB, b"acknowledged")
    storage.room = 0
    with pytest.raises(BlockIOError, match="no space left"):
        image.close()
    with opened(storage, read_only=True) as image:
        assert image.read(300 * KIB, 12) == b"acknowledged"
        assert not image.bitmaps  # in use, and not stored: not to be trusted
        check_whole(image)


def test_a_machine_state_that_does_not_fit_leaves_nothing_behind() -> None:
    storage = Quota(1 << 20)
    Qcow2.create(Child(storage, "file", grows=True), MIB, Qcow2.create_schema.parse({"cluster_size": 4096}))
    with opened(storage) as image:
        image.write(0, b"x" * MIB)
        image.flush()
        before = image.node.check().allocated_clusters  # type: ignore[attr-defined]
        storage.room = len(storage.blocks) + 600  # for what one L2 table maps, 2 MiB, and not for the rest
        with pytest.raises(BlockIOError, match="no space left"):
            image.create_snapshot("one", b"s" * 4 * MIB)
        storage.room = 1 << 20
        report = image.node.check()  # type: ignore[attr-defined]
        assert (report.clean, report.allocated_clusters, image.snapshots()) == (True, before, ())
        assert image.read(0, MIB) == b"x" * MIB


def test_a_machine_state_for_which_the_l1_table_cannot_grow() -> None:
    """The error is that of the storage, though nothing of the state is there to be given back."""
    storage = Quota(1 << 20)
    Qcow2.create(Child(storage, "file", grows=True), MIB, Qcow2.create_schema.parse({"cluster_size": 4096}))
    with opened(storage) as image:
        storage.room = len(storage.blocks)
        with pytest.raises(BlockIOError, match="no space left"):
            image.create_snapshot("one", b"s" * 4 * MIB)
        storage.room = 1 << 20
        image.write(0, b"x" * MIB)
        assert image.create_snapshot("one", b"s" * 4 * MIB).id == "1"
        check_whole(image)

"""The faults by which writers of qcow2 lost data, each as the smallest case: young implementations, and the reference."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import BlockIOError, CorruptImage, LimitExceeded
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.qcow2.header import Header
from lamina.graph import Opener
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.failing import FailingStorage
from lamina.testing.image_checks import check_whole

KIB, MIB = 1024, 1 << 20


def made(storage: Any, size: int = MIB, **options: Any) -> None:
    kind: Any = Qcow2
    kind.create(Child(storage, "file", grows=True), size, kind.creation_schema().parse({**options, "size": size}))


def opened(storage: Any, *, read_only: bool = False, **more: Any) -> Image:
    options = Qcow2.schema.parse({"file": Child(storage, "file", grows=True), **more})
    return Image(Qcow2.open(options, Opener(read_only=read_only)))


class Kept(MemoryStorage):
    """Storage that outlives the images over it."""

    def close(self) -> None:
        pass

    def content(self) -> bytearray:
        found = bytearray(self.size)
        self.read_into(0, memoryview(found))
        return found


class LateDiscards(Kept):
    """Storage that executes discards at the next flush, over whatever was written meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[int, int]] = []

    def discard(self, offset: int, length: int) -> None:
        self.waiting.append((offset, length))

    def flush(self) -> None:
        waiting, self.waiting = self.waiting, []
        for offset, length in waiting:
            super().zero(offset, length)
        super().flush()


@pytest.mark.parametrize("options", [{}, {"extended_l2": True}, {"refcount_bits": 1}], ids=str)
def test_a_cluster_is_not_reused_while_its_discard_is_under_way(options: dict[str, Any]) -> None:
    storage = LateDiscards()
    made(storage, cluster_size=16 * KIB, **options)
    rng, disk = random.Random(5), bytearray(MIB)
    with opened(storage) as image:
        for number in range(300):
            offset = rng.randrange(64) * 16 * KIB
            if rng.randrange(2):
                data = bytes([number % 255 + 1]) * 16 * KIB
                image.write(offset, data)
            else:
                image.discard(offset, 16 * KIB)
                data = bytes(16 * KIB)
            disk[offset : offset + 16 * KIB] = data
            if rng.randrange(5) == 0:
                image.flush()
        image.flush()
        assert image.read(0, MIB) == disk
    storage.flush()
    with opened(storage, read_only=True) as image:
        assert image.read(0, MIB) == disk
        check_whole(image)


def test_no_l1_entry_is_published_before_its_count_when_the_disk_is_full() -> None:
    """Each write of an operation that makes L2 tables finds the disk full, once and for good."""
    empty = FailingStorage()
    made(empty, 8 * MIB, cluster_size=512, refcount_bits=64)
    content = bytes(empty.content)
    failures = 0
    for sticky in (False, True):
        for nth in range(1, 200):
            storage = FailingStorage(content)
            image = opened(storage)
            storage.arm(nth, 28, sticky=sticky, kinds=["write"])
            try:
                for at in range(0, 8 * MIB, MIB):
                    image.write(at, b"x" * 5000)
                image.flush()
            except BlockIOError:
                failures += 1
            ended = not storage.failed
            power_cut = FailingStorage(bytes(storage.content))  # what the disk has now, whether or not closing succeeds
            with opened(power_cut, read_only=True) as left:
                check_whole(left)
            storage.disarm()
            image.close()
            with opened(FailingStorage(bytes(storage.content)), read_only=True) as left:
                check_whole(left)
            if ended:
                break
    assert failures > 60


@pytest.mark.parametrize("options", [{}, {"extended_l2": True}, {"refcount_bits": 1}], ids=str)
def test_two_writers_never_allocate_the_same_cluster(options: dict[str, Any], tmp_path: Path) -> None:
    path, cluster = tmp_path / "disk.qcow2", 16 * KIB
    lamina.create(path, "qcow2", 32 * MIB, cluster_size=cluster, **options)
    count = 32 * MIB // cluster
    order = list(range(count))
    random.Random(6).shuffle(order)
    with lamina.open(path, format="qcow2", read_only=False) as image:

        def work(which: int) -> None:
            for number in order[which::8]:
                image.write(number * cluster, number.to_bytes(4, "big") * (cluster // 4))
                if number % 50 == 0:
                    image.flush()

        run(*(lambda which=which: work(which) for which in range(8)))
        hosts = [row.offset for row in image.extents() if row.data]
    with lamina.open(path, format="qcow2") as image:
        for number in range(count):
            assert image.read(number * cluster, cluster) == number.to_bytes(4, "big") * (cluster // 4)
        check_whole(image)
    assert len(set(hosts)) == len(hosts)


def run(*works: Callable[[], Any]) -> None:
    """Run these in threads, wait for all, and raise the error of one that failed."""
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


def patched(storage: Kept, at: int, value: bytes) -> None:
    storage.write(at, memoryview(value))


def test_the_first_cluster_is_never_overwritten() -> None:
    """Its count is 0, so that it seems to be free; or an entry points to it."""
    storage = Kept()
    made(storage, cluster_size=4 * KIB)
    header = Header.read(Child(storage, "file"))
    first = bytes(storage.content()[: 4 * KIB])
    block = int.from_bytes(storage.content()[header.refcount_table_offset :][:8], "big")
    patched(storage, block, bytes(2))
    with opened(storage) as image, pytest.raises(CorruptImage):
        image.write(0, b"x" * 300_000)
    assert_marked(storage, first)

    storage = Kept()
    made(storage, cluster_size=4 * KIB)
    with opened(storage) as image:
        image.write(0, b"y" * 8 * KIB)
    first = bytes(storage.content()[: 4 * KIB])
    patched(storage, l2_entry(storage, 0), q.COPIED.to_bytes(8, "big"))
    with opened(storage) as image:
        image.write(0, b"x" * 100)  # an entry without an offset has no storage
        assert image.read(0, 100) == b"x" * 100
    assert bytes(storage.content()[:72]) == first[:72]


def l2_entry(storage: Kept, cluster: int) -> int:
    """Where the L2 entry of this cluster is, in the first L2 table."""
    content = storage.content()
    header = Header.read(Child(storage, "file"))
    table = int.from_bytes(content[header.l1_table_offset :][:8], "big") & q.OFFSET_MASK
    return table + 8 * cluster


def assert_marked(storage: Kept, first: bytes) -> None:
    """The first cluster is as it was, but for the mark."""
    now = storage.content()[: len(first)]
    assert now[79] & q.CORRUPT
    now[79] &= ~q.CORRUPT
    assert now == first


@pytest.mark.parametrize("target", ["l1", "l2", "refcount table", "refcount block", "header"])
def test_guest_data_is_never_written_over_metadata(target: str) -> None:
    storage = Kept()
    made(storage, cluster_size=4 * KIB)
    with opened(storage) as image:
        image.write(0, b"y" * 8 * KIB)
    header, content = Header.read(Child(storage, "file")), storage.content()
    places = {
        "header": 0,
        "l1": header.l1_table_offset,
        "l2": l2_entry(storage, 0),
        "refcount table": header.refcount_table_offset,
        "refcount block": int.from_bytes(content[header.refcount_table_offset :][:8], "big"),
    }
    place = places[target]
    patched(storage, l2_entry(storage, 1), (q.COPIED | place).to_bytes(8, "big"))
    before = storage.content()
    with opened(storage) as image:
        if target == "header":
            image.write(4 * KIB, b"x" * 4 * KIB)  # no storage: see above
        else:
            with pytest.raises(CorruptImage):
                image.write(4 * KIB, b"x" * 4 * KIB)
    if target != "header":
        after = storage.content()
        after[79] &= ~q.CORRUPT
        assert after == before


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("what", ["write", "zero", "discard"])
def test_a_part_of_a_compressed_cluster_changes_alone(extended: bool, what: str, tmp_path: Path) -> None:
    path, cluster = tmp_path / "disk.qcow2", 16 * KIB
    lamina.create(path, "qcow2", MIB, cluster_size=cluster, extended_l2=extended)
    disk = bytearray((b"compressible " * 100_000)[:MIB])
    spec = {"driver": "compress", "image": {"driver": "qcow2", "file": {"filename": str(path)}}}
    with lamina.open(spec, read_only=False) as image:
        image.write(0, disk)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        assert image.extents().where(compressed=True).totals().length > MIB // 2
        for at, length in (
            (100, 50),
            (cluster + 512, 512),
            (3 * cluster - 512, 1024),
            (5 * cluster, 700),
            (MIB - 9, 9),
        ):
            if what == "write":
                image.write(at, b"N" * length)
                disk[at : at + length] = b"N" * length
            elif what == "zero":
                image.zero(at, length)
                disk[at : at + length] = bytes(length)
            else:
                image.discard(at, length)
                got = image.read(at, length)
                assert all(new in (0, old) for new, old in zip(got, disk[at : at + length], strict=True))
                disk[at : at + length] = got
            assert image.read(0, MIB) == disk
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, MIB) == disk
        check_whole(image)


@pytest.mark.parametrize("bits", [1, 2])
def test_a_count_never_overflows(bits: int, tmp_path: Path) -> None:
    """Neither by a snapshot, nor by compressed clusters that share a host cluster."""
    path, most = tmp_path / "disk.qcow2", (1 << bits) - 1
    lamina.create(path, "qcow2", MIB, cluster_size=4 * KIB, refcount_bits=bits)
    disk = random.Random(7).randbytes(100_000)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, disk)
        for number in range(most - 1):
            image.create_snapshot(str(number))
        with pytest.raises(LimitExceeded):
            image.create_snapshot("one too many")
        image.write(10, b"new")
        assert image.read(0, 100_000) == disk[:10] + b"new" + disk[13:]
    for number in range(most - 1):
        spec = {"driver": "qcow2", "file": {"filename": str(path)}, "snapshot-name": str(number)}
        with lamina.open(spec) as old:
            assert old.read(0, 100_000) == disk
    assert lamina.check(path, format="qcow2").clean
    if bits == 1:
        return  # there is no compression, which saves nothing then
    packed = tmp_path / "packed.qcow2"
    lamina.create(packed, "qcow2", MIB, cluster_size=4 * KIB, refcount_bits=bits)
    spec = {"driver": "compress", "image": {"driver": "qcow2", "file": {"filename": str(packed)}}}
    with lamina.open(spec, read_only=False) as image:
        for at in range(0, MIB, 4 * KIB):
            image.write(at, bytes([at // 4096 % 250 + 1]) * 4 * KIB)
    with lamina.open(packed, format="qcow2") as image:
        for at in range(0, MIB, 4 * KIB):
            assert image.read(at, 4 * KIB) == bytes([at // 4096 % 250 + 1]) * 4 * KIB
        check_whole(image)


def test_zeros_that_are_detected_leave_the_bytes_around_them(tmp_path: Path) -> None:
    """detect-zeroes=unmap over a backing file: a part of a cluster is written as zeros."""
    base, path, rng = tmp_path / "base", tmp_path / "disk.qcow2", random.Random(8)
    disk = bytearray(rng.randbytes(MIB))
    base.write_bytes(disk)
    lamina.create(path, "qcow2", MIB, backing_file="base", backing_fmt="raw")
    spec = {"driver": "qcow2", "file": {"filename": str(path)}, "detect-zeroes": "unmap"}
    with lamina.open(spec, read_only=False) as image:
        for _ in range(60):
            at, length = rng.randrange(MIB), rng.choice((1, 512, 4096, 65_536, 200_000))
            length = min(length, MIB - at)
            data = bytes(length) if rng.randrange(3) else rng.randbytes(length)
            image.write(at, data)
            disk[at : at + length] = data
            assert image.read(0, MIB) == disk
    assert base.stat().st_size == MIB
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, MIB) == disk
        check_whole(image)


class Slow(MemoryStorage):
    """A layer whose reads wait until they are let go."""

    def __init__(self, content: bytes) -> None:
        super().__init__(len(content))
        self.write(0, memoryview(content))
        self.read_only = True
        self.asked, self.go = threading.Event(), threading.Event()

    def read_into(self, offset: int, view: memoryview) -> None:
        self.asked.set()
        assert self.go.wait(20)
        super().read_into(offset, view)


@pytest.mark.parametrize("what", ["discard", "zero"])
@pytest.mark.parametrize("extended", [False, True])
def test_a_discard_beside_copy_on_write_shows_no_old_bytes(what: str, extended: bool) -> None:
    """A write copies the rest of its cluster from the layer below, and meanwhile the cluster is discarded."""
    storage, below = Kept(), Slow(b"old" * 30_000)
    made(storage, 64 * KIB, cluster_size=64 * KIB, extended_l2=extended)
    with opened(storage, backing=Child(below, "backing")) as image:
        writing = threading.Thread(target=image.write, args=(1000, b"new" * 100))
        writing.start()
        assert below.asked.wait(20)
        other = threading.Thread(target=getattr(image, what), args=(0, 64 * KIB))
        other.start()
        other.join(0.2)
        assert other.is_alive(), "it waits for the write"
        below.go.set()
        writing.join()
        other.join()
        got = image.read(0, 64 * KIB)
    assert got == bytes(64 * KIB)
    with opened(storage, read_only=True, backing=Child(below, "backing")) as image:
        check_whole(image)
        assert image.read(0, 64 * KIB) == got

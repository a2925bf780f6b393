"""Persistent dirty bitmaps from the library: what is recorded and refused, and where they lie in the file."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.bitmap import MemoryBitmap
from lamina.errors import BlockIOError
from lamina.formats.qcow2 import bitmap_directory
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.header import Header
from lamina.limits import Budget
from lamina.node import Node
from lamina.testing.faulty import FaultyStorage
from lamina.testing.image_checks import check_whole
from tests.crash.workloads import open_on

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=4096)
    return path


def node_of(image: lamina.Image) -> Any:
    return image.node


def open_for(path: Path) -> lamina.Image:
    return lamina.open(path, format="qcow2", read_only=False)


def dirty(path: Path, name: str) -> list[tuple[int, int]]:
    with lamina.open(path, format="qcow2") as image:
        return list(image.node.bitmaps[name].dirty(0, image.size))


def test_a_bitmap_knows_what_was_written_since(path: Path) -> None:
    with open_for(path) as image:
        image.write(0, b"before")
        node_of(image).add_bitmap("since", 1024)
        assert list(image.node.bitmaps["since"].dirty(0, SIZE)) == []
        image.write(5000, b"x" * 3000)
        image.zero(100 * 1024, 4096)
        image.discard(200 * 1024, 8192)
        image.write(300 * 1024, b"c" * 4096, compress=True)
        found = list(image.node.bitmaps["since"].dirty(0, SIZE))
        assert found == [(4096, 8192), (102400, 106496), (204800, 212992), (307200, 311296)]
        assert list(image.node.bitmaps["since"].dirty(5000, 103000)) == [(5000, 8192), (102400, 103000)]
    assert dirty(path, "since") == found
    with open_for(path) as image:
        node_of(image).enable_bitmap("since", False)
        image.write(900 * 1024, b"not recorded")
    assert dirty(path, "since") == found
    assert lamina.check(path, format="qcow2").clean


def test_a_disk_of_size_0_has_no_bitmaps(path: Path) -> None:
    """QEMU opens no image that has both."""
    with open_for(path) as image:
        node = node_of(image)
        size = image.size
        image.create_snapshot("whole")
        image.truncate(0)
        image.create_snapshot("empty")
        with pytest.raises(lamina.OptionError, match="size 0"):
            node.add_bitmap("one", 65536)
        image.apply_snapshot("1")
        node.add_bitmap("one", 65536)
        for change in (lambda: image.truncate(0), lambda: image.apply_snapshot("2")):
            with pytest.raises(lamina.OptionError, match="size 0"):
                change()
        assert image.size == size
        image.write(0, b"x")
    with open_for(path) as image:
        assert list(node_of(image).bitmaps["one"].dirty(0, size)) == [(0, 65536)]


def test_what_is_refused(path: Path, tmp_path: Path) -> None:
    with open_for(path) as image:
        node = node_of(image)
        node.add_bitmap("one", 65536)
        for name, granularity, match in (
            ("one", 65536, "already"),
            ("", 65536, "empty"),
            ("x" * 1024, 65536, "too long"),
            ("two", 1000, "power of two"),
            ("two", 256, "power of two"),
            ("two", 1 << 32, "power of two"),
        ):
            with pytest.raises(lamina.OptionError, match=match):
                node.add_bitmap(name, granularity)
        for change in (node.remove_bitmap, node.clear_bitmap, lambda name: node.merge_bitmaps(name, [])):
            with pytest.raises(lamina.OptionError, match="no bitmap 'two'"):
                change("two")
    with lamina.open(path, format="qcow2") as image, pytest.raises(lamina.ReadOnly):
        node_of(image).add_bitmap("two", 65536)
    old = tmp_path / "old.qcow2"
    lamina.create(old, "qcow2", SIZE, compat="0.10")
    with open_for(old) as image, pytest.raises(lamina.OptionError, match="version 2"):
        node_of(image).add_bitmap("one", 65536)


def test_bits_are_booked(path: Path) -> None:
    with lamina.open(path, format="qcow2", read_only=False, budget=Budget(memory=1500)) as image:
        with pytest.raises(lamina.LimitExceeded, match="dirty bitmaps"):
            node_of(image).add_bitmap("one", 512)
        node_of(image).add_bitmap("two", 4096)
        image.write(0, b"x")
    assert dirty(path, "two") == [(0, 4096)]


def test_a_write_that_fails_is_recorded(path: Path) -> None:
    with open_for(path) as image:
        image.write(0, b"x" * SIZE)
        node_of(image).add_bitmap("one", 4096)
    file = {"driver": "file", "filename": str(path)}
    spec = {"driver": "qcow2", "file": {"driver": "faults", "rules": [{"kind": "write"}], "image": file}}
    image = lamina.open(spec, read_only=False)
    with pytest.raises(BlockIOError):
        image.write(8192, b"y")
    assert list(image.node.bitmaps["one"].dirty(0, SIZE)) == [(8192, 12288)]
    with pytest.raises(BlockIOError):  # the bitmap cannot be stored
        image.close()


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("operation", ["write", "flush"])
@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_a_removal_that_fails_leaves_no_bitmap_that_misses_writes(
    path: Path, operation: str, names: tuple[str, ...], written: bool
) -> None:
    """Whichever request of it fails: neither a power cut after later writes nor a close shows a bitmap that lacks them."""
    with open_for(path) as image:
        for name in names:
            image.add_bitmap(name, 4096)
    start, failures = path.read_bytes(), 0
    for nth in range(1, 30):
        storage = FaultyStorage(start)
        with open_on(storage, read_only=False) as image:
            if written:  # they are marked as in use already
                image.write(8192, b"before")
            storage.fail(operation, nth=nth)
            with suppress(BlockIOError):
                image.remove_bitmap(names[-1])
            storage.heal()
            image.write(40960, b"after")
            image.flush()
            crashed = bytes(storage.content)
        failures += storage.failures
        for content in (crashed, bytes(storage.content)):
            with open_on(FaultyStorage(content), read_only=True) as image:
                for name, one in image.bitmaps.items():
                    known = [(8192, 12288)] if written else []
                    assert list(one.dirty(0, SIZE)) == [*known, (40960, 45056)], f"{name}, {operation} {nth}"
                check_whole(image)
        if not storage.failures:
            break
    assert failures > 1


@pytest.mark.parametrize("operation", ["write", "flush"])
def test_a_removal_that_fails_leaves_the_header_as_it_is(path: Path, operation: str) -> None:
    """The image says then that its bitmaps are out of date: where their directory was is nothing to be marked as in use. The
    marks of all but the first went to the beginning of the file, over the offset of the L1 table."""
    with open_for(path) as image:
        image.write(0, b"before")
        for name in ("one", "two", "three"):
            image.add_bitmap(name, 4096)
    start, failures = path.read_bytes(), 0
    for nth in range(1, 30):
        storage = FaultyStorage(start)
        with open_on(storage, read_only=False) as image:
            storage.fail(operation, nth=nth)
            with suppress(BlockIOError):
                image.remove_bitmap("three")
            storage.heal()
            image.write(8192, b"after")
            image.flush()
            with open_on(FaultyStorage(bytes(storage.content)), read_only=True) as killed:
                assert (killed.read(0, 6), killed.read(8192, 5)) == (b"before", b"after")
                check_whole(killed)
        failures += storage.failures
    assert failures > 1


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("operation", ["read", "write", "flush"])
def test_bitmaps_whose_storing_failed_are_stored_the_next_time(path: Path, operation: str, lasting: bool) -> None:
    """Also where the extension is in the file, and only the flush behind it failed."""
    start, failures = path.read_bytes(), 0
    for nth in range(1, 40):
        storage = FaultyStorage(start)
        image = open_on(storage, read_only=False)
        image.add_bitmap("one", 4096)
        image.add_bitmap("two", 4096)
        image.write(8192, b"before")
        storage.fail(operation, nth=nth, times=None if lasting else 1)
        with suppress(BlockIOError):
            image.remove_bitmap("two")
        storage.heal()
        image.write(40960, b"after")
        image.flush()
        with open_on(FaultyStorage(bytes(storage.content)), read_only=True) as killed:
            assert not killed.bitmaps
        image.close()
        with open_on(FaultyStorage(bytes(storage.content)), read_only=True) as again:
            assert list(again.bitmaps["one"].dirty(0, SIZE)) == [(8192, 12288), (40960, 45056)]
            check_whole(again)
        failures += bool(storage.failures)
        if not storage.failures:
            break
    assert failures


def test_a_change_of_a_bitmap_that_fails_changes_nothing(path: Path) -> None:
    """A program that hears of an error takes the bitmap for what it was."""
    with open_for(path) as image:
        image.add_bitmap("one", 4096)
        image.add_bitmap("two", 4096)
        image.write(8192, b"before")
        image.clear_bitmap("two")
    storage = FaultyStorage(path.read_bytes())
    with open_on(storage, read_only=False) as image:
        for change in (
            lambda: image.clear_bitmap("one"),
            lambda: image.enable_bitmap("one", False),
            lambda: image.merge_bitmaps("two", [image.bitmaps["one"]]),
        ):
            storage.fail("write")
            with pytest.raises(BlockIOError):
                change()
            storage.heal()
            assert list(image.bitmaps["one"].dirty(0, SIZE)) == [(8192, 12288)]
            assert list(image.bitmaps["two"].dirty(0, SIZE)) == []
            image.write(40960, b"recorded")
            image.clear_bitmap("two")
            assert list(image.bitmaps["one"].dirty(0, SIZE)) == [(8192, 12288), (40960, 45056)]
            image.clear_bitmap("one")
            image.write(8192, b"before")
            image.clear_bitmap("two")


def test_a_disk_that_changes_its_size(path: Path) -> None:
    with open_for(path) as image:
        node = node_of(image)
        node.add_bitmap("one", 4096)
        image.write(SIZE - 10, b"x" * 10)
        image.truncate(3 * SIZE)
        image.write(2 * SIZE, b"y")
        assert list(node.bitmaps["one"].dirty(0, 3 * SIZE)) == [(SIZE - 4096, SIZE), (2 * SIZE, 2 * SIZE + 4096)]
    assert dirty(path, "one") == [(SIZE - 4096, SIZE), (2 * SIZE, 2 * SIZE + 4096)]
    with open_for(path) as image:
        image.truncate(SIZE)
    assert dirty(path, "one")[0] == (SIZE - 4096, SIZE)
    with open_for(path) as image:
        image.truncate(2 * SIZE)
    assert lamina.check(path, format="qcow2").clean
    assert all(end <= SIZE or begin >= SIZE for begin, end in dirty(path, "one"))


def test_a_snapshot_that_is_applied_changes_everything(path: Path) -> None:
    with open_for(path) as image:
        image.create_snapshot("then")
        node_of(image).add_bitmap("one", 65536)
        image.apply_snapshot("1")
        assert list(image.node.bitmaps["one"].dirty(0, SIZE)) == [(0, SIZE)]
        image.delete_snapshot("1")
    assert dirty(path, "one") == [(0, SIZE)]
    assert lamina.check(path, format="qcow2").clean


def test_merging_takes_all_or_nothing(path: Path) -> None:
    class Broken:
        granularity = 512

        def dirty(self, begin: int, end: int) -> Any:
            yield 0, 512
            raise BlockIOError("it cannot be read")

    with open_for(path) as image:
        node = node_of(image)
        node.add_bitmap("one", 4096)
        other = MemoryBitmap(512)
        other.mark(10_000, 1)
        with pytest.raises(BlockIOError):
            node.merge_bitmaps("one", [other, Broken()])
        assert list(node.bitmaps["one"].dirty(0, SIZE)) == []
        node.merge_bitmaps("one", [other])
        assert list(node.bitmaps["one"].dirty(0, SIZE)) == [(8192, 12288)]


def test_marks_of_many_threads(path: Path) -> None:
    with open_for(path) as image:
        node_of(image).add_bitmap("one", 512)
    with open_for(path) as image:
        start = threading.Barrier(4)

        def write(number: int) -> None:
            start.wait()
            for at in range(number * 512, SIZE, 4 * 512 * 8):
                image.write(at, b"x")

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = sorted(at for number in range(4) for at in range(number * 512, SIZE, 4 * 512 * 8))
    found = [at for begin, end in dirty(path, "one") for at in range(begin, end, 512)]
    assert found == expected


@pytest.mark.parametrize("length", [1, 8, 31, 32, 40, 200, 255])
def test_the_extension_finds_its_place_before_the_name_of_the_backing_file(tmp_path: Path, length: int) -> None:
    """The name lies behind the list of extensions, and gives way, whatever its length."""
    name = "b" * length
    (tmp_path / name).write_bytes(b"below" * 1000)
    path = tmp_path / "top.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=1024, backing_file=name, backing_fmt="raw")
    for number in range(2):
        with open_for(path) as image:
            node_of(image).add_bitmap(f"bitmap {number}", 512)
            image.write(8192 * (number + 1), b"x")
        with lamina.open(path, format="qcow2") as image:
            assert image.read(0, 5) == b"below"
            assert len(image.node.bitmaps) == number + 1
    assert dirty(path, "bitmap 0") == [(8192, 8704), (16384, 16896)]
    with open_for(path) as image:
        for number in range(2):
            node_of(image).remove_bitmap(f"bitmap {number}")
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 5) == b"below"
        assert not image.node.bitmaps
        assert node_of(image).header.extension(q.EXT_BITMAPS) is None
    assert lamina.check(path, format="qcow2").clean


def test_a_header_without_space_for_them(tmp_path: Path) -> None:
    path = tmp_path / "top.qcow2"
    (tmp_path / ("b" * 250)).write_bytes(b"")
    lamina.create(
        path, "qcow2", SIZE, cluster_size=512, backing_file="b" * 250, backing_fmt="raw", backing_unchecked=True
    )
    with open_for(path) as image:
        node_of(image).add_bitmap("one", 512)
        with pytest.raises(lamina.LimitExceeded, match="no space"):
            image.close()
    assert lamina.check(path, format="qcow2").corruptions == 0
    with lamina.open(path, format="qcow2") as image:
        assert not image.node.bitmaps


def test_a_writer_without_bitmaps_makes_them_out_of_date(path: Path) -> None:
    """It clears the autoclear bit. What they hold is not used, and a new one takes the place of the extension."""
    with open_for(path) as image:
        node_of(image).add_bitmap("one", 4096)
    with lamina.open(path, format="raw", read_only=False) as raw:
        header = Header.read(raw.node.children["file"])
        header.autoclear_features = 0
        header.store(raw.node.children["file"], "autoclear_features")
    with open_for(path) as image:
        assert not image.node.bitmaps
        node_of(image).add_bitmap("two", 4096)
        image.write(0, b"x")
    assert dirty(path, "two") == [(0, 4096)]
    assert "bitmaps" in lamina.info(path, format="qcow2").to_json()["format-specific"]["data"]


def test_a_bitmap_that_was_never_stored_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 1 << 20)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.add_bitmap("new")
        image.remove_bitmap("new")
        assert not image.bitmaps
        with pytest.raises(lamina.OptionError, match="no bitmap"):
            image.remove_bitmap("new")
    with lamina.open(path, format="qcow2") as image:
        assert not image.bitmaps


@pytest.mark.parametrize("structure", ["L1 table", "L2 table", "refcount table", "refcount block"])
def test_a_removal_frees_no_structure_that_the_bitmap_names(path: Path, structure: str) -> None:
    with open_for(path) as image:
        node = node_of(image)
        image.write(0, b"data" * 50_000)
        node.add_bitmap("one", 512)
        image.write(4096, b"recorded")
        content = image.read(0, SIZE)
    with lamina.open(path, format="qcow2") as image:
        entry, header = bitmap_directory.read(node_of(image).file, node_of(image).header)[0], node_of(image).header
    raw = bytearray(path.read_bytes())

    def named_at(at: int) -> int:
        return int.from_bytes(raw[at : at + 8], "big") & q.OFFSET_MASK

    places = {"L1 table": header.l1_table_offset, "refcount table": header.refcount_table_offset}
    places |= {"L2 table": named_at(places["L1 table"]), "refcount block": named_at(places["refcount table"])}
    raw[entry.table_offset : entry.table_offset + 8] = places[structure].to_bytes(8, "big")
    path.write_bytes(raw)
    with open_for(path) as image, pytest.raises(lamina.CorruptImage, match="structures of the image overlap"):
        node_of(image).remove_bitmap("one")
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, SIZE) == content


def test_bitmaps_go_on_to_record_where_a_reopening_for_reading_fails(path: Path) -> None:
    storage = FaultyStorage(path.read_bytes())
    image = open_on(storage, read_only=False)
    image.add_bitmap("one", 4096)
    image.write(8192, b"before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FaultyStorage, "reopen", Node.reopen)
        with pytest.raises(lamina.NotSupported):
            image.reopen(read_only=True)
    assert not image.read_only
    image.write(40960, b"after")
    image.flush()
    with open_on(FaultyStorage(bytes(storage.content)), read_only=True) as killed:
        assert not killed.bitmaps
    image.close()
    with open_on(FaultyStorage(bytes(storage.content)), read_only=True) as again:
        assert list(again.bitmaps["one"].dirty(0, SIZE)) == [(8192, 12288), (40960, 45056)]


def test_a_repair_frees_no_clusters_of_bitmaps_that_could_not_be_stored(path: Path) -> None:
    with open_for(path) as image:
        image.add_bitmap("kept", 4096)
        image.write(0, b"x")
        image.enable_bitmap("kept", False)
        image.add_bitmap("two", 4096)
    start, failures = path.read_bytes(), 0
    for nth in range(1, 40):
        storage = FaultyStorage(start)
        with open_on(storage, read_only=False) as image:
            storage.fail("write", nth=nth)
            with suppress(BlockIOError):
                image.remove_bitmap("two")
            storage.heal()
            node_of(image).repair("leaks")
            image.write(SIZE // 2, b"data" * 65536)
        with open_on(FaultyStorage(bytes(storage.content)), read_only=True) as again:
            assert list(again.bitmaps["kept"].dirty(0, SIZE)) == [(0, 4096)]
            check_whole(again)
        failures += bool(storage.failures)
        if not storage.failures:
            break
    assert failures


def test_an_extension_is_not_placed_behind_the_offset_of_an_empty_name(path: Path) -> None:
    """A header may name a backing file of no bytes: the list of extensions ends where that name begins."""
    raw = bytearray(path.read_bytes())
    field = q.HEADER_V2["backing_file_offset"]
    with lamina.open(path, format="qcow2") as image:
        end = node_of(image).header.used_bytes(raw)
    raw[field.offset : field.offset + field.size] = (end + 8).to_bytes(8, "big")
    path.write_bytes(raw)
    with open_for(path) as image:
        node_of(image).add_bitmap("one", 512)
        image.write(0, b"recorded")
    with lamina.open(path, format="qcow2") as image:
        assert list(node_of(image).bitmaps["one"].dirty(0, 4096)) == [(0, 512)]

"""External data files: how they are named, created, kept and refused, and what their images cannot have."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import (
    BlockIOError,
    CorruptImage,
    FormatError,
    LaminaError,
    NotFound,
    NotSupported,
    OptionError,
    PolicyError,
    UnsupportedFeature,
)
from lamina.formats.qcow2 import layout as q
from lamina.jobs.convert import convert_to_file
from lamina.policy import Policy

pytestmark = pytest.mark.usefixtures("granted")
SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=4096, data_file="data")
    return path


def l2_entry_at(path: Path, cluster: int) -> int:
    """Where the L2 entry of a guest cluster below 512 is in the file."""
    raw = path.read_bytes()
    l1 = int.from_bytes(raw[40:48], "big")
    return (int.from_bytes(raw[l1 : l1 + 8], "big") & q.OFFSET_MASK) + 8 * cluster


def patch(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


# -- where the bytes are


def test_the_guest_data_has_the_same_offset_in_the_data_file(path: Path) -> None:
    data = random.Random(1).randbytes(3 * 4096)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, data)
        image.write(700_000, b"far")
        rows = [row for row in image.extents() if row.data]
        assert [(row.offset, row.file and os.path.basename(row.file.path)) for row in rows] == [
            (0, "data"),
            (696_320, "data"),
        ]
    stored = path.with_name("data").read_bytes()
    assert stored[: len(data)] == data
    assert stored[700_000:700_003] == b"far"
    assert len(stored) == SIZE
    assert data not in path.read_bytes()
    assert lamina.check(path, format="qcow2").clean


@pytest.mark.parametrize("raw", [False, True])
def test_the_data_file_is_as_long_as_the_disk(tmp_path: Path, raw: bool) -> None:
    """Its last cluster is as short as that of the disk, before and after a change of the size."""
    path, data = tmp_path / "disk.qcow2", tmp_path / "data"
    lamina.create(path, "qcow2", SIZE + 512, data_file="data", data_file_raw=raw)
    assert data.stat().st_size == SIZE + 512
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(SIZE, b"x" * 512)
        image.write(70_000, b"y")
        image.flush()
        assert data.stat().st_size == SIZE + 512
        image.truncate(SIZE + 1024)
        assert data.stat().st_size == SIZE + 1024
        assert image.read(SIZE, 1024) == b"x" * 512 + bytes(512)
        image.truncate(512)
        assert data.stat().st_size == 512
        image.truncate(SIZE)
        assert not any(image.read(0, SIZE))
    if raw:
        assert data.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize("raw", [False, True])
def test_bytes_behind_the_disk_in_a_longer_data_file_do_not_become_visible(tmp_path: Path, raw: bool) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "data"
    lamina.create(path, "qcow2", 4096, data_file="data", data_file_raw=raw)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"x" * 4096)
    data.write_bytes(b"x" * 4096 + b"garbage!" * 20_000)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.truncate(128 * 1024)
        assert image.read(0, 128 * 1024) == b"x" * 4096 + bytes(124 * 1024)
        image.write(100_000, b"z")
        assert image.read(0, 128 * 1024) == b"x" * 4096 + bytes(95_904) + b"z" + bytes(31_071)
    if raw:
        assert data.read_bytes()[: 128 * 1024] == b"x" * 4096 + bytes(95_904) + b"z" + bytes(31_071)


def test_a_write_beside_old_bytes_of_the_data_file_shows_none_of_them(path: Path) -> None:
    """Clusters that the tables do not map may have any bytes there."""
    path.with_name("data").write_bytes(b"garbage!" * (SIZE // 8))
    with lamina.open(path, format="qcow2", read_only=False) as image:
        assert not any(image.read(0, SIZE))
        image.write(10_000, b"new")
        assert image.read(8192, 4096) == bytes(1808) + b"new" + bytes(2285)
        image.zero(10_000, 3, unmap=False)
        image.discard(8192, 4096)
        assert not any(image.read(0, SIZE))


def test_what_is_discarded_or_zeroed_leaves_the_data_file(path: Path) -> None:
    data = path.with_name("data")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"s" * 40_960)
        image.discard(4096, 8192)
        image.zero(16_384, 4096, unmap=True)
        image.zero(24_576, 4096, unmap=False)
    stored = data.read_bytes()
    assert stored[:24_576] == b"s" * 4096 + bytes(8192) + b"s" * 4096 + bytes(4096) + b"s" * 4096
    assert stored[24_576:28_672] == b"s" * 4096, "its storage stays, as it is"
    with lamina.open(path, format="qcow2") as image:
        assert not any(image.read(24_576, 4096))


def test_a_flush_brings_the_data_to_stable_storage_before_the_tables(path: Path) -> None:
    order: list[str] = []
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "data-file": {"driver": "file"}}
    spec["data-file"]["filename"] = str(path.with_name("data"))  # type: ignore[index]
    with lamina.open(spec, read_only=False) as image:
        for role in ("file", "data-file"):
            storage = image.node.children[role].node
            flush, write = storage.flush, storage.write

            def note_flush(role: str = role, flush: Any = flush) -> None:
                order.append(f"flush {role}")
                flush()

            def note_write(offset: int, view: memoryview, flags: int = 0, role: str = role, write: Any = write) -> None:
                order.append(f"write {role}")
                write(offset, view, flags)

            storage.flush, storage.write = note_flush, note_write  # type: ignore[method-assign]
        image.write(0, b"a" * 4096)
        image.flush()
        image.write(4096, b"b" * 4096)  # its L2 table exists now
        order.clear()
        image.flush()
        assert order.index("flush data-file") < order.index("write file")
        order.clear()
        image.write(0, b"c" * 4096)  # in place: no table changes
        image.flush()
        assert order.index("write data-file") < order.index("flush data-file")


# -- names, and the policy for them


def test_a_data_file_outside_the_granted_files_is_not_opened(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    lamina.create(inner / "disk.qcow2", "qcow2", SIZE, data_file="../data")
    for policy in (None, Policy.none()):
        with pytest.raises(PolicyError, match="data file"):
            lamina.open(inner / "disk.qcow2", format="qcow2", read_only=False, references=policy)
    with lamina.open(inner / "disk.qcow2", format="qcow2", references=Policy.listed([tmp_path / "data"])) as image:
        assert image.size == SIZE
    found = lamina.info(inner / "disk.qcow2", format="qcow2").to_json()["format-specific"]["data"]
    assert (found["data-file"], found["data-file-raw"]) == ("../data", False)


def test_an_option_names_another_data_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"o" * SIZE)
    path.with_name("data").unlink()
    with pytest.raises(NotFound):
        lamina.open(path, format="qcow2")
    spec = {"driver": "qcow2", "file": {"filename": str(path)}, "data-file": {"filename": str(other)}}
    with lamina.open(spec, read_only=False) as image:
        assert not any(image.read(0, SIZE))
        image.write(0, b"n")
    assert other.read_bytes()[:4096] == b"n" + bytes(4095)


def test_an_image_that_does_not_name_its_data_file_needs_the_option(path: Path) -> None:
    at = next(at for at in range(104, 512, 8) if path.read_bytes()[at : at + 4] == b"DATA")
    patch(path, at, b"NONE")
    with pytest.raises(FormatError, match="does not name it"):
        lamina.open(path, format="qcow2")
    spec = {"driver": "qcow2", "file": {"filename": str(path)}, "data-file": {"filename": str(path.with_name("data"))}}
    with lamina.open(spec) as image:
        assert not any(image.read(0, SIZE))


def test_an_image_without_a_data_file_takes_none(tmp_path: Path) -> None:
    lamina.create(tmp_path / "disk.qcow2", "qcow2", SIZE)
    (tmp_path / "data").touch()
    spec = {
        "driver": "qcow2",
        "file": {"filename": str(tmp_path / "disk.qcow2")},
        "data-file": {"filename": str(tmp_path / "data")},
    }
    with pytest.raises(OptionError, match="the image has none"):
        lamina.open(spec)


def test_the_data_file_is_locked_as_the_image_is(path: Path, tmp_path: Path) -> None:
    lamina.create(tmp_path / "second.qcow2", "qcow2", SIZE, data_file="other")
    spec = {
        "driver": "qcow2",
        "file": {"filename": str(tmp_path / "second.qcow2")},
        "data-file": {"filename": str(path.with_name("data"))},
    }
    with lamina.open(path, format="qcow2", read_only=False), pytest.raises(LaminaError, match=r"lock|use"):
        lamina.open(spec, read_only=False)


# -- creation


def test_an_existing_file_is_not_taken_for_a_new_data_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"precious")
    with pytest.raises(OptionError, match="exists already"):
        lamina.create(tmp_path / "disk.qcow2", "qcow2", SIZE, data_file="data")
    assert (tmp_path / "data").read_bytes() == b"precious"
    assert not (tmp_path / "disk.qcow2").exists()
    os.symlink("absent", tmp_path / "link")
    with pytest.raises(LaminaError):
        lamina.create(tmp_path / "disk.qcow2", "qcow2", SIZE, data_file="link")
    assert sorted(os.listdir(tmp_path)) == ["data", "link"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"data_file_raw": True}, "no data file"),
        ({"data_file": "disk.qcow2"}, "the new image itself"),
        ({"data_file": "data", "compat": "0.10"}, "version 2"),
        (
            {"data_file": "data", "data_file_raw": True, "backing_file": "base", "backing_fmt": "raw"},
            "hides the backing",
        ),
        ({"data_file": "data", "data_file_keep": True, "preallocation": "full"}, "kept"),
        ({"data_file": "x" * 5000}, "name|long|cluster"),
    ],
)
def test_options_that_contradict_one_another(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    (tmp_path / "base").write_bytes(bytes(512))
    with pytest.raises(LaminaError, match=match):
        lamina.create(tmp_path / "disk.qcow2", "qcow2", SIZE, cluster_size=4096, **options)
    assert os.listdir(tmp_path) == ["base"]


def test_a_creation_that_fails_leaves_no_data_file(tmp_path: Path) -> None:
    with pytest.raises(LaminaError):
        lamina.create(tmp_path / "disk.qcow2", "qcow2", 1 << 50, cluster_size=512, data_file="data")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("how", ["metadata", "falloc", "full"])
def test_preallocation_takes_place_in_the_data_file(tmp_path: Path, how: str) -> None:
    lamina.create(tmp_path / "disk.qcow2", "qcow2", SIZE + 512, data_file="data", preallocation=how)
    data = (tmp_path / "data").stat()
    assert data.st_size == SIZE + 512
    assert (data.st_blocks * 512 >= SIZE) is (how != "metadata")
    with lamina.open(tmp_path / "disk.qcow2", format="qcow2") as image:
        assert not any(image.read(0, image.size))
        assert image.extents().where(present=True).totals().length == image.size
    assert lamina.check(tmp_path / "disk.qcow2", format="qcow2").clean


@pytest.mark.parametrize("raw", [False, True])
def test_a_kept_data_file_becomes_the_disk(tmp_path: Path, raw: bool) -> None:
    disk = random.Random(3).randbytes(200_192)
    (tmp_path / "data").write_bytes(disk)
    options = {"data_file": "data", "data_file_raw": raw, "data_file_keep": True}
    lamina.create(tmp_path / "disk.qcow2", "qcow2", cluster_size=4096, **options)
    with lamina.open(tmp_path / "disk.qcow2", format="qcow2", read_only=False) as image:
        assert image.read(0, image.size) == disk
        image.write(5, b"five")
    assert (tmp_path / "data").read_bytes() == disk[:5] + b"five" + disk[9:]
    with pytest.raises(OptionError, match="kept"), lamina.open(tmp_path / "disk.qcow2", format="qcow2") as source:
        convert_to_file(source, tmp_path / "copy.qcow2", "qcow2", options=options)


def test_a_kept_data_file_has_the_size_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(1000))
    keep: dict[str, Any] = {"data_file": "data", "data_file_keep": True}
    with pytest.raises(OptionError, match="multiple of the sector size"):
        lamina.create(tmp_path / "disk.qcow2", "qcow2", **keep)
    (tmp_path / "data").write_bytes(bytes(1024))
    with pytest.raises(OptionError, match="omit the size"):
        lamina.create(tmp_path / "disk.qcow2", "qcow2", 2048, **keep)
    assert (tmp_path / "data").read_bytes() == bytes(1024)


def test_convert_fills_a_new_data_file_and_removes_it_after_a_failure(tmp_path: Path) -> None:
    disk = random.Random(4).randbytes(300_000) + bytes(200_000)
    (tmp_path / "raw").write_bytes(disk)
    with lamina.open(tmp_path / "raw", format="raw") as source:
        convert_to_file(source, tmp_path / "disk.qcow2", "qcow2", options={"data_file": "data"})
        with lamina.open(tmp_path / "disk.qcow2", format="qcow2") as image:
            assert image.read(0, len(disk)) == disk
        with pytest.raises(LaminaError):
            convert_to_file(source, tmp_path / "two.qcow2", "qcow2", options={"data_file": "data2"}, max_output=1000)
    assert sorted(os.listdir(tmp_path)) == ["data", "disk.qcow2", "raw"]
    assert (tmp_path / "data").read_bytes()[:300_000] == disk[:300_000]


@pytest.mark.parametrize("raw", [False, True])
def test_convert_makes_the_data_file_durable_before_the_image_replaces_another(
    tmp_path: Path, raw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut must not leave the new image without its data where the old one was."""
    target, data, synced = tmp_path / "disk.qcow2", tmp_path / "data", b""
    sync, replace = os.fdatasync, os.replace

    def synced_data(fd: int) -> None:
        nonlocal synced
        sync(fd)
        if os.path.samestat(os.fstat(fd), os.stat(data)):
            synced = data.read_bytes()

    def replaced(*arguments: Any, **options: Any) -> None:
        assert synced == data.read_bytes() == disk
        replace(*arguments, **options)

    disk = random.Random(5).randbytes(300_032)
    (tmp_path / "raw").write_bytes(disk)
    lamina.create(target, "qcow2", SIZE)
    monkeypatch.setattr(os, "fdatasync", synced_data)
    monkeypatch.setattr(os, "replace", replaced)
    with lamina.open(tmp_path / "raw", format="raw") as source:
        convert_to_file(source, target, "qcow2", options={"data_file": "data", "data_file_raw": raw})
    assert synced == disk


# -- entries that contradict the specification


@pytest.mark.parametrize("entry", [q.COPIED | 8192, 8192, q.COMPRESSED | 4096])
def test_an_entry_for_another_place_is_not_followed(path: Path, entry: int) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"a" * 16_384)
    patch(path, l2_entry_at(path, 1), entry.to_bytes(8, "big"))
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 4096) == b"a" * 4096
        with pytest.raises(CorruptImage):
            image.read(4096, 4096)
        with pytest.raises(CorruptImage):
            image.extents()
    assert [finding.kind for finding in lamina.check(path, format="qcow2").findings] == ["error"]
    with lamina.open(path, format="qcow2", read_only=False) as image, pytest.raises(CorruptImage):
        image.write(4096, b"b")
    assert path.with_name("data").read_bytes()[:16_384] == b"a" * 16_384


def test_a_cluster_without_the_flag_copied_is_stored_and_gets_it(path: Path) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"a" * 16_384)
    patch(path, l2_entry_at(path, 1), (4096).to_bytes(8, "big"))
    report = lamina.check(path, format="qcow2")
    assert report.clean
    assert [finding.kind for finding in report.findings] == ["note"]
    with lamina.open(path, format="qcow2", read_only=False) as image:
        assert image.read(0, 16_384) == b"a" * 16_384
        image.write(5000, b"b")
        image.write(20_000, b"c")
        assert image.read(4096, 4096) == b"a" * 904 + b"b" + b"a" * 3191
    assert lamina.check(path, format="qcow2").findings == ()


# -- what such an image cannot have


def test_snapshots_and_compression_are_refused_before_anything_changes(path: Path) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"a" * 4096)
        with pytest.raises(NotSupported, match="no internal snapshots"):
            image.create_snapshot("one")
        assert not image.node.supported_flags
        assert image.read(0, 4096) == b"a" * 4096
    with lamina.open(path, format="qcow2") as image, pytest.raises((UnsupportedFeature, OptionError)):
        convert_to_file(image, path.with_name("c.qcow2"), "qcow2", options={"data_file": "d"}, compress=True)


def test_a_change_of_the_width_of_counts_and_a_repair_leave_the_entries(path: Path) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"a" * 20_000)
        image.amend(refcount_bits=64)
        image.write(40_000, b"b" * 20_000)
        image.add_bitmap("changes", 4096)
        image.write(100_000, b"c")
    raw = path.read_bytes()
    table = int.from_bytes(raw[48:56], "big")
    block = int.from_bytes(raw[table : table + 8], "big")
    patch(path, block + 8, bytes(8))  # the count of the second cluster
    assert not lamina.check(path, format="qcow2").clean
    lamina.check(path, format="qcow2", repair="all")
    assert lamina.check(path, format="qcow2").clean
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 20_000) == b"a" * 20_000
        assert image.read(40_000, 20_000) == b"b" * 20_000
        assert image.read(100_000, 1) == b"c"


def test_a_data_file_that_cannot_grow_keeps_the_disk_small(path: Path) -> None:
    spec = {
        "driver": "qcow2",
        "file": {"filename": str(path)},
        "data-file": {
            "driver": "raw",
            "size": SIZE,
            "file": {"driver": "file", "filename": str(path.with_name("data"))},
        },
    }
    with lamina.open(spec, read_only=False) as image:
        image.write(SIZE - 4096, b"e" * 4096)
        with pytest.raises((OptionError, BlockIOError, NotSupported)):
            image.truncate(2 * SIZE)
        assert image.size == SIZE
        assert image.read(SIZE - 4096, 4096) == b"e" * 4096


def test_a_write_to_what_was_discarded_waits_for_a_flush_of_the_data_file(path: Path) -> None:
    """Storage may discard late. Other clusters do not wait, and nothing waits twice."""
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "data-file": {"driver": "file"}}
    spec["data-file"]["filename"] = str(path.with_name("data"))  # type: ignore[index]
    with lamina.open(spec, read_only=False) as image:
        storage, count = image.node.children["data-file"].node, 0
        flush = storage.flush

        def counted() -> None:
            nonlocal count
            count += 1
            flush()

        storage.flush = counted  # type: ignore[method-assign]
        image.write(0, b"a" * 65_536)
        image.discard(8192, 4096)
        image.write(16_384, b"b")
        assert count == 0
        image.write(8200, b"c")
        image.write(8300, b"c")
        assert count == 1
        image.discard(8192, 4096)
        image.flush()
        assert count == 2
        image.write(8200, b"c")
        assert count == 2
        for at in range(300):
            image.zero((at % 16) * 4096, 4096, unmap=True)
        assert count == 3, "not all of many are remembered"


@pytest.mark.parametrize("extended", [False, True])
def test_all_clusters_over_a_raw_data_file_are_allocated(tmp_path: Path, extended: bool) -> None:
    """So that no table has to change with it."""
    path = tmp_path / "disk.qcow2"
    size = SIZE + 512
    lamina.create(path, "qcow2", size, cluster_size=16_384, data_file="data", data_file_raw=True, extended_l2=extended)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.truncate(size + 100_352)
        image.write(0, b"a" * 100_000)
        tables = path.read_bytes()
        image.discard(0, 32_768)
        image.zero(40_000, 20_000)
        image.write(size + 50_000, b"grown")
        image.flush()
        assert image.extents().where(present=True).totals().length == size + 100_352
    assert path.read_bytes() == tables
    assert lamina.check(path, format="qcow2").allocated_clusters == -(-(size + 100_352) // 16_384)
    with lamina.open(path, format="qcow2") as image, lamina.open(tmp_path / "data", format="raw") as raw:
        assert image.read(0, image.size) == raw.read(0, raw.size)
        assert raw.read(0, 100_000) == bytes(32_768) + b"a" * 7232 + bytes(20_000) + b"a" * 40_000

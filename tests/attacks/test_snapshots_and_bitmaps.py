"""Hostile snapshot tables and bitmap directories: rows 35, 50, 55 and 57 of the known attacks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

import lamina
from lamina import CorruptImage, FormatError, OptionError, UnsupportedFeature
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.header import Header
from lamina.graph import Opener
from lamina.report import CheckReport
from lamina.request import Child

from .images import KIB, U32, U64, Victim, victim
from .oracle import inspect, measure, survives

CLUSTER = 4 * KIB


def with_snapshot(
    folder: Path,
    *,
    l1_offset: int = 0,
    l1_size: int = 1,
    extra: int = 16,
    id_size: int = 1,
    name_size: int = 1,
    count: int = 1,
) -> Victim:
    """An image with a snapshot table at its end, whose entries say all this."""
    found = victim(folder)
    at = -(-len(found.bytes) // CLUSTER) * CLUSTER
    entry = (
        (l1_offset or found.l1()).to_bytes(8, "big")
        + l1_size.to_bytes(4, "big")
        + id_size.to_bytes(2, "big")
        + name_size.to_bytes(2, "big")
        + bytes(20)
        + extra.to_bytes(4, "big")
        + bytes(16)
        + b"1s"
    ).ljust(64, b"\0")
    found.bytes += bytes(at - len(found.bytes)) + (entry * min(count, 64)).ljust(CLUSTER, b"\0")
    return found.set(nb_snapshots=count, snapshots_offset=at)


def checked(path: Path) -> CheckReport:
    """The report on an image that cannot be opened."""
    from lamina.formats.qcow2.check import check

    storage = Child(Opener().open({"driver": "file", "filename": str(path)}, storage=True), "file")
    try:
        return check(storage, Header.read(storage))
    finally:
        storage.close()


def described_and_never_destroyed(found: Victim, *, shown: bool = True) -> None:
    """The disk is read, whatever the snapshots say; a write is refused if its tables cannot be told from theirs."""
    path = found.save()
    before, told = path.read_bytes(), inspect(path)
    if shown:
        assert len(told["snapshots"]) == found.header.nb_snapshots
    else:
        assert "snapshot" in told["unsupported"][0]
    with lamina.open(path, format="qcow2") as image:
        image.read(0, image.size)

    def write() -> None:
        with lamina.open(path, format="qcow2", read_only=False) as image:
            image.write(0, b"x" * CLUSTER)

    def look() -> None:
        with lamina.open({"driver": "qcow2", "file": str(path), "snapshot-name": "s"}) as image:
            image.read(0, min(image.size, 1 << 20))

    refused = False
    for work in (write, look, lambda: checked(path)):

        def attempt(work: Callable[[], object] = work) -> None:
            nonlocal refused
            try:
                work()
            except (FormatError, OptionError):
                refused = refused or work is write

        cost = measure(attempt)
        assert cost.seconds < 2
        assert cost.memory < 64 << 20
    survives(path)
    if refused:
        after = path.read_bytes()
        assert after == before or after[:72] == before[:72], "only marked as corrupt"


@pytest.mark.parametrize("l1_size", [0, 2, 512, 0x10000000, 0x7FFFFFFF, U32])
def test_row_35_cve_2014_0145_snapshot_l1_larger_than_the_active_one(tmp_path: Path, l1_size: int) -> None:
    described_and_never_destroyed(with_snapshot(tmp_path, l1_size=l1_size))


@pytest.mark.parametrize("offset", [1, 0x1234567890ABCDEF, U64, U64 & ~(CLUSTER - 1), 1 << 62])
def test_row_35_cve_2014_0145_snapshot_l1_elsewhere(tmp_path: Path, offset: int) -> None:
    described_and_never_destroyed(with_snapshot(tmp_path, l1_offset=offset))


@pytest.mark.parametrize("extra", [0, 15, 1024, 1025, 0x7FFFFFFF, U32])
def test_row_50_iotest_261_extra_data(tmp_path: Path, extra: int) -> None:
    found = with_snapshot(tmp_path, extra=extra)
    described_and_never_destroyed(found, shown=extra <= 1024)
    if extra < 16 or extra > 1024:
        assert not checked(found.path).clean


@pytest.mark.parametrize("size", [0, 0xFFFF])
def test_row_50_iotest_261_names_and_identifiers(tmp_path: Path, size: int) -> None:
    described_and_never_destroyed(with_snapshot(tmp_path, id_size=size, name_size=size), shown=not size)


@pytest.mark.parametrize("count", [2, 64, 100])
def test_row_57_cve_2026_40251_more_snapshots_than_the_table_holds(tmp_path: Path, count: int) -> None:
    described_and_never_destroyed(with_snapshot(tmp_path, count=count), shown=count <= 64)


@pytest.mark.parametrize(
    "fields",
    [
        (1, 1 << 63, CLUSTER),
        (U32, (64 << 20) + 1, CLUSTER),
        (65536, 32, U64),
        (1, 0, 0),
        (0, U64, 1),
    ],
)
@pytest.mark.parametrize("promised", [True, False])
def test_row_55_bitmap_directory(tmp_path: Path, fields: tuple[int, int, int], promised: bool) -> None:
    """If the autoclear bit says that the bitmaps are good, they must be, or nothing is written; else nobody looks at them."""
    count, size, offset = fields
    data = count.to_bytes(4, "big") + bytes(4) + size.to_bytes(8, "big") + offset.to_bytes(8, "big")
    bitmaps_are(victim(tmp_path).extension(q.EXT_BITMAPS, data), promised=promised)


@pytest.mark.parametrize("promised", [True, False])
@pytest.mark.parametrize("length", [0, 1, 23, 25])
def test_row_55_bitmap_extension_of_a_wrong_length(tmp_path: Path, length: int, promised: bool) -> None:
    bitmaps_are(victim(tmp_path).extension(q.EXT_BITMAPS, b"\xff" * length), promised=promised)


def test_row_55_bitmap_extension_past_the_header(tmp_path: Path) -> None:
    path = victim(tmp_path).extension(q.EXT_BITMAPS, b"\xff" * 4000).save()
    with pytest.raises(FormatError):
        lamina.open(path, format="qcow2")
    survives(path)


def bitmaps_are(found: Victim, *, promised: bool) -> None:
    """Bitmaps that cannot be: the disk is read all the same, and written only where the header does not vouch for them."""
    path = found.set(autoclear_features=int(promised)).save()
    told = inspect(path)
    with lamina.open(path, format="qcow2") as image:
        image.read(0, image.size)
    if promised:
        assert "bitmaps" in told["unsupported"][0]
        with pytest.raises(FormatError):
            lamina.open(path, format="qcow2", read_only=False)
        assert path.read_bytes() == bytes(found.bytes)
    else:
        assert "unsupported" not in told
        with lamina.open(path, format="qcow2", read_only=False) as image:
            image.write(0, b"x")
            assert not image.node.bitmaps
    survives(path)
    cost = measure(lambda: checked(path))
    assert cost.seconds < 2
    assert cost.memory < 64 << 20


@pytest.mark.parametrize(
    "entry",
    [
        {"bitmap_table_offset": 0},
        {"bitmap_table_offset": 512},
        {"bitmap_table_offset": U64 & ~(CLUSTER - 1)},
        {"bitmap_table_size": U32},
        {"bitmap_table_size": 4 << 20},
        {"name_size": 0},
        {"name_size": 0xFFFF},
        {"extra_data_size": U32},
        {"extra_data_size": 8},
        {"flags": U32},
        {"type": 0},
        {"type": 255},
        {"granularity_bits": 0},
        {"granularity_bits": 8},
        {"granularity_bits": 63},
        {"granularity_bits": 255},
        {"pointer": 1 << 62},
        {"pointer": 3},
        {"pointer": CLUSTER},
        {"pointer": 0},
        {"pointer": 1},
    ],
    ids=str,
)
def test_row_55_bitmap_entry(tmp_path: Path, entry: dict[str, int]) -> None:
    """One entry with a field that says too much, or a table that points to what is not its own: nothing is destroyed."""
    found = victim(tmp_path)
    pointer = entry.pop("pointer", None)
    at = -(-len(found.bytes) // CLUSTER) * CLUSTER
    fields = {"bitmap_table_offset": at + CLUSTER, "bitmap_table_size": 1, "flags": 2, "type": 1}
    fields |= {"granularity_bits": 16, "name_size": 1, "extra_data_size": 0}
    directory = (q.BITMAP_ENTRY.pack(**(fields | entry)) + b"b").ljust(32, b"\0")
    table = (0 if pointer is None else pointer).to_bytes(8, "big")
    found.bytes += bytes(at - len(found.bytes)) + directory.ljust(CLUSTER, b"\0") + table.ljust(CLUSTER, b"\0")
    data = (1).to_bytes(4, "big") + bytes(4) + (32).to_bytes(8, "big") + at.to_bytes(8, "big")
    path = found.extension(q.EXT_BITMAPS, data).set(autoclear_features=1).save()
    before, disk = path.read_bytes(), b""
    inspect(path)
    with lamina.open(path, format="qcow2") as image:
        disk = image.read(0, image.size)

    def use() -> None:
        with lamina.open(path, format="qcow2", read_only=False) as image:
            image.write(0, disk[:CLUSTER])
            for bitmap in image.node.bitmaps.values():
                list(bitmap.dirty(0, image.size))

    def attempt() -> None:
        with contextlib.suppress(FormatError, OptionError):
            use()
        with contextlib.suppress(FormatError):
            checked(path)

    cost = measure(attempt)
    assert cost.seconds < 2
    assert cost.memory < 64 << 20
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, image.size) == disk
    after = path.read_bytes()
    assert after[:40] == before[:40], "the header and what it points to are there still"
    survives(path)


@pytest.mark.parametrize(
    ("method", "error", "match"),
    [
        (1, OptionError, "no passphrase"),
        (2, CorruptImage, "encryption header"),
        (3, UnsupportedFeature, "encryption"),
        (U32, UnsupportedFeature, "encryption"),
    ],
)
def test_encryption_without_a_key_or_a_header(tmp_path: Path, method: int, error: type[Exception], match: str) -> None:
    pointer = U64.to_bytes(8, "big") * 2
    path = victim(tmp_path).extension(q.EXT_ENCRYPTION, pointer).set(crypt_method=method).save()
    with pytest.raises(error, match=match):
        lamina.open(path, format="qcow2")
    survives(path)
    checked(path)


@pytest.mark.parametrize("change", ["width", "delete"])
def test_flags_of_an_entry_far_past_the_end_of_the_file(tmp_path: Path, change: str) -> None:
    """The flags of the active entries follow the counts, and this cluster has none."""
    found = victim(tmp_path)
    with lamina.open(found.path, format="qcow2", read_only=False) as image:
        image.create_snapshot("before")
        image.write(0, b"another L2 table")
    found = Victim(found.path)
    found.put(found.l2(9), q.COPIED | q.ZERO | 1 << 40).save()
    before = found.path.read_bytes()
    with lamina.open(found.path, format="qcow2", read_only=False) as image:
        work = {"width": lambda: image.amend(refcount_bits=64), "delete": lambda: image.delete_snapshot("1")}[change]
        with pytest.raises(CorruptImage, match="counted as free"):
            work()
        assert image.read(0, 16) == b"another L2 table"
    after = found.path.read_bytes()
    assert after[:72] == before[:72]  # the header says that the image is corrupt
    assert after[found.cluster_size : len(before)] == before[found.cluster_size :]

"""Hostile snapshot tables, and bitmaps, which are refused so far: rows 35, 50, 55 and 57 of the known attacks."""

from __future__ import annotations

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
    """Bitmaps are refused, whether the autoclear bit says they are good or not, and never looked at."""
    count, size, offset = fields
    data = count.to_bytes(4, "big") + bytes(4) + size.to_bytes(8, "big") + offset.to_bytes(8, "big")
    found = victim(tmp_path).extension(q.EXT_BITMAPS, data).set(autoclear_features=int(promised))
    path = found.save()
    assert inspect(path)["unsupported"] == ["persistent bitmaps"]
    with pytest.raises(UnsupportedFeature, match="bitmaps"):
        lamina.open(path, format="qcow2", read_only=False)
    assert path.read_bytes() == bytes(found.bytes)
    survives(path)


@pytest.mark.parametrize("length", [0, 1, 23, 25, 4000])
def test_row_55_bitmap_extension_of_a_wrong_length(tmp_path: Path, length: int) -> None:
    path = victim(tmp_path).extension(q.EXT_BITMAPS, b"\xff" * length).save()
    with pytest.raises(FormatError):
        lamina.open(path, format="qcow2")
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

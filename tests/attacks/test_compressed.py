"""Hostile compressed clusters: bombs, streams that end early, sectors past the end, data over metadata and over other data.

Rows 51 and 52 of the known attacks.
"""

from __future__ import annotations

import random
import tracemalloc
import zlib
from functools import partial
from pathlib import Path

import pytest

import lamina
from lamina import CorruptImage, FormatError, Image
from lamina.codecs import deflate, zstd
from lamina.formats.qcow2 import layout as q
from lamina.node import COMPRESS

from .images import MIB, Victim, victim
from .oracle import survives

CLUSTER = 4096
SECTORS_AT = 62 - (12 - 8)
FURTHER = 15  # sectors, the most that an entry can say


def packed(found: Victim, index: int, data: bytes, *, further: int | None = None) -> int:
    """Put `data` at the end of the file, and point a guest cluster to it; where it lies."""
    place, before = len(found.bytes), found.host(index)
    if before:
        found.put(found.refblock(before // CLUSTER), 0, 2)
    found.bytes += data.ljust(-(-len(data) // CLUSTER) * CLUSTER, b"\0")
    if further is None:
        further = (len(data) - 1) // 512
    found.put(found.l2(index), q.COMPRESSED | further << SECTORS_AT | place)
    for cluster in range(place // CLUSTER, -(-(place + 512 * (further + 1)) // CLUSTER)):
        at = found.refblock(cluster)  # the sectors may reach into the cluster that the next data begins in
        found.put(at, int.from_bytes(found.bytes[at : at + 2], "big") + 1, 2)
    return place


def zstd_image(found: Victim) -> None:
    found.set(incompatible_features=q.COMPRESSION_TYPE)
    found.bytes[q.COMPRESSION_TYPE_OFFSET] = 1


@pytest.mark.parametrize("place", [0, 1 << 40, (1 << 54) - 1, 3 * CLUSTER + 17])
@pytest.mark.parametrize("further", [0, FURTHER])
def test_row_51_iotest_080_where_it_cannot_be(tmp_path: Path, place: int, further: int) -> None:
    """Beyond the file, over the header, over tables. The rest is served; nothing there is counted down or discarded."""
    found = victim(tmp_path)
    found.put(found.l2(1), q.COMPRESSED | further << SECTORS_AT | place & (1 << SECTORS_AT) - 1)
    path = found.save()
    with lamina.open(path, format="qcow2") as image:
        with pytest.raises(CorruptImage, match="compressed data"):
            image.read(CLUSTER, 1)
        assert image.read(0, 1) == b"\1"
        assert image.extents(CLUSTER, CLUSTER)[0].compressed
        assert image.extents(CLUSTER, CLUSTER)[0].offset is None
    for action in (
        lambda image: image.write(CLUSTER, b"x"),
        lambda image: image.write(CLUSTER, b"x" * CLUSTER),
        lambda image: image.root.write(CLUSTER, memoryview(b"x" * CLUSTER), COMPRESS),
        lambda image: image.zero(CLUSTER, CLUSTER),
        lambda image: image.discard(CLUSTER, CLUSTER),
    ):
        found.save()
        with (
            lamina.open(path, format="qcow2", read_only=False) as image,
            pytest.raises(CorruptImage, match="points to"),
        ):
            action(image)
        after = path.read_bytes()
        assert after[80 : len(found.bytes)] == found.bytes[80:], "more than the corrupt bit has changed"
    survives(found.save())


def test_row_51_sectors_that_end_past_the_end_of_the_file(tmp_path: Path) -> None:
    """What the file does not have is not needed, if the stream ends before. Behind its last cluster nothing is given up."""
    found = victim(tmp_path)
    data = deflate.compress(b"tail" * 1024)
    place = packed(found, 1, data, further=7)
    found.truncate(place + len(data)).save()
    with lamina.open(found.path, format="qcow2", read_only=False) as image:
        assert image.read(CLUSTER, CLUSTER) == b"tail" * 1024
        image.write(CLUSTER + 5, b"x")
        assert image.read(CLUSTER, 9) == b"tailtxilt"
    with lamina.open(found.path, format="qcow2") as image:
        assert not lamina_findings(image)
    found.put(found.l2(1), q.COMPRESSED | FURTHER << SECTORS_AT | place).save()
    with (
        lamina.open(found.path, format="qcow2", read_only=False) as image,
        pytest.raises(CorruptImage, match="outside the file"),
    ):
        image.discard(CLUSTER, CLUSTER)
    survives(found.save())


def lamina_findings(image: Image) -> list[object]:
    node = image.node
    return list(node.check().findings)  # type: ignore[attr-defined]


@pytest.mark.parametrize("codec", [deflate, zstd], ids=["deflate", "zstd"])
def test_row_51_streams_that_end_early(tmp_path: Path, codec: object) -> None:
    rng = random.Random(51)
    whole = codec.compress(rng.randbytes(2000) * 2 + bytes(96))  # type: ignore[attr-defined]
    short, empty = codec.compress(b"short"), codec.compress(b"")  # type: ignore[attr-defined]
    for data in (whole[:600], whole[:1], short, empty, rng.randbytes(500)):
        found = victim(tmp_path)
        if codec is zstd:
            zstd_image(found)
        place = packed(found, 1, data, further=0 if len(data) < 512 else None)
        path = found.save()
        with lamina.open(path, format="qcow2", read_only=False) as image:
            with pytest.raises(CorruptImage, match=f"offset {place}") as caught:
                image.read(CLUSTER + 9, 7)
            assert str(path) in str(caught.value)
            with pytest.raises(CorruptImage):
                image.write(CLUSTER, b"a part")  # the rest of the cluster cannot be kept
            image.write(CLUSTER, b"w" * CLUSTER)  # all of it is new: the damage is healed
            assert image.read(CLUSTER, CLUSTER) == b"w" * CLUSTER
        with lamina.open(path, format="qcow2") as image:
            assert not lamina_findings(image)
        survives(found.save())


def test_row_51_compressed_data_over_other_data(tmp_path: Path) -> None:
    """Two entries name the same bytes, and one the bytes of a plain cluster; all are counted. Who writes harms no other."""
    found = victim(tmp_path)
    place = packed(found, 1, deflate.compress(b"both" * 1024))
    entry = found.entry(found.l2(1))
    found.put(found.l2(2), entry)
    found.put(found.refblock(place // CLUSTER), 3, 2)
    found.put(found.l2(3), place)
    path = found.save()
    with lamina.open(path, format="qcow2", read_only=False) as image:
        raw = image.read(3 * CLUSTER, CLUSTER)
        image.write(CLUSTER, b"one")
        image.flush()
        image.discard(2 * CLUSTER, CLUSTER)
        image.flush()
        image.flush()
        assert image.read(CLUSTER, 8) == b"oneh" + b"both"
        assert image.read(2 * CLUSTER, CLUSTER) == bytes(CLUSTER)
        assert image.read(3 * CLUSTER, CLUSTER) == raw
        for at in range(10):
            image.root.write((20 + at) * CLUSTER, memoryview(bytes([at]) * CLUSTER), COMPRESS)
        assert image.read(3 * CLUSTER, CLUSTER) == raw
    survives(found.save())


@pytest.mark.parametrize("codec", ["deflate", "zstd"])
def test_row_52_bombs_are_unpacked_one_cluster_far(tmp_path: Path, codec: str) -> None:
    """A few kilobytes that would be 64 MiB of zeros: each reader gets its cluster, and nobody more."""
    found = victim(tmp_path)
    bomb = (deflate if codec == "deflate" else zstd).compress(bytes(64 * MIB))[: 16 * 512]
    if codec == "zstd":
        zstd_image(found)
    for index in range(4):
        packed(found, index, bomb, further=FURTHER)
    path = found.save()
    with lamina.open(path, format="qcow2") as image:
        tracemalloc.start()
        try:
            assert image.read(0, 4 * CLUSTER) == bytes(4 * CLUSTER)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2 * MIB
    assert not survives(path).errors


@pytest.mark.parametrize(("window", "content"), [(0xA8, None), (0xF8, None), (None, 1 << 40), (None, (1 << 64) - 1)])
def test_row_52_zstd_frames_that_ask_for_much(tmp_path: Path, window: int | None, content: int | None) -> None:
    """A window of 2 GiB and more, a content of a terabyte: refused before anything is allocated for it."""
    frame = b"\x28\xb5\x2f\xfd"
    frame += bytes([0x00, window]) if window is not None else b"\xe0" + (content or 0).to_bytes(8, "little")
    frame += (CLUSTER << 3 | 1 << 1).to_bytes(3, "little") + b"\0"  # a block of equal bytes, not the last one
    found = victim(tmp_path)
    zstd_image(found)
    packed(found, 1, frame)
    path = found.save()
    with lamina.open(path, format="qcow2") as image:
        tracemalloc.start()
        try:
            with pytest.raises(CorruptImage, match="compressed data"):
                image.read(CLUSTER, 1)
            assert tracemalloc.get_traced_memory()[1] < 2 * MIB
        finally:
            tracemalloc.stop()
    survives(path)


@pytest.mark.parametrize(("kind", "bit"), [(2, True), (255, True), (2, False), (255, False), (0, True), (1, False)])
def test_row_52_compression_type_and_its_bit(tmp_path: Path, kind: int, bit: bool) -> None:
    found = victim(tmp_path).set(incompatible_features=q.COMPRESSION_TYPE if bit else 0)
    found.bytes[q.COMPRESSION_TYPE_OFFSET] = kind
    with pytest.raises(FormatError):
        lamina.open(found.save(), format="qcow2")
    survives(found.path)


def test_counts_that_are_too_low_are_noticed(tmp_path: Path) -> None:
    """Two pieces in one cluster that is counted once: neither can go, since the other would go with it."""
    found = victim(tmp_path)
    place = packed(found, 1, deflate.compress(b"one " * 1024))
    second = deflate.compress(b"two " * 1024)
    found.bytes[place + 512 : place + 512 + len(second)] = second
    found.put(found.l2(2), q.COMPRESSED | place + 512)
    path = found.save()
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.discard(CLUSTER, CLUSTER)
        with pytest.raises(CorruptImage, match="more references than its count"):
            image.flush()
        assert image.read(2 * CLUSTER, CLUSTER) == b"two " * 1024
    survives(found.save())


def test_deflate_with_a_larger_window_than_ours_is_read(tmp_path: Path) -> None:
    """Other writers may look further back than 4 KiB."""
    data = random.Random(5).randbytes(20_000)
    disk = (data + data).ljust(65536, b"\0")
    stream = partial(zlib.compressobj, 9, zlib.DEFLATED, -15)()
    stored = stream.compress(disk) + stream.flush()
    assert len(stored) < 22_000
    assert deflate.decompress(stored, 65536) == disk

"""The computed file of a qcow2 image: read in any order, its parts are those of one sound image with the same disk."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.creation import create_driver
from lamina.errors import LimitExceeded, UnsupportedFeature
from lamina.extents import Extents
from lamina.formats.qcow2 import computed
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.image import Image
from lamina.node import Node
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

KIB, MIB = 1 << 10, 1 << 20
CLUSTERS = [512 << number for number in range(13)]


class Sparse(MemoryStorage):
    """Stores runs of data; the status is exact, however small the runs are."""

    def __init__(self, size: int, runs: dict[int, bytes]) -> None:
        super().__init__(size)
        self.runs = runs
        content = bytearray(min(size, 64 * MIB))
        for at, data in runs.items():
            content[at : at + len(data)] = data
        self.content = bytes(content)
        for at, data in runs.items():
            super().write(at, memoryview(data))

    def extents(self, offset: int, length: int) -> Extents:
        edges = sorted({at for start, data in self.runs.items() for at in (start, start + len(data))})
        stop = next((at for at in edges if at > offset), offset + length)
        data = any(start <= offset < start + len(data) for start, data in self.runs.items())
        length = min(stop - offset, length)
        return Extents.single(offset, length, data=data, zero=not data, present=True)


def values_of(size: int, **options: Any) -> dict[str, Any]:
    kind = create_driver("qcow2")
    values = kind.creation_schema().parse({"size": size, **options})
    kind.prepare_create(values, "out")
    return values


def opened(file: bytes) -> Image:
    storage = MemoryStorage(len(file))
    storage.write(0, memoryview(file))
    return Image(Qcow2.open(Qcow2.schema.parse({"file": Child(storage, "file")}), Opener(read_only=True)))


def file_of(disk: Node, **options: Any) -> Image:
    size = options.pop("size", disk.size)
    return Image(Qcow2.file_of(Child(disk, "image"), values_of(size, **options)))


@st.composite
def disks(draw: st.DrawFn, cluster: int) -> Sparse:
    size = draw(st.integers(0, min(300 * cluster, 6 * MIB)))
    size = draw(st.sampled_from([size, size - size % cluster, size - size % 512]))
    runs: dict[int, bytes] = {}
    dice = random.Random(draw(st.integers(0, 1 << 32)))
    at = 0
    while at < size and len(runs) < 60:
        at += dice.choice([0, 1, 500, cluster // 2, cluster, 3 * cluster, 70 * cluster])
        length = min(dice.choice([1, 512, cluster - 1, cluster, 2 * cluster + 3, 66 * cluster]), size - at)
        if length > 0:
            runs[at] = dice.randbytes(length)
            at += length
    return Sparse(size, runs)


@settings(max_examples=60)
@given(data=st.data())
def test_one_sound_image_of_the_same_disk(data: st.DataObject) -> None:
    cluster = data.draw(st.sampled_from(CLUSTERS))
    disk = data.draw(disks(cluster))
    options: dict[str, Any] = {"cluster_size": cluster, "refcount_bits": 1 << data.draw(st.integers(0, 6))}
    if cluster >= 16 * KIB:
        options["extended_l2"] = data.draw(st.booleans())
    if options["refcount_bits"] == 16 and not options.get("extended_l2"):
        options["compat"] = data.draw(st.sampled_from(["0.10", "1.1"]))
    if data.draw(st.booleans()):
        options["size"] = disk.size + data.draw(st.sampled_from([1, cluster, 100 * cluster]))
    with file_of(disk, **options) as file:
        whole = file.read(0, file.size)
        dice = random.Random(data.draw(st.integers(0, 1 << 32)))
        for _ in range(20):
            offset = dice.randrange(file.size)
            length = dice.randrange(min(file.size - offset, 3 * cluster) + 1)
            assert file.read(offset, length) == whole[offset : offset + length]
            view = memoryview(bytearray(length))
            if length:
                file.root.start_read(offset, view).wait()
            assert bytes(view) == whole[offset : offset + length]
    with opened(whole) as image:
        report = image.node.check()  # type: ignore[attr-defined]
        assert report.clean, report.findings
        assert image.size == -(-options.get("size", disk.size) // 512) * 512
        assert image.read(0, image.size) == disk.content + bytes(image.size - disk.size)
        owned = {number for start, run in disk.runs.items() for number in _touched(start, len(run), cluster)}
        assert image.extents().totals().data <= len(owned) * cluster
        assert len(whole) % cluster == 0


def _touched(start: int, length: int, cluster: int) -> range:
    return range(start // cluster, -(-(start + length) // cluster))


def test_it_is_no_longer_than_measured() -> None:
    dice = random.Random(5)
    disk = Sparse(40 * MIB, {at * 70_001: dice.randbytes(dice.randrange(1, 9000)) for at in range(0, 590, 7)})
    values = values_of(disk.size, cluster_size=4096)
    measured = Qcow2.measure(disk.size, values, [Image(disk).extents()])
    with file_of(disk, cluster_size=4096) as file:
        assert file.size <= measured.required


def test_a_large_disk_costs_what_its_data_costs() -> None:
    """8 TiB: the tables of the empty parts are not there, and nothing is computed for them."""
    size = 8 << 40
    disk = lamina.open({"driver": "memory", "size": size}, read_only=False)
    with disk:
        for at in (0, 3 << 40, size - 512):
            disk.write(at, b"data" * 128)
        with Image(Qcow2.file_of(Child(disk.node, "image"), values_of(size))) as file:
            assert file.size < 4 * MIB
            whole = file.read(0, file.size)
    with opened(whole) as image:
        assert image.node.check().clean  # type: ignore[attr-defined]
        assert [image.read(at, 4) for at in (0, 3 << 40, size - 512, 1 << 40)] == [b"data"] * 3 + [bytes(4)]


def test_more_than_one_refcount_block_and_table_cluster() -> None:
    """With clusters of 512 bytes a block counts 64 of them at 64 bits, and a cluster of the table has 64 blocks."""
    disk = Sparse(4 * MIB, {0: os.urandom(4 * MIB)})
    with file_of(disk, cluster_size=512, refcount_bits=64) as file:
        whole = file.read(0, file.size)
    assert int.from_bytes(whole[56:60], "big") > 1  # refcount_table_clusters
    with opened(whole) as image:
        assert image.node.check().clean  # type: ignore[attr-defined]
        assert image.read(0, 4 * MIB) == disk.runs[0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"preallocation": "metadata"}, "preallocated"),
        ({"encrypt": {"format": "luks", "key-secret": lamina.Secret(b"x")}}, "encryption"),
        ({"data_file": "data", "data_file_raw": True}, "data file"),
        ({"backing_file": "base", "backing_fmt": "raw", "backing_unchecked": True}, "backing"),
    ],
)
def test_what_needs_more_than_one_pass_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedFeature, match=word):
        file_of(Sparse(MIB, {}), **options)


def test_the_number_of_parts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed, "_MOST_RUNS", 10)
    disk = Sparse(MIB, {at * 8192: b"x" for at in range(11)})
    with pytest.raises(LimitExceeded, match="parts"):
        file_of(disk, cluster_size=4096)


def test_it_cannot_be_changed() -> None:
    with file_of(Sparse(MIB, {})) as file:
        assert file.read_only
        with pytest.raises(lamina.ReadOnly):
            file.write(0, b"x")


def test_later_data_reads_as_zeros() -> None:
    disk = Sparse(MIB, {0: b"x" * 65536})
    with file_of(disk) as file:
        disk.write(MIB // 2, memoryview(b"late"))
        disk.runs[MIB // 2] = b"late"
        whole = file.read(0, file.size)
    with opened(whole) as image:
        assert image.read(0, MIB) == b"x" * 65536 + bytes(MIB - 65536)

"""BLOCK_STATUS has two ways to an answer: from the first extents, in plain Python, and from columns. Both say the same, and
neither changes how the requests of other clients are executed."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.extents import Extents
from lamina.image import Image
from lamina.nbd import Client, Export, Server, wire
from lamina.nbd.server import export as module
from lamina.storage.memory import PAGE, MemoryStorage

NAMES = (wire.BASE_ALLOCATION, wire.ALLOCATION_DEPTH, wire.EXACT)


def unpacked(answer: tuple[int, bytes], wide: bool) -> list[tuple[int, int]]:
    rows = list(struct.iter_unpack(">QQ" if wide else ">II", answer[1]))
    assert len(rows) == answer[0]
    return rows


def image_with(path: Path, clusters: str, below: str, unit: int) -> Image:
    """A qcow2 over another one, both with a cluster of data (d), zeros (z) or nothing (.) by character."""
    names = [path / "below.qcow2", path / "top.qcow2"]
    for name, kinds in zip(names, (below, clusters), strict=True):
        name.unlink(missing_ok=True)
        lower = {} if name is names[0] else {"backing_file": names[0].name, "backing_fmt": "qcow2"}
        lamina.create(name, "qcow2", unit * len(kinds), cluster_size=unit, **lower)
        with lamina.open(name, format="qcow2", read_only=False) as image:
            for number, kind in enumerate(kinds):
                if kind == "d":
                    image.write(number * unit, b"d" * unit)
                elif kind == "z":
                    image.zero(number * unit, unit)
    return lamina.open(names[1], format="qcow2")


@pytest.mark.parametrize("align", [1, 4096])
def test_both_ways_say_the_same(tmp_path: Path, align: int) -> None:
    unit, count = 1024, 24

    @settings(max_examples=25)
    @given(st.text("dz.", min_size=count, max_size=count), st.text("dz.", min_size=count, max_size=count), st.data())
    def law(clusters: str, below: str, data: st.DataObject) -> None:
        with image_with(tmp_path, clusters, below, unit) as image:
            if align > 1:
                with image.edit() as edit:
                    edit.insert("blkdebug", {"align": align})
            export = Export(image)
            for _ in range(8):
                block = max(align, data.draw(st.sampled_from([1, 512, unit])))
                first = data.draw(st.integers(0, export.size // block - 1)) * block
                length = data.draw(st.integers(1, (export.size - first) // block)) * block
                names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
                one, wide = data.draw(st.booleans()), data.draw(st.booleans())
                few = export.status_of_few(names, first, length, one=one, wide=wide)
                many = export.status_of_many(names, first, length, one=one, wide=wide)
                if few is None:
                    continue
                for mine, theirs in zip(few, many, strict=True):
                    found, expected = unpacked(mine, wide), unpacked(theirs, wide)
                    if one:  # the blocks that follow, once rounded, may say the same
                        assert found[0][1] == expected[0][1]
                        assert 0 < found[0][0] <= expected[0][0]
                        assert len(found) == 1
                    else:
                        assert found == expected
                if one and len(names) == 1:
                    first_one = export.status_of_first(module.CONTEXTS[names[0]], first, length)
                    ((size, status),) = unpacked(many[0], wide)
                    assert first_one is None or (first_one[0] <= size and first_one[1] == status)

    law()


def test_a_client_that_walks_gets_extents_that_are_joined(tmp_path: Path) -> None:
    """Clusters that lie apart in the file, and say the same, are few answers."""
    path, unit, count = tmp_path / "disk.qcow2", 65536, 200
    lamina.create(path, "qcow2", unit * count)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for number in [*range(0, count, 2), *range(1, count, 2)]:
            image.write(number * unit, b"x" * unit)
    with (
        lamina.open(path, format="qcow2") as image,
        Server([Export(image)], unix=str(tmp_path / "s")) as server,
        Client.connect(server.uri) as client,
    ):
        at, answers = 0, []
        while at < client.size:
            ((length, status),) = client.block_status(at, client.size - at, one=True)[wire.BASE_ALLOCATION]
            answers.append(status)
            at += length
        assert at == client.size
        assert set(answers) == {0}
        assert len(answers) <= 4


class SlowToTell(MemoryStorage):
    """Reads at once, and takes its time to say what is stored."""

    def extents(self, offset: int, length: int) -> Extents:
        time.sleep(0.02)
        return super().extents(offset, length)


def test_questions_for_status_do_not_move_reads_to_the_pool(tmp_path: Path) -> None:
    with (
        Image(SlowToTell(64 * PAGE)) as image,
        Server([Export(image)], unix=str(tmp_path / "s")) as server,
        Client.connect(server.uri) as reader,
        Client.connect(server.uri) as other,
    ):
        reader.read(0, 512)
        (pool, _) = next(iter(server._pools.values()))
        for _ in range(1000):
            if not pool.slow:
                break
            reader.read(0, 512)
        assert not pool.slow
        before = pool.mean
        for one in (False, True) * 4:
            other.block_status(0, other.size, one=one)
        assert pool.mean == before

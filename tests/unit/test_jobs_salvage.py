"""Salvaging: exactly the blocks that cannot be read become zeros, whatever format, alignment and order."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.creation import create
from lamina.errors import BlockIOError, Cancelled, CorruptImage, LaminaError, OptionError
from lamina.extents import Extents
from lamina.image import Image
from lamina.jobs.convert import convert, convert_to_file
from lamina.jobs.progress import Monitor
from lamina.jobs.salvage import salvaging
from lamina.limits import Limits
from lamina.node import fill_zero
from lamina.pending import Pending
from lamina.storage.memory import MemoryStorage

KIB, MIB = 1 << 10, 1 << 20


class Damaged(MemoryStorage):
    """Reads of `bad` sectors of `align` bytes fail, and so do queries of the status that touch `dark` bytes. `later`: started
    reads fail only when they are waited for."""

    def __init__(
        self, content: bytes, bad: set[int], *, dark: range = range(0), align: int = 1, later: bool = False
    ) -> None:
        super().__init__(len(content))
        super().write(0, memoryview(content))
        self.bad, self.dark, self.align, self.later = bad, dark, align, later
        self.number = errno.EIO
        self.reads = 0

    @property
    def limits(self) -> Limits:
        return Limits(request_alignment=self.align)

    @property
    def pipelines(self) -> bool:
        return self.later

    def read_into(self, offset: int, view: memoryview) -> None:
        self.reads += 1
        size = max(self.align, 512)
        if any(at in self.bad for at in range(offset // size, -(-(offset + len(view)) // size))):
            view[:] = b"\xee" * len(view)
            raise BlockIOError("the medium is damaged", errno=self.number, path="damaged", offset=offset)
        super().read_into(offset, view)

    def start_read(self, offset: int, view: memoryview) -> Pending:
        if self.later:
            return Later(self, offset, view)
        return super().start_read(offset, view)

    def extents(self, offset: int, length: int) -> Extents:
        if self.dark and offset < self.dark.stop and self.dark.start < offset + length:
            raise BlockIOError("no status", errno=self.number)
        return super().extents(offset, length)


class Later:
    def __init__(self, node: Damaged, offset: int, view: memoryview) -> None:
        self.node, self.offset, self.view = node, offset, view

    def wait(self) -> Any:
        self.node.read_into(self.offset, self.view)

    def leave(self) -> None:
        pass


def salvaged(source: Image, target: Image, **how: Any) -> tuple[Any, list[str]]:
    told: list[str] = []
    done = convert(source, target, salvage=True, monitor=Monitor(tell=told.append), **how)
    return done, told


def sectors(content: bytes, bad: set[int], size: int) -> bytes:
    found = bytearray(content)
    for number in bad:
        part = memoryview(found)[number * size : (number + 1) * size]
        fill_zero(part)
    return bytes(found)


@settings(max_examples=40)
@given(
    bad=st.sets(st.integers(0, 4 * MIB // 512), max_size=20),
    run=st.tuples(st.integers(0, 8000), st.integers(0, 300)),
    align=st.sampled_from([1, 512, 4096]),
    odd=st.integers(0, 600),
    later=st.booleans(),
    parallel=st.sampled_from([None, 1, 4]),
)
def test_exactly_the_failed_blocks(
    bad: set[int], run: tuple[int, int], align: int, odd: int, later: bool, parallel: int | None
) -> None:
    size = max(align, 512)
    content = (os.urandom(65_537) * 65)[: 4 * MIB - odd]
    blocks = -(-len(content) // size)
    bad = {number for number in bad | set(range(run[0], sum(run))) if number < blocks}
    with (
        Image(Damaged(content, bad, align=align, later=later)) as source,
        lamina.open({"driver": "memory", "size": len(content)}, read_only=False) as target,
    ):
        target.write(0, b"\x55" * len(content))
        done, told = salvaged(source, target, parallel=parallel, in_order=parallel != 4)
        expected = sectors(content, bad, size)
        assert target.read(0, len(content)) == expected
        assert done.unreadable == sum(len(content[n * size : (n + 1) * size]) for n in bad)
        assert bool(told) == bool(bad)


def test_each_range_is_told_once() -> None:
    content = os.urandom(8 * MIB)
    # The second range lies in two buffers of the job.
    bad = {7, 8, *range(4090, 4100), 9000}
    with (
        Image(Damaged(content, bad)) as source,
        lamina.open({"driver": "memory", "size": len(content)}, read_only=False) as target,
    ):
        done, told = salvaged(source, target)
    assert done.unreadable == 13 * 512
    places = [text.split(" could not")[0].split(": ")[1] for text in told]
    assert places == [
        "1024 bytes at offset 3584",
        f"5120 bytes at offset {4090 * 512}",
        f"512 bytes at offset {9000 * 512}",
    ]


@pytest.mark.parametrize("what", ["data", "table"])
def test_below_a_format(tmp_path: Path, what: str) -> None:
    """Damage of the file of a qcow2 image: in its data, and in a table, so that neither status nor bytes are known."""
    content = os.urandom(3 * MIB)
    create(tmp_path / "a.qcow2", "qcow2", 3 * MIB, cluster_size=4096)
    with lamina.open(tmp_path / "a.qcow2", format="qcow2", read_only=False) as image:
        image.write(0, content)
        row = image.extents(0, 3 * MIB)[0]
    file = (tmp_path / "a.qcow2").read_bytes()
    bad = {(row.offset or 0) // 512 + 3}
    if what == "table":
        l1 = int.from_bytes(file[40:48], "big")
        # The second L2 table, whose clusters are 2 to 4 MiB of the disk.
        bad = {(int.from_bytes(file[l1 + 8 : l1 + 16], "big") & ~(1 << 63)) // 512}
    storage = Damaged(file, bad)
    with (
        _over(storage) as source,
        lamina.open({"driver": "memory", "size": len(content)}, read_only=False) as target,
    ):
        with pytest.raises(LaminaError):
            convert(source, target)
        done, told = salvaged(source, target)
        found = target.read(0, len(content))
    if what == "data":
        assert found == sectors(content, {3}, 512)
        assert done.unreadable == 512
    else:
        # The part of the table in another sector is readable, but tables are read as a whole.
        assert found[: 2 * MIB] == content[: 2 * MIB]
        assert not any(found[2 * MIB :])
        assert done.unreadable == MIB
        assert len(told) == 2


def _over(storage: Damaged) -> Image:
    from lamina.formats.qcow2.driver import Qcow2
    from lamina.graph import Opener
    from lamina.request import Child

    options = Qcow2.schema.parse({"file": Child(storage, "file")})
    return Image(Qcow2.open(options, Opener(read_only=True)))


def test_where_the_status_fails_all_is_read() -> None:
    content = bytearray(4 * MIB)
    content[MIB : MIB + 5] = b"bytes"
    content[3 * MIB : 3 * MIB + 5] = b"bytes"
    storage = Damaged(bytes(content), {5000}, dark=range(MIB + 70_000, MIB + 300_000))
    with (
        Image(storage) as source,
        lamina.open({"driver": "memory", "size": len(content)}, read_only=False) as target,
    ):
        target.write(0, b"\x55" * len(content))
        done, told = salvaged(source, target)
        assert target.read(0, len(content)) == bytes(content)
    assert done.unreadable in (0, 512)  # the sector lies in a hole, or not
    assert sum("unknown status" in text for text in told) == 1


def test_the_status_is_queried_as_before_once_it_succeeds() -> None:
    storage = Damaged(bytes(256 * MIB), set(), dark=range(MIB, MIB + 1))
    with Image(storage) as image, salvaging(image, Monitor(tell=lambda text: None)) as (source, _):
        parts = list(source.windows())
    assert sum(part.end - part.begin for part in parts) == 256 * MIB
    assert len(parts) < 40  # the query of all of it, halves down to 64 KiB, and back


@pytest.mark.parametrize("number", [errno.ECONNRESET, errno.ESHUTDOWN, errno.EPIPE])
@pytest.mark.parametrize("dark", [range(0), range(1)])
def test_a_lost_connection_ends_the_job(number: int, dark: range) -> None:
    storage = Damaged(os.urandom(MIB), {0}, dark=dark)
    storage.number = number
    with (
        Image(storage) as source,
        lamina.open({"driver": "memory", "size": MIB}, read_only=False) as target,
        pytest.raises(BlockIOError) as caught,
    ):
        salvaged(source, target)
    assert caught.value.errno == number


def test_cancel_ends_the_search_for_blocks() -> None:
    monitor = Monitor(tell=lambda text: None)

    class Cancelling(Damaged):
        def read_into(self, offset: int, view: memoryview) -> None:
            if self.reads > 5:
                monitor.cancel()
            super().read_into(offset, view)

    storage = Cancelling(os.urandom(2 * MIB), set(range(4096)))
    with (
        Image(storage) as source,
        lamina.open({"driver": "memory", "size": 2 * MIB}, read_only=False) as target,
        pytest.raises(Cancelled),
    ):
        convert(source, target, salvage=True, monitor=monitor)
    assert storage.reads < 20


def test_errors_of_the_target_end_the_job() -> None:
    class Full(MemoryStorage):
        def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
            raise BlockIOError("no space", errno=errno.ENOSPC)

    with (
        Image(Damaged(os.urandom(MIB), {1})) as source,
        Image(Full(MIB)) as target,
        pytest.raises(BlockIOError, match="no space"),
    ):
        salvaged(source, target)


def test_not_beside_offloaded_copies(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(512))
    with lamina.open(tmp_path / "a", format="raw") as source, pytest.raises(OptionError, match="unreadable"):
        convert_to_file(source, tmp_path / "b", "raw", {}, offload="copy", salvage=True)
    assert os.listdir(tmp_path) == ["a"]


@pytest.fixture
def corrupt(tmp_path: Path) -> Iterator[Image]:
    """A qcow2 image whose second cluster lies at no possible place."""
    path = tmp_path / "corrupt.qcow2"
    create(path, "qcow2", 4 * 65536)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, os.urandom(4 * 65536))
    file = bytearray(path.read_bytes())
    l1 = int.from_bytes(file[40:48], "big")
    l2 = int.from_bytes(file[l1 : l1 + 8], "big") & ~(1 << 63)
    file[l2 + 8 : l2 + 16] = (1 << 63 | 7 << 9).to_bytes(8, "big")
    path.write_bytes(file)
    with lamina.open(path, format="qcow2") as image:
        yield image


def test_a_corrupt_entry_is_an_unreadable_cluster(corrupt: Image) -> None:
    with pytest.raises(CorruptImage):
        corrupt.read(65536, 1)
    with lamina.open({"driver": "memory", "size": 4 * 65536}, read_only=False) as target:
        done, _ = salvaged(corrupt, target)
        found = target.read(0, 4 * 65536)
    assert done.unreadable == 65536
    assert found[:65536] == corrupt.read(0, 65536)
    assert not any(found[65536 : 2 * 65536])
    assert found[2 * 65536 :] == corrupt.read(2 * 65536, 2 * 65536)

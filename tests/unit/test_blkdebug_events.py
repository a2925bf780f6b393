"""Which events a node hears, and in which order: those that were measured with QEMU 7.2 and 10.0 for the same requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import lamina
from lamina.filters.blkdebug import Blkdebug
from lamina.filters.blkdebug.rules import EVENTS
from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.raw import Raw
from lamina.graph import Opener
from lamina.limits import Limits
from lamina.node import FUA
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


class Listening(Blkdebug):
    """Keeps the names of the events that it hears."""

    def __init__(self, below: MemoryStorage, align: int = 1) -> None:
        self.heard: list[str] = []
        super().__init__(Child(below, "image", grows=True), Limits(request_alignment=align))

    def event(self, name: str) -> None:
        assert name in EVENTS
        self.heard.append(name)
        super().event(name)


Request = Callable[[Child], None]


def write(offset: int, length: int, flags: int = 0) -> Request:
    return lambda edge: edge.write(offset, memoryview(b"x" * length), flags)


def zero(offset: int, length: int) -> Request:
    return lambda edge: edge.zero(offset, length)


def read(offset: int, length: int) -> Request:
    return lambda edge: edge.read_into(offset, memoryview(bytearray(length)))


WRITTEN = ["pwritev", "pwritev_done"]
ZEROED = ["pwritev_zero", "pwritev_done"]
HEAD = ["pwritev_rmw_head", "pwritev_rmw_after_head"]
TAIL = ["pwritev_rmw_tail", "pwritev_rmw_after_tail"]
#: Both edges in one block, or in two that touch: they are read at once.
BOTH = ["pwritev_rmw_head", "pwritev_rmw_tail", "pwritev_rmw_after_head", "pwritev_rmw_after_tail"]


@pytest.mark.parametrize(
    ("request_", "heard"),
    [
        (read(0, 512), []),
        (write(0, 4096), WRITTEN),
        (write(0, 512), TAIL + WRITTEN),
        (write(512, 3584), HEAD + WRITTEN),
        (write(100, 100), BOTH + WRITTEN),
        (write(100, 8000), BOTH + WRITTEN),
        (write(4000, 200), BOTH + WRITTEN),
        (write(100, 20000), HEAD + TAIL + WRITTEN),
        (write(0, 4096, FUA), WRITTEN),
        (zero(0, 4096), ZEROED),
        (zero(100, 100), BOTH + WRITTEN),
        (lambda edge: edge.discard(0, 4096), []),
        (lambda edge: edge.flush(), []),
        (lambda edge: edge.truncate(1 << 20), []),
    ],
)
def test_a_node_hears_of_requests_to_it(request_: Request, heard: list[str]) -> None:
    storage = MemoryStorage(1 << 20)
    storage.write(0, memoryview(b"y" * (1 << 20)))
    node = Listening(storage, align=4096)
    edge = Child(node, "root")
    request_(edge)
    assert node.heard == heard


@pytest.mark.parametrize(
    ("request_", "heard"),
    [
        (read(0, 512), ["read_aio"]),
        (write(0, 512), ["write_aio", *WRITTEN]),
        (write(0, 4096, FUA), ["write_aio", *WRITTEN]),
        (zero(100, 20000), ZEROED),
        (lambda edge: edge.discard(0, 4096), []),
        (lambda edge: edge.flush(), ["flush_to_os", "flush_to_disk"]),
    ],
)
def test_below_raw(request_: Request, heard: list[str]) -> None:
    node = Listening(MemoryStorage(1 << 20))
    request_(Child(Raw(Child(node, "file", grows=True)), "root"))
    assert node.heard == heard


def test_only_the_child_hears_and_not_what_is_below_it() -> None:
    below = Listening(MemoryStorage(1 << 20))
    above = Blkdebug(Child(below, "image", grows=True))
    Child(Raw(Child(above, "file", grows=True)), "root").read_into(0, memoryview(bytearray(512)))
    assert below.heard == []


def test_where_nobody_hears_there_is_nothing_to_call() -> None:
    assert Child(MemoryStorage(512), "root").event is None
    edge = Child(MemoryStorage(512), "root")
    edge.tell("read_aio")


@pytest.fixture
def image(tmp_path: Path) -> tuple[Listening, Child]:
    """A qcow2 image with one cluster of data over a raw base, on a node that listens."""
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 4 << 20)
    with lamina.open(path, format="qcow2", read_only=False) as disk:
        disk.write(0, b"a" * 65536)
    storage = MemoryStorage(path.stat().st_size)
    storage.write(0, memoryview(path.read_bytes()))
    node = Listening(storage)
    base = MemoryStorage(4 << 20)
    base.write(1 << 20, memoryview(b"b" * 65536))
    values = {"file": Child(node, "file", grows=True), "backing": Child(base, "backing")}
    edge = Child(Qcow2.open(values, Opener(read_only=False)), "root")
    return node, edge


@pytest.mark.parametrize(
    ("request_", "heard"),
    [
        (read(0, 512), ["l2_load", "read_aio"]),
        (read(1 << 20, 512), ["l2_load", "read_backing_aio"]),
        (write(0, 512), ["l2_load", "reftable_load", "write_aio", *WRITTEN]),
        (
            write(2 << 20, 65536),
            ["l2_load", "reftable_load", "cluster_alloc", "refblock_alloc", "refblock_load", "write_aio", *WRITTEN],
        ),
        (
            write(1 << 20, 512),
            ["l2_load", "reftable_load", "cluster_alloc", "refblock_alloc", "refblock_load", "cow_read",
             "read_backing_aio", "write_aio", "cow_write", *WRITTEN],
        ),
        (lambda edge: edge.flush(), ["flush_to_os", "flush_to_disk"]),
    ],
)  # fmt: skip
def test_below_qcow2(image: tuple[Listening, Child], request_: Request, heard: list[str]) -> None:
    node, edge = image
    node.heard.clear()
    request_(edge)
    assert list(dict.fromkeys(node.heard)) == list(dict.fromkeys(heard))
    edge.close()


def test_what_a_flush_of_qcow2_writes(image: tuple[Listening, Child]) -> None:
    node, edge = image
    edge.write(2 << 20, memoryview(bytes(65536)))
    edge.zero(0, 65536)
    node.heard.clear()
    edge.flush()
    told = [name for name in node.heard if not name.startswith("pwritev")]
    assert told == ["flush_to_os", "refblock_update_part", "flush_to_disk", "l2_update"]
    edge.discard(2 << 20, 65536)
    node.heard.clear()
    edge.flush()
    edge.flush()
    edge.close()
    assert "cluster_free" in node.heard

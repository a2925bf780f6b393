"""Requests that are started now and asked for later: through edges, filters and pools, and what waits for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import BlockIOError, LaminaError, NotSupported
from lamina.extents import Extents
from lamina.filters.stats import Stats
from lamina.filters.throttle import Throttle
from lamina.graph import Opener
from lamina.image import Image
from lamina.limits import Limits
from lamina.nbd import Export, Server
from lamina.node import FUA, FilterNode, Node, StorageNode
from lamina.pending import DONE, Pending
from lamina.pooled import PooledStorage
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

KIB, MIB = 1 << 10, 1 << 20
PATIENCE = 20.0


class Held:
    """A request of `Slow`: done when somebody waits for it."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self.left = False
        self._mutex = threading.Lock()

    def wait(self) -> None:
        with self._mutex:
            work, self._work = self._work, lambda: None
            work()

    def leave(self) -> None:
        self.left = True


class Slow(StorageNode):
    """Memory that does what was started when it is asked for it. Blocks of `block` bytes."""

    driver = "slow"

    def __init__(self, size: int = MIB, *, block: int = 1, zeroes: bool = True) -> None:
        super().__init__()
        self.bytes = bytearray(size)
        self.started: list[Held] = []
        self.direct: list[str] = []
        self._block, self._zeroes = block, zeroes

    size = property(lambda self: len(self.bytes))
    limits = property(
        lambda self: Limits(request_alignment=self._block, zero_alignment=self._block, max_transfer=64 * KIB)
    )

    def read_into(self, offset: int, view: memoryview) -> None:
        self.direct.append("read")
        view[:] = self.bytes[offset : offset + len(view)]

    def truncate(self, size: int) -> None:
        assert size == self.size

    def extents(self, offset: int, length: int) -> Extents:
        return Extents.single(offset, length, data=True, present=True)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.direct.append("write")
        self.bytes[offset : offset + len(view)] = view

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.direct.append("zero")
        if not self._zeroes:
            raise NotSupported("no zeros")
        self.bytes[offset : offset + length] = bytes(length)

    def _start(self, work: Any) -> Pending:
        self.started.append(Held(work))
        return self.started[-1]

    def start_read(self, offset: int, view: memoryview) -> Pending:
        return self._start(lambda: view.__setitem__(slice(None), self.bytes[offset : offset + len(view)]))

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        return self._start(lambda: self.bytes.__setitem__(slice(offset, offset + len(view)), view))

    def start_zero(self, offset: int, length: int, flags: int = 0) -> Pending:
        if not self._zeroes:
            raise NotSupported("no zeros")
        return self._start(lambda: self.bytes.__setitem__(slice(offset, offset + length), bytes(length)))


def test_any_node_starts_a_request_by_doing_it() -> None:
    node = MemoryStorage(MIB)
    edge = Child(node, "it")
    view = memoryview(bytearray(5))
    assert edge.start_write(3, memoryview(b"hello")) is DONE
    assert edge.start_read(3, view) is DONE
    assert bytes(view) == b"hello"
    assert edge.start_zero(4, 2) is DONE
    assert node.start_zero_runs(0, MIB).wait() == edge.zero_runs(0, MIB)
    assert sum(length for length, zero in edge.zero_runs(0, MIB) if not zero) >= 5
    assert edge.start_zero_runs(7, 0).wait() == []
    with pytest.raises(LaminaError, match="is outside"):
        edge.start_read(MIB - 1, view)
    with pytest.raises(LaminaError, match="is outside"):
        edge.start_zero_runs(MIB, 1)


def test_what_goes_to_the_node_as_it_is_waits_there() -> None:
    node = Slow()
    edge = Child(node, "it")
    view = memoryview(bytearray(5))
    write = edge.start_write(3, memoryview(b"hello"))
    assert not any(node.bytes)
    write.wait()
    read, zero = edge.start_read(3, view), edge.start_zero(0, 4)
    assert bytes(view) == bytes(5)
    read.wait()
    read.wait()
    assert bytes(view) == b"hello"
    zero.wait()
    assert node.bytes[:8] == b"\0\0\0\0ello"
    assert node.direct == []


@pytest.mark.parametrize("what", ["long", "fua", "unaligned", "zero that is no zero", "detect-zeroes"])
def test_what_cannot_is_done_at_once(what: str) -> None:
    node = Slow(block=512, zeroes=what != "zero that is no zero")
    edge = Child(node, "it")
    data = memoryview(b"x" * 512)
    if what == "long":
        started = edge.start_write(0, memoryview(b"x" * 128 * KIB))
    elif what == "fua":
        started = edge.start_write(0, data, FUA)
    elif what == "unaligned":
        started = edge.start_write(7, data)
        assert node.bytes[7:519] == data
    elif what == "detect-zeroes":
        node.zero_detected = 0
        started = edge.start_write(0, memoryview(bytes(512)))
    else:
        node.bytes[:512] = data
        started = edge.start_zero(0, 512)
        assert not any(node.bytes)
    assert started is DONE
    assert node.direct
    assert node.started == []


def test_who_needs_the_range_alone_finishes_what_was_started() -> None:
    """The same thread, too: it would wait for itself."""
    node = Slow(block=512)
    edge = Child(node, "it")
    started = [edge.start_write(at, memoryview(b"a" * 512)) for at in range(0, 4096, 512)]
    edge.write(1000, memoryview(b"b" * 100))
    assert node.bytes[:4096] == b"a" * 1000 + b"b" * 100 + b"a" * (4096 - 1100)
    for request in started:
        request.wait()
    again = edge.start_write(0, memoryview(b"c" * 512))
    again.leave()
    assert node.started[-1].left
    edge.zero(0, 100)  # nothing holds the range


def test_an_error_is_told_to_whoever_started_it() -> None:
    def fails() -> None:
        raise BlockIOError("broken on purpose")

    class Failing(Slow):
        def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
            held = Held(fails)
            held.wait = fails  # type: ignore[method-assign]
            return held

    node = Failing(block=512)
    edge = Child(node, "it")
    started = edge.start_write(0, memoryview(b"a" * 512))
    edge.write(5, memoryview(b"b"))
    for _ in range(2):
        with pytest.raises(BlockIOError, match="on purpose"):
            started.wait()


# -- filters


class Counting(FilterNode):
    """A filter that knows nothing of started requests."""

    driver = "counting"

    def __init__(self, image: Child) -> None:
        super().__init__(image)
        self.reads = 0

    def read_into(self, offset: int, view: memoryview) -> None:
        self.reads += 1
        super().read_into(offset, view)


class Derived(Throttle):
    driver = "derived"

    def __init__(self, image: Child) -> None:
        super().__init__(image)
        self.writes = 0

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.writes += 1
        super().write(offset, view, flags)


@pytest.mark.parametrize("kind", [FilterNode, Throttle, Stats])
def test_a_filter_that_observes_forwards(kind: type[FilterNode]) -> None:
    below = Slow()
    kind.driver = kind.__dict__.get("driver", "plain")
    node = kind(Child(below, "image", grows=True))
    edge = Child(node, "it")
    view = memoryview(bytearray(4))
    requests = [edge.start_write(0, memoryview(b"abcd")), edge.start_read(0, view)]
    assert not any(below.bytes)
    for request in requests:
        request.wait()
    assert bytes(view) == b"abcd"
    assert below.direct == []
    if isinstance(node, Stats):
        for request in requests:
            request.wait()
        found = node.snapshot()["operations"]
        assert {kind: one["done"] for kind, one in found.items()} == {"read": 1, "write": 1}


def test_a_filter_that_does_not_know_of_it_sees_every_request() -> None:
    below = Slow()
    node = Counting(Child(below, "image", grows=True))
    assert Child(node, "it").start_read(0, memoryview(bytearray(4))) is DONE
    assert (node.reads, node.pipelines) == (1, False)
    assert below.direct == ["read"]
    derived = Derived(Child(below, "image", grows=True))
    assert Child(derived, "it").start_write(0, memoryview(b"x")) is DONE
    assert derived.writes == 1


def test_stats_counts_a_failure_once() -> None:
    def fails() -> None:
        raise BlockIOError("broken on purpose")

    below = Slow()
    node = Stats(Child(below, "image", grows=True))
    request = Child(node, "it").start_read(0, memoryview(bytearray(4)))
    below.started[0].wait = fails  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(BlockIOError):
            request.wait()
    assert node.snapshot()["operations"]["read"]["failed"] == 1


# -- pools


class Remote(PooledStorage):
    """Storage whose reads wait until `meet` of them are under way."""

    driver = "remote"

    def __init__(self, data: bytes, meet: int) -> None:
        super().__init__()
        self.data = bytearray(data)
        self.meeting = threading.Barrier(meet, timeout=PATIENCE)
        self.quick = False

    size = property(lambda self: len(self.data))

    def read_into(self, offset: int, view: memoryview) -> None:
        if offset == len(self.data) - 1:
            raise BlockIOError("broken on purpose")
        if not self.quick:
            self.meeting.wait()
        view[:] = self.data[offset : offset + len(view)]

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.data[offset : offset + len(view)] = view


def test_a_pool_has_several_calls_under_way() -> None:
    node = Remote(bytes(range(100)), 4)
    edge = Child(Stats(Child(node, "image")), "it")
    assert edge.node.pipelines
    views = [memoryview(bytearray(10)) for _ in range(4)]
    requests = [edge.start_read(10 * number, view) for number, view in enumerate(views)]
    waiters = [threading.Thread(target=request.wait) for request in requests for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    for waiter in waiters:
        waiter.join(PATIENCE)
        assert not waiter.is_alive()
    assert b"".join(views) == bytes(range(40))
    with pytest.raises(BlockIOError):
        edge.start_read(99, views[0][:1]).wait()
    edge.start_write(0, memoryview(b"x")).wait()
    assert node.data[0] == ord("x")
    edge.close()


def test_a_pool_that_is_closed_makes_no_call_any_more() -> None:
    node = Remote(bytes(100), 1)
    node.quick = True
    begun = threading.Event()
    go = threading.Event()

    def slow(offset: int, view: memoryview) -> None:
        begun.set()
        assert go.wait(PATIENCE)

    node.read_into = slow  # type: ignore[method-assign]
    views = [memoryview(bytearray(1)) for _ in range(20)]
    requests = [node.start_read(number, view) for number, view in enumerate(views)]
    assert begun.wait(PATIENCE)
    closer = threading.Thread(target=node.close)
    closer.start()
    go.set()
    closer.join(PATIENCE)
    assert not closer.is_alive()
    requests[-1].leave()
    requests[-1].leave()


# -- a server


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    with lamina.open({"driver": "memory", "size": MIB}, read_only=False) as image:
        image.write(5000, b"there")
        with Server([Export(image, "", writable=True)], unix=str(tmp_path / "socket")):
            yield f"nbd+unix:///?socket={tmp_path / 'socket'}"


@pytest.mark.parametrize("over", [[], ["throttle"], ["stats", "throttle"], ["raw", "stats"]], ids=str)
def test_requests_over_a_server_are_on_their_way_at_once(served: str, over: list[str]) -> None:
    """Through filters that observe, too: none is done when it is started, all are when they are asked for."""
    spec: Any = {"driver": "nbd", "uri": served}
    for driver in over:
        spec = {"driver": driver, "file" if driver == "raw" else "image": spec}
    node: Node = Opener(read_only=False).open(spec)
    edge = Child(node, "it")
    try:
        assert node.pipelines
        views = [memoryview(bytearray(5)) for _ in range(100)]
        requests = [edge.start_read(5000, view) for view in views]
        assert DONE not in requests
        for request in reversed(requests):
            request.wait()
        assert {bytes(view) for view in views} == {b"there"}
        for request in [edge.start_write(at, memoryview(b"new")) for at in range(0, 4000, 100)]:
            request.wait()
        edge.start_zero(5000, 3).wait()
        edge.read_into(4998, views[0])
        assert bytes(views[0]) == b"\0\0\0\0\0"
        runs = edge.start_zero_runs(0, MIB).wait()
        assert runs == edge.zero_runs(0, MIB)
        assert sum(length for length, _ in runs) <= MIB
        lost = edge.start_read(0, views[1])
        lost.leave()
    finally:
        edge.close()


# -- roots


def test_an_edit_finishes_what_was_started() -> None:
    """By the same thread, by another one, and by `close`: nobody waits for ever."""
    node = Slow()
    image = Image(node)
    root = image.root
    views = [memoryview(bytearray(b"z" * 4)) for _ in range(3)]
    write = root.start_write(0, memoryview(b"abcd"))
    read = root.start_read(0, views[0])
    assert not any(node.bytes)
    with image.edit() as edit:
        assert node.bytes[:4] == b"abcd"
        edit.insert("stats")
    read.wait()
    write.wait()
    assert bytes(views[0]) == b"abcd"
    again = root.start_read(0, views[1])
    other = threading.Thread(target=image.truncate, args=(node.size,))
    other.start()
    other.join(PATIENCE)
    assert not other.is_alive()
    last = root.start_read(0, views[2])
    assert root.start_zero_runs(0, 8).wait() == [(8, False)]
    image.close()
    assert [bytes(view) for view in views] == [b"abcd"] * 3
    for request in (again, last):
        request.wait()
    with pytest.raises(LaminaError):
        root.start_read(0, views[0])


def test_a_root_passes_what_is_done_at_once() -> None:
    with Image(MemoryStorage(MIB)) as image:
        assert image.root.start_write(0, memoryview(b"x")) is DONE
        assert not image.root.gate.inside
        assert image.root.start_zero(0, 1) is DONE
        with pytest.raises(LaminaError, match="is outside"):
            image.root.start_read(MIB, memoryview(bytearray(1)))
        assert not image.root.gate.inside

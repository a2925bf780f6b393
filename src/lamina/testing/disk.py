"""The laws of every node, whatever its kind, which the three suites share.

Each law takes new disks from `opened` and compares them with `model.Disk`. Requests pass through the request path, like those
of every user.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..errors import LaminaError, NotSupported, OutOfRange, ReadOnly
from ..extents import Extents
from ..image import Image
from ..limits import MAX_SIZE
from ..node import Node, StorageNode
from .model import Disk, Written, check_disk, check_first_extents, check_status, serial_order

#: The settings of every law. Many classes inherit a law, which hypothesis would otherwise report as a mistake.
LAW = settings(
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow, HealthCheck.data_too_large],
)

Operation = tuple[str, int, int, int]


def spans(size: int, unit: int) -> st.SearchStrategy[tuple[int, int]]:
    """(offset, length) inside a disk, including empty ranges: bounds anywhere, and at or next to multiples of `unit`."""
    near = st.tuples(st.integers(0, size // unit + 1), st.integers(-1, 1)).map(
        lambda pair: min(max(pair[0] * unit + pair[1], 0), size)
    )
    edge = near | st.integers(0, size)
    return st.tuples(edge, edge).map(lambda pair: (min(pair), abs(pair[0] - pair[1])))


def operations(size: int, unit: int) -> st.SearchStrategy[list[Operation]]:
    """Sequences of requests: (name, offset, length, value)."""
    names = st.sampled_from(["write", "write", "write", "zero", "unmap", "fast", "discard", "flush", "reopen"])
    request = st.tuples(names, spans(size, unit), st.integers(1, 250))
    return st.lists(request.map(lambda r: (r[0], *r[1], r[2])), min_size=1, max_size=8)


def pattern(length: int, value: int) -> bytes:
    """`length` bytes, none of them zero, which depend on `value` and on their position in the range."""
    period = bytes((value + at) % 251 + 1 for at in range(251))
    return (period * (length // 251 + 1))[:length]


def refused(kind: type[Exception], operation: Callable[..., Any], *arguments: Any) -> None:
    """Assert that the call raises an error of the class `kind`."""
    caught: Exception | None = None
    try:
        operation(*arguments)
    except kind as error:
        caught = error
    assert isinstance(caught, LaminaError), f"{operation.__name__}{arguments} did not raise {kind.__name__}"
    assert str(caught)


class DiskConformance:
    """The laws of every node. A subclass for a kind of node creates the disks; see `opened` and `reopened`."""

    #: Whether written bytes can be read again.
    keeps = True
    #: Whether `truncate` changes the size.
    resizes = True
    #: `truncate` accepts multiples of this number of bytes.
    size_unit = 1
    #: The unit whose boundaries are the most error-prone: a cluster, a page.
    unit = 4096
    #: Overlapping writes are ordered at least in each block of this number of bytes.
    atom = 512

    def opened(self) -> Node:
        """A new disk, open for writing. Its size is more than a unit."""
        raise NotImplementedError

    def reopened(self, node: Node, *, read_only: bool = False) -> Node:
        """The same disk, closed and opened again. If its content exists only as long as its node: the node itself."""
        node.read_only = read_only
        return node

    @contextmanager
    def image(self) -> Iterator[Image]:
        with Image(self.opened()) as image:
            yield image

    def model(self, image: Image) -> Disk:
        return Disk(image.read(0, image.size), keeps=self.keeps)

    def apply(self, image: Image, disk: Disk, operation: Operation) -> Image:
        """Execute the request on both disks, and return the image to continue with."""
        name, offset, length, value = operation
        if name == "write":
            data = pattern(length, value)
            image.write(offset, data, fua=value % 8 == 0)
            disk.write(offset, data)
        elif name == "discard":
            image.discard(offset, length)
            disk.discard(offset, length)
        elif name == "flush":
            image.flush()
        elif name == "reopen":
            return Image(self.reopened(image.node))
        else:
            try:
                image.zero(offset, length, unmap=name == "unmap", fast=name == "fast")
            except NotSupported:
                assert name == "fast", "only a fast zero request may be refused"
            else:
                disk.zero(offset, length)
        return image

    # -- bytes

    @LAW
    @given(st.data())
    def test_what_is_written_is_read_and_neighbours_stay(self, data: st.DataObject) -> None:
        with self.image() as image:
            disk = self.model(image)
            for value in range(1, 4):
                offset, length = data.draw(spans(image.size, self.unit))
                self.apply(image, disk, ("write", offset, length, value))
                got = image.read(offset, length)
                assert disk.wrong(offset, got) is None
            check_disk(image, disk)

    @LAW
    @given(st.data())
    def test_any_sequence_of_requests(self, data: st.DataObject) -> None:
        image = Image(self.opened())
        try:
            disk = self.model(image)
            for operation in data.draw(operations(image.size, self.unit)):
                image = self.apply(image, disk, operation)
            content = check_disk(image, disk)
            for _ in range(3):
                offset, length = data.draw(spans(image.size, self.unit))
                if length and image.root.reads_zero(offset, length):
                    part = content[offset : offset + length]
                    assert part.count(0) == length, "reads_zero is true for bytes that are not zero"
        finally:
            image.close()

    def test_an_empty_request_does_nothing(self) -> None:
        with self.image() as image:
            disk = self.model(image)
            for offset in (0, 1, image.size):
                assert image.read(offset, 0) == b""
                image.write(offset, b"")
                image.zero(offset, 0)
                image.discard(offset, 0)
                assert len(image.extents(offset, 0)) == 0
            check_disk(image, disk)

    def test_requests_outside_the_disk_are_refused(self) -> None:
        with self.image() as image:
            disk, size = self.model(image), image.size
            for offset, length in ((size, 1), (size - 1, 2), (0, size + 1), (-1, 2), (MAX_SIZE, 1), (MAX_SIZE - 1, 1)):
                refused(OutOfRange, image.read, offset, length)
                refused(OutOfRange, image.write, offset, bytes(length))
                refused(OutOfRange, image.zero, offset, length)
                refused(OutOfRange, image.discard, offset, length)
                refused(OutOfRange, image.extents, offset, length)
            refused(OutOfRange, image.zero, 0, -1)
            refused(OutOfRange, image.discard, 0, -1)
            refused(OutOfRange, image.extents, 1, -1)
            refused(OutOfRange, image.truncate, -1)
            refused(OutOfRange, image.truncate, MAX_SIZE + 1)
            check_disk(image, disk)

    def test_what_is_open_for_reading_refuses_every_change(self) -> None:
        image = Image(self.opened())
        disk = self.model(image)
        self.apply(image, disk, ("write", 1, self.unit, 7))
        image = Image(self.reopened(image.node, read_only=True))
        try:
            refused(ReadOnly, image.write, 0, b"x")
            refused(ReadOnly, image.zero, 0, 1)
            refused(ReadOnly, image.discard, 0, self.unit)
            refused(ReadOnly, image.truncate, image.size + 1)
            image.flush()
            check_disk(image, disk)
        finally:
            image.close()

    def test_what_was_flushed_is_there_when_it_is_opened_again(self) -> None:
        image = Image(self.opened())
        try:
            disk = self.model(image)
            for value, offset in enumerate(range(0, image.size - self.unit, self.unit + self.unit // 2), 1):
                self.apply(image, disk, ("write", offset, self.unit, value))
                if value == 40:
                    break
            image.flush()
            status = _rows(image.extents())
            for read_only in (True, False):
                image = Image(self.reopened(image.node, read_only=read_only))
                check_disk(image, disk)
                assert _rows(image.extents()) == status
        finally:
            image.close()

    # -- size

    @LAW
    @given(st.data())
    def test_what_truncate_adds_reads_as_zero(self, data: st.DataObject) -> None:
        if not self.resizes:
            return
        with self.image() as image:
            disk = self.model(image)
            size = image.size
            for value in range(1, 5):
                offset, length = data.draw(spans(image.size, self.unit))
                self.apply(image, disk, ("write", offset, length, value))
                new, _ = data.draw(spans(size + 3 * self.unit, self.unit))
                new -= new % self.size_unit
                image.truncate(new)
                disk.truncate(new)
                check_disk(image, disk)

    # -- status

    @LAW
    @given(st.data())
    def test_a_split_query_is_the_whole_one_merged(self, data: st.DataObject) -> None:
        with self.image() as image:
            disk = self.model(image)
            for value in range(1, 5):
                offset, length = data.draw(spans(image.size, self.unit))
                name = data.draw(st.sampled_from(["write", "unmap"]))
                self.apply(image, disk, (name, offset, length, value))
            content = image.read(0, image.size)
            offset, length = data.draw(spans(image.size, self.unit))
            end = offset + length
            whole = image.extents(offset, length)
            if length:
                check_status(whole, offset, content[offset:end])
                check_first_extents(image.root, whole, data.draw(st.integers(1, 8)))
            cuts = data.draw(st.lists(st.integers(offset, end), max_size=4))
            edges = sorted({offset, *cuts, end})
            pieces = [image.extents(lo, hi - lo) for lo, hi in pairwise(edges)]
            if pieces:
                assert Extents.concat(pieces).coalesce() == whole
            assert image.extents().clip(offset, end) == whole

    @LAW
    @given(st.data())
    def test_right_after_a_write_the_status_says_data(self, data: st.DataObject) -> None:
        if not self.keeps:
            return
        with self.image() as image:
            disk = self.model(image)
            for before in ("unmap", "discard", "zero"):
                offset, length = data.draw(spans(image.size, self.unit))
                image.extents()  # the driver may cache the result
                self.apply(image, disk, (before, offset, length, 0))
                offset, length = data.draw(spans(image.size, self.unit).filter(lambda span: span[1] > 0))
                self.apply(image, disk, ("write", offset, length, 9))
                found = image.extents(offset, length)
                assert found.data.all()
                assert not found.zero.any()
                assert not image.root.reads_zero(offset, length)

    # -- memory

    def test_what_was_closed_is_freed_without_the_garbage_collector(self) -> None:
        """Which runs rarely in a large program: until then closed disks would keep their tables and buffers."""
        gc.collect()
        gc.disable()
        try:
            with self.image() as image:
                # Storage may be kept for `reopened`.
                nodes = [weakref.ref(node) for node in image.node.beneath() if not isinstance(node, StorageNode)]
                if not image.read_only:
                    image.write(1, b"written")
                image.read(0, image.size)
                image.extents()
            del image
            assert not [kind for node in nodes if (kind := node()) is not None]
        finally:
            gc.enable()

    # -- threads

    def test_overlapping_writes_of_many_threads_have_an_order(self) -> None:
        """Also with zero requests; over an empty disk, where clusters are allocated, and over a full one."""
        seed = random.SystemRandom().randrange(1 << 32)
        for turn in range(4):
            with self.image() as image:
                self._race(image, random.Random(f"{seed}-{turn}"), turn % 2 == 1, f"seed {seed}, turn {turn}")

    def _race(self, image: Image, rng: random.Random, full: bool, where: str) -> None:
        region = min(image.size, 3 * self.unit + 1000)
        if full:
            image.write(0, b"\xff" * image.size)
        else:
            image.zero(0, image.size, unmap=True)
        before = image.read(0, image.size)
        plans: list[list[Written]] = []
        for thread in range(4):
            plan = []
            for number in range(10):
                offset = rng.randrange(region)
                length = min(rng.choice((300, 3000, self.unit, 2 * self.unit)), region - offset)
                # One write consists of zeros, if these differ from the previous content.
                value = 0 if full and (thread, number) == (0, 5) else 1 + thread * 10 + number
                plan.append(Written(thread, offset, length, value))
            plans.append(plan)

        def run(plan: list[Written]) -> None:
            for write in plan:
                if write.value:
                    image.write(write.offset, bytes([write.value]) * write.length)
                else:
                    image.zero(write.offset, write.length)

        in_threads([partial(run, plan) for plan in plans], where)
        after = image.read(0, image.size)
        writes = [write for plan in plans for write in plan] if self.keeps else []
        # A node that has its requests ordered shows one order in all blocks.
        atom = image.size if image.node.serialise else max(self.atom, image.alignment)
        wrong = serial_order(writes, before, after, atom)
        assert wrong is None, f"{where}: {wrong}"
        check_status(image.extents(), 0, after)

    def test_who_reads_while_others_write_sees_whole_writes(self) -> None:
        with self.image() as image:
            if not image.node.serialise:
                return
            offset = self.unit // 2
            length = min(2 * self.unit, image.size - offset)
            image.write(offset, bytes([1]) * length)

            def write(value: int) -> None:
                for _ in range(10):
                    image.write(offset, bytes([value]) * length)

            def read() -> None:
                for _ in range(20):
                    seen = image.read(offset, length)
                    assert seen.count(seen[0]) == length, "a read returned parts of two writes"

            in_threads([partial(write, 1), partial(write, 2), read])


def in_threads(works: list[Callable[[], None]], where: str = "") -> None:
    """Run all functions in threads of their own, with frequent switches between the threads, and assert that none failed."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:  # noqa: BLE001 - reported by the calling thread
            failures.append(error)

    workers = [threading.Thread(target=run, args=(work,)) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures, f"{where} {failures!r}"


def _rows(extents: Extents) -> list[tuple[Any, ...]]:
    """The rows without their files, which are other objects after a reopen."""
    return [(*row[:7], row.offset) for row in extents]

"""The request path against a flat model: whatever limits a node declares, bytes are right and promises are kept."""

from __future__ import annotations

import errno
import random
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import BlockIOError, NotSupported, OutOfRange, ReadOnly
from lamina.filters.blkdebug import Blkdebug
from lamina.graph import Opener
from lamina.limits import Limits
from lamina.node import FUA, NO_FALLBACK, StorageNode
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


class Checked(StorageNode):
    """Flat bytes behind declared limits; each request is checked against what node.py promises to drivers."""

    driver = "checked"

    def __init__(
        self,
        size: int,
        limits: Limits | None = None,
        *,
        growable: bool = False,
        can_zero: bool = True,
        serialise: int = 0,
        read_only: bool = False,
    ) -> None:
        super().__init__(read_only=read_only)
        self.bytes = bytearray(random.Random(size).randbytes(size))
        self._limits = limits or Limits()
        self._growable = growable
        self._serialise = serialise
        self.can_zero = can_zero
        self.pause = 0.0
        self.fail_reads: int | None = None  # how many reads still succeed
        self.fail_writes: int | None = None
        self.flushes = 0
        self.flags: list[int] = []

    @property
    def size(self) -> int:
        return len(self.bytes)

    @property
    def growable(self) -> bool:
        return self._growable

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def serialise(self) -> int:
        return self._serialise

    def _check(self, offset: int, length: int, align: int, most: int, *, grows: bool = False) -> None:
        size = len(self.bytes)
        assert offset >= 0
        assert length > 0
        assert offset + length <= size or (grows and self._growable)
        for unit in (align, self._limits.request_alignment):
            assert offset % unit == 0
            assert (offset + length) % unit == 0 or offset + length == size
        assert not most or length <= most

    def read_into(self, offset: int, view: memoryview) -> None:
        self._check(offset, len(view), 1, self._limits.max_transfer)
        if self.fail_reads is not None:
            self.fail_reads -= 1
            if self.fail_reads < 0:
                raise BlockIOError("no read", errno=errno.EIO)
        view[:] = self.bytes[offset : offset + len(view)]
        if self.pause:
            time.sleep(self.pause)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self._check(offset, len(view), 1, self._limits.max_transfer, grows=True)
        if self.fail_writes is not None:
            self.fail_writes -= 1
            if self.fail_writes < 0:
                raise BlockIOError("no write", errno=errno.ENOSPC)
        self.flags.append(flags)
        self.bytes += bytes(max(offset + len(view) - len(self.bytes), 0))
        self.bytes[offset : offset + len(view)] = view

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self._check(offset, length, self._limits.zero_alignment, self._limits.max_zero, grows=True)
        if not self.can_zero:
            raise NotSupported("no zero")
        self.bytes += bytes(max(offset + length - len(self.bytes), 0))
        self.bytes[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self._check(offset, length, self._limits.discard_alignment, self._limits.max_discard)
        self.bytes[offset : offset + length] = bytes(length)

    def flush(self) -> None:
        self.flushes += 1

    def reads_zero(self, offset: int, length: int) -> bool:
        assert 0 <= offset < offset + length <= len(self.bytes)
        return not any(self.bytes[offset : offset + length])


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    align = 1 << draw(st.integers(0, 6))
    zero = align * draw(st.integers(1, 5))
    discard = align * draw(st.integers(1, 5))
    times = st.integers(0, 4)
    return Limits(
        request_alignment=align,
        max_transfer=align * draw(times),
        zero_alignment=zero,
        max_zero=zero * draw(times),
        discard_alignment=discard,
        max_discard=discard * draw(times),
    )


steps = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "write", "zero", "fast zero", "discard"]),
        st.integers(0, 700),
        st.integers(0, 300),
        st.sampled_from([0, FUA]),
    ),
    max_size=12,
)


@settings(max_examples=300)
@given(
    size=st.integers(0, 600),
    limits=limits(),
    growable=st.booleans(),
    can_zero=st.booleans(),
    serialise=st.sampled_from([0, 0, 16, 128]),
    steps=steps,
)
def test_against_a_flat_model(
    size: int, limits: Limits, growable: bool, can_zero: bool, serialise: int, steps: list[tuple[str, int, int, int]]
) -> None:
    node = Checked(size, limits, growable=growable, can_zero=can_zero, serialise=serialise)
    edge = Child(node, "test", grows=growable)
    model = bytearray(node.bytes)
    for what, offset, length, flags in steps:
        end = offset + length
        before = bytes(node.bytes)
        flushes = node.flushes
        if end > len(model) and (not growable or what == "discard"):
            operations = {
                "read": lambda: edge.read_into(offset, memoryview(bytearray(length))),  # noqa: B023 - called at once
                "write": lambda: edge.write(offset, memoryview(bytes(length))),  # noqa: B023
                "discard": lambda: edge.discard(offset, length),  # noqa: B023
            }
            with pytest.raises(OutOfRange):
                operations.get(what, lambda: edge.zero(offset, length))()  # noqa: B023
            assert node.bytes == before
        elif what == "read":
            buffer = bytearray(b"\xee" * length)
            edge.read_into(offset, memoryview(buffer))
            assert buffer == model[offset:end] + bytes(length - len(model[offset:end]))
        elif what == "discard":
            edge.discard(offset, length)
            assert node.bytes[:offset] == model[:offset]
            assert node.bytes[end:] == model[end:]
            assert all(new in (0, old) for new, old in zip(node.bytes[offset:end], model[offset:end], strict=True))
            model[:] = node.bytes
        else:
            piece = random.Random(end).randbytes(length) if what == "write" else bytes(length)
            try:
                if what == "write":
                    edge.write(offset, memoryview(piece), flags)
                else:
                    edge.zero(offset, length, flags | (NO_FALLBACK if what == "fast zero" else 0))
            except NotSupported:
                assert what == "fast zero"
                assert node.bytes == before
                continue
            if length:
                assert node.flushes > flushes or not flags
                model += bytes(max(end - len(model), 0))
                model[offset:end] = piece
        # Storage that grows does so by whole blocks.
        unit = max(limits.request_alignment, limits.zero_alignment)
        assert len(model) <= node.size < len(model) + unit
        model += bytes(node.size - len(model))
        assert node.bytes == model


def test_zero_of_a_corner_of_an_empty_block_stores_nothing() -> None:
    node = Checked(256, Limits(zero_alignment=64))
    node.bytes[64:128] = bytes(64)
    Child(node, "test").zero(70, 10)
    assert not node.flags  # no write was sent


def test_a_fast_zero_that_has_begun_is_finished() -> None:
    """A second piece that the node refuses must not turn into "nothing was touched"."""

    class Once(Checked):
        def zero(self, offset: int, length: int, flags: int = 0) -> None:
            super().zero(offset, length, flags)
            self.can_zero = False

    node = Once(128, Limits(max_zero=64))
    Child(node, "test").zero(0, 128, NO_FALLBACK)
    assert not any(node.bytes)
    node = Once(128, Limits(zero_alignment=64))
    node.bytes[:64] = bytes(64)
    Child(node, "test").zero(10, 118, NO_FALLBACK)  # the head's whole block, then the rest
    assert not any(node.bytes)


def test_zeros_that_are_written_are_merged_only_at_their_ends() -> None:
    """With blocks larger than the buffer of zeros, too: a block in the middle is written once, and none is read."""
    block = 4 << 20
    node = Checked(5 * block, Limits(request_alignment=block), can_zero=False)
    before = bytes(node.bytes)
    edge = Child(node, "root")
    node.fail_reads = 2  # the head's and the tail's
    edge.zero(block // 2, 4 * block)
    assert node.bytes == before[: block // 2] + bytes(4 * block) + before[block // 2 + 4 * block :]
    assert len(node.flags) == 5


def test_fua_is_emulated_once_and_passed_on_where_it_is_known() -> None:
    node = Checked(64, Limits(max_transfer=16))
    Child(node, "test").write(0, memoryview(bytes(64)), FUA)
    assert (node.flushes, node.flags) == (1, [0] * 4)
    node.supported_flags = FUA
    node.flags.clear()
    Child(node, "test").write(0, memoryview(bytes(64)), FUA)
    assert (node.flushes, node.flags) == (1, [FUA] * 4)


def test_read_only_and_bounds() -> None:
    edge = Child(Checked(100, read_only=True), "test")
    for operation in (
        lambda: edge.write(0, memoryview(b"x")),
        lambda: edge.zero(0, 1),
        lambda: edge.discard(0, 1),
        lambda: edge.truncate(1),
    ):
        with pytest.raises(ReadOnly):
            operation()
    for offset, length in [(-1, 1), (100, 1), (0, 101), (1 << 63, 1)]:
        with pytest.raises(OutOfRange):
            edge.read_into(offset, memoryview(bytearray(length)))
        with pytest.raises(OutOfRange):
            edge.extents(offset, length)


@pytest.mark.parametrize(("offset", "length"), [(70, 10), (70, 200), (64, 100), (70, 122), (1000, 24), (900, 100)])
def test_a_failure_inside_read_modify_write_leaves_the_neighbours(offset: int, length: int) -> None:
    for reads in range(3):
        for writes in range(3):
            node = Checked(1024, Limits(request_alignment=64))
            before = bytes(node.bytes)
            node.fail_reads, node.fail_writes = reads, writes
            try:
                Child(node, "test").write(offset, memoryview(b"\xff" * length))
            except BlockIOError:
                assert node.bytes[:offset] == before[:offset]
                assert node.bytes[offset + length :] == before[offset + length :]
                if node.fail_reads < 0:
                    assert node.bytes == before
            else:
                assert node.bytes == before[:offset] + b"\xff" * length + before[offset + length :]


def test_large_unaligned_writes_with_failures() -> None:
    size = 3 << 20
    for writes in range(4):
        node = Checked(size, Limits(request_alignment=4096, max_transfer=1 << 20))
        before = bytes(node.bytes)
        node.fail_writes = writes
        with pytest.raises(BlockIOError):
            Child(node, "test").write(5, memoryview(b"\xff" * (size - 10)))
        assert (node.bytes[:5], node.bytes[-5:]) == (before[:5], before[-5:])
    node = Checked(size, Limits(request_alignment=4096))
    Child(node, "test").write(5, memoryview(b"\xff" * (size - 10)))
    assert node.bytes == before[:5] + b"\xff" * (size - 10) + before[-5:]


@pytest.mark.parametrize("serialise", [0, 4, 64, 256])
def test_threads_that_share_a_block_lose_no_neighbour(serialise: int) -> None:
    """Sub-block writes and zeroes by many threads, each in its own bytes, on a node that is slow to read."""
    workers, width = 6, 5
    node = Checked(workers * width, Limits(request_alignment=64), serialise=serialise)
    node.pause = 0.0002
    edge = Child(node, "test")
    failures: list[BaseException] = []

    def work(mine: int) -> None:
        try:
            for turn in range(1, 25):
                if turn % 3:
                    edge.write(mine * width, memoryview(bytes([turn]) * width))
                    expected = bytes([turn]) * width
                else:
                    edge.zero(mine * width, width)
                    expected = bytes(width)
                buffer = bytearray(width)
                edge.read_into(mine * width, memoryview(buffer))
                assert buffer == expected
        except BaseException as error:  # noqa: BLE001 - told to the thread that runs the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert node.bytes == bytes(workers * width)


@pytest.mark.parametrize(
    ("serialise", "align", "zero"), [(0, 16, 48), (64, 16, 48), (16, 64, 64), (0, 1, 48), (32, 1, 48)]
)
def test_a_widened_zero_excludes_writes_to_all_that_it_touches(serialise: int, align: int, zero: int) -> None:
    writers: list[threading.Thread] = []

    class Slow(Checked):
        def zero(self, offset: int, length: int, flags: int = 0) -> None:
            # In the middle of the operation others write to its first and last byte.
            for at in (offset, offset + length - 1):
                writers.append(threading.Thread(target=edge.write, args=(at, memoryview(b"\xff"))))
                writers[-1].start()
            time.sleep(0.05)
            super().zero(offset, length, flags)

    node = Slow(768, Limits(request_alignment=align, zero_alignment=zero), serialise=serialise)
    node.bytes[:] = bytes(768)
    edge = Child(node, "test")
    edge.zero(zero * 3 + 2, zero - 4)
    for writer in writers:
        writer.join()
    assert (node.bytes[zero * 3], node.bytes[zero * 4 - 1]) == (0xFF, 0xFF)


def test_an_error_gives_every_hold_back() -> None:
    node = Checked(256, Limits(request_alignment=64), serialise=64)
    edge: Any = Child(node, "test")
    for number in range(3):
        node.fail_reads, node.fail_writes = (0, None) if number else (None, 0)
        with pytest.raises(BlockIOError):
            edge.write(1, memoryview(b"x"))
    node.fail_reads = node.fail_writes = None
    node.can_zero = False
    with pytest.raises(NotSupported):
        edge.zero(0, 64, NO_FALLBACK)
    edge.write(1, memoryview(b"x"))
    with pytest.raises(NotSupported):
        edge.truncate(1)  # it would wait for ever on a hold that was lost


def test_a_filter_sees_no_zeroing_that_nobody_asked_for() -> None:
    """A block that the filter merely prefers is not zeroed whole for a part of it, even where the rest reads as zero."""
    node = Blkdebug.open(
        Blkdebug.schema.parse({"image": Child(MemoryStorage(1 << 20), "image", grows=True), "opt-write-zero": 65536}),
        Opener(read_only=False),
    )
    seen: list[tuple[str, int, int]] = []
    zero, write = node.zero, node.write
    node.zero = lambda at, length, flags=0: (seen.append(("zero", at, length)), zero(at, length, flags))[1]  # type: ignore[method-assign]
    node.write = lambda at, view, flags=0: (seen.append(("write", at, len(view))), write(at, view, flags))[1]  # type: ignore[method-assign]
    edge = Child(node, "root")
    edge.zero(4096, 4096)
    edge.zero(65536 - 512, 65536 + 1024)
    assert seen == [
        ("write", 4096, 4096),
        ("write", 65536 - 512, 512),
        ("zero", 65536, 65536),
        ("write", 2 * 65536, 512),
    ]


def test_a_long_request_gives_way_between_its_steps() -> None:
    """Between two steps of a long `zero` or `discard` no range is held, and an edge that is being closed may end it."""
    node = Blkdebug.open(
        Blkdebug.schema.parse(
            {
                "image": Child(MemoryStorage(1 << 20), "image", grows=True),
                "align": 512,
                "max-write-zero": 65536,
                "max-discard": 65536,
            }
        ),
        Opener(read_only=False),
    )

    class Edge(Child):
        rests = 0

        def checkpoint(self) -> None:
            self.rests += 1
            assert not self.node.ranges._queue

    edge = Edge(node, "root")
    edge.zero(0, 1 << 20)
    assert edge.rests == 15
    edge.discard(512, (1 << 20) - 512)
    assert edge.rests == 30

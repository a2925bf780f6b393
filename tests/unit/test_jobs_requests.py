"""Jobs on storage that is far away: several buffers at once, each byte in its place, and nothing left behind when one of them
fails."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

import lamina
from lamina import workers
from lamina.errors import BlockIOError, Cancelled, LaminaError, OptionError, OutOfRange
from lamina.image import Image
from lamina.jobs.compare import Difference, compare
from lamina.jobs.convert import Result, convert, convert_to_file
from lamina.jobs.progress import Monitor
from lamina.jobs.requests import FAR, WAITED, Requests, in_order
from lamina.pending import DONE, Pending
from lamina.storage.memory import MemoryStorage
from tests.conftest import Qemu

KIB, MIB = 1 << 10, 1 << 20
#: What `convert` reads at a time.
BUFFER = 2 * MIB
SIZE = 24 * MIB + 4096
#: So many are waited for; the last ones have fewer beside them.
TOGETHER = 4


class Slow(MemoryStorage):
    """Storage on which requests take some time, each another one. `together`: so many of the threads that were made for it
    must meet, or their requests fail."""

    def __init__(self, size: int, *, together: int = 1, seed: int = 0) -> None:
        super().__init__(size)
        self.most = 0
        self.order: list[int] = []
        self.quick = True
        self._now = self._met = 0
        self._meet = threading.Barrier(together, timeout=20)
        self._dice = random.Random(seed)
        self._counting = threading.Lock()

    def _linger(self, offset: int) -> None:
        if self.quick:
            return
        with self._counting:
            self._now += 1
            self.most = max(self.most, self._now)
            self.order.append(offset)
            of_a_lane = re.fullmatch(r"lamina-(convert-|compare).*_\d", workers.names.get(threading.get_ident(), ""))
            meets = of_a_lane is not None and self._met < self._meet.parties
            self._met += meets
            pause = WAITED * (1 + self._dice.random())
        try:
            if meets:
                self._meet.wait()
            time.sleep(pause)
        finally:
            with self._counting:
                self._now -= 1

    def read_into(self, offset: int, view: memoryview) -> None:
        self._linger(offset)
        super().read_into(offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self._linger(offset)
        super().write(offset, view, flags)


class Far(Slow):
    far: ClassVar[bool] = True


def disk(storage: Slow, content: bytes) -> Image:
    """`content` on this storage, which takes its time from now on."""
    image = Image(storage)
    for at in range(0, len(content), 64 * KIB):
        if part := content[at : at + 64 * KIB].rstrip(b"\0"):
            image.write(at, part)
    storage.quick = False
    return image


@pytest.fixture
def content(seed: int) -> bytes:
    """Data, holes and zeros that are stored, of all lengths: enough for seven buffers, and some in each stretch that one
    could hold."""
    dice = random.Random(seed)
    data = bytearray(SIZE)
    data[3 * MIB + 5 : 15 * MIB] = dice.randbytes(12 * MIB - 5)
    for at in range(0, SIZE, BUFFER):
        data[at : at + 4096] = dice.randbytes(min(4096, SIZE - at))
    for _ in range(40):
        at = dice.randrange(SIZE)
        piece = dice.randbytes(dice.choice([1, 4096, 70_000, 3 * MIB]))[: SIZE - at]
        data[at : at + len(piece)] = piece
    return bytes(data)


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 20
    while workers.names and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not workers.names


def one_by_one(content: bytes, before: bytes) -> Result:
    """What a conversion over `before` says where all is near."""
    with disk(Slow(SIZE), content) as source, disk(Slow(SIZE), before) as target:
        return convert(source, target)


@pytest.mark.parametrize("far", ["source", "target", "both"])
def test_far_storage_has_several_at_once(content: bytes, far: str) -> None:
    before = random.Random(1).randbytes(SIZE // 2)
    source = Far(SIZE, together=TOGETHER) if far != "target" else Slow(SIZE)
    target = Far(SIZE, together=TOGETHER) if far != "source" else Slow(SIZE)
    with disk(source, content) as one, disk(target, before) as other:
        assert convert(one, other) == one_by_one(content, before)
        target.quick = True
        assert other.read(0, SIZE) == content
    assert (source.most > 1, target.most > 1) == (far != "target", far != "source")
    assert max(source.most, target.most) <= FAR
    if far == "source":
        assert target.order == sorted(target.order), "what is near is written in order"


def test_as_many_as_asked_for(content: bytes) -> None:
    source, target = Slow(SIZE, together=3), Slow(SIZE, together=3)
    with disk(source, content) as one, disk(target, b"") as other:
        convert(one, other, parallel=3, in_order=False)
        target.quick = True
        assert other.read(0, SIZE) == content
    assert (source.most, target.most) == (3, 3)
    source, target = Far(SIZE), Far(SIZE)
    with disk(source, content) as one, disk(target, b"") as other:
        convert(one, other, parallel=1)
    assert (source.most, target.most) == (1, 1)
    assert source.order == sorted(source.order)
    assert target.order == sorted(target.order)


def test_what_is_near_is_written_in_any_order_if_asked_for(content: bytes) -> None:
    """As many at once as are read."""
    source, target = Far(SIZE), Slow(SIZE, together=TOGETHER)
    with disk(source, content) as one, disk(target, b"") as other:
        convert(one, other, in_order=False)
        target.quick = True
        assert other.read(0, SIZE) == content
    assert TOGETHER <= target.most <= FAR


@pytest.mark.parametrize("parallel", [0, 17, -1])
def test_too_many_are_refused(parallel: int) -> None:
    with Image(Slow(MIB)) as one, Image(Slow(MIB)) as other, pytest.raises(OptionError, match="1 to 16"):
        convert(one, other, parallel=parallel)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("options", [{"cluster_size": 512}, {}, {"cluster_size": 2 * MIB}], ids=str)
def test_an_image_of_any_order_is_whole(
    tmp_path: Path, qemu: Qemu, content: bytes, in_order: bool, options: dict[str, int]
) -> None:
    target = tmp_path / "a.qcow2"
    with disk(Slow(SIZE), content) as source:
        convert_to_file(source, str(target), "qcow2", options, parallel=5, in_order=in_order)
    assert qemu.check(target)[0] == 0
    with lamina.open(target, format="qcow2") as made:
        assert made.read(0, SIZE) == content


def test_beside_a_backing_file_that_is_compared(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "base.raw").write_bytes(content[: SIZE // 2])
    changed = bytearray(content)
    for at in range(0, SIZE, 3 * MIB):
        changed[at : at + 3] = b"new"
    with disk(Far(SIZE, together=TOGETHER), bytes(changed)) as source:
        convert_to_file(
            source, str(tmp_path / "top.qcow2"), "qcow2", {}, backing="base.raw", backing_format="raw", in_order=False
        )
    with lamina.open(tmp_path / "top.qcow2", format="qcow2") as made:
        assert made.read(0, SIZE) == changed
        owned = made.extents().where(present=True, depth=0).totals().data
        assert owned <= SIZE // 2 + 5 * 64 * KIB + 65536


@pytest.mark.parametrize("after", [0, 5, 11])
def test_a_read_that_fails(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    source = Far(SIZE)
    image = disk(source, content)

    def broken(offset: int, view: memoryview) -> None:
        if len(source.order) >= after:
            raise BlockIOError("broken on purpose", offset=offset)
        Far.read_into(source, offset, view)

    monkeypatch.setattr(source, "read_into", broken)
    with image, pytest.raises(BlockIOError, match="broken on purpose"):
        convert_to_file(image, str(tmp_path / "b.qcow2"), "qcow2", {}, in_order=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0, 3, 11])
def test_all_writes_fail_from_one_on(content: bytes, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    target = Far(SIZE)

    def full(offset: int, view: memoryview, flags: int = 0) -> None:
        if len(target.order) >= after:
            raise BlockIOError("full on purpose", errno=28)
        Far.write(target, offset, view, flags)

    monkeypatch.setattr(target, "write", full)
    failed = pytest.raises(LaminaError, match="full on purpose")
    with disk(Slow(SIZE), content) as source, disk(target, b"") as there, failed:
        convert(source, there)


def test_it_can_be_stopped(content: bytes) -> None:
    told: list[int] = []

    def report(done: int, total: int) -> None:
        told.append(done)
        monitor.cancel()

    monitor = Monitor(report)
    with disk(Far(SIZE), content) as source, disk(Far(SIZE), b"") as target, pytest.raises(Cancelled):
        convert(source, target, monitor=monitor)
    assert len(told) == 1
    assert told[0] < SIZE


def test_progress_is_told_in_order(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.jobs.progress.INTERVAL", 0)
    told: list[tuple[int, int]] = []
    with disk(Far(SIZE), content) as source, disk(Far(SIZE), b"") as target:
        convert(source, target, monitor=Monitor(lambda *at: told.append(at)))
    assert told == sorted(told)
    assert len(told) > 5
    assert told[-1] == (SIZE, SIZE)


# -- comparing


@pytest.mark.parametrize("far", ["first", "second", "both"])
def test_comparing_reads_several_at_once(content: bytes, far: str) -> None:
    first = Far(SIZE, together=TOGETHER) if far != "second" else Slow(SIZE)
    second = Far(SIZE, together=TOGETHER) if far != "first" else Slow(SIZE)
    with disk(first, content) as one, disk(second, content) as other:
        assert compare(one, other) is None
    assert TOGETHER <= max(first.most, second.most) <= FAR


@pytest.mark.parametrize(("parallel", "most"), [(None, 2), (1, 1)])
def test_near_images_are_compared_by_two_threads(content: bytes, parallel: int | None, most: int) -> None:
    first, second = Slow(SIZE), Slow(SIZE)
    with disk(first, content) as one, disk(second, content) as other:
        assert compare(one, other, parallel=parallel) is None
    assert max(first.most, second.most) == most


def test_the_first_difference_counts_and_what_lies_behind_may_be_broken(
    content: bytes, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(seed)
    for _ in range(8):
        changed = bytearray(content)
        places = sorted(dice.sample(range(SIZE), 3))
        for at in places:
            changed[at] ^= 1
        storage = Far(SIZE)

        def broken(offset: int, view: memoryview, storage: Far = storage, bad: int = places[0]) -> None:
            if offset > bad:
                raise BlockIOError("broken on purpose", offset=offset)
            Far.read_into(storage, offset, view)

        with disk(storage, bytes(changed)) as one, disk(Slow(SIZE), content) as other:
            monkeypatch.setattr(storage, "read_into", broken)
            assert compare(one, other) == Difference("content", places[0])
            assert compare(other, one) == Difference("content", places[0])


def test_a_comparison_that_fails(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Far(SIZE)
    with disk(storage, content) as one, disk(Slow(SIZE), content) as other:

        def broken(offset: int, view: memoryview) -> None:
            if offset >= 5 * BUFFER:
                raise BlockIOError("broken on purpose", offset=offset)
            Far.read_into(storage, offset, view)

        monkeypatch.setattr(storage, "read_into", broken)
        with pytest.raises(BlockIOError, match="broken on purpose"):
            compare(one, other)


def test_a_comparison_is_stopped(content: bytes) -> None:
    monitor = Monitor()
    monitor.cancel()
    with disk(Far(SIZE), content) as one, disk(Far(SIZE), content) as other, pytest.raises(Cancelled):
        compare(one, other, monitor=monitor)


# -- requests


def test_one_at_a_time_is_made_at_once() -> None:
    storage = Slow(MIB)
    with disk(storage, b"x" * 100) as image:
        requests = Requests(image, 1, "lamina-test", eager=True)
        view = memoryview(bytearray(100))
        assert requests.start_read(0, view) is DONE
        assert bytes(view) == b"x" * 100
        failed = requests.start_read(MIB, view)
        for _ in range(2):
            with pytest.raises(OutOfRange):
                failed.wait()
        requests.close()


def test_threads_are_used_once_two_calls_have_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("lamina.jobs.requests.time", SimpleNamespace(monotonic=lambda: now))
    seconds = 0.0
    threads: list[int] = []

    class Timed(MemoryStorage):
        def read_into(self, offset: int, view: memoryview) -> None:
            nonlocal now
            now += seconds
            threads.append(threading.get_ident())

    here, long, view = threading.get_ident(), 2 * WAITED, memoryview(bytearray(1))
    with Image(Timed(MIB)) as image:
        requests = Requests(image, 3, "lamina-test")
        try:
            for seconds in (0, long, 0, long, 0, 0):  # noqa: B007 - one that takes long says nothing
                assert requests.start_read(0, view) is DONE
            seconds = long
            for _ in range(3):
                requests.start_read(0, view).wait()
            assert [thread == here for thread in threads[-3:]] == [True, True, False]
            seconds = 0
            requests.start_read(0, view).wait()
            assert threads[-1] != here
        finally:
            requests.close()
        eager = Requests(image, 2, "lamina-test", eager=True)
        eager.start_read(0, view).wait()
        assert threads[-1] != here
        eager.close()


@pytest.mark.parametrize("count", [1, 4])
def test_items_come_in_order_and_their_errors_in_their_turn(count: int) -> None:
    class Sometime:
        def __init__(self, number: int) -> None:
            self.number = number

        def wait(self) -> None:
            waited.append(self.number)
            if self.number == 7:
                raise BlockIOError("broken on purpose")

        def leave(self) -> None:
            left.append(self.number)

    waited: list[int] = []
    left: list[int] = []

    def begin(number: int) -> list[Pending]:
        begun.append(number)
        return [Sometime(number)] if number % 2 else [DONE]

    begun: list[int] = []
    found: list[int] = []
    with pytest.raises(BlockIOError, match="on purpose"):
        found.extend(in_order(range(20), begin, count))
    assert found == list(range(7))
    assert waited == [1, 3, 5, 7]
    assert set(left) >= {7}
    assert len(begun) - len(found) <= count

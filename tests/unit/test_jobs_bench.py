"""`bench`: the requests that were asked for are made, as many at once as were asked for, and their times are counted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lamina
from lamina import workers
from lamina.cli.main import main
from lamina.errors import BlockIOError, Cancelled, LaminaError, LimitExceeded, OptionError, OutOfRange
from lamina.image import Image
from lamina.jobs.bench import MOST, Latencies, Load, bench
from lamina.jobs.progress import Monitor
from lamina.node import FUA
from lamina.pending import Pending
from lamina.storage.memory import MemoryStorage

KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * KIB


class Counting(MemoryStorage):
    """Storage that remembers its requests. The first `together` of them meet before any goes on, or fail."""

    supported_flags = FUA

    def __init__(self, size: int = SIZE, together: int = 1) -> None:
        super().__init__(size)
        self.requests: list[tuple[str, int, int]] = []
        self.now = self.most = 0
        self.at_flushes: list[int] = []
        self._meet, self._met = threading.Barrier(together, timeout=20), 0
        self._mutex = threading.Lock()

    def _count(self, what: str, offset: int, length: int) -> None:
        with self._mutex:
            self.requests.append((what, offset, length))
            self.now += 1
            self.most = max(self.most, self.now)
            meets = self._met < self._meet.parties
            self._met += 1
        try:
            if meets:
                self._meet.wait()
        finally:
            with self._mutex:
                self.now -= 1

    def read_into(self, offset: int, view: memoryview) -> None:
        self._count("read", offset, len(view))
        super().read_into(offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self._count("stable write" if flags & FUA else "write", offset, len(view))
        super().write(offset, view, flags)

    def flush(self) -> None:
        self.at_flushes.append(self.now)
        self.requests.append(("flush", 0, 0))
        super().flush()


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 20
    while workers.names and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not workers.names


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=200), st.sampled_from([0.1, 1, 50, 90, 99, 99.9, 100]))
def test_a_percentile_is_at_most_a_class_too_large(durations: list[int], percent: float) -> None:
    counted = Latencies()
    for duration in durations:
        counted.add(duration)
    exact = sorted(durations)[max(-(-len(durations) * percent // 100) - 1, 0).__trunc__()]
    assert exact <= counted.percentile(percent) <= exact + (exact >> 6)
    assert (counted.count, counted.total) == (len(durations), sum(durations))
    assert (counted.lowest, counted.highest) == (min(durations), max(durations))


def test_none_has_a_percentile() -> None:
    assert Latencies().percentile(99) == 0


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_the_requests_are_those_asked_for(depth: int) -> None:
    with Image(storage := Counting(together=depth)) as image:
        measured = bench(image, Load(20, depth, 4 * KIB, offset=8 * KIB))
    asked = [("read", (8 + 4 * number) % 64 * KIB, 4 * KIB) for number in range(20)]
    assert sorted(storage.requests) == sorted(asked)
    assert depth > 1 or storage.requests == asked
    assert storage.most == depth
    assert measured.latencies.count == 20
    assert 0 < measured.latencies.highest <= measured.nanoseconds


class Pipelined(MemoryStorage):
    """Storage whose started reads end when somebody waits for them."""

    pipelines = True

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.now = self.most = self.read = 0

    def start_read(self, offset: int, view: memoryview) -> Pending:
        self.now += 1
        self.most = max(self.most, self.now)
        return _Read(self, offset, view)


class _Read:
    def __init__(self, storage: Pipelined, offset: int, view: memoryview) -> None:
        self._storage, self._offset, self._view = storage, offset, view
        self._done = False

    def wait(self) -> None:
        if not self._done:
            self._done = True
            self._storage.now -= 1
            self._storage.read += 1
            self._storage.read_into(self._offset, self._view)

    def leave(self) -> None:
        self._done = True


@pytest.mark.parametrize("depth", [2, 9])
def test_storage_that_pipelines_has_them_in_flight_without_threads(depth: int) -> None:
    with Image(storage := Pipelined()) as image:
        measured = bench(image, Load(50, depth, 512))
        assert not workers.names
    assert (storage.most, storage.now, storage.read) == (depth, 0, 50)
    assert measured.latencies.count == 50


def test_a_step_may_be_larger_or_smaller_than_a_request() -> None:
    with Image(storage := Counting()) as image:
        bench(image, Load(4, 1, 512, step=24 * KIB))
        bench(image, Load(3, 1, 4 * KIB, step=512))
    assert [offset for _, offset, _ in storage.requests] == [0, 24 * KIB, 48 * KIB, 8 * KIB, 0, 512, 1024]


def test_writes_have_the_pattern_and_change_nothing_else() -> None:
    with Image(storage := Counting()) as image:
        image.write(0, b"\x11" * SIZE)
        bench(image, Load(3, 2, 1000, offset=10, step=2000, write=True, pattern=0xAB))
        wanted = bytearray(b"\x11" * SIZE)
        for at in (10, 2010, 4010):
            wanted[at : at + 1000] = b"\xab" * 1000
        assert image.read(0, SIZE) == wanted
    assert [what for what, _, _ in storage.requests].count("flush") == 0


def test_stable_writes_are_so() -> None:
    with Image(storage := Counting()) as image:
        bench(image, Load(3, 1, 512, write=True, stable=True))
    assert {what for what, _, _ in storage.requests} == {"stable write"}


def test_flushes_come_between_the_requests() -> None:
    with Image(storage := Counting()) as image:
        measured = bench(image, Load(10, 1, 512, write=True, flush_interval=4))
    assert [what[0] for what, _, _ in storage.requests] == list("wwwwfwwwwfww")
    assert measured.flushes == 2
    assert measured.latencies.count == 10


def test_a_flush_waits_for_the_requests_before_it_or_does_not() -> None:
    with Image(storage := Counting(together=4)) as image:
        bench(image, Load(24, 4, 512, write=True, flush_interval=4))
    assert storage.at_flushes == [0] * 5


def test_a_flush_may_come_beside_them() -> None:
    """The first four requests meet a fifth thread, which stands for the flush: with `drain` none would come."""

    class Beside(Counting):
        def flush(self) -> None:
            self._meet.wait()
            super().flush()

    with Image(storage := Beside(together=4)) as image:
        storage._meet = threading.Barrier(5, timeout=20)
        storage._met = 1
        bench(image, Load(5, 4, 512, write=True, flush_interval=4, drain=False))
    assert len(storage.at_flushes) == 1


def test_an_error_ends_the_run() -> None:
    class Broken(Counting):
        def read_into(self, offset: int, view: memoryview) -> None:
            if offset == 32 * KIB:
                raise BlockIOError("broken", errno=5)
            super().read_into(offset, view)

    for depth in (1, 5):
        with Image(storage := Broken()) as image:
            with pytest.raises(BlockIOError, match="broken"):
                bench(image, Load(10_000, depth))
            assert len(storage.requests) < 100
            assert storage.now == 0


def test_a_request_across_the_end_is_an_error() -> None:
    with Image(Counting()) as image, pytest.raises(OutOfRange):
        bench(image, Load(100, 1, 3000))
    with Image(Counting()) as image, pytest.raises(OutOfRange):
        bench(image, Load(1, 1, 512, offset=SIZE))


def test_it_can_be_stopped() -> None:
    monitor = Monitor()
    monitor.cancel()
    with Image(storage := Counting()) as image, pytest.raises(Cancelled):
        bench(image, Load(1000, 3), monitor)
    assert len(storage.requests) < 10


@pytest.mark.parametrize(
    ("load", "error"),
    [
        ({"count": 1, "depth": 0}, OptionError),
        ({"count": 1, "depth": MOST + 1}, OptionError),
        ({"count": -1}, OptionError),
        ({"count": 1, "size": 0}, OptionError),
        ({"count": 1, "offset": -1}, OptionError),
        ({"count": 1, "step": -1}, OptionError),
        ({"count": 1, "write": True, "pattern": 256}, OptionError),
        ({"count": 1, "flush_interval": 100}, OptionError),
        ({"count": 100, "write": True, "flush_interval": 63}, OptionError),
        ({"count": 64, "size": 32 * MIB}, LimitExceeded),
    ],
)
def test_a_load_without_sense_is_refused(load: dict[str, Any], error: type[LaminaError]) -> None:
    with pytest.raises(error):
        Load(**load)


def test_the_command_describes_its_run_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", MIB)
    assert main(["bench", "--output", "json", "-c", "50", "-d", "3", "-s", "1k", "-S", "2k", str(path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["operation"], told["count"], told["depth"], told["step-size"]) == ("read", 50, 3, 2048)
    assert told["bytes-per-second"] > 0
    times = told["latency-ns"]
    kept = [times["minimum"], *times["percentiles"].values(), times["maximum"]]
    assert kept == sorted(kept)
    assert list(times["percentiles"]) == ["50", "90", "95", "99", "99.9"]


def test_the_command_reads_unless_writes_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\x22" * MIB)
    assert main(["bench", "-c", "20", "--pattern", "9", "-f", "raw", str(path)]) == 0
    assert path.read_bytes() == b"\x22" * MIB
    assert main(["bench", "-c", "2", "-w", str(path)]) == 1  # the format is not detected of what is overwritten
    assert main(["bench", "-c", "2", "-w", "-U", "-f", "raw", str(path)]) == 1
    assert path.read_bytes() == b"\x22" * MIB
    assert main(["bench", "-c", "2", "-w", "--pattern", "9", "-f", "raw", str(path)]) == 0
    assert path.read_bytes() == b"\x09" * 8192 + b"\x22" * (MIB - 8192)
    assert "second" in capsys.readouterr().out

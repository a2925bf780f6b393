"""The rate limit of `convert` and `copy`: no more bytes pass than the time allows, and a cancel ends a wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import lamina
from lamina.errors import Cancelled, OptionError
from lamina.filters.throttle import SLACK
from lamina.jobs.convert import Offload, convert, convert_to_file
from lamina.jobs.copy import Copy, Plan
from lamina.jobs.copy_ends import PipeTarget, StorageSource
from lamina.jobs.progress import Monitor
from lamina.jobs.rate import RateLimit

MIB = 1 << 20


class Clock:
    """Time that passes only while a thread sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self._mutex = threading.Lock()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._mutex:
            self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("lamina.jobs.rate.clock", made)
    return made


def disk(content: bytes) -> lamina.Image:
    image = lamina.open({"driver": "memory", "size": len(content)}, read_only=False)
    image.write(0, content)
    return image


@pytest.mark.parametrize("parallel", [None, 3])
def test_neither_reads_nor_writes_pass_faster(clock: Clock, parallel: int | None) -> None:
    content = os.urandom(16 * MIB)
    with disk(content) as source, disk(bytes(len(content))) as target:
        convert(source, target, rate=MIB, parallel=parallel, in_order=parallel is None)
        # The last buffer passes without the time that it costs.
        assert clock.now >= 16 - 2 - SLACK
        assert target.read(0, len(content)) == content


def test_zeros_that_are_made_without_data_cost_nothing(clock: Clock) -> None:
    with lamina.open({"driver": "memory", "size": 16 * MIB}) as source, disk(os.urandom(16 * MIB)) as target:
        convert(source, target, rate=MIB)
        assert clock.now == 0
        assert not any(target.read(0, 16 * MIB))


@pytest.mark.parametrize("odd", [0, 3])
def test_zeros_that_are_written_as_data_count(clock: Clock, odd: int) -> None:
    length = 16 * MIB - odd
    with disk(bytes(length)) as source, disk(os.urandom(16 * MIB)) as target:
        with target.edit() as edit:
            edit.insert("nozero")
        convert(source, target, rate=MIB)
        assert clock.now >= 16 - 1 - SLACK
        assert not any(target.read(0, length))


@pytest.mark.parametrize(("offload", "waits"), [("copy", True), ("share", False)])
def test_what_the_system_copies_counts(clock: Clock, tmp_path: Path, offload: Offload, waits: bool) -> None:
    content = os.urandom(8 * MIB)
    (tmp_path / "a").write_bytes(content)
    with lamina.open(tmp_path / "a", format="raw") as source:
        done = convert_to_file(source, tmp_path / "b", "raw", {}, rate=MIB, offload=offload)
    assert (tmp_path / "b").read_bytes() == content
    assert done.copied + done.written == len(content)
    if waits or done.written:
        assert clock.now >= 8 - 2 - SLACK


def test_a_copy_to_a_pipe_counts_its_zeros(clock: Clock, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file, disk(bytes(8 * MIB)) as source:
        end = StorageSource(source)
        Copy(end, PipeTarget(file.fileno()), Plan(MIB, rate=MIB)).run()
        end.close()
    assert (tmp_path / "out").read_bytes() == bytes(8 * MIB)
    assert clock.now >= 8 - 1 - SLACK


def _cancelled(work: Callable[[Monitor], object]) -> None:
    """`work` takes years, unless a thread that cancels it ends its waits."""
    monitor = Monitor()
    timer = threading.Timer(0.05, monitor.cancel)
    timer.start()
    try:
        with pytest.raises(Cancelled):
            work(monitor)
    finally:
        timer.join()


def test_cancel_ends_the_wait_of_a_conversion(tmp_path: Path) -> None:
    with disk(os.urandom(8 * MIB)) as source:
        _cancelled(lambda monitor: convert_to_file(source, tmp_path / "b", "raw", {}, rate=1, monitor=monitor))
    assert os.listdir(tmp_path) == []


def test_cancel_ends_the_wait_of_a_copy(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file, disk(os.urandom(8 * MIB)) as source:
        end = StorageSource(source)
        _cancelled(lambda monitor: Copy(end, PipeTarget(file.fileno()), Plan(MIB, rate=1), monitor=monitor).run())
        end.close()


@pytest.mark.parametrize("rate", [0, -1])
def test_a_limit_is_above_nothing(rate: int) -> None:
    with pytest.raises(OptionError, match="rate limit"):
        RateLimit(rate, Monitor())

"""Threads that make calls for others: results, errors, cancelling, ends, forks."""

from __future__ import annotations

import _thread
import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from lamina import workers
from lamina.errors import Cancelled
from lamina.testing.interrupts import in_another_thread
from lamina.workers import Task, Workers

PATIENCE = 20.0


def wait_until_ended() -> None:
    deadline = time.monotonic() + PATIENCE
    while workers.names and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not workers.names


@pytest.fixture
def two() -> Iterator[Workers]:
    made = Workers(2, "two")
    yield made
    made.close()
    made.close()
    wait_until_ended()


def test_results_and_errors(two: Workers) -> None:
    tasks = [two.submit(divmod, 7, number) for number in range(3)]
    assert [task.result() for task in tasks[1:]] == [(7, 0), (3, 1)]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            tasks[0].result()
    assert isinstance(tasks[0].wait(), ZeroDivisionError)
    assert tasks[1].wait() is None
    assert all(task.finished for task in tasks)
    deadline = time.monotonic() + PATIENCE
    while len(workers.names) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sorted(workers.names.values()) == ["two_0", "two_1"]


def test_a_map_keeps_the_order(two: Workers) -> None:
    assert two.map(lambda number: time.sleep(0.01 if number == 0 else 0) or number, range(5)) == list(range(5))


def test_a_map_that_fails_leaves_nothing_under_way(two: Workers) -> None:
    calls: list[int] = []
    first = threading.Event()

    def call(number: int) -> None:
        if number == 0:
            assert first.wait(PATIENCE)
            raise MemoryError
        calls.append(number)
        first.set()
        time.sleep(0.05)
        calls.append(number)

    with pytest.raises(MemoryError):
        two.map(call, range(2))
    assert calls == [1, 1]


def test_what_is_cancelled_does_not_begin(two: Workers) -> None:
    go_on, ran = threading.Event(), list[int]()
    blocked = [two.submit(go_on.wait, PATIENCE) for _ in range(2)]
    waiting = two.submit(ran.append, 1)
    waiting.cancel()
    waiting.cancel()
    go_on.set()
    assert isinstance(waiting.wait(), Cancelled)
    assert all(task.result() for task in blocked)
    assert not ran
    for task in (*blocked, waiting):
        task.cancel()  # nothing is left to be cancelled


def test_cancelling_waits_for_what_is_under_way(two: Workers) -> None:
    begun, ended = threading.Event(), list[bool]()

    def work() -> None:
        begun.set()
        time.sleep(0.05)
        ended.append(True)

    task = two.submit(work)
    assert begun.wait(PATIENCE)
    task.cancel()
    assert ended
    assert task.wait() is None


def test_finished_tasks() -> None:
    assert Task.of(3).result() == 3
    with pytest.raises(OSError, match="full"):
        Task.failed(OSError("full")).result()
    Task.of(3).cancel()


def test_a_task_keeps_nothing_alive(two: Workers) -> None:
    class Buffer(bytearray):
        pass

    def fail(_: Buffer) -> None:
        raise ValueError

    gc.disable()
    try:
        buffer = Buffer(10)
        kept = weakref.ref(buffer)
        task = two.submit(fail, buffer)
        with pytest.raises(ValueError, match=r"^$"):
            task.result()
        del task, buffer
        deadline = time.monotonic() + PATIENCE
        while kept() is not None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert kept() is None
    finally:
        gc.enable()


def test_workers_that_are_given_up_end() -> None:
    made = Workers(3, "given up")
    assert [made.submit(int, "3").result() for _ in range(3)] == [3, 3, 3]
    del made
    wait_until_ended()


@pytest.mark.parametrize("started", [0, 1])
def test_no_more_threads(monkeypatch: pytest.MonkeyPatch, started: int) -> None:
    """The one that is there does the work, or the caller."""
    made, real = Workers(2, "few"), _thread.start_new_thread
    allowed = [None] * started

    def start(*arguments: object) -> int:
        if not allowed:
            raise RuntimeError("can't start new thread")
        allowed.pop()
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_thread, "start_new_thread", start)
    tasks = [made.submit(threading.get_ident) for _ in range(4)]
    assert len({task.result() for task in tasks}) == 1
    assert (tasks[0].result() == threading.get_ident()) == (not started)
    made.close()
    wait_until_ended()


def test_a_forked_child_has_threads_of_its_own(two: Workers) -> None:
    assert two.map(abs, [-1, -2]) == [1, 2]
    child = os.fork()
    if not child:
        try:
            in_another_thread(lambda: two.map(abs, [-1, -2]))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert two.map(abs, [-3]) == [3]

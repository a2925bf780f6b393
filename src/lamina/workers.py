"""Threads that execute calls. An interrupt may strike their users at any step.

The module uses queues, locks and threads of C code, each of which completes an operation in one step. The executors, futures
and conditions of the standard library are written in Python: an exception between two of their steps (by Ctrl-C, for example)
leaves locks held, and then every executor of the process waits for ever.
"""

from __future__ import annotations

import _thread
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from .errors import Cancelled

_T = TypeVar("_T")

#: The running worker threads of this process by identifier, with the names of their `Workers`, for debugging:
#: `threading.enumerate` does not list them.
names: dict[int, str] = {}

#: The interval in seconds at which a thread that waits for a task checks whether it is finished.
_POLL_INTERVAL = 0.1


class Task(Generic[_T]):
    """A call that is executed once. Any thread may wait for it or cancel it; each method can be called again, also after an
    interrupt.

    `begun`: a worker has taken it. `finished`: the call has returned or raised, or will not be executed.
    """

    __slots__ = ("_arguments", "_call", "_cancelled", "_error", "_value", "_wake", "begun", "finished")

    begun: bool
    finished: bool

    def __init__(self, call: Callable[..., _T], *arguments: Any) -> None:
        self._call, self._arguments = call, arguments
        self._cancelled = self.begun = self.finished = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._wake = _thread.allocate_lock()  # the worker releases it at the end
        self._wake.acquire()

    @classmethod
    def of(cls, value: _T) -> Task[_T]:
        """A finished task with this result."""
        return cls._finished(value, None)

    @classmethod
    def failed(cls, error: BaseException) -> Task[_T]:
        """A finished task that raised `error`."""
        return cls._finished(None, error)

    @classmethod
    def _finished(cls, value: _T | None, error: BaseException | None) -> Task[_T]:
        task = cls.__new__(cls)
        task._value, task._error = value, error
        task.begun = task.finished = True
        return task

    def wait(self) -> BaseException | None:
        """Wait, and return the error of the call or None. The error is Cancelled if the call was cancelled before it
        began."""
        self._await_end()
        return self._error

    def result(self) -> _T:
        """Wait, and return the result of the call or raise its error."""
        if (error := self.wait()) is None:
            value: _T = self._value
            return value
        try:
            raise error
        finally:
            del self, error  # the traceback refers to this frame, which would keep the task and its error alive

    def cancel(self) -> None:
        """When this returns, the call is not in progress and will not begin."""
        # Each thread first records its own step and then reads that of the other: at least one of them sees the other.
        self._cancelled = True
        if self.begun:
            self._await_end()

    def _await_end(self) -> None:
        while not self.finished:
            if self._wake.acquire(timeout=_POLL_INTERVAL):
                self._wake.release()  # for other waiting threads; if an interrupt prevents it, they poll


def run(task: Task[Any]) -> None:
    """Execute the call of `task` in this thread."""
    task.begun = True
    try:
        if task._cancelled:
            raise Cancelled("the call was cancelled before it began")
        task._value = task._call(*task._arguments)
    except BaseException as error:  # noqa: BLE001 - raised by the thread that waits for the task
        task._error = error
    task._call = task._arguments = None  # type: ignore[assignment]  # buffers, above all
    task.finished = True
    task._wake.release()
    del task  # see `Task.result`


class Workers:
    """At most `count` threads, started on demand, which end after `close` or with the program. The program does not wait for
    their calls, so the owner cancels them first. Thread-safe. A forked child starts its own threads; it does not execute
    calls that were submitted before the fork."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._started = 0
        self._process = os.getpid()
        self._tasks: SimpleQueue[Task[Any] | None] = SimpleQueue()

    def submit(self, call: Callable[..., _T], *arguments: Any) -> Task[_T]:
        """A task for call(*arguments), which is queued, in progress or finished."""
        task: Task[_T] = Task(call, *arguments)
        self.start(task)
        return task

    def start(self, task: Task[Any]) -> None:
        """Submit a task that its creator has recorded already, so that an interrupt cannot lose it."""
        if self._process != os.getpid():
            self._started, self._process, self._tasks = 0, os.getpid(), SimpleQueue()
        if self._started < self._count:
            try:
                # An interrupt before the counter is incremented makes for one surplus thread, which ends with the others.
                _thread.start_new_thread(_work, (self._tasks, f"{self._name}_{self._started}"))
                self._started += 1
            except RuntimeError:  # the process has reached its limit of threads
                if not self._started:
                    run(task)
                    return
        self._tasks.put(task)

    def map(self, call: Callable[..., _T], items: Iterable[Any]) -> list[_T]:
        """call(item) for each item, with the results in the order of the items. Raises the error of the first failed one,
        when no call is in progress any more."""
        with closing(self.results(call, items)) as found:
            return list(found)

    def results(self, call: Callable[..., _T], items: Iterable[Any]) -> Generator[_T, None, None]:
        """The same, each result as soon as it and those before it are there. When this generator is closed, no call is in
        progress."""
        tasks: list[Task[_T]] = []
        try:
            for item in items:
                tasks.append(Task(call, item))
                self.start(tasks[-1])
            for task in tasks:
                yield task.result()
        finally:
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """Let the threads end after the submitted calls. Does not wait. May be called again."""
        self._tasks.put(None)

    def __del__(self) -> None:
        if "_tasks" in self.__dict__:  # otherwise an interrupt struck before `__init__`
            self.close()


def _work(tasks: SimpleQueue[Task[Any] | None], name: str) -> None:
    names[_thread.get_ident()] = name
    try:
        while (task := tasks.get()) is not None:
            run(task)
            del task
    finally:
        del names[_thread.get_ident()]
        tasks.put(None)  # for the next thread

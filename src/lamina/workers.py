"""Threads that make calls for others: an interrupt may strike whoever uses them, at any step.

Made of queues, locks and threads of C code, each of which does its work in one step. The executors, futures and conditions
of the standard library are written in Python: an exception between two of their steps (Ctrl-C is one) leaves locks taken,
and then every executor of the process waits for ever.
"""

from __future__ import annotations

import _thread
import os
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from .errors import Cancelled

_T = TypeVar("_T")

#: The running worker threads of this process by identifier, each named after its `Workers`: for whoever looks at a process
#: from outside, since `threading.enumerate` does not tell them.
names: dict[int, str] = {}

#: Seconds after which a thread that waits for a task looks whether it is finished.
_LOOK_AGAIN = 0.1


class Task(Generic[_T]):
    """A call that is made once. Any thread may wait for it or cancel it; each method can be called again, after an interrupt
    too.

    `begun`: its worker has it. `finished`: the call has returned or raised, or will not be made.
    """

    __slots__ = ("_arguments", "_call", "_cancelled", "_error", "_value", "_wake", "begun", "finished")

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
        """Wait, and return the error that the call raised, or None: Cancelled if it was cancelled before it began."""
        self._await_end()
        return self._error

    def result(self) -> _T:
        """Wait, and return what the call returned, or raise what it raised."""
        if (error := self.wait()) is None:
            value: _T = self._value
            return value
        try:
            raise error
        finally:
            del self, error  # the error's traceback names this frame: it would keep the task, and the task the error

    def cancel(self) -> None:
        """When this returns the call is not under way, and will not begin."""
        # Each side says first what it does, then looks at what the other said: one of them sees it, or both.
        self._cancelled = True
        if self.begun:
            self._await_end()

    def _await_end(self) -> None:
        while not self.finished:
            if self._wake.acquire(timeout=_LOOK_AGAIN):
                self._wake.release()  # for other threads that wait; where an interrupt keeps it, they look again


def run(task: Task[Any]) -> None:
    """Make the call of `task`, in this thread."""
    task.begun = True
    try:
        if task._cancelled:
            raise Cancelled("the call was cancelled before it began")
        task._value = task._call(*task._arguments)
    except BaseException as error:  # noqa: BLE001 - whoever waits for the task raises it
        task._error = error
    task._call = task._arguments = None  # type: ignore[assignment]  # buffers, above all
    task.finished = True
    task._wake.release()
    del task  # see `Task.result`


class Workers:
    """At most `count` threads, started when they are needed, which end after `close`, or with the program: what they do then
    is not waited for, so an owner cancels it first. Any number of threads may use them at once. In a forked child they start
    anew; what was submitted before the fork is not done there."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._started = 0
        self._process = os.getpid()
        self._tasks: SimpleQueue[Task[Any] | None] = SimpleQueue()

    def submit(self, call: Callable[..., _T], *arguments: Any) -> Task[_T]:
        """call(*arguments), which is done, under way, or waits for its turn."""
        task: Task[_T] = Task(call, *arguments)
        self.start(task)
        return task

    def start(self, task: Task[Any]) -> None:
        """Hand over a task that its maker has noted already, so that an interrupt cannot leave it to nobody."""
        if self._process != os.getpid():
            self._started, self._process, self._tasks = 0, os.getpid(), SimpleQueue()
        if self._started < self._count:
            try:
                # An interrupt before the count is raised makes for one thread too many, which ends with the others.
                _thread.start_new_thread(_work, (self._tasks, f"{self._name}_{self._started}"))
                self._started += 1
            except RuntimeError:  # the process may have no more of them
                if not self._started:
                    run(task)
                    return
        self._tasks.put(task)

    def map(self, call: Callable[..., _T], items: Iterable[Any]) -> list[_T]:
        """call(item) for each item, in their order. Raises what the first of those that failed raised, when no call is
        under way any more."""
        tasks: list[Task[_T]] = []
        try:
            for item in items:
                tasks.append(Task(call, item))
                self.start(tasks[-1])
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """Let the threads end, when they have done what was submitted. Waits for nothing. May be called again."""
        self._tasks.put(None)

    def __del__(self) -> None:
        if "_tasks" in self.__dict__:  # else an interrupt struck before `__init__`
            self.close()


def _work(tasks: SimpleQueue[Task[Any] | None], name: str) -> None:
    names[_thread.get_ident()] = name
    try:
        while (task := tasks.get()) is not None:
            run(task)
            del task
    finally:
        del names[_thread.get_ident()]
        tasks.put(None)  # for the next one

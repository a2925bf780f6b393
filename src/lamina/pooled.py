"""Storage that is far away and knows only calls that wait: its started requests are made by threads of its own.

The base class of drivers for object stores, HTTP and the like. Such a driver implements `read_into`, `write`, `zero` and
`extents` as any other storage does; several of them are under way at once because jobs start them (`Node.start_read`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

from .node import StorageNode
from .pending import Pending
from .workers import Task, Workers


class PooledStorage(StorageNode):
    """Storage whose started requests run in a pool of `threads` threads, which are started when they are needed and end with
    `close`. An owner that gives a request up, or closes the node, waits for calls that are under way: so each call must end,
    by a time limit of the driver's own."""

    far = True
    #: How many started requests are under way at once; more wait in line.
    threads: ClassVar[int] = 8

    def __init__(self, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self._workers = Workers(self.threads, f"lamina-{self.driver}")
        self._tasks: deque[Task[Any]] = deque()  # those that may be under way

    @property
    def pipelines(self) -> bool:
        return True

    def start_read(self, offset: int, view: memoryview) -> Pending:
        return self._submit(self.read_into, offset, view)

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        return self._submit(self.write, offset, view, flags)

    def start_zero_runs(self, offset: int, length: int) -> Pending:
        return self._submit(self.zero_runs, offset, length)

    def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        self._workers.close()
        super().close()

    def _submit(self, call: Callable[..., Any], *arguments: Any) -> Pending:
        tasks = self._tasks
        while tasks and tasks[0].finished:
            tasks.popleft()
        task = Task(call, *arguments)
        tasks.append(task)  # before a thread can have it
        self._workers.start(task)
        return _Call(task)


# A driver that derives from it gets these methods back where it has `read_into` and the others of its own.
PooledStorage.starts_as = PooledStorage


class _Call:
    """A request that a thread of the pool makes."""

    __slots__ = ("_task",)

    def __init__(self, task: Task[Any]) -> None:
        self._task = task

    def wait(self) -> Any:
        return self._task.result()

    def leave(self) -> None:
        self._task.cancel()

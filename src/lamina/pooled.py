"""The base class of drivers for remote storage with blocking calls only, such as HTTP and object stores.

Such a driver implements `read_into`, `write`, `zero` and `extents` like any other storage. A pool of threads makes the
requests that jobs start (`Node.start_read`), so that several are in flight at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

from .node import StorageNode
from .pending import Pending
from .workers import Task, Workers


class PooledStorage(StorageNode):
    """Storage whose started requests run in a pool of `threads` threads. The threads start on demand, and end after `close`.
    `Pending.leave` and `close` wait for running calls, so the driver must give each call a time limit."""

    far = True
    #: The number of requests in flight at once; others wait in a queue.
    threads: ClassVar[int] = 8

    def __init__(self, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self._workers = Workers(self.threads, f"lamina-{self.driver}")
        self._tasks: deque[Task[Any]] = deque()  # those that may be running

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


# These methods are the defaults of derived drivers, which override `read_into` and the other operations.
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

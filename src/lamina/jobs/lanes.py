"""Requests beside each other: where storage is far away, several at once take no longer than one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ..errors import OptionError
from ..node import Node, StorageNode
from ..workers import Task, Workers

#: Requests at once to storage that is far away; and the most that may be asked for.
FAR, MOST = 8, 16
#: A call that takes so many seconds has waited. (2 MiB from or to a server on this machine take 1 ms, and eight threads are a
#: quarter slower at that than one. With 20 ms for each request they are four to six times as fast.)
WAITED = 0.004

_I = TypeVar("_I")
_T = TypeVar("_T")


class Lanes:
    """Runs calls beside each other in `count` threads, once two of them, one after the other, have waited; if `eager`, from
    the first on. Until then each runs at once in its caller's thread: those that do not wait only get in each other's way.
    One thread at a time may use it."""

    def __init__(self, count: int, name: str, *, eager: bool = False) -> None:
        self.count = count
        self._workers = Workers(count, name) if count > 1 else None
        self._tasks: deque[Task[Any]] = deque()  # those that may be under way
        self._waited = 2 if eager else 0

    def submit(self, call: Callable[[_I], _T], item: _I) -> Task[_T]:
        """call(item), which is done, under way, or waits for its turn. What it raises, the result raises."""
        if self._workers is not None and self._waited >= 2:
            while self._tasks and self._tasks[0].finished:
                self._tasks.popleft()
            task = Task(call, item)
            self._tasks.append(task)  # before a thread can have it
            self._workers.start(task)
            return task
        begun = time.monotonic()
        try:
            task = Task.of(call(item))
        except Exception as error:  # noqa: BLE001 - whoever asks for the result gets it
            task = Task.failed(error)
        self._waited = self._waited + 1 if time.monotonic() - begun > WAITED else 0
        return task

    def in_order(self, call: Callable[[_I], _T], items: Iterable[_I]) -> Iterator[tuple[_I, _T]]:
        """(item, call(item)) in the order of the items; as many as there are lanes are under way. What the call raises is
        raised when it is that item's turn."""
        if self._workers is None:
            for item in items:
                yield item, call(item)
            return
        under_way: deque[tuple[_I, Task[_T]]] = deque()
        for item in items:
            under_way.append((item, self.submit(call, item)))
            while under_way and (len(under_way) == self.count or under_way[0][1].finished):
                first, done = under_way.popleft()
                yield first, done.result()
        for item, done in under_way:
            yield item, done.result()

    def close(self) -> None:
        """Calls that wait for their turn are given up; returns when none is under way. May be called again."""
        if self._workers is not None:
            for task in self._tasks:
                task.cancel()
            self._workers.close()


def lanes_for(*tops: Node, asked: int | None, name: str) -> Lanes:
    """Lanes for requests to these graphs: as many as were `asked` for, else one, or several where some of their storage is
    far away. OptionError where too many are asked for."""
    if asked is None:
        return Lanes(FAR if any(map(is_far, tops)) else 1, name)
    if not 1 <= asked <= MOST:
        raise OptionError(f"{asked} requests cannot be under way at once", hint=f"ask for 1 to {MOST}")
    return Lanes(asked, name, eager=True)


def is_far(top: Node) -> bool:
    """Whether some storage below `top` is far away."""
    return (isinstance(top, StorageNode) and top.far) or any(is_far(child.node) for child in top.children.values())

"""How jobs make requests: a bounded number of them under way at once, finished in order.

A job starts requests and asks for them later (`lamina.pending`). Storage that pipelines has them on their way from the job's
own thread. Other storage that is far away gets threads, as soon as calls turn out to wait. What is near is done at once:
threads would only get in each other's way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import OptionError
from ..limits import KIB
from ..node import Node, StorageNode
from ..pending import DONE, Pending
from ..workers import Task, Workers

if TYPE_CHECKING:
    from ..image import Image

#: Requests at once to storage that is far away; and the most that may be asked for.
FAR, MOST = 8, 16
#: A call that takes so many seconds has waited. (2 MiB from or to a server on this machine take 1 ms, and eight threads are a
#: quarter slower at that than one. With 20 ms for each request they are four to six times as fast.)
WAITED = 0.004
#: Stored bytes that lie no further apart than this, in bytes, are read with one request, and the zeros between them are found
#: again: a request of its own takes longer than so many bytes, from a file as over a network.
NEAR = 16 * KIB

_I = TypeVar("_I")


class Requests:
    """Makes requests to one image, of which a job has `count` under way at once. Where the storage does not pipeline, `count`
    threads make them once two, one after the other, have waited; if `eager`, from the first on. An error is raised when the
    request is waited for, and not before. One thread at a time may use it."""

    def __init__(self, image: Image, count: int, name: str, *, eager: bool = False) -> None:
        self.count = count
        self._edge = image.root
        self._pipelines = count > 1 and image.node.pipelines
        self._workers = Workers(count, name) if count > 1 and not self._pipelines else None
        self._waited = 2 if eager else 0
        self._tasks: deque[Task[None]] = deque()  # those that may be under way

    def start_read(self, offset: int, view: memoryview) -> Pending:
        """Begin to fill `view` with the bytes at `offset`."""
        return self._start(self._edge.start_read, self._edge.read_into, offset, view)

    def start_write(self, offset: int, view: memoryview) -> Pending:
        """Begin to make the bytes at `offset` equal to `view`."""
        return self._start(self._edge.start_write, self._edge.write, offset, view)

    def start_zero(self, offset: int, length: int, flags: int) -> Pending:
        """Begin to make the bytes read as zero."""
        return self._start(self._edge.start_zero, self._edge.zero, offset, length, flags)

    def close(self) -> None:
        """Calls of threads that wait for their turn are given up; returns when none is under way. May be called again."""
        for task in tuple(self._tasks):
            task.cancel()
        if self._workers is not None:
            self._workers.close()

    def _start(self, start: Callable[..., Pending], call: Callable[..., None], *arguments: Any) -> Pending:
        if self._workers is not None and self._waited >= 2:
            while self._tasks and self._tasks[0].finished:
                self._tasks.popleft()
            task = Task(call, *arguments)
            self._tasks.append(task)  # before a thread can have it
            self._workers.start(task)
            return _Threaded(task)
        begun = time.monotonic()
        try:
            if self._pipelines:
                return start(*arguments)
            call(*arguments)
        except Exception as error:  # noqa: BLE001 - whoever waits for the request gets it
            return Failed(error)
        self._waited = self._waited + 1 if time.monotonic() - begun > WAITED else 0
        return DONE


class _Threaded:
    """A request that a thread makes."""

    __slots__ = ("task",)

    def __init__(self, task: Task[None]) -> None:
        self.task = task

    def wait(self) -> None:
        self.task.result()

    def leave(self) -> None:
        self.task.cancel()


class Failed:
    """A request that failed when it was started."""

    __slots__ = ("_error",)

    def __init__(self, error: Exception) -> None:
        self._error = error

    def wait(self) -> None:
        try:
            raise self._error
        finally:
            del self  # the error's traceback names this frame

    def leave(self) -> None:
        return


def in_order(items: Iterable[_I], begin: Callable[[_I], Sequence[Pending]], count: int) -> Generator[_I, None, None]:
    """Each item, in their order, when what `begin` started for it is finished; at most `count` items are under way. What a
    request raises is raised when it is its item's turn."""
    under_way: deque[tuple[_I, Sequence[Pending]]] = deque()
    try:
        for item in items:
            under_way.append((item, begin(item)))
            while under_way and (len(under_way) >= count or all(request is DONE for request in under_way[0][1])):
                yield _first(under_way)
        while under_way:
            yield _first(under_way)
    finally:
        for _, requests in under_way:
            for request in requests:
                request.leave()


def _first(under_way: deque[tuple[_I, Sequence[Pending]]]) -> _I:
    """The first item, when its requests are finished."""
    item, requests = under_way[0]
    for request in requests:
        request.wait()
    under_way.popleft()
    return item


def requests_for(image: Image, *others: Node, asked: int | None, name: str) -> Requests:
    """Requests to `image`: as many at once as were `asked` for, else one, or several where some storage of it, or of
    `others`, is far away. OptionError where too many are asked for."""
    if asked is None:
        return Requests(image, FAR if any(map(is_far, (image.node, *others))) else 1, name)
    if not 1 <= asked <= MOST:
        raise OptionError(f"{asked} requests cannot be under way at once", hint=f"ask for 1 to {MOST}")
    return Requests(image, asked, name, eager=True)


def is_far(top: Node) -> bool:
    """Whether some storage below `top` is far away."""
    return (isinstance(top, StorageNode) and top.far) or any(is_far(child.node) for child in top.children.values())

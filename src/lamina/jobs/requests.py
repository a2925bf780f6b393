"""How jobs make requests: a bounded number in flight, finished in order.

A job starts requests and waits for them later (`lamina.pending`). Storage that pipelines has them in flight at once, from the
job's own thread. For other remote storage a pool of threads makes them, as soon as the latency of the first calls shows that
this pays. Requests to local storage complete at once: more threads would only compete.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import LaminaError, NotSupported, OptionError
from ..limits import KIB, MIB, align_down, align_up
from ..node import NO_FALLBACK, Node, StorageNode
from ..pending import DONE, Pending
from ..workers import Task, Workers

if TYPE_CHECKING:
    from ..image import Image
    from .rate import RateLimit

#: The number of requests in flight to remote storage, and the largest number that a caller may choose.
FAR, MOST = 8, 16
#: The latency, in seconds, from which a pool pays. (2 MiB from or to a server on the same machine take 1 ms, where eight
#: threads are a quarter slower than one. With 20 ms for each request they are four to six times as fast.)
WAITED = 0.004
#: Allocated ranges at most so many bytes apart are read with one request, and the search for zeros finds the gaps between
#: them: a request takes longer than reading so many bytes, from a file as well as over a network.
NEAR = 16 * KIB
#: The longest request that writes zeros as data under a rate limit.
_ZEROS = 1 * MIB

_I = TypeVar("_I")


class Requests:
    """Makes the requests of a job to one image, `count` of them at once. Storage that pipelines has them in flight. Where a
    request is done when it is started, a pool of `count` threads makes further ones after two such calls of high latency in a
    row; if `eager`, and the storage does not pipeline, from the first on. `Pending.wait` raises the error of a request, never
    the method that started it. Each request first waits for its share of the `rate`. For use by one thread at a time."""

    def __init__(
        self, image: Image, count: int, name: str, *, eager: bool = False, rate: RateLimit | None = None
    ) -> None:
        self.count = count
        self._rate = rate
        self._edge = image.root
        self._pipelines = count > 1 and image.node.pipelines
        self._workers = Workers(count, name) if count > 1 else None
        self._waited = 2 if eager and not self._pipelines else 0
        self._tasks: deque[Task[None]] = deque()  # those that may be under way

    def start_read(self, offset: int, view: memoryview) -> Pending:
        """Begin to fill `view` with the bytes at `offset`."""
        if self._rate is not None:
            try:
                self._rate.before_read(len(view))
            except LaminaError as error:
                return Failed(error)
        return self._start(self._edge.start_read, self._edge.read_into, offset, view)

    def start_write(self, offset: int, view: memoryview) -> Pending:
        """Begin to make the bytes at `offset` equal to `view`."""
        if self._rate is not None:
            try:
                self._rate.before_write(len(view))
            except LaminaError as error:
                return Failed(error)
        return self._start(self._edge.start_write, self._edge.write, offset, view)

    def start_zero(self, offset: int, length: int, flags: int) -> Pending:
        """Begin to make the bytes read as zero."""
        if self._rate is not None:
            try:
                self._zero_limited(self._rate, offset, length, flags)
            except LaminaError as error:
                return Failed(error)
            return DONE
        return self._start(self._edge.start_zero, self._edge.zero, offset, length, flags)

    def _zero_limited(self, rate: RateLimit, offset: int, length: int, flags: int) -> None:
        """Zero these bytes. Those for which zeros are written count as written."""
        end = offset + length
        unit = self._edge.node.limits.zero_alignment
        lo, hi = min(align_up(offset, unit), end), max(align_down(end, unit), offset)
        middle = [(lo, hi)] if lo < hi else []
        try:
            for at, to in middle:
                self._edge.zero(at, to - at, flags | NO_FALLBACK)
            ends = [(offset, lo), (hi, end)] if middle else [(offset, end)]
        except NotSupported:
            ends = [(offset, end)]
        for at, to in ends:
            while at < to:
                count = min(to - at, _ZEROS)
                rate.before_write(count)
                self._edge.zero(at, count, flags)
                at += count

    def close(self) -> None:
        """Cancel the calls that no thread has begun, and wait for the others. May be called again."""
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
            return Threaded(task)
        begun = time.monotonic()
        try:
            if self._pipelines:
                request = start(*arguments)
                if request is not DONE:
                    self._waited = 0
                    return request
            else:
                call(*arguments)
        except Exception as error:  # noqa: BLE001 - `Pending.wait` raises it
            return Failed(error)
        self._waited = self._waited + 1 if time.monotonic() - begun > WAITED else 0
        return DONE


class Threaded:
    """A request that a thread makes."""

    __slots__ = ("task",)

    def __init__(self, task: Task[Any]) -> None:
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
    """Yield each item, in order, when the requests that `begin(item)` started are finished; the requests of at most `count`
    items are in flight. The error of a request is raised when its item would be yielded."""
    under_way: deque[tuple[_I, Sequence[Pending]]] = deque()
    try:
        for item in items:
            under_way.append((item, begin(item)))
            while under_way and (len(under_way) >= count or _is_done(under_way[0][1])):
                yield _first(under_way)
        while under_way:
            yield _first(under_way)
    finally:
        for _, requests in under_way:
            for request in requests:
                request.leave()


def in_two_steps(
    items: Iterable[_I],
    begin: Callable[[_I], Sequence[Pending]],
    proceed: Callable[[_I], Sequence[Pending]],
    count: int,
) -> Generator[_I, None, None]:
    """The same for items that take two steps: `proceed(item)` starts further requests when those of `begin(item)` are
    finished, in order. At most `count` items are in flight; each step has half of them where both take time. When a request
    fails, the items before it that finish are still yielded, and then its error is raised."""
    first: deque[tuple[_I, Sequence[Pending]]] = deque()
    second: deque[tuple[_I, Sequence[Pending]]] = deque()
    try:
        for item in items:
            first.append((item, begin(item)))
            while first and (_is_done(first[0][1]) or len(first) + len(second) >= count):
                if not _is_done(first[0][1]) and second and len(first) <= count // 2:
                    yield _first(second)
                else:
                    item = _first(first)
                    second.append((item, proceed(item)))
                while second and _is_done(second[0][1]):
                    yield _first(second)
            while len(second) >= count:
                yield _first(second)
        while first:
            item = _first(first)
            second.append((item, proceed(item)))
            while second and _is_done(second[0][1]):
                yield _first(second)
        while second:
            yield _first(second)
    except LaminaError:
        with suppress(LaminaError):
            while second:
                yield _first(second)
        raise
    finally:
        for _, requests in (*first, *second):
            for request in requests:
                request.leave()


def _is_done(requests: Sequence[Pending]) -> bool:
    """Whether all of these were finished when they were started."""
    return all(request is DONE for request in requests)


def _first(under_way: deque[tuple[_I, Sequence[Pending]]]) -> _I:
    """The first item, when its requests are finished."""
    item, requests = under_way[0]
    for request in requests:
        request.wait()
    under_way.popleft()
    return item


def requests_for(image: Image, *others: Node, asked: int | None, name: str, rate: RateLimit | None = None) -> Requests:
    """Requests to `image`: as many at once as were `asked` for, else one, or several where some storage of it, or of
    `others`, is far away. OptionError where too many are asked for."""
    if asked is None:
        return Requests(image, FAR if any(map(is_far, (image.node, *others))) else 1, name, rate=rate)
    if not 1 <= asked <= MOST:
        raise OptionError(f"{asked} requests cannot be under way at once", hint=f"ask for 1 to {MOST}")
    return Requests(image, asked, name, eager=True, rate=rate)


def is_far(top: Node) -> bool:
    """Whether some storage below `top` is far away."""
    return (isinstance(top, StorageNode) and top.far) or any(is_far(child.node) for child in top.children.values())


def reconnects(top: Node) -> bool:
    """Whether some storage below `top` reconnects after the loss of a connection. Its flush may then fail once, because
    the server may have restarted without what was written since the flush before."""
    if isinstance(top, StorageNode) and top.reconnects:
        return True
    return any(reconnects(child.node) for child in top.children.values())

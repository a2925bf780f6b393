"""Whole-image work for the tasks of event loops: any function of the package, in a thread of its own.

A function that takes `cancel` (an object with `is_set`), or `monitor`, is cancelled with its task: it removes what it made,
as for any other reason to stop, and the await ends after that. Others run to their end first. `progress` is called in the
thread of the event loop, and the function waits for it: an exception stops the function there, before its next step.
"""

from __future__ import annotations

import _thread
import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from functools import partial, wraps
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from ..errors import Cancelled
from ..workers import Workers
from .calls import Call, in_thread, passing_to

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: So many functions run at once; further ones wait. Each may have threads of its own.
AT_ONCE = 32
_threads = Workers(AT_ONCE, "lamina-aio-work")
#: An iterator is advanced by a thread for so many seconds, or items, before the event loop gets them.
_STEP_SECONDS, _STEP_ITEMS = 0.05, 256
#: The interval in seconds at which a function that waits for `progress` checks whether its event loop was closed.
_POLL_INTERVAL = 0.1


class _Link:
    """Between a job in a thread and the task that awaits it. It is the event `cancel` of the job."""

    def __init__(self, function: Callable[..., object], named: dict[str, Any]) -> None:
        """`named`: the arguments of the function, which are changed to use this link."""
        try:
            known = inspect.signature(function).parameters
        except ValueError:  # a function of C, which takes none of them
            known = MappingProxyType({})
        self._stopped = False
        self._given: Any = None
        self._cancel: Callable[[], object] = lambda: None
        self.failure: BaseException | None = None
        progress = named.get("progress")
        if "monitor" in known:
            if named.get("monitor") is None:
                from ..jobs.progress import Monitor

                named["monitor"] = Monitor()
            self._cancel = named["monitor"].cancel
        if "cancel" in known:
            self._given = named.get("cancel")
            named["cancel"] = self
        if progress is not None and "progress" in known:
            self._progress: Callable[..., object] = progress
            self._loop = asyncio.get_running_loop()
            named["progress"] = self._tell

    def is_set(self) -> bool:
        """Whether the job is to stop."""
        return self._stopped or (self._given is not None and bool(self._given.is_set()))

    def cancel(self) -> None:
        """Ask the job to stop."""
        self._stopped = True
        self._cancel()

    def _tell(self, *told: object) -> None:
        """The `progress` of the job: let the event loop call that of the caller, and wait until it has. Raises Cancelled if
        it raised, and if the event loop was closed."""
        heard = _thread.allocate_lock()
        heard.acquire()
        try:
            self._loop.call_soon_threadsafe(self._report, heard, *told)
        except RuntimeError:  # the loop was closed
            self.cancel()
        while not self._stopped and not heard.acquire(timeout=_POLL_INTERVAL):
            if self._loop.is_closed():
                self.cancel()
        if self.failure is not None or self._loop.is_closed():
            raise Cancelled("the job was stopped")

    def _report(self, heard: _thread.LockType, *told: object) -> None:
        """Call `progress`, which may raise to stop the job: CancelledError, too."""
        try:
            if not self._stopped:
                self._progress(*told)
        except BaseException as error:
            self.failure = error
            self.cancel()
            if isinstance(error, KeyboardInterrupt | SystemExit):  # they end the event loop as well
                raise
        finally:
            heard.release()


async def run(function: Callable[_P, _T], /, *arguments: _P.args, **named: _P.kwargs) -> _T:
    """function(*arguments), a function of this package or of the caller's, in a thread. At most 32 run at once; others wait,
    and are not begun if their task is cancelled. If the task is cancelled later, a function that can be cancelled is, and the
    await ends with CancelledError when the function has ended. An exception that `progress` raises, CancelledError included,
    stops the function, and is raised here when it has ended. Raises what the function raises."""
    options: dict[str, Any] = dict(named)
    link = _Link(function, options)
    return await _done(partial(function, *arguments, **options), link)


async def iterate(
    function: Callable[_P, Iterable[_T]], /, *arguments: _P.args, **named: _P.kwargs
) -> AsyncGenerator[_T, None]:
    """The items of the iterable function(*arguments), which threads advance: `async for part in iterate(lamina.diff, ...)`.
    Cancellation and `progress` as for `run`. A caller that leaves the loop early closes the iterator with
    `contextlib.aclosing`; otherwise the event loop does, later."""
    options: dict[str, Any] = dict(named)
    link = _Link(function, options)
    items = await _done(lambda: iter(function(*arguments, **options)), link)
    try:
        while found := await _done(partial(_some, items), link):
            for item in found:
                yield item
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            await in_thread(close)


async def _done(work: Callable[[], _T], link: _Link, discard: Callable[[_T], object] | None = None) -> _T:
    """The value of `work`, which is the job of `link` or a part of it. `discard` as for `Call`."""
    try:
        found = await Call(work, discard).outcome(passing_to(_threads), cancel=link.cancel)
    except Cancelled:
        if link.failure is None:
            raise
    if link.failure is not None:
        raise link.failure
    return found


def _some(items: Iterator[_T]) -> list[_T]:
    """The next items, at least one; none at the end."""
    found: list[_T] = []
    end = time.monotonic() + _STEP_SECONDS
    for item in items:
        found.append(item)
        if len(found) >= _STEP_ITEMS or time.monotonic() > end:
            break
    return found


def awaitable(function: Callable[_P, _T]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """The same function for tasks of an event loop: `await awaitable(f)(...)` is `await run(f, ...)`. A value that a
    cancelled task does not get is closed, if it can be."""

    @wraps(function)
    async def awaited(*arguments: _P.args, **named: _P.kwargs) -> _T:
        options: dict[str, Any] = dict(named)
        link = _Link(function, options)
        return await _done(partial(function, *arguments, **options), link, _close)

    return awaited


def awaitable_as(function: Callable[_P, _T]) -> Callable[[Callable[[], None]], Callable[_P, Coroutine[Any, Any, _T]]]:
    """A decorator: whatever it decorates becomes `awaitable(function)`."""
    return lambda _: awaitable(function)


def _close(value: object) -> None:
    close = getattr(value, "close", None)
    if close is not None:
        close()

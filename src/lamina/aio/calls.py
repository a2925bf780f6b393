"""Calls that threads make for the tasks of event loops, and what a cancelled task means for them.

A `Call` is made once, in a thread. The task that awaits it may be cancelled meanwhile:

- A call that has not begun is withdrawn: it is never made.
- A call that has begun runs to its end. What it works with (buffers, images) belongs to it until then. If it changes
  something or works in a buffer of the caller, the await ends with CancelledError when the call has ended, so that nothing
  goes on behind the caller's back. If it only returns a value, the await ends at once, and the value is discarded.

An event loop may be closed before a call has ended, or a coroutine dropped: the call ends all the same, and its value is
discarded. Nothing here belongs to one event loop, so the tasks of several loops may use one pool.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

from .. import lifecycle
from ..errors import Cancelled, Closed
from ..workers import Task, Workers

_T = TypeVar("_T")
_P = ParamSpec("_P")

#: The interval in seconds at which the thread that closes a pool checks whether its calls have ended.
_POLL_INTERVAL = 0.0005


class Call(Generic[_T]):
    """One call for the current task. `discard` gets a value that nobody takes: an opened image, for example. A `certain`
    call is made and waited for whenever the task is cancelled: that of a close, for example."""

    __slots__ = (
        "_begun",
        "_certain",
        "_context",
        "_discard",
        "_ended",
        "_error",
        "_left",
        "_loop",
        "_value",
        "_waiter",
        "_withdrawn",
        "_work",
    )

    def __init__(
        self, work: Callable[[], _T], discard: Callable[[_T], object] | None = None, *, certain: bool = False
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._work: Callable[[], _T] | None = work
        self._discard = discard
        self._certain = certain
        self._waiter: asyncio.Future[None] | None = None
        # The thread sets the first two, the task the others. Each first records its own step and then reads that of the
        # other, so at least one of them sees the other.
        self._begun = self._ended = False
        self._withdrawn = self._left = False
        self._value: list[_T] = []  # one item once there is a value; none again when it was taken
        self._error: BaseException | None = None

    def run(self) -> None:
        """Make the call, in this thread."""
        self._begun = True
        work, self._work = self._work, None
        try:
            if work is not None and not self._withdrawn:
                self._value.append(self._context.run(work))
        except BaseException as error:  # noqa: BLE001 - the task raises it
            self._error = error
        del work  # it refers to buffers
        self._ended = True
        if self._left:
            self._drop()
            return
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop was closed, and no task of it will ever take the value
            self._drop()

    async def outcome(self, *, leave: bool = False, cancel: Callable[[], object] | None = None) -> _T:
        """The value of the call; raises its error. `leave`: the call only returns a value, and a cancelled task leaves it.
        `cancel` asks a call that has begun to end early."""
        cancelled: asyncio.CancelledError | None = None
        try:
            while not self._ended:
                self._waiter = self._loop.create_future()
                try:
                    await self._waiter
                except asyncio.CancelledError as error:
                    cancelled = cancelled or error
                    if self._certain:
                        continue
                    self._withdrawn = True
                    if leave or not self._begun:
                        raise
                    if cancel is not None:
                        cancel()
                except GeneratorExit:  # the coroutine was dropped: nothing can wait for the call any more
                    self._withdrawn = not self._certain
                    if cancel is not None:
                        cancel()
                    raise
            if cancelled is not None:
                if self._value and self._discard is not None:
                    await in_thread(partial(self._discard, self._value.pop())).outcome()
                # Cancelled is what `cancel` has asked for.
                raise cancelled from (None if isinstance(self._error, Cancelled) else self._error)
            if self._error is not None:
                raise self._error
            return self._value.pop()
        finally:
            self._left = True
            if self._ended:
                self._drop()
            self._error = self._waiter = cancelled = None  # the traceback refers to this frame
            del self

    def withdraw(self) -> None:
        """The call will not begin, if it has not."""
        self._withdrawn = self._left = True

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _drop(self) -> None:
        """Discard the value, if nobody has taken it. The thread and the task may both come here."""
        try:
            value = self._value.pop()
        except IndexError:
            return
        if self._discard is not None:
            self._discard(value)


def start(call: Call[_T], workers: Workers) -> Call[_T]:
    """Let a thread of `workers` make the call."""
    try:
        workers.start(Task(call.run))
    except BaseException:
        call.withdraw()
        raise
    return call


def in_thread(work: Callable[[], _T]) -> Call[_T]:
    """A certain call in a thread of its own: it waits for no other call."""
    return start(Call(work, certain=True), Workers(1, "lamina-aio"))


class Pool:
    """At most `count` threads that make the calls for one image, in the order in which tasks ask for them. Further calls
    wait; they have allocated nothing yet, and each belongs to an awaiting task, which bounds their number. Safe for any
    number of threads and event loops. A forked child has threads of its own."""

    def __init__(self, count: int, name: str) -> None:
        self._workers = Workers(count, name)
        self._calls: set[Call[Any]] = set()  # those that have not ended
        self._closing = False
        lifecycle.connected.add(self)

    async def call(self, work: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """The value of work(*arguments); a cancelled task waits until a call that has begun has ended. Raises Closed after
        `refuse`."""
        return await self.begin(partial(work, *arguments, **named)).outcome()

    async def value_of(self, work: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """The same for work that changes nothing and fills no buffer of the caller: a cancelled task does not wait."""
        return await self.begin(partial(work, *arguments, **named)).outcome(leave=True)

    def begin(self, work: Callable[[], _T], discard: Callable[[_T], object] | None = None) -> Call[_T]:
        """A call of `work`, to be awaited by `Call.outcome`; `discard` as for `Call`. Raises Closed after `refuse`."""
        call = Call(work, discard)
        self._calls.add(call)  # before `_closing` is read: `finish` sees this call, or it is refused
        if self._closing:
            self._calls.discard(call)
            raise Closed("this image was closed")
        try:
            self._workers.start(Task(self._run, call))
        except BaseException:
            call.withdraw()
            self._calls.discard(call)
            raise
        return call

    def _run(self, call: Call[Any]) -> None:
        try:
            call.run()
        finally:
            self._calls.discard(call)

    def refuse(self) -> None:
        """Refuse further calls."""
        self._closing = True

    def finish(self) -> None:
        """Wait until all calls have ended, and let the threads end. Called after `refuse`, in a thread without an event
        loop."""
        while self._calls:
            time.sleep(_POLL_INTERVAL)
        self._workers.close()

    def after_fork(self) -> None:
        """In a forked child: the calls belong to threads of the parent."""
        self._calls.clear()

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

    async def outcome(
        self,
        begin: Callable[[Call[_T]], object],
        *,
        leave: bool = False,
        cancel: Callable[[], object] | None = None,
    ) -> _T:
        """Let `begin` pass the call to a thread, and return its value; raises its error. `leave`: the call only returns a
        value, and a cancelled task leaves it. `cancel` asks a call that has begun to end early. A KeyboardInterrupt here does
        what a CancelledError does."""
        stop: BaseException | None = None
        passed = False
        try:
            while not self._ended:
                try:
                    if not passed:
                        begin(self)
                        passed = True
                    self._waiter = self._loop.create_future()
                    await self._waiter
                except GeneratorExit:  # the coroutine was dropped: nothing can wait for the call any more
                    self._withdrawn = not self._certain
                    if cancel is not None:
                        cancel()
                    raise
                except BaseException as error:
                    stop = stop or error
                    if passed and self._certain:
                        continue
                    self._withdrawn = True
                    if leave or not self._begun:
                        raise
                    passed = True
                    if cancel is not None:
                        cancel()
            if stop is not None:
                if self._value and self._discard is not None:
                    await in_thread(partial(self._discard, self._value.pop()))
                # Cancelled is what `cancel` has asked for.
                raise stop from (None if isinstance(self._error, Cancelled) else self._error)
            if self._error is not None:
                raise self._error
            # No call from here on: an interrupt would lose the value.
            value, self._value = self._value[0], []
            return value
        finally:
            self._left = True
            if self._ended and self._value:
                self._drop()
            self._error = self._waiter = stop = None  # the traceback refers to this frame
            del self

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


def passing_to(workers: Workers) -> Callable[[Call[Any]], None]:
    """The argument `begin` of `Call.outcome`: a thread of `workers` makes the call."""
    return lambda call: workers.start(Task(call.run))


async def in_thread(work: Callable[[], _T]) -> _T:
    """The value of a certain call in a thread of its own: it waits for no other call."""
    return await Call(work, certain=True).outcome(_pass_to_a_thread)


def _pass_to_a_thread(call: Call[Any]) -> None:
    workers = Workers(1, "lamina-aio")
    try:
        workers.start(Task(call.run))
    finally:
        try:
            workers.close()  # the thread ends after this call
        finally:
            workers.close()


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
        return await Call(partial(work, *arguments, **named)).outcome(self.begin)

    async def value_of(self, work: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """The same for work that changes nothing and fills no buffer of the caller: a cancelled task does not wait."""
        return await Call(partial(work, *arguments, **named)).outcome(self.begin, leave=True)

    def begin(self, call: Call[Any]) -> None:
        """The argument `begin` of `Call.outcome`. Raises Closed after `refuse`."""
        try:
            self._calls.add(call)  # before `_closing` is read: `finish` sees this call, or it is refused
            if self._closing:
                raise Closed("this image was closed")
            self._workers.start(Task(self._run, call))
        except BaseException:
            self._calls.discard(call)
            raise

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

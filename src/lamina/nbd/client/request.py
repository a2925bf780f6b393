"""Requests of a client in flight: single ones, several that are one request of the caller, and the end of interrupted
ones."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from ...errors import BlockIOError, LaminaError
from .. import wire

if TYPE_CHECKING:
    from .link import Link

CHANGES: Final = (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES)


class Request:
    """One request and, when `done`, its outcome: `error`, or None; the bytes are in `view`, the status in `status` (by the
    name of the context, (length, flags) from `offset` on). `payload`: what is sent behind the header. All is in bytes.
    Times are those of `time.monotonic`."""

    __slots__ = (
        "before",
        "begun",
        "bounds",
        "command",
        "contents",
        "cookie",
        "covers",
        "done",
        "error",
        "flags",
        "latest",
        "left",
        "length",
        "link",
        "lost_at",
        "offset",
        "payload",
        "status",
        "told",
        "view",
    )

    def __init__(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        view: memoryview | None = None,
        payload: memoryview | bytes | None = None,
    ) -> None:
        self.command: int = command
        self.offset: int = offset
        self.length: int = length
        self.flags: int = flags
        self.view: memoryview | None = view
        self.payload: memoryview | bytes | None = payload
        self.cookie: int = 0
        #: The connection that it is sent over; when it was sent there, and how many were on their way then.
        self.link: Link | None = None
        self.begun: float = 0.0
        self.before: int = 0
        #: When it must be answered although the server makes progress, where that is sooner than usual.
        self.latest: float | None = None
        #: When its connection was first lost, or 0.
        self.lost_at: float = 0.0
        #: Of a flush: whether there was something to flush.
        self.covers: bool = False
        #: The thread that waited for it was interrupted.
        self.left: bool = False
        self.done: bool = False
        self.error: LaminaError | None = None
        #: Where stretches of bytes that came begin and end, in turn, from the start of the request.
        self.bounds: list[int] = []
        #: Chunks of content that came, and extents in all contexts.
        self.contents: int = 0
        self.told: int = 0
        self.status: dict[str, list[tuple[int, int]]] | None = None

    def restart(self) -> None:
        """Forget what was answered so far: it is sent again."""
        self.done = False
        self.error = None
        self.bounds = []
        self.contents = self.told = 0
        self.status = None


class Pending(ABC):
    """A request that was started. `wait` may be called by any thread, and again: the outcome stays."""

    __slots__ = ()

    @abstractmethod
    def wait(self) -> Any:
        """The outcome, when it is there: None, or the status of blocks. Raises what the request failed with. Whoever is
        interrupted in it (KeyboardInterrupt, any exception that is not a LaminaError) has its buffers back all the same: no
        byte is put there, or read from there, any more. The request then counts as failed, and may have been carried out."""

    @abstractmethod
    def leave(self) -> None:
        """Take leave of it, as if interrupted in `wait`."""


class Sent(Request, Pending):
    """A request on its way over one link."""

    __slots__ = ()

    def wait(self) -> Any:
        if not self.done:
            assert self.link is not None
            try:
                self.link.wait(self)
            except LaminaError:
                raise
            except BaseException:
                self.leave()
                raise
        if self.left and self.error is None:
            assert self.link is not None
            raise self.link.interrupted()
        if self.error is not None:
            if self.error.path is None and self.link is not None:
                self.error.path = self.link.name
            raise self.error
        return self.status

    def leave(self) -> None:
        if not self.done and self.link is not None:
            self.link.forget(self)

    def touches(self, offset: int, length: int) -> bool:
        """Whether it is about some of these bytes."""
        return offset < self.offset + self.length and self.offset < offset + length


class Group(Pending):
    """Several requests that are one to the caller: done when all are; `finish` makes the outcome."""

    __slots__ = ("_finish", "_outcome", "_parts")

    def __init__(self, parts: Sequence[Pending], finish: Callable[[list[Any]], Any] | None = None) -> None:
        self._parts = parts
        self._finish = finish
        self._outcome: tuple[Any] | None = None

    def wait(self) -> Any:
        if self._outcome is None:
            first: LaminaError | None = None
            outcomes = []
            try:
                # All are waited for, whatever happens: no reply may come into a view that the caller has back.
                for part in self._parts:
                    try:
                        outcomes.append(part.wait())
                    except LaminaError as error:
                        first = first or error
                if first is not None:
                    raise first
                self._outcome = (self._finish(outcomes) if self._finish else None,)
            except LaminaError:
                raise
            except BaseException:
                self.leave()
                raise
        return self._outcome[0]

    def leave(self) -> None:
        take_leave(self._parts)


class Durability:
    """What the client knows of writes that were answered and not flushed, over all links. Thread-safe: each change is a
    single assignment, and where two race, more is taken for lost than is."""

    __slots__ = ("answered", "doubtful", "unsettled")

    def __init__(self) -> None:
        #: Changes that may still be carried out, and whose callers were interrupted: what touches the same bytes comes after.
        self.unsettled: list[Sent] = []
        #: Changes were answered since the last flush began.
        self.answered: bool = False
        #: Such changes were there when a connection broke: the next flush must fail.
        self.doubtful: bool = False

    def note(self, request: Request) -> None:
        """A change or a flush was answered."""
        if request.command in CHANGES:
            if request.error is None and not request.flags & wire.CMD_FLAG_FUA:
                self.answered = True
        elif request.error is not None:
            self.answered |= request.covers

    def error(self) -> BlockIOError:
        """For the one flush that tells of it."""
        self.doubtful = False
        return BlockIOError(
            "the connection was lost after writes that were not flushed: the server may have restarted without them",
            errno=errno.EIO,
            operation="flush",
            hint="write again what was written since the last flush",
        )


def take_leave(requests: Iterable[Pending]) -> None:
    """The thread that waited for `requests` was interrupted: on return no thread uses their buffers. Finished requests, and
    those that were never sent, stay as they are."""
    for request in requests:
        request.leave()

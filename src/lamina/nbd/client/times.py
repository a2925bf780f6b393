"""How long a client waits for a server: the limits that callers choose, and the clock that one connection is held against.

A server is not waited for because it sends something, but because it gets on: a request is answered, or some kilobytes moved.
One byte a minute is silence.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from ...errors import BlockIOError, Hint
from ...limits import KIB
from .. import wire

if TYPE_CHECKING:
    from .request import Request

#: Bytes, in either direction, that count as progress although no request is answered yet.
STEP: Final = 16 * KIB
#: Seconds after which a wait looks up at the latest, whether anybody listens.
TICK: Final = 0.5
#: Seconds without progress that a server has once its client was interrupted, or is being closed.
SHORT: Final = 2.0
#: One request takes at most so many times its limit, more for each one before it and for its bytes at so many a second: what
#: moves just enough to count as progress ends, too.
_TIMES: Final = 10
_SLOWEST: Final = 64 * KIB
#: Requests for which a server may work for long without a sign.
_LONG: Final = (wire.CMD_FLUSH, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES)


class Times(NamedTuple):
    """Seconds without progress after which a server counts as gone; None is no limit. `quick`: while it reads, writes, or
    tells of status. `slow`: while it flushes, trims or zeroes. `connect`: until it accepts the connection, and again until
    the handshake is done."""

    quick: float | None = 60.0
    slow: float | None = 600.0
    connect: float = 10.0

    @classmethod
    def all(cls, seconds: float | None) -> Self:
        """The same time for everything: as long as `seconds`, or without a limit (0); None: the usual times."""
        if seconds is None:
            return cls()
        return cls(seconds, seconds, seconds) if seconds else cls(None, None)


class Clock:
    """The time since the server of one connection made progress. Any thread may call this; where two race, the server gets a
    moment more."""

    __slots__ = ("_moved", "_pressed", "since", "tick", "times", "urgent")

    def __init__(self, times: Times) -> None:
        self.times = times
        #: Seconds after which to look again.
        self.tick = min(TICK, *(limit / 4 for limit in times[:2] if limit is not None), TICK)
        #: When it last made progress, or was asked while it had nothing to do.
        self.since = monotonic()
        self._moved = 0
        #: When the server's time was cut short, if it made no progress since.
        self._pressed: float | None = None
        #: The client is being closed: there is never more than a short time.
        self.urgent = False

    @property
    def pressed(self) -> bool:
        """Whether the server has only a short time, since a thread that waited for it was interrupted."""
        return self._pressed is not None

    def press(self) -> None:
        """A waiting thread was interrupted: the server has only a short time for the next bytes."""
        self._pressed = monotonic()

    def relax(self) -> None:
        """The usual times again: the interrupt is dealt with."""
        self._pressed = None

    def progress(self, now: float | None = None) -> None:
        """A request was answered."""
        self.since = monotonic() if now is None else now
        self._pressed = None

    def moved(self, count: int) -> None:
        """So many bytes came, or were taken."""
        self._moved += count
        if self._moved >= STEP:
            self._moved = 0
            self.progress()

    def overdue(self, requests: Sequence[Request], path: str) -> BlockIOError | None:
        """The error for a server that has not answered these `requests`, if it had its time."""
        if not requests:
            return None
        now = monotonic()
        # While the server flushes, what stands behind the flush waits with it.
        long = any(request.command in _LONG for request in requests)
        usual = limit = self.times.slow if long else self.times.quick
        since = self.since
        pressed = self._pressed
        if pressed is not None or self.urgent:
            limit = SHORT if limit is None else min(limit, SHORT)
            since = max(since, pressed or 0.0)
        if limit is not None and now - since > limit:
            return _late(f"no reply within {limit:g} s", path)
        for request in requests:
            latest = inf if request.latest is None else request.latest
            if usual is not None:
                most = request.begun + usual * (_TIMES + request.before) + request.length / _SLOWEST
                latest = min(latest, most)
            if now > latest:
                return _late("the reply comes too slowly", path)
        return None


def _late(message: str, path: str) -> BlockIOError:
    look = "see whether the server is at work"
    hint = Hint(
        f"{look}; the option timeout, or request_timeout of a client, sets how long it is waited for",
        command=f"{look}; --timeout, or the node's option timeout, sets how long it is waited for",
    )
    return BlockIOError(message, errno=errno.ETIMEDOUT, path=path, hint=hint)

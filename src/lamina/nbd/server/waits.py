"""How long a client lets its server wait, and what of that is too long.

The thread of the connection (or the loop of several) tells what happens, in simple assignments that take no lock; whoever
looks after the clients asks, and may see the one or the other a moment late.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Final

from ...limits import KIB
from .transmission import PART

if TYPE_CHECKING:
    from .transmission import Request

#: A request that comes in pieces goes on while so many bytes of it come within the time limit.
_GOING_ON: Final = 16 * KIB


class Waits:
    """Of one client, which came at `begun`. `idle_time`: seconds that it may send no whole request; `stall_time`: seconds
    that it may stop in the middle of one. None: any."""

    def __init__(self, begun: float, idle_time: float | None, stall_time: float | None) -> None:
        self._idle_time, self._stall_time = idle_time, stall_time
        #: Whether a whole message of the negotiation came, and whether another one is waited for.
        self.spoke, self.listening = False, True
        self._heard = begun
        #: Something that was received is being executed or answered; a whole request is part of that; when the last such was
        #: done, or the last answer of the pool was out.
        self._busy = self._whole = False
        self._rested = begun
        #: A part of a request is there; when it last went on; bytes that came since.
        self._halfway, self._went_on, self._trickle = False, begun, 0

    # -- negotiation

    def heard(self) -> None:
        """A whole message came."""
        self.spoke, self._heard = True, monotonic()

    def silent_for(self) -> float:
        """For how many seconds the client has sent no whole message; 0 while it waits for the server."""
        return monotonic() - self._heard if self.listening else 0.0

    # -- transmission

    def took_in(self, halfway: bool, requests: list[Request], count: int) -> None:
        """`count` bytes came, which made `requests` whole: these are executed next. `halfway`: a part of another is there."""
        if requests:
            self._busy = True
            self._whole = self._whole or requests[0].type != PART or requests[0].payload[2]
        if halfway:
            self._trickle += count
            if requests or not self._halfway or self._trickle >= _GOING_ON:
                self._went_on, self._trickle = monotonic(), 0
        self._halfway = halfway

    def rest(self) -> None:
        """All that was received is done, or in the pool: from now on the client is waited for."""
        if self._busy:
            now = self._went_on = monotonic()
            if self._whole:
                self._rested, self._whole = now, False
            self._busy = False

    def answered(self) -> None:
        """A request of the pool was answered."""
        self._rested = monotonic()

    def stalled(self) -> bool:
        """Whether the client stopped in the middle of a request for too long."""
        if self._stall_time is None or self._busy or not self._halfway:
            return False
        return monotonic() - self._went_on > self._stall_time

    def overdue(self) -> str | None:
        """What the client did for too long, if it did. Nothing is held against it while a request is executed by its own
        thread; of those in the pool this does not know."""
        if self.stalled():
            return f"it stopped in the middle of a request for {self._stall_time:g} s"
        if self._idle_time is not None and not self._busy and monotonic() - self._rested > self._idle_time:
            return f"it asked nothing for {self._idle_time:g} s"
        return None

"""The time for which a client keeps its server waiting, and the limits on it.

The thread of the connection (or the loop of several) reports events by plain assignments, without a lock. The thread that
enforces the limits may see an event a moment late.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Final

from ...limits import KIB
from .transmission import PART

if TYPE_CHECKING:
    from .transmission import Request

#: A partial request counts as progressing while at least so many bytes of it arrive within the time limit.
_LEAST_PROGRESS: Final = 16 * KIB


class ClientActivity:
    """The activity of one client, which connected at `begun`. `idle_time`: the seconds for which it may send no complete
    request; `stall_time`: the seconds for which it may pause in the middle of one. None: no limit."""

    def __init__(self, begun: float, idle_time: float | None, stall_time: float | None) -> None:
        self._idle_time, self._stall_time = idle_time, stall_time
        #: Negotiation: whether a complete message arrived, and whether the server waits for another one.
        self.sent_message, self.waiting = False, True
        self._last_message = begun
        #: Transmission: whether received bytes are being processed, and whether they include a complete request; the time
        #: when the last such request was executed, or the last reply of the pool was sent.
        self._busy = self._complete = False
        self._idle_since = self._busy_since = begun
        #: Whether a partial request was received; the time of its last progress; the bytes that arrived since.
        self._partial, self._progressed_at, self._progress = False, begun, 0

    # -- negotiation

    def message_received(self) -> None:
        """A complete message arrived."""
        self.sent_message, self._last_message = True, monotonic()

    def silence(self) -> float:
        """The seconds since the last complete message; 0 while the client waits for the server."""
        return monotonic() - self._last_message if self.waiting else 0.0

    # -- transmission

    def received(self, partial: bool, requests: list[Request], count: int) -> None:
        """`count` bytes arrived, which completed `requests`; these are executed next. `partial`: a part of another one
        arrived."""
        if requests:
            if not self._busy:
                self._busy_since = monotonic()
            self._busy = True
            self._complete = self._complete or requests[0].type != PART or requests[0].payload[2]
        if partial:
            self._progress += count
            if requests or not self._partial or self._progress >= _LEAST_PROGRESS:
                self._progressed_at, self._progress = monotonic(), 0
        self._partial = partial

    def requests_done(self) -> None:
        """All received requests are executed, or in the pool: from now on the server waits for the client."""
        if self._busy:
            now = self._progressed_at = monotonic()
            if self._complete:
                self._idle_since, self._complete = now, False
            else:  # parts of a long request: the time that they took is not the client's
                self._idle_since += now - self._busy_since
            self._busy = False

    def reply_sent(self) -> None:
        """The reply to a request of the pool was sent."""
        self._idle_since = monotonic()

    def stalled(self) -> bool:
        """Whether the client has paused in the middle of a request for too long."""
        if self._stall_time is None or self._busy or not self._partial:
            return False
        return monotonic() - self._progressed_at > self._stall_time

    def overdue(self) -> str | None:
        """The limit that the client exceeded, as a text, or None. Time in which the connection's thread executes requests
        does not count. (This object does not know of requests in the pool.)"""
        if self.stalled():
            return f"it stopped in the middle of a request for {self._stall_time:g} s"
        if self._idle_time is not None and not self._busy and monotonic() - self._idle_since > self._idle_time:
            return f"it asked nothing for {self._idle_time:g} s"
        return None

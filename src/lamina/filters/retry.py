"""The filter `retry`: repeats failed requests, for storage with transient errors, such as network storage. Times are in
milliseconds."""

from __future__ import annotations

import errno
from typing import Any, ClassVar

from ..around import AroundNode, Request
from ..errors import BlockIOError
from ..request import Child
from ..schema import Option

#: Transient errors. A full disk or a missing permission is none.
_LOCAL = "EIO EAGAIN EBUSY EINTR ETIMEDOUT"
_NETWORK = "ECONNRESET ECONNABORTED ECONNREFUSED ENOTCONN EPIPE ESHUTDOWN ENETDOWN ENETRESET ENETUNREACH EHOSTUNREACH"
TRANSIENT = frozenset(getattr(errno, name) for name in f"{_LOCAL} {_NETWORK}".split())
#: The longest wait: an hour, in milliseconds.
_LONGEST = 3_600_000


class Retry(AroundNode):
    """Repeats failed requests to `image` up to `retries` times, then raises the last error. It waits `delay` before each
    attempt, with `exponential` twice as long each time. `clock` has `sleep(seconds)`.

    Requests may be repeated, since they are idempotent. A flush is not repeated: a successful flush after a failed one does
    not prove that the data is on stable storage. For the same reason the request path splits a FUA write in a write and a
    flush above this filter.
    """

    driver = "retry"
    faithful = True
    options: ClassVar[tuple[Option, ...]] = (
        Option("retries", "int", "the maximum number of repetitions", default=5, minimum=0, maximum=1000),
        Option("delay", "int", "milliseconds before a repetition", default=200, minimum=0, maximum=_LONGEST),
        Option("exponential", "bool", "double the delay each time", default=True),
    )
    supported_flags = 0

    def __init__(self, image: Child, retries: int = 5, delay: int = 200, exponential: bool = True, **rest: Any) -> None:
        super().__init__(image, **rest)
        #: The delay in seconds before each repetition.
        self.pauses: list[float] = [
            min(delay * (2 ** min(n, 32) if exponential else 1), _LONGEST) / 1000 for n in range(retries)
        ]

    def around(self, kind: str, request: Request, /, *_: int) -> Any:
        for pause in self.pauses:
            try:
                return request()
            except BlockIOError as error:
                if kind == "flush" or error.errno not in TRANSIENT:
                    raise
            self.clock.sleep(pause)
        return request()

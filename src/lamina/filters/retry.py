"""The filter `retry`: tries failed requests again. One of the filters; for storage whose errors pass, such as a network's.
Times are milliseconds."""

from __future__ import annotations

import errno
from typing import Any

from ..around import AroundNode, Request
from ..errors import BlockIOError
from ..request import Child
from ..schema import Option

#: Errors that may be gone when the same is asked again; a full disk or a missing permission is none.
_LOCAL = "EIO EAGAIN EBUSY EINTR ETIMEDOUT"
_NETWORK = "ECONNRESET ECONNABORTED ECONNREFUSED ENOTCONN EPIPE ESHUTDOWN ENETDOWN ENETRESET ENETUNREACH EHOSTUNREACH"
PASSING = frozenset(getattr(errno, name) for name in f"{_LOCAL} {_NETWORK}".split())
#: The longest wait: an hour, in milliseconds.
_LONGEST = 3_600_000


class Retry(AroundNode):
    """`image`, whose failed requests are done again, up to `retries` times after the first; then the last error is raised.
    Before each it waits `delay`, with `exponential` twice as long as the time before. `clock`: has `sleep(seconds)`.

    Each of them may be done twice: reads and writes are whole and absolute. A flush is not tried again: one that succeeds
    after one that failed does not mean that the data is safe. So a FUA write is a write, and a flush from above.
    """

    driver = "retry"
    faithful = True
    options = (
        Option("retries", "int", "how often a failed request is tried again", default=5, minimum=0, maximum=1000),
        Option("delay", "int", "milliseconds before it is tried again", default=200, minimum=0, maximum=_LONGEST),
        Option("exponential", "bool", "wait twice as long each time", default=True),
    )
    supported_flags = 0

    def __init__(self, image: Child, retries: int = 5, delay: int = 200, exponential: bool = True, **rest: Any) -> None:
        super().__init__(image, **rest)
        #: Seconds before each new try.
        self.pauses = [min(delay * (2 ** min(n, 32) if exponential else 1), _LONGEST) / 1000 for n in range(retries)]

    def around(self, kind: str, request: Request, /, *_: int) -> Any:
        for pause in self.pauses:
            try:
                return request()
            except BlockIOError as error:
                if kind == "flush" or error.errno not in PASSING:
                    raise
            self.clock.sleep(pause)
        return request()

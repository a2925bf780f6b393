"""The filter `retry`: tries failed requests again. One of the filters; for storage whose errors pass, such as a network's.
Times are milliseconds."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, ClassVar

from ..errors import BlockIOError
from ..node import FilterNode
from ..request import Child
from ..schema import Option, Schema

#: Errors that may be gone when the same is asked again; a full disk or a missing permission is none.
_LOCAL = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT}
_CONNECTION = {errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN, errno.EPIPE, errno.ESHUTDOWN}
_NETWORK = {errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.EHOSTUNREACH}
PASSING = frozenset(_LOCAL | _CONNECTION | _NETWORK)


def _again(operation: Callable[..., Any]) -> Any:
    """`operation`, done again as often as the filter says."""

    def tries(self: Retry, *request: Any) -> Any:
        for pause in self.pauses:
            try:
                return operation(self, *request)
            except BlockIOError as error:
                if error.errno not in PASSING:
                    raise
            self.clock.sleep(pause)
        return operation(self, *request)

    return tries


class Retry(FilterNode):
    """`image`, whose failed requests are done again, up to `retries` times after the first; then the last error is raised.
    Before each it waits `delay`, with `exponential` twice as long as the time before. `clock`: has `sleep(seconds)`.

    Each of them may be done twice: reads and writes are whole and absolute. A flush is not tried again: one that succeeds
    after one that failed does not mean that the data is safe. So a FUA write is a write, and a flush from above.
    """

    driver: ClassVar[str] = "retry"
    schema: ClassVar[Schema] = Schema(
        "retry",
        [
            Option("image", "node", "the node below", required=True),
            Option("retries", "int", "how often a failed request is tried again", default=5, minimum=0, maximum=1000),
            Option("delay", "int", "milliseconds before it is tried again", default=200, minimum=0),
            Option("exponential", "bool", "wait twice as long each time", default=True),
        ],
    )
    supported_flags = 0

    def __init__(
        self,
        image: Child,
        retries: int = 5,
        delay: int = 200,
        exponential: bool = True,
        clock: Any = time,
        **common: Any,
    ) -> None:
        super().__init__(image, **common)
        self.clock = clock
        #: Seconds before each new try; no wait is longer than an hour.
        self.pauses = [min(delay / 1000 * (2.0 ** min(n, 32) if exponential else 1), 3600.0) for n in range(retries)]

    read_into = _again(FilterNode.read_into)
    write = _again(FilterNode.write)
    zero = _again(FilterNode.zero)
    discard = _again(FilterNode.discard)
    truncate = _again(FilterNode.truncate)
    extents = _again(FilterNode.extents)

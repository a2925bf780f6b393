"""The filter `delay`: every operation takes a while longer. One of the filters; it makes a fast disk behave like a slow or
distant one. Times are milliseconds."""

from __future__ import annotations

from typing import Any

from ..around import AroundNode, Request
from ..request import Child
from ..schema import Option

#: The longest wait: a day.
LONGEST = 86_400_000
KINDS = ("read", "write", "zero", "discard", "flush", "extents")


class Delay(AroundNode):
    """`image`, before whose operations it waits: `read_ms`, `write_ms`, ... milliseconds. Threads wait side by side: this
    is latency, not a limit of throughput (see `throttle`). `clock`: what has a `sleep(seconds)`, for tests."""

    driver = "delay"
    faithful = True
    options = tuple(
        Option(f"{kind}-ms", "int", f"milliseconds before each: {kind}", default=0, minimum=0, maximum=LONGEST)
        for kind in KINDS
    )

    def __init__(self, image: Child, **waits: Any) -> None:
        self.seconds = {kind: waits.pop(f"{kind}_ms", 0) / 1000 for kind in KINDS}
        super().__init__(image, **waits)

    def around(self, kind: str, request: Request, /, *_: int) -> Any:
        if wait := self.seconds.get(kind):
            self.clock.sleep(wait)
        return request()

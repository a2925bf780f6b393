"""The filter `delay`: every operation takes a while longer. One of the filters; it makes a fast disk behave like a slow or
distant one. Times are milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar

from ..node import FilterNode
from ..request import Child
from ..schema import Option, Schema

KINDS = ("read", "write", "zero", "discard", "flush", "extents")


def _later(kind: str, operation: Callable[..., Any]) -> Any:
    """`operation`, after the wait that was chosen for its kind."""

    def waits(self: Delay, *request: Any) -> Any:
        if self.seconds[kind]:
            self.clock.sleep(self.seconds[kind])
        return operation(self, *request)

    return waits


class Delay(FilterNode):
    """`image`, before whose operations it waits: `read_ms`, `write_ms`, ... milliseconds. Threads wait side by side: this
    is latency, not a limit of throughput (see `throttle`). `clock`: what has a `sleep(seconds)`, for tests."""

    driver: ClassVar[str] = "delay"
    _waits = [Option(f"{kind}-ms", "int", f"milliseconds before each: {kind}", default=0, minimum=0) for kind in KINDS]
    schema: ClassVar[Schema] = Schema("delay", [Option("image", "node", "the node below", required=True), *_waits])

    def __init__(self, image: Child, *, clock: Any = time, **waits: Any) -> None:
        self.seconds = {kind: waits.pop(f"{kind}_ms", 0) / 1000 for kind in KINDS}
        super().__init__(image, **waits)
        self.clock = clock

    read_into = _later("read", FilterNode.read_into)
    write = _later("write", FilterNode.write)
    zero = _later("zero", FilterNode.zero)
    discard = _later("discard", FilterNode.discard)
    flush = _later("flush", FilterNode.flush)
    extents = _later("extents", FilterNode.extents)

"""The filter `delay`: adds latency to operations, in milliseconds, to simulate a slow or distant disk."""

from __future__ import annotations

from typing import Any, ClassVar

from ..around import AroundNode, Request
from ..request import Child
from ..schema import Option

#: The longest wait: a day.
LONGEST = 86_400_000
KINDS = ("read", "write", "zero", "discard", "flush", "extents")


class Delay(AroundNode):
    """Waits before each operation on `image`: `read_ms`, `write_ms`, ... milliseconds. Several threads wait concurrently, so
    the filter limits latency and not throughput (see `throttle`). `clock` has a method `sleep(seconds)`; tests replace it."""

    driver = "delay"
    faithful = True
    options: ClassVar[tuple[Option, ...]] = tuple(
        Option(f"{kind}-ms", "int", f"milliseconds before each: {kind}", default=0, minimum=0, maximum=LONGEST)
        for kind in KINDS
    )

    def __init__(self, image: Child, **waits: Any) -> None:
        self.seconds: dict[str, Any] = {kind: waits.pop(f"{kind}_ms", 0) / 1000 for kind in KINDS}
        super().__init__(image, **waits)

    def around(self, kind: str, request: Request, /, *_: int) -> Any:
        if wait := self.seconds.get(kind):
            self.clock.sleep(wait)
        return request()

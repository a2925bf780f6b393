"""Storage whose requests wait until a test lets them go on, for the tests of `lamina.aio`."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, ClassVar, Self

from lamina.errors import BlockIOError
from lamina.graph import Opener
from lamina.schema import Schema
from lamina.storage.memory import MemoryStorage

#: Seconds after which a request that nobody lets go on fails: the test is wrong.
PATIENCE = 30.0


class Gated(MemoryStorage):
    """Memory whose reads, writes and flushes wait while `shut`. `begun` and `ended` count them; `began` is set by each."""

    driver = "gated"

    def __init__(self, size: int, **common: Any) -> None:
        super().__init__(size, **common)
        self._gate = threading.Event()
        self._gate.set()
        self.began = threading.Event()
        self.begun = self.ended = self.most = 0
        self._count = threading.Lock()

    def shut(self) -> None:
        self.began.clear()
        self._gate.clear()

    def open_gate(self) -> None:
        self._gate.set()

    def _pass(self) -> None:
        with self._count:
            self.begun += 1
            self.most = max(self.most, self.begun - self.ended)
        self.began.set()
        if not self._gate.wait(PATIENCE):
            raise BlockIOError("the test did not let this request go on")

    def _end(self) -> None:
        with self._count:
            self.ended += 1

    def read_into(self, offset: int, view: memoryview) -> None:
        self._pass()
        try:
            super().read_into(offset, view)
        finally:
            self._end()

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self._pass()
        try:
            super().write(offset, view, flags)
        finally:
            self._end()

    def flush(self) -> None:
        self._pass()
        self._end()


class SlowOpen(MemoryStorage):
    """Memory that waits while it is opened, as `control` lets it; `made` are those that were opened."""

    driver = "slow-open"
    schema = Schema("slow-open", [])
    control = Gated(512)
    made: ClassVar[list[SlowOpen]] = []

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        cls.control._pass()
        node = cls(1 << 20, name=opener.name, read_only=opener.read_only)
        cls.made.append(node)
        cls.control._end()
        return node


async def until_begun(storage: Gated, count: int = 1) -> None:
    """Return when so many requests have begun."""
    async with asyncio.timeout(PATIENCE):
        while storage.begun < count:
            await asyncio.sleep(0.001)

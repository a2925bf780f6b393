"""An interrupt at any opcode between a start and its end: no range stays locked, and what was started can be finished."""

from __future__ import annotations

import os
from types import CodeType

from lamina import pending, ranges, request
from lamina.limits import Limits
from lamina.node import StorageNode
from lamina.pending import Pending
from lamina.request import Child
from lamina.testing.interrupts import in_another_thread, interrupted_at_opcode

FILES = {pending.__file__, ranges.__file__, request.__file__}


class Later:
    def __init__(self, node: Blocks, offset: int, data: bytes) -> None:
        self.node, self.offset, self.data = node, offset, data

    def wait(self) -> None:
        self.node.bytes[self.offset : self.offset + len(self.data)] = self.data

    def leave(self) -> None:
        self.data = b""


class Blocks(StorageNode):
    """Memory in blocks of 512 bytes, whose started writes are done when they are waited for."""

    driver = "blocks"
    limits = Limits(request_alignment=512)  # type: ignore[assignment]
    size = 1 << 16  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.bytes = bytearray(self.size)

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self.bytes[offset : offset + len(view)]

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.bytes[offset : offset + len(view)] = view

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        return Later(self, offset, bytes(view))


def counts(code: CodeType) -> bool:
    return code.co_filename in FILES


def work(edge: Child, started: list[Pending]) -> None:
    started += [edge.start_write(0, memoryview(b"a" * 512)), edge.start_write(512, memoryview(b"b" * 512))]
    started[0].wait()
    edge.write(600, memoryview(b"c"))  # finishes the other one
    started.append(edge.start_write(1024, memoryview(b"d" * 512)))
    started[-1].leave()


def test_no_range_stays_locked() -> None:
    total = os.environ.get("LAMINA_SOAK_JOBS", "")
    every = 1 if total else 3
    with interrupted_at_opcode(-1, counts) as seen:
        work(Child(Blocks(), "it"), [])
    struck = 0
    for number in range(1, seen[0] + 1, every):
        node = Blocks()
        edge = Child(node, "it")
        started: list[Pending] = []

        def trial(number: int = number, edge: Child = edge, started: list[Pending] = started) -> None:
            nonlocal struck
            try:
                with interrupted_at_opcode(number, counts):
                    work(edge, started)
            except KeyboardInterrupt:
                struck += 1
            for one in started:
                one.wait()
            edge.write(5, memoryview(b"x"))  # for itself alone: it would wait for ever
            edge.start_write(2048, memoryview(b"y" * 512)).wait()

        in_another_thread(trial)
        assert node.bytes[5] == ord("x")
        assert node.bytes[2048:2560] == b"y" * 512
    assert struck

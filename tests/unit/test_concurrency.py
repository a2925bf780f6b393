"""Eight threads of overlapping unaligned requests: every aligned block is the result of some serial order of them.

`LAMINA_CONCURRENT` sets the number of operations; `make soak` runs many more.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from lamina.filters.blkdebug import Blkdebug
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.limits import KIB, MIB, align_down, align_up
from lamina.node import Node
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.model import Written, serial_order

THREADS = 8
OPERATIONS = int(os.environ.get("LAMINA_CONCURRENT", "20000"))
ALIGNMENTS = [1, 512, 4 * KIB, 64 * KIB, MIB]
#: What every byte holds before a round; no request writes it.
BEFORE = 255


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(usual)


def aligned(alignment: int) -> tuple[Node, int, int]:
    """A node over memory that takes requests of this alignment only, its size, and the atom of its promise."""
    size = max(3 * alignment, 2 * KIB)
    below = Child(MemoryStorage(size), "image", grows=True)
    options = Blkdebug.schema.parse({"image": below, "align": alignment})
    return Blkdebug.open(options, Opener(read_only=False)), size, alignment


def qcow2(cluster_size: int, **options: Any) -> tuple[Node, int, int]:
    storage = Child(MemoryStorage(0), "file", grows=True)
    size = max(5 * cluster_size, 64 * KIB)
    Qcow2.create(storage, size, Qcow2.create_schema.parse({"cluster_size": cluster_size, **options}))
    node = Qcow2.open(Qcow2.schema.parse({"file": storage}), Opener(read_only=False))
    return node, size, cluster_size


def cases() -> list[Any]:
    return (
        [pytest.param(aligned, a, id=f"align-{a}") for a in ALIGNMENTS]
        + [pytest.param(qcow2, c, id=f"qcow2-{c}") for c in (512, 4 * KIB, 64 * KIB)]
        + [pytest.param(partial(qcow2, extended_l2=True), 16 * KIB, id="qcow2-subclusters")]
    )


class Round:
    """What each thread does in one round: overlapping requests, each writing a value of its own (at most one zeroes)."""

    def __init__(self, rng: random.Random, size: int) -> None:
        self.start = rng.randrange(size)
        self.plans: list[list[tuple[str, int, int, int]]] = []
        values = iter(range(1, BEFORE))
        zeroing = rng.randrange(THREADS) if rng.random() < 0.5 else -1
        for thread in range(THREADS):
            plan = []
            for number in range(2):
                at = max(0, min(size - 1, self.start + rng.randrange(-3000, 3000)))
                length = min(rng.choice([1, 100, 700, 5000, size // 2]), size - at)
                kind = rng.choice(["write", "write", "write", "read"])
                if thread == zeroing and not number:
                    kind = rng.choice(["zero", "discard"])
                plan.append((kind, at, length, 0 if kind in ("zero", "discard") else next(values)))
            self.plans.append(plan)

    def written(self, size: int, atom: int, *, discards: bool) -> list[Written]:
        """The changes of this round, with or without its discard, which takes whole blocks only."""
        found = []
        for thread, plan in enumerate(self.plans):
            for kind, at, length, value in plan:
                end = at + length
                if kind == "discard":
                    at, end = align_up(at, atom), end if end == size else align_down(end, atom)
                if (kind in ("write", "zero") or (kind == "discard" and discards)) and at < end:
                    found.append(Written(thread, at, end - at, value))
        return found


@pytest.mark.parametrize(("make", "unit"), cases())
def test_every_block_equals_some_serial_order(make: Any, unit: int, seed: int) -> None:
    rng = random.Random(f"{seed}/{unit}")
    node, size, atom = make(unit)
    edge = Child(node, "root")
    current: list[Round | None] = [None]
    begin, end = threading.Barrier(THREADS + 1), threading.Barrier(THREADS + 1)
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        while True:
            begin.wait()
            now = current[0]
            if now is None:
                return
            try:
                for kind, at, length, value in now.plans[thread]:
                    do(edge, kind, at, length, value)
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
                errors.append(error)
            end.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    before = bytes([BEFORE]) * size
    try:
        for _ in range(OPERATIONS // (len(cases()) * THREADS * 2)):
            edge.write(0, memoryview(before))
            current[0] = Round(rng, size)
            begin.wait()
            end.wait()
            assert not errors, errors
            after = bytearray(size)
            edge.read_into(0, memoryview(after))
            # A discard may leave what was there: with it or without it, an order must be found.
            wrong = [
                serial_order(current[0].written(size, atom, discards=d), before, bytes(after), atom)
                for d in (False, True)
            ]
            assert None in wrong, f"{wrong} {current[0].plans}"
    finally:
        current[0] = None
        begin.wait()
        for thread in threads:
            thread.join()


def do(edge: Child, kind: str, at: int, length: int, value: int) -> None:
    if kind == "write":
        edge.write(at, memoryview(bytes([value]) * length))
    elif kind == "read":
        edge.read_into(at, memoryview(bytearray(length)))
    elif kind == "zero":
        edge.zero(at, length)
    else:
        edge.discard(at, length)

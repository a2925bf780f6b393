"""Threads that pack clusters beside each other.

Made of what the interpreter does in one step: queues and threads of C code. An executor of the standard library has locks
that an exception can leave taken (Ctrl-C is one), which then stop every executor of the process.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple


class _Task(NamedTuple):
    call: Callable[[memoryview], list[bytes]]
    part: memoryview
    number: int
    results: SimpleQueue[tuple[int, list[bytes] | BaseException]]


class Packers:
    """`count` threads, which end after `close`, or with the program. Any number of threads may use them at once."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._started = 0
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()

    def run(self, call: Callable[[memoryview], list[bytes]], parts: list[memoryview]) -> list[list[bytes]]:
        """What `call` returns for each part, called in these threads. Raises what one of the calls raised."""
        while self._started < self._count:  # cut short by an interrupt there is one thread too many, at worst
            _thread.start_new_thread(_work, (self._tasks,))
            self._started += 1
        results: SimpleQueue[tuple[int, list[bytes] | BaseException]] = SimpleQueue()
        for number, part in enumerate(parts):
            self._tasks.put(_Task(call, part, number, results))
        found: dict[int, list[bytes]] = {}
        while len(found) < len(parts):
            number, result = results.get()
            if isinstance(result, BaseException):
                raise result
            found[number] = result
        return [found[number] for number in range(len(parts))]

    def close(self) -> None:
        """Let the threads end. Nobody waits for them: they hold nothing."""
        self._tasks.put(None)


def _work(tasks: SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        call, part, number, results = task
        try:
            results.put((number, call(part)))
        except BaseException as error:  # noqa: BLE001 - whoever waits for it raises it
            results.put((number, error))
        del task, part, results
    tasks.put(None)  # for the next one

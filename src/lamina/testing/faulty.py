"""A storage in memory that fails on request of a test."""

from __future__ import annotations

import errno as _errno
from dataclasses import dataclass

from ..errors import BlockIOError
from .persistence import Record
from .recorder import Recorder

OPERATIONS = ("read", "write", "zero", "discard", "truncate", "flush")


@dataclass
class _Fault:
    operation: str
    errno: int
    wait: int  # the number of operations that succeed first
    left: int  # the number of operations that then fail; -1: all
    partial: int  # the number of bytes of a failed write that reach the storage


class FaultyStorage(Recorder):
    """A `Recorder` (a node, a file by `as_file`, and a `log` of successful operations) with faults. Errors are
    `BlockIOError`s, which are `OSError`s with an errno. Thread-safe."""

    driver = "faulty"

    def __init__(self, content: bytes = b"") -> None:
        super().__init__(content)
        self._faults: list[_Fault] = []
        #: The number of calls of each operation, including failed ones.
        self.calls: dict[str, int] = dict.fromkeys(OPERATIONS, 0)
        #: The number of failed operations.
        self.failures: int = 0

    def fail(
        self,
        operation: str,
        *,
        errno: int = _errno.EIO,
        nth: int = 1,
        times: int | None = 1,
        partial: int = 0,
    ) -> None:
        """Make the `nth` call of `operation` from now on fail with `errno`, and `times` calls in total (None: all until
        `heal`). `partial`: the number of bytes of a failed write that reach the storage."""
        if operation not in OPERATIONS or nth < 1:
            raise ValueError(
                f"there is no operation {operation!r}, or no {nth}th call: use one of {', '.join(OPERATIONS)}, from 1"
            )
        with self._mutex:
            self._faults.append(_Fault(operation, errno, nth - 1, -1 if times is None else times, partial))

    def heal(self) -> None:
        """Remove all faults."""
        with self._mutex:
            self._faults.clear()

    def read(self, offset: int, length: int) -> bytes:
        self._meet("read", offset, length)
        return super().read(offset, length)

    def read_into(self, offset: int, view: memoryview) -> None:
        self._meet("read", offset, len(view))
        super().read_into(offset, view)

    def note(self, record: Record) -> None:
        operation = "flush" if record.kind == "flush_start" else record.kind
        if operation in OPERATIONS:
            try:
                self._meet(operation, record.offset, record.length)
            except _Partial as fault:
                if fault.length:
                    data = record.data[: fault.length]
                    super().note(record._replace(length=len(data), data=data))
                raise fault.error from None
        super().note(record)

    def _meet(self, operation: str, offset: int, length: int) -> None:
        """Raise the error of a fault that is due. Every fault counts the calls; the first one that is due applies."""
        with self._mutex:
            self.calls[operation] += 1
            due = None
            for fault in self._faults:
                if fault.operation != operation:
                    continue
                if fault.wait:
                    fault.wait -= 1
                elif fault.left and due is None:
                    due = fault
                    fault.left -= fault.left > 0
            if due is None:
                return
            self.failures += 1
        place = {} if operation == "flush" else {"offset": offset, "length": length}
        error = BlockIOError("a fault of the test", errno=due.errno, node=self.name, operation=operation, **place)
        if operation == "write":
            raise _Partial(due.partial, error)
        raise error


class _Partial(Exception):
    """Internal: a write fails after `length` bytes."""

    def __init__(self, length: int, error: BlockIOError) -> None:
        self.length = length
        self.error = error

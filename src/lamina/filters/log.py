"""The filter `log`: a line for every request, when it is done. One of the filters; to see what a program does to a disk.

A line is `TIME OPERATION offset=N length=N flags=WORDS result=ok us=N`, with what the operation has of these, time in UTC,
offsets and lengths in bytes, the duration in microseconds. A failure has the name of its errno as the result, and
`error="..."` at the end. So a line splits at blanks, and a message in it never ends it.
"""

from __future__ import annotations

import errno
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from ..errors import BlockIOError
from ..node import FUA, MAY_UNMAP, NO_FALLBACK, FilterNode
from ..request import Child
from ..schema import Option, Schema

if TYPE_CHECKING:
    from ..extents import Extents

_FLAGS = {FUA: "fua", MAY_UNMAP: "may_unmap", NO_FALLBACK: "no_fallback"}


class Log(FilterNode):
    """`image`, whose requests are logged to the file `log`, appended, or to standard error. Lines of threads come whole, in
    the order in which requests ended. `clock`: has `time()` and `perf_counter()`, seconds.

    Raises BlockIOError if the log cannot be opened or written: a log with gaps would mislead.
    """

    driver: ClassVar[str] = "log"
    schema: ClassVar[Schema] = Schema(
        "log",
        [
            Option("image", "node", "the node below", required=True),
            Option("log", "str", "the file to append to; standard error if there is none"),
        ],
    )

    def __init__(
        self,
        image: Child,
        log: str | None = None,
        *,
        clock: Any = time,
        name: str | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__(image, name=name, read_only=read_only)
        self._path, self._clock = log, clock
        self._mutex = threading.Lock()
        self._file: TextIO | None = None
        if log is not None:
            try:
                self._file = open(log, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            except OSError as error:
                raise BlockIOError.from_os(error, "the log cannot be opened", path=log) from error

    def read_into(self, offset: int, view: memoryview) -> None:
        with self._line(f"read offset={offset} length={len(view)}"):
            self.image.read_into(offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        with self._line(f"write offset={offset} length={len(view)}{_words(flags)}"):
            self.image.write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        with self._line(f"zero offset={offset} length={length}{_words(flags)}"):
            self.image.zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        with self._line(f"discard offset={offset} length={length}"):
            self.image.discard(offset, length)

    def flush(self) -> None:
        with self._line("flush"):
            self.image.flush()

    def truncate(self, size: int) -> None:
        with self._line(f"truncate size={size}"):
            self.image.truncate(size)

    def extents(self, offset: int, length: int) -> Extents:
        with self._line(f"extents offset={offset} length={length}"):
            return self.image.extents(offset, length)

    def close(self) -> None:
        try:
            with self._line("close"):
                super().close()
        finally:
            with self._mutex:
                file, self._file = self._file, None
            if file is not None:
                try:
                    file.close()
                except OSError as error:  # what it could not write before, it tries again
                    raise BlockIOError.from_os(error, "the log cannot be written", path=self._path) from error

    @contextmanager
    def _line(self, request: str) -> Iterator[None]:
        """Runs the request in the block, and writes its line; what it raises, it still raises."""
        start = self._clock.perf_counter()
        result, why = "ok", ""
        try:
            yield
        except BaseException as error:
            number = getattr(error, "errno", None)
            result = errno.errorcode.get(number, str(number)) if number else type(error).__name__
            why = f" error={json.dumps(str(error))}"
            raise
        finally:
            took = (self._clock.perf_counter() - start) * 1e6
            self._put(f"{_stamp(self._clock.time())} {request} result={result} us={took:.1f}{why}\n")

    def _put(self, line: str) -> None:
        with self._mutex:
            try:
                (self._file or sys.stderr).write(line)
            except OSError as error:
                raise BlockIOError.from_os(error, "the log cannot be written", path=self._path) from error


def _words(flags: int) -> str:
    """` flags=fua,may_unmap`, or nothing."""
    words = [word for bit, word in _FLAGS.items() if flags & bit]
    return f" flags={','.join(words)}" if words else ""


def _stamp(seconds: float) -> str:
    """A time in UTC with microseconds: `2026-02-01T12:00:00.000000Z`."""
    whole, micro = divmod(round(seconds * 1_000_000), 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{micro:06}Z"

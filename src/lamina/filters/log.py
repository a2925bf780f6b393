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
from typing import Any

from ..around import AroundNode, Request
from ..errors import BlockIOError
from ..node import FUA, MAY_UNMAP, NO_FALLBACK
from ..request import Child
from ..schema import Option
from ..side_file import SideFile

_FLAGS = {FUA: "fua", MAY_UNMAP: "may_unmap", NO_FALLBACK: "no_fallback"}


class Log(AroundNode):
    """`image`, whose requests are logged to the file `log`, appended, or to standard error; which files are written is said
    in `side_file`. Lines of threads come whole, in the order in which requests ended. `clock`: has `time()` and
    `perf_counter()`, seconds.

    Raises BlockIOError if the log cannot be opened or written: a log with gaps would mislead.
    """

    driver = "log"
    faithful = True
    options = (Option("log", "str", "the file to append to; standard error if there is none"),)

    def __init__(self, image: Child, log: str | None = None, **common: Any) -> None:
        super().__init__(image, **common)
        self._path = log
        self._mutex = threading.Lock()
        self._file = None if log is None else SideFile(log, append=True, failure="the log cannot be written")

    def around(self, kind: str, request: Request, offset: int, length: int, flags: int, /) -> Any:
        start = self.clock.perf_counter()
        result, why = "ok", ""
        try:
            return request()
        except BaseException as error:
            number = getattr(error, "errno", None)
            result = errno.errorcode.get(number, str(number)) if number else type(error).__name__
            why = f" error={json.dumps(str(error))}"
            raise
        finally:
            took = (self.clock.perf_counter() - start) * 1e6
            place = f" size={offset}" if kind == "truncate" else f" offset={offset} length={length}" if length else ""
            line = f"{_stamp(self.clock.time())} {kind}{place}{_words(flags)} result={result} us={took:.1f}{why}\n"
            self._put(line)

    def close(self) -> None:
        try:
            self.around("close", super().close, 0, 0, 0)
        except Exception:
            self._close_file()
            raise
        self._close_file()  # not after an interrupt, when there is more to come

    def _close_file(self) -> None:
        with self._mutex:
            if self._file is not None:
                self._file.close()  # again where an interrupt cut it short
                self._file = None

    def forsake(self) -> None:
        super().forsake()
        if self._file is not None:
            self._file.close()

    def _put(self, line: str) -> None:
        with self._mutex:
            try:
                (self._file or sys.stderr).write(line)
            except BlockIOError:
                raise
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

"""The filter `log`: writes one line for every completed request, to show how a program uses a disk.

A line is `TIME OPERATION offset=N length=N flags=WORDS result=ok us=N`, without the fields that an operation does not have.
The time is in UTC, offsets and lengths are bytes, and the duration is in microseconds. The result of a failed request is the
name of its errno, and `error="..."` follows at the end. Fields are separated by blanks; a message never contains a newline.
"""

from __future__ import annotations

import errno
import json
import sys
import threading
import time
from typing import Any, ClassVar

from ..around import AroundNode, Request
from ..errors import BlockIOError
from ..node import FUA, MAY_UNMAP, NO_FALLBACK
from ..request import Child
from ..schema import Option
from ..side_file import SideFile

_FLAGS = {FUA: "fua", MAY_UNMAP: "may_unmap", NO_FALLBACK: "no_fallback"}


class Log(AroundNode):
    """Logs the requests to `image`: appends to the file `log` (under the rules of `side_file`), or writes to standard error.
    Lines of several threads never interleave; their order is that in which the requests ended. `clock` has `time()` and
    `perf_counter()`, in seconds.

    Raises BlockIOError if the log cannot be opened or written, since a log with gaps would mislead.
    """

    driver = "log"
    faithful = True
    options: ClassVar[tuple[Option, ...]] = (
        Option("log", "str", "the file to which lines are appended (default: standard error)"),
    )

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
            where = f" size={offset}" if kind == "truncate" else f" offset={offset} length={length}" if length else ""
            line = f"{_stamp(self.clock.time())} {kind}{where}{_words(flags)} result={result} us={took:.1f}{why}\n"
            self._put(line)

    def close(self) -> None:
        try:
            self.around("close", super().close, 0, 0, 0)
        except Exception:
            self._close_file()
            raise
        self._close_file()  # not after an interrupt, since `close` is called again then

    def _close_file(self) -> None:
        with self._mutex:
            if self._file is not None:
                self._file.close()  # may be called again after an interrupt
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
    """The field ` flags=fua,may_unmap`; empty without flags."""
    words = [word for bit, word in _FLAGS.items() if flags & bit]
    return f" flags={','.join(words)}" if words else ""


def _stamp(seconds: float) -> str:
    """A time in UTC with microseconds: `2026-02-01T12:00:00.000000Z`."""
    whole, micro = divmod(round(seconds * 1_000_000), 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{micro:06}Z"

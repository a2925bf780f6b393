"""The standard streams of the program: that each of the three descriptors is taken, and that output which is lost is told.

A descriptor that was closed at the start (`>&-`) would be given to the next file that is opened, an image for example, and
text for the terminal would be written into it. So a closed one is taken first. What a command says on a closed standard
output or error is dropped, as the peers do; the status of the command is not changed by it. Only a read or write of the
descriptor itself, where a copy comes from or goes to it, fails.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO

from ..errors import printable


class _Nowhere(io.BufferedIOBase):
    """Takes what is written, and drops it. Its descriptor is that of the stream that it stands for."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: Any) -> int:
        return len(memoryview(data).cast("B"))

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd


class _Remembering(io.BufferedWriter):
    """A buffer that remembers why a write failed: it does not keep what is longer than itself, and argparse drops errors."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = error
            raise


def prepare() -> None:
    """Take the descriptors that are closed, and let a name that the terminal cannot show end no command."""
    for fd, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDWR)):
        try:
            os.fstat(fd)
        except OSError:
            # Open for the other direction only: reading from it, or writing to it, says "Bad file descriptor".
            taken = os.open(os.devnull, mode)
            if taken != fd:
                os.dup2(taken, fd)
                os.close(taken)
            os.set_inheritable(fd, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = _dropping(1)
    else:
        given: Any = sys.stdout
        sys.stdout = io.TextIOWrapper(
            _Remembering(io.FileIO(given.fileno(), "w", closefd=False)),
            encoding=given.encoding,
            # With PYTHONUNBUFFERED the stream wrote through; whole lines are as good to whoever waits for them.
            line_buffering=given.line_buffering or given.write_through,
        )
    if sys.stderr is None:
        sys.stderr = _dropping(2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def complain(words: str) -> None:
    """One line on standard error, after all that was said before it. What cannot be said there is dropped."""
    try:
        sys.stderr.write(f"lamina: {printable(words)}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        drop(sys.stderr)


def lost_output() -> OSError | None:
    """Write out what was said on standard output. Why that failed, if it did; that is told once, and the rest is dropped.
    BrokenPipeError is raised: whoever read has enough, which is no error to tell of."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop(sys.stdout)
        return error
    buffer = getattr(sys.stdout, "buffer", None)
    if not isinstance(buffer, _Remembering) or buffer.lost is None:
        return None
    if isinstance(buffer.lost, BrokenPipeError):
        raise buffer.lost
    lost, buffer.lost = buffer.lost, None
    drop(sys.stdout)
    return lost


def drop(stream: TextIO) -> None:
    """Let `stream` write into nothing: Python flushes it at the end of the process, and would complain."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _dropping(fd: int) -> TextIO:
    return io.TextIOWrapper(_Nowhere(fd), encoding="utf-8", errors="backslashreplace")  # type: ignore[type-var]

"""The standard streams of the program: replacement of closed descriptors, and detection of lost output.

A standard descriptor that is closed at the start (`>&-`) would be reused for the next opened file, such as an image, and text
would be written into that file. Therefore `prepare` opens closed descriptors first. Output of a command to a closed standard
output or error is discarded without an effect on the exit status, as by qemu-img. Only a copy that reads or writes such a
descriptor fails.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO

from . import program


class _DiscardingStream(io.BufferedIOBase):
    """A stream that discards all output. Its descriptor is that of the stream that it replaces."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: Any) -> int:
        return len(memoryview(data).cast("B"))

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd


class _RecordingWriter(io.BufferedWriter):
    """A buffered writer that records the error of a failed write, since argparse ignores errors, and text that is longer than
    the buffer does not stay in it."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = error
            raise


def prepare() -> None:
    """Open the closed standard descriptors, and make the streams escape characters that the terminal cannot show."""
    for fd, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDWR)):
        try:
            os.fstat(fd)
        except OSError:
            # Open for the other direction only, so that using it raises "Bad file descriptor".
            opened = os.open(os.devnull, mode)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = _discarding(1)
    else:
        given: Any = sys.stdout
        sys.stdout = io.TextIOWrapper(
            _RecordingWriter(io.FileIO(given.fileno(), "w", closefd=False)),
            encoding=given.encoding,
            # With PYTHONUNBUFFERED the stream had no buffer; line buffering serves readers as well.
            line_buffering=given.line_buffering or given.write_through,
        )
    if sys.stderr is None:
        sys.stderr = _discarding(2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def print_error(text: str) -> None:
    """Print one line on standard error. Errors of standard error itself are ignored."""
    try:
        program.tell(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        drop(sys.stderr)


def lost_output() -> OSError | None:
    """Flush standard output. Returns the error of a failed write, once; later output is discarded. Raises BrokenPipeError if
    the reader has closed the pipe, which is not reported as an error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop(sys.stdout)
        return error
    buffer = getattr(sys.stdout, "buffer", None)
    if not isinstance(buffer, _RecordingWriter) or buffer.lost is None:
        return None
    if isinstance(buffer.lost, BrokenPipeError):
        raise buffer.lost
    lost, buffer.lost = buffer.lost, None
    drop(sys.stdout)
    return lost


def drop(stream: TextIO) -> None:
    """Redirect `stream` to /dev/null, since Python would report an error when it flushes the stream at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _discarding(fd: int) -> TextIO:
    return io.TextIOWrapper(_DiscardingStream(fd), encoding="utf-8", errors="backslashreplace")  # type: ignore[type-var]

"""Auxiliary files that a command reads: rules, patterns, keys. Base layer. (`side_file` writes auxiliary files.)

Such a file may be a FIFO (`<(...)` of a shell), which is read to its end. Each wait for its writer is limited to `PATIENCE`
seconds.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from .capabilities import O_CLOEXEC, O_NOCTTY, O_NONBLOCK, wait_for
from .errors import BlockIOError, NotFound, OptionError, printable

#: The longest wait, in seconds, for the writer of a FIFO.
PATIENCE: Final = 10.0
_CHUNK: Final = 1 << 16


def read_named(path: str, most: int, *, failure: str, patience: float | None = None) -> tuple[bytes, os.stat_result]:
    """The first `most` bytes of the file, FIFO or device at `path`, and its status when it was opened. `failure`: the text
    of errors. Raises NotFound, BlockIOError (ETIMEDOUT if no process writes to the FIFO), OptionError for an invalid name."""
    try:
        fd = os.open(path, os.O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC)
    except OSError as error:
        raise _failed(error, failure, path) from error
    except ValueError as error:  # NUL, or a character without an encoding
        raise OptionError(f"{failure}: {printable(str(error))}", path=path, hint="name a file") from error
    try:
        status = os.fstat(fd)
        limit = PATIENCE if patience is None else patience
        waits = not stat.S_ISREG(status.st_mode)
        data = bytearray()
        while len(data) < most:
            if waits:
                _wait(fd, path, failure, limit)
            try:
                chunk = os.read(fd, min(most - len(data), _CHUNK))
            except BlockingIOError:
                continue
            if not chunk:
                break
            data += chunk
        return bytes(data), status
    except OSError as error:
        if isinstance(error, BlockIOError):
            raise
        raise _failed(error, failure, path) from error
    finally:
        os.close(fd)


def _wait(fd: int, path: str, failure: str, patience: float) -> None:
    """Wait until bytes can be read or all writers of a FIFO have closed it. `poll` also waits for the first writer, while a
    read would report the end of the file."""
    if not wait_for(fd, patience):
        raise BlockIOError(
            f"{failure}: no process has written to it for {patience:g} s", errno=errno.ETIMEDOUT, path=path
        )


def _failed(error: OSError, failure: str, path: str) -> BlockIOError:
    kind = NotFound if isinstance(error, FileNotFoundError) else BlockIOError
    return kind.from_os(error, failure, path=path)

"""Files that a user names for a command to read beside its images: rules, patterns, keys. Ground floor.

Such a name may be a FIFO (`<(...)` of a shell). One is read to its end, but never waited for longer than `PATIENCE` seconds.
What is written beside images is in `side_file`.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from typing import Final

from .errors import BlockIOError, NotFound, OptionError, printable

#: Seconds that somebody who writes into a FIFO may keep us waiting for the next bytes.
PATIENCE: Final = 10.0
_PIECE: Final = 1 << 16


def read_named(path: str, most: int, *, failure: str, patience: float | None = None) -> tuple[bytes, os.stat_result]:
    """The first `most` bytes of the file, FIFO or device at `path`, and its status when it was opened. `failure`: what an
    error says. NotFound, BlockIOError (ETIMEDOUT where nobody writes into the FIFO); OptionError where it is no name."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(error, failure, path) from error
    except ValueError as error:  # a NUL, or a character that no file name has
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
                piece = os.read(fd, min(most - len(data), _PIECE))
            except BlockingIOError:
                continue
            if not piece:
                break
            data += piece
        return bytes(data), status
    except OSError as error:
        if isinstance(error, BlockIOError):
            raise
        raise _failed(error, failure, path) from error
    finally:
        os.close(fd)


def _wait(fd: int, path: str, failure: str, patience: float) -> None:
    """Until something can be read, or the writers of a FIFO are gone. A FIFO that nobody has opened to write yet is not at
    its end: `poll` tells the two apart, a read does not."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(patience * 1000):
        raise BlockIOError(
            f"{failure}: nothing has been written into it for {patience:g} s", errno=errno.ETIMEDOUT, path=path
        )


def _failed(error: OSError, failure: str, path: str) -> BlockIOError:
    kind = NotFound if isinstance(error, FileNotFoundError) else BlockIOError
    return kind.from_os(error, failure, path=path)

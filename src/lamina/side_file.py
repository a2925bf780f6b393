"""Auxiliary files that a command writes: reports, logs, counters, pid files. (`named_file` reads auxiliary files.)

Base layer. Such a file may be in a folder that other users can write, and the command may run as root. Therefore symbolic
links are never followed, and an existing file is written only if that cannot harm other users: a regular file of the same
user with one link, a FIFO, or a terminal. Each wait for the reader of a FIFO is limited to `patience` seconds.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from types import TracebackType
from typing import Final, Self

from .capabilities import O_CLOEXEC, O_NOCTTY, O_NOFOLLOW, O_NONBLOCK, set_blocking, user, wait_for
from .errors import BlockIOError, OptionError

#: The longest wait, in seconds, for the reader of a FIFO.
PATIENCE: Final = 10.0
#: The number of bytes that a pipe accepts without blocking when `poll` reports it as writable (PIPE_BUF of Linux).
_PIPE = 4096
#: Names of descriptors of this process. They are symbolic links, but other users cannot change them.
_DESCRIPTOR = re.compile(r"/dev/(?:fd/(\d{1,9})|(stdout)|(stderr))|/proc/self/fd/(\d{1,9})", re.ASCII)


class SideFile:
    """The file at `path`, open for writing ("-" is standard output). A missing file is created with the permissions `mode`;
    an existing file is truncated unless `append` is set. `failure`: the text of errors. Not thread-safe.

    Raises BlockIOError if the file cannot be opened or may not be written (see the module).
    """

    def __init__(
        self,
        path: str,
        *,
        append: bool = False,
        mode: int = 0o666,
        failure: str = "it cannot be written",
        patience: float = PATIENCE,
    ) -> None:
        self.path = path
        self._failure = failure
        self._patience = patience
        try:
            self._fd = _open(path, append, mode, time.monotonic() + patience)
        except OSError as error:
            raise self._failed(error) from error
        except ValueError as error:
            raise OptionError(f"not a valid file name: {error}", path=path) from error
        status = os.fstat(self._fd)
        #: Device and inode.
        self.identity = (status.st_dev, status.st_ino)
        self.regular = stat.S_ISREG(status.st_mode)

    def write(self, text: str) -> None:
        """Write `text` as UTF-8 after the previous text. Raises BlockIOError, with ETIMEDOUT if no process reads the FIFO."""
        data = memoryview(text.encode(errors="backslashreplace"))
        try:
            while data:
                data = data[os.write(self._fd, data if self.regular else self._writable(data)) :]
        except OSError as error:
            raise self._failed(error) from error

    def empty(self) -> None:
        """Truncate a regular file that was opened with `append`; the next `write` begins at offset 0."""
        if self.regular:
            try:
                os.ftruncate(self._fd, 0)
            except OSError as error:
                raise self._failed(error) from error

    def _writable(self, data: memoryview) -> memoryview:
        """Wait until the pipe is writable. Returns the part of `data` that it accepts without blocking."""
        if not wait_for(self._fd, self._patience, to_write=True):
            raise _Refusal(errno.ETIMEDOUT, f"no process has read from it for {self._patience:g} s")
        return data[:_PIPE]

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor; further calls do nothing. Raises BlockIOError for a write error reported at close."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            os.close(fd)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> BlockIOError:
        if isinstance(error, _Refusal):
            return BlockIOError(
                f"{self._failure}: {error.strerror}", errno=error.errno or errno.EPERM, path=self.path, hint=error.hint
            )
        return BlockIOError.from_os(error, self._failure, path=self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Refusal(OSError):
    """An OSError with its own text and hint, for files that may not be written."""

    def __init__(self, number: int, why: str, hint: str | None = None) -> None:
        super().__init__(number, why)
        self.hint = hint


def make_side_file(path: str, *, failure: str = "it cannot be written") -> None:
    """Ensure that `path` is a file for a storage node: a new file, an existing regular file that may be written (see the
    module), whose content stays, or a block device. Raises BlockIOError."""
    try:
        if stat.S_ISBLK(os.stat(path).st_mode):
            return
    except (FileNotFoundError, ValueError):
        pass
    except OSError as error:
        raise BlockIOError.from_os(error, failure, path=path) from error
    with SideFile(path, append=True, failure=failure):
        pass


def _open(path: str, append: bool, mode: int, deadline: float) -> int:
    if path == "-":
        return os.dup(1)
    own = _DESCRIPTOR.fullmatch(path)
    if own:
        number = own[1] or own[4] or ("1" if own[2] else "2")
        return os.dup(int(number))
    flags = os.O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC | (os.O_APPEND if append else 0)
    while True:
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            pass
        try:
            _require_safe(os.lstat(path))  # checked before the open, which has side effects on some devices
            fd = os.open(path, flags)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            continue  # removed meanwhile
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _refused("symbolic links are not followed") from error
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise _Refusal(errno.ENXIO, "no process reads from this FIFO") from error
            time.sleep(0.02)
            continue
        try:
            # The file of that name may have been replaced meanwhile, so the descriptor is checked as well.
            status = os.fstat(fd)
            _require_safe(status)
            if stat.S_ISREG(status.st_mode) and not append:
                os.ftruncate(fd, 0)
            if not stat.S_ISFIFO(status.st_mode):
                set_blocking(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _require_safe(status: os.stat_result) -> None:
    """Raise `_Refusal` if the existing file may not be written."""
    kind = status.st_mode
    if stat.S_ISLNK(kind):
        raise _refused("symbolic links are not followed")
    if stat.S_ISREG(kind):
        if status.st_uid != user():
            raise _refused("the file belongs to another user")
        if status.st_nlink != 1:
            raise _refused("the file has several names (hard links)")
    elif not stat.S_ISFIFO(kind) and not stat.S_ISCHR(kind):
        raise _refused("it is not a regular file")


def _refused(why: str) -> _Refusal:
    return _Refusal(errno.EPERM, why, hint="name a new file, or remove the existing one")

"""Files that a user lets a command write beside its images: reports, logs, counters, pid files.

Ground floor. Such a file often lies in a folder that others may write, and the command may run as root. So a link is never
followed, and what is there already is written only where that cannot harm somebody else: a regular file of the same user
with one link, a FIFO, a terminal. A FIFO is never waited for longer than `patience` seconds.
"""

from __future__ import annotations

import errno
import os
import re
import select
import stat
import time
from types import TracebackType
from typing import Final, Self

from .errors import BlockIOError, OptionError

#: Seconds that somebody who reads a FIFO may keep us waiting.
PATIENCE: Final = 10.0
#: Bytes that a pipe which `poll` calls writable takes without blocking (PIPE_BUF of Linux).
_PIPE = 4096
#: Names that mean a descriptor of this process: links by their nature, but nobody else's.
_DESCRIPTOR = re.compile(r"/dev/(?:fd/(\d{1,9})|(stdout)|(stderr))|/proc/self/fd/(\d{1,9})", re.ASCII)


class SideFile:
    """The file at `path`, open for writing ("-" is standard output); it is made, with the permissions `mode`, if it is not
    there. `append`: what it holds stays; otherwise it is emptied. `failure` is what an error says. For one thread at a time.

    BlockIOError if it cannot be opened, or is not a file that may be written: see above.
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
            raise OptionError(f"this cannot be a file name: {error}", path=path) from error
        found = os.fstat(self._fd)
        #: Device and inode.
        self.identity = (found.st_dev, found.st_ino)
        self.regular = stat.S_ISREG(found.st_mode)

    def write(self, text: str) -> None:
        """Write `text`, as UTF-8, where the last one ended. BlockIOError; ETIMEDOUT where nobody reads the FIFO."""
        data = memoryview(text.encode(errors="backslashreplace"))
        try:
            while data:
                data = data[os.write(self._fd, data if self.regular else self._writable(data)) :]
        except OSError as error:
            raise self._failed(error) from error

    def empty(self) -> None:
        """Forget what the regular file holds: the next `write` is at its start. For one that was opened with `append`."""
        if self.regular:
            try:
                os.ftruncate(self._fd, 0)
            except OSError as error:
                raise self._failed(error) from error

    def _writable(self, data: memoryview) -> memoryview:
        """As much of `data` as a pipe takes now; waits for room."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        if not poll.poll(self._patience * 1000):
            raise _Refusal(errno.ETIMEDOUT, f"nobody has read from it for {self._patience:g} s")
        return data[:_PIPE]

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Give the descriptor back. Calling it again does nothing. BlockIOError where the system tells of a failure now."""
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
    """Why a file is not written, in words."""

    def __init__(self, number: int, why: str, hint: str | None = None) -> None:
        super().__init__(number, why)
        self.hint = hint


def make_side_file(path: str, *, failure: str = "it cannot be written") -> None:
    """See to it that there is a file at `path` to which storage may write: a new one, a regular file as above, whose bytes
    stay, or a block device. BlockIOError."""
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
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (os.O_APPEND if append else 0)
    while True:
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            pass
        try:
            _judge(os.lstat(path))  # before it is opened: to open a device can do something
            fd = os.open(path, flags)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            continue  # gone since
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _refused("it is a symbolic link, and is not followed") from error
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise _Refusal(errno.ENXIO, "nobody reads from this FIFO") from error
            time.sleep(0.02)
            continue
        try:
            # The name may have changed its meaning meanwhile: what counts is the descriptor.
            found = os.fstat(fd)
            _judge(found)
            if stat.S_ISREG(found.st_mode) and not append:
                os.ftruncate(fd, 0)
            if not stat.S_ISFIFO(found.st_mode):
                os.set_blocking(fd, True)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _judge(found: os.stat_result) -> None:
    """BlockIOError if what is there already is not for us to write."""
    kind = found.st_mode
    if stat.S_ISLNK(kind):
        raise _refused("it is a symbolic link, and is not followed")
    if stat.S_ISREG(kind):
        if found.st_uid != os.geteuid():
            raise _refused("the file is another user's")
        if found.st_nlink != 1:
            raise _refused("the file has other names (hard links), and would change under all of them")
    elif not stat.S_ISFIFO(kind) and not stat.S_ISCHR(kind):
        raise _refused("it is not a regular file")


def _refused(why: str) -> _Refusal:
    return _Refusal(errno.EPERM, why, hint="name a new file, or remove this one")

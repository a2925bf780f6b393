"""Daemon support of `lamina serve`: the background process, the pid file, sockets from a service manager."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self

from ..capabilities import O_CLOEXEC, O_NOCTTY, O_NOFOLLOW, O_NONBLOCK
from ..errors import BlockIOError, OptionError
from ..side_file import SideFile

#: The first descriptor that a service manager passes.
_FIRST = 3


def inherited_sockets() -> list[socket.socket]:
    """The listening sockets from a service manager (LISTEN_FDS, LISTEN_PID), which may be none. The variables are removed
    from the environment, so that child processes do not use them."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    sockets = []
    for fd in range(_FIRST, _FIRST + int(count)):
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise BlockIOError.from_os(error, f"descriptor {fd} from the service manager is not a socket") from error
        if not listening or sock.type != socket.SOCK_STREAM:
            raise OptionError(f"descriptor {fd} from the service manager is not a listening stream socket")
        sockets.append(sock)
    return sockets


def fork_to_background() -> Callable[[], None]:
    """Fork, and continue in the child process. The parent process waits and exits with the status 0 when the child calls the
    returned function, or with 1 if the child ends before. So a script that waits for the parent knows that the child serves.
    Until then a Ctrl-C ends both processes.

    Call it before images are opened and threads are started, since images and sockets belong to the process that opened them.
    """
    if not hasattr(os, "fork"):
        raise OptionError("a process cannot continue in the background on this system", hint="leave --fork out")
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(writer)
        _wait_for(reader, child)
    os.close(reader)

    def ready() -> None:
        sys.stdout.flush()
        # Detach from the terminal: no output to it and no Ctrl-C from it from now on.
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        if null > 2:
            os.close(null)
        try:
            os.write(writer, b"\0")
        except OSError as error:  # the parent process was killed
            raise BlockIOError.from_os(error, "the process that started this server has ended") from error
        os.close(writer)

    return ready


def _wait_for(reader: int, child: int) -> NoReturn:
    status = 1
    try:
        status = 0 if os.read(reader, 1) else 1
    except BaseException:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGTERM)
        raise
    finally:
        # Not sys.exit: its handlers would end things that the child process uses.
        os._exit(status)


class PidFile:
    """A context manager for a file with the id of this process, under the rules of `side_file`. An existing file must be a
    regular file of this user with one link that contains only a number. Raises BlockIOError if it cannot be written."""

    def __init__(self, path: str) -> None:
        if path == "-":
            raise OptionError(
                "a pid file cannot be standard output (-)", hint="name a file; write ./- for a file named -"
            )
        self._path = os.path.abspath(path)
        self._written = f"{os.getpid()}\n"
        self._identity: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        found = self._there()
        if found is not None and not (found[1].strip().isdigit() or not found[1].strip()):
            raise BlockIOError(
                "the existing file is not a pid file", errno=errno.EEXIST, path=self._path, hint="name another file"
            )
        with SideFile(self._path, mode=0o644, failure="the pid file cannot be written") as file:
            file.write(self._written)
            self._identity = file.identity if file.regular else None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the file if it is unchanged. Never raises OSError."""
        with contextlib.suppress(OSError):
            found = self._there()
            if found == (self._identity, self._written.encode()):
                os.unlink(self._path)

    def _there(self) -> tuple[tuple[int, int], bytes] | None:
        """Device and inode of the existing regular file, and its first bytes; None if there is no such file."""
        try:
            fd = os.open(self._path, os.O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC)
        except OSError:
            return None  # `SideFile` raises the error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return None
            return (status.st_dev, status.st_ino), os.read(fd, 64)
        finally:
            os.close(fd)

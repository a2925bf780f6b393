"""What a server of the command line shares with its system: the background, a pid file, sockets of a service manager."""

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

from ..errors import BlockIOError, OptionError
from ..side_file import SideFile

#: The first descriptor that a service manager passes.
_FIRST = 3


def inherited_sockets() -> list[socket.socket]:
    """The listening sockets that a service manager passed (LISTEN_FDS, LISTEN_PID); none if it passed none to this process.
    The variables are taken out of the environment, so that children do not believe them."""
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
            raise BlockIOError.from_os(
                error, f"descriptor {fd}, passed by the service manager, is no socket"
            ) from error
        if not listening or sock.type != socket.SOCK_STREAM:
            raise OptionError(f"descriptor {fd}, passed by the service manager, is no listening stream socket")
        sockets.append(sock)
    return sockets


def fork_to_background() -> Callable[[], None]:
    """Go on in a child process. The parent ends when the child calls what this returns (status 0), or ends without (status
    1): so whoever waits for the parent knows that the child serves. Until then a Ctrl-C ends both.

    Call it before anything is opened and any thread runs: images and sockets belong to the process that opened them.
    """
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
        # The terminal is the parent's: from now on nothing is said there, and its Ctrl-C is not for this process.
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        if null > 2:
            os.close(null)
        try:
            os.write(writer, b"\0")
        except OSError as error:  # the parent was killed: nobody knows of this server
            raise BlockIOError.from_os(error, "the process that started this server is gone") from error
        os.close(writer)

    return ready


def _wait_for(reader: int, child: int) -> NoReturn:
    status = 1
    try:
        told = os.read(reader, 1)
        status = 0 if told else 1
    except BaseException:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGTERM)
        raise
    finally:
        # Not sys.exit: what was set up before is the child's as well, and nothing here may end it in its name.
        os._exit(status)


class PidFile:
    """The id of this process in a file, as long as the context lasts. Written as `side_file` has it: an existing file must be
    a regular one of this user, with one link, that holds nothing but a number. BlockIOError if it cannot be written."""

    def __init__(self, path: str) -> None:
        if path == "-":
            raise OptionError("- is standard output, and a pid file is a file", hint="name a file: ./- if that is it")
        self._path = os.path.abspath(path)
        self._written = f"{os.getpid()}\n"
        self._identity: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        found = self._there()
        if found is not None and not (found[1].strip().isdigit() or not found[1].strip()):
            raise BlockIOError(
                "the file that is there is no pid file", errno=errno.EEXIST, path=self._path, hint="name another one"
            )
        with SideFile(self._path, mode=0o644, failure="the pid file cannot be written") as file:
            file.write(self._written)
            self._identity = file.identity if file.regular else None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the file, if it is still the one that was written, and holds what was written. Never raises."""
        with contextlib.suppress(OSError):
            found = self._there()
            if found == (self._identity, self._written.encode()):
                os.unlink(self._path)

    def _there(self) -> tuple[tuple[int, int], bytes] | None:
        """Device and inode of the regular file that is there, and its first bytes; None if there is none."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return None  # whatever it is, `SideFile` judges it
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return None
            return (status.st_dev, status.st_ino), os.read(fd, 64)
        finally:
            os.close(fd)

"""What a server of the command line shares with its system: the background, a pid file, sockets of a service manager."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self

from .. import lifecycle
from ..errors import BlockIOError, OptionError

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
    """Go on in a child process, in a session of its own. The parent ends when the child calls what this returns (status 0),
    or ends without (status 1): so whoever waits for the parent knows that the child serves. No other thread may run yet."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with lifecycle.handing_over():  # the images are the child's
        pid = os.fork()
    if pid:
        os.close(writer)
        _wait_for(reader)
    os.close(reader)
    os.setsid()

    def ready() -> None:
        sys.stdout.flush()
        # The terminal is the parent's: from now on nothing is said there.
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        os.write(writer, b"\0")
        os.close(writer)

    return ready


def _wait_for(reader: int) -> NoReturn:
    told = os.read(reader, 1)
    # Not sys.exit: the images and sockets are the child's, and nothing here may close them in its name.
    os._exit(0 if told else 1)


class PidFile:
    """The id of this process in a file, as long as the context lasts. BlockIOError if it cannot be written."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._written = f"{os.getpid()}\n"

    def __enter__(self) -> Self:
        try:
            with open(self._path, "w", encoding="ascii") as file:
                file.write(self._written)
        except OSError as error:
            raise BlockIOError.from_os(error, "the pid file cannot be written", path=self._path) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            with open(self._path, encoding="ascii") as file:
                mine = file.read() == self._written
            if mine:
                os.unlink(self._path)

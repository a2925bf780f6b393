"""What the sockets of the operating systems do not all have, and what stands for it where it is missing.

Linux has everything. macOS lacks epoll, POLLRDHUP and the credentials of a peer; Windows also Unix sockets, sendmsg, poll,
calls that do not wait, and time limits inside the kernel. `connected` makes a socket there that has them (`_SelectSocket`).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
from collections.abc import Callable
from errno import EBADF, ECONNABORTED, EINVAL
from time import monotonic
from typing import Any, Final

#: The family of Unix sockets; no family where there are none.
AF_UNIX: Final[int] = getattr(socket, "AF_UNIX", -1)

# Programs in a pipeline may have given SIGPIPE its deadly meaning back. Ints: the enum's members are slower to pass. (Without
# the flag, on macOS, Python ignores that signal, as a process does unless it asks otherwise.)
NO_SIGNAL: Final = int(getattr(socket, "MSG_NOSIGNAL", 0))
#: The number is Linux's; where the system has no such flag, only `_SelectSocket` sees it.
DONT_WAIT: Final = int(getattr(socket, "MSG_DONTWAIT", 0x40))
PEEK: Final = int(socket.MSG_PEEK)

#: Whether calls of a socket have flags, time limits and several buffers.
_COMPLETE: Final = hasattr(socket, "MSG_DONTWAIT") and hasattr(socket.socket, "sendmsg")
_PEER_CREDENTIALS: Final[int | None] = getattr(socket, "SO_PEERCRED", None)
#: A peer that says nothing is asked whether it is there: after so many seconds, so often, so many times.
_KEEPALIVE: Final = (
    ("TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE", 60),
    ("TCP_KEEPINTVL", 15),
    ("TCP_KEEPCNT", 4),
)
#: Seconds after which a wait of a `_SelectSocket` looks whether it was shut down.
_LOOK: Final = 0.1
#: The most bytes of one send of a `_SelectSocket`.
_PIECE: Final = 1 << 16


class _SelectSocket(socket.socket):
    """A connected socket that waits by `select`, and never inside a call: so each call can have its own time limit. The
    methods raise what those of a complete socket raise."""

    _limit: float | None = None
    _over = False

    def _again(self, call: Callable[[], int], flags: int, *, to_write: bool) -> int:
        """The result of `call` as soon as it need not wait. Raises BlockingIOError after the time limit."""
        until = None if self._limit is None else monotonic() + self._limit
        while True:
            try:
                return call()
            except BlockingIOError:
                if flags & DONT_WAIT or (until is not None and monotonic() >= until):
                    raise
            if self._over:
                raise OSError(ECONNABORTED, os.strerror(ECONNABORTED))
            try:
                ready(self, _LOOK, to_write=to_write)
            except ValueError as error:  # it was closed
                raise OSError(EBADF, os.strerror(EBADF)) from error

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        receive = super().recv_into
        return self._again(lambda: receive(buffer, nbytes, flags & PEEK), flags, to_write=False)

    def sendmsg(self, buffers: Any, ancillary: Any = (), flags: int = 0, address: Any = None, /) -> int:  # type: ignore[override,unused-ignore]
        first = next((each for each in buffers if len(each)), b"")
        return self.send(memoryview(first)[:_PIECE], flags) if len(first) else 0

    def send(self, data: Any, flags: int = 0, /) -> int:
        send = super().send
        return self._again(lambda: send(data), flags, to_write=True)

    def shutdown(self, how: int) -> None:
        if how == socket.SHUT_RDWR:
            self._over = True
        super().shutdown(how)


def connected(sock: socket.socket) -> socket.socket:
    """The connected socket `sock`, with calls that wait, and that have flags, time limits and several buffers on any system.
    `sock` itself may be used no more."""
    # Python's own timeouts would poll before each call; the kernel's (see `limit`) cost nothing.
    if _COMPLETE:
        sock.settimeout(None)
        return sock
    made = _SelectSocket(fileno=sock.detach())
    made.setblocking(False)
    return made


def limit(sock: socket.socket, seconds: float | None) -> None:
    """Let no single wait of a `connected` socket last longer; None: without end. Raises OSError."""
    if isinstance(sock, _SelectSocket):
        sock._limit = seconds
        return
    # At least a microsecond: to the kernel, 0 means no timeout.
    micros = 0 if seconds is None else max(1, int(seconds * 1_000_000))
    value = struct.pack("ll", *divmod(micros, 1_000_000))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, value)


def ready(sock: socket.socket, seconds: float, *, to_write: bool = False) -> bool:
    """Wait until the socket has something to receive (or takes something), or is broken; at most for `seconds`."""
    return any(ready_for(sock, seconds, to_read=not to_write, to_write=to_write))


def ready_for(sock: socket.socket, seconds: float, *, to_read: bool = True, to_write: bool = True) -> tuple[bool, bool]:
    """The same for both directions: whether it has something, and whether it takes something. A broken one does both."""
    if not hasattr(select, "poll"):
        one = [sock]
        found = select.select(one if to_read else [], one if to_write else [], one, seconds)
        return bool(found[0] or found[2]), bool(found[1] or found[2])
    poll = select.poll()
    poll.register(sock.fileno(), (select.POLLIN if to_read else 0) | (select.POLLOUT if to_write else 0))
    events = sum(event for _, event in poll.poll(int(seconds * 1000)))
    broken = bool(events & (select.POLLERR | select.POLLHUP | select.POLLNVAL))
    return broken or bool(events & select.POLLIN), broken or bool(events & select.POLLOUT)


def is_gone(sock: socket.socket) -> bool:
    """Whether the peer has disconnected without waiting for replies. A system call. Raises OSError, ValueError for a socket
    that is closed here."""
    # A peer that only shuts down its sending half of a Unix socket may wait for replies; with TCP both look the same.
    if hasattr(select, "POLLRDHUP"):
        ended = 0 if sock.family == AF_UNIX else select.POLLRDHUP
        poll = select.poll()
        poll.register(sock.fileno(), ended)
        return any(events & (select.POLLHUP | select.POLLERR | ended) for _, events in poll.poll(0))
    if sock.family == AF_UNIX:
        poll = select.poll()
        poll.register(sock.fileno(), 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))
    try:
        # Behind a request that has arrived, the end is not seen.
        return sock.recv_into(bytearray(1), 1, PEEK | DONT_WAIT) == 0
    except BlockingIOError:
        return False


def peer_process(sock: socket.socket) -> str:
    """The process at the other end of a Unix socket, for messages. Raises OSError."""
    if _PEER_CREDENTIALS is None:
        return "a process of this machine"
    pid, user, _ = struct.unpack("iii", sock.getsockopt(socket.SOL_SOCKET, _PEER_CREDENTIALS, 12))
    return f"pid {pid} of user {user}"


def keep_alive(sock: socket.socket) -> None:
    """Let the connection `sock` end when its peer vanished without a word."""
    if sock.family == AF_UNIX:
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            option: int | None = getattr(socket, name, None)
            if option is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


def restrict(listener: socket.socket) -> bool:
    """Let `bind` create the name of this Unix socket with mode 0600, so that no other user can connect even for a moment.
    False where a socket has no mode of its own (macOS)."""
    try:
        os.fchmod(listener.fileno(), 0o600)
    except OSError as error:
        if error.errno != EINVAL:
            raise
        return False
    return True


def reserve_address(listener: socket.socket) -> None:
    """Let the socket take an address that a server has just left, and no other program one that it has."""
    exclusive: int | None = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)
    if sys.platform == "win32" and exclusive is not None:
        listener.setsockopt(socket.SOL_SOCKET, exclusive, 1)  # SO_REUSEADDR would share the address there
    else:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

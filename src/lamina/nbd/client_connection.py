"""From a target to a connection that is ready: the socket, TLS, and the handshake, within their times.

Drives `client_negotiation` over a channel. Everything here blocks, and holds no state between calls.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from typing import TYPE_CHECKING, Final

from ..errors import BlockIOError, LaminaError
from .channel import Channel, PlainChannel
from .client_facts import Facts, Wish
from .client_negotiation import Negotiation, Task

if TYPE_CHECKING:
    import ssl

    from .uri import Target

#: Errors that may be gone in a moment: nobody listens yet, or the server is just being started again.
PASSING: Final = frozenset(
    {
        errno.ECONNREFUSED,
        errno.ENOENT,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EAGAIN,
        errno.ESHUTDOWN,
    }
)
#: The first and the longest pause between two attempts to connect, in seconds.
_PAUSE, _LONGEST_PAUSE = 0.02, 1.0


def passes(error: LaminaError) -> bool:
    """Whether `error`, of an attempt to connect, may be gone in a moment. A socket that is not there may appear; an export
    that a server does not have counts as settled."""
    return error.errno in PASSING and (error.errno != errno.ENOENT or isinstance(error.__cause__, OSError))


def lost(target: Target, what: str = "the server closed the connection", hint: str | None = None) -> BlockIOError:
    """The error for a connection that ended before it should."""
    return BlockIOError(what, errno=errno.ECONNRESET, path=str(target), hint=hint)


def connect(target: Target, timeout: float) -> PlainChannel:
    """A connected stream to the server, within `timeout` seconds for each of its addresses. BlockIOError, NotFound."""
    try:
        if target.socket is not None:
            return PlainChannel(_connected(socket.AF_UNIX, target.socket, timeout))
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _unreachable(error, target) from error
    first: OSError | None = None
    for family, _, _, _, address in found:
        try:
            return PlainChannel(_connected(family, address, timeout))
        except OSError as error:
            first = first or error
    raise _unreachable(first or OSError(errno.EHOSTUNREACH, ""), target) from first


def _connected(family: int, address: object, timeout: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(address)  # type: ignore[arg-type]
    except BaseException:
        sock.close()
        raise
    return sock


def _unreachable(error: OSError, target: Target) -> LaminaError:
    if isinstance(error, socket.gaierror):
        message = f"the host cannot be found: {error.strerror}"
        return BlockIOError(message, errno=errno.EHOSTUNREACH, path=str(target))
    if isinstance(error, TimeoutError):
        error = OSError(errno.ETIMEDOUT, "")
    if error.errno == errno.ECONNREFUSED and _is_other_file(target.socket):
        message = "this is no socket, but another kind of file"
        return BlockIOError(message, errno=errno.ENOTSOCK, path=str(target), hint="name the server's socket")
    return BlockIOError.from_os(error, "cannot connect", path=str(target))


def _is_other_file(path: str | None) -> bool:
    """Whether there is a file at `path` that is no socket."""
    if path is None or path.startswith("\0"):
        return False
    try:
        return not stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def negotiate(
    target: Target,
    wish: Wish,
    task: Task = "enter",
    *,
    all_exports: bool = False,
    connect_timeout: float,
    timeout: float,
) -> tuple[Channel, Negotiation]:
    """Connect and shake hands, in `timeout` seconds once connected: the channel, without a time limit, and the negotiation,
    which is `done`. Any LaminaError; the server was then told goodbye as far as the protocol lets one."""
    context: tuple[ssl.SSLContext, str | None] | None = None
    if wish.tls != "off":
        from .tls import client_context

        context = client_context(target)
    channel: Channel = connect(target, connect_timeout)
    negotiation = Negotiation(wish, task, all_exports=all_exports)
    try:
        deadline = time.monotonic() + timeout
        while True:
            if out := negotiation.to_send():
                channel.send(out)
            if negotiation.done:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                raise BlockIOError(f"no handshake within {timeout:g} s", errno=errno.ETIMEDOUT, path=str(target))
            if negotiation.wants_tls:
                assert context is not None
                assert isinstance(channel, PlainChannel)
                channel = channel.start_tls(context[0], server_side=False, hostname=context[1], timeout=left)
                negotiation.tls_started()
                continue
            channel.settimeout(left)
            count = channel.recv_into(negotiation.buffer())
            if not count:
                raise lost(target, "the server closed the connection during the handshake", negotiation.hangup_hint)
            negotiation.received(count)
        channel.settimeout(None)
    except BaseException as error:
        leave(channel, negotiation.farewell())
        if isinstance(error, LaminaError):
            error.path = str(target)
        raise
    return channel, negotiation


def leave(channel: Channel, farewell: bytes) -> None:
    """Say goodbye, if the server still listens, and close."""
    if farewell:
        # Who leaves need not be heard: the server may be gone, and that is what closes the connection anyway.
        with contextlib.suppress(LaminaError):
            channel.settimeout(1.0)
            channel.send((farewell,))
    channel.close()


def enter(
    target: Target, wish: Wish, *, connect_timeout: float, timeout: float, patience: float
) -> tuple[Channel, Facts]:
    """A connection in transmission. For `patience` seconds, what may pass (`PASSING`) is tried again, with pauses that
    double; other errors, and the last of these, are raised."""
    deadline = time.monotonic() + patience
    pause = _PAUSE
    while True:
        try:
            channel, negotiation = negotiate(target, wish, connect_timeout=connect_timeout, timeout=timeout)
            assert isinstance(negotiation.result, Facts)
            return channel, negotiation.result
        except LaminaError as error:
            if not passes(error) or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)

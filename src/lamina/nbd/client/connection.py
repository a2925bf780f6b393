"""From a target to a connection that is ready: the socket, TLS, and the handshake, within their times.

Drives `negotiation` over a channel. Everything here blocks, and holds no state between calls.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from ...errors import BlockIOError, LaminaError, printable
from ..channel import Channel, PlainChannel
from ..sockets import AF_UNIX, ready
from .details import ExportDetails, HandshakeOptions
from .negotiation import Negotiation, Task

if TYPE_CHECKING:
    import ssl

    from ..uri import Target

#: Errors that may be temporary: no server listens yet, or it is being restarted.
TRANSIENT: Final = frozenset(
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
#: Seconds after which every wait looks up, whether it should end.
_LOOK: Final = 0.2
#: Addresses of one host that are tried.
_MOST_ADDRESSES: Final = 8

#: What `connect` says while it goes on (the second on Windows).
_UNDER_WAY: Final = (errno.EINPROGRESS, *((errno.EWOULDBLOCK,) if errno.EWOULDBLOCK != errno.EAGAIN else ()))

#: Called while something is waited for: raises what shall end the wait.
Check = Callable[[], None]


def passes(error: LaminaError) -> bool:
    """Whether `error`, of an attempt to connect, may be gone in a moment. A socket that is not there may appear; an export
    that a server does not have counts as settled."""
    return error.errno in TRANSIENT and (error.errno != errno.ENOENT or isinstance(error.__cause__, OSError))


def lost(target: Target, what: str = "the server closed the connection", hint: str | None = None) -> BlockIOError:
    """The error for a connection that ended before it should."""
    return BlockIOError(what, errno=errno.ECONNRESET, path=str(target), hint=hint)


def never() -> None:
    """For waits that only their time ends."""


def pause(seconds: float, check: Check = never) -> None:
    """Sleep, and look up often."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        check()
        time.sleep(min(left, _LOOK))


def connect(target: Target, timeout: float, check: Check = never) -> PlainChannel:
    """A connected stream to the server, within `timeout` seconds for each of its addresses. BlockIOError, NotFound."""
    try:
        if target.socket is not None:
            if AF_UNIX < 0:
                raise BlockIOError("this system has no Unix sockets", errno=errno.EAFNOSUPPORT, path=str(target))
            return _channel(target, AF_UNIX, target.socket, timeout, check)
        found = _addresses(target, timeout, check)
    except OSError as error:
        raise _unreachable(error, target) from error
    first: OSError | None = None
    for family, address in found[:_MOST_ADDRESSES]:
        try:
            return _channel(target, family, address, timeout, check)
        except LaminaError:
            raise
        except OSError as error:
            first = first or error
    raise _unreachable(first or OSError(errno.EHOSTUNREACH, ""), target) from first


def _addresses(target: Target, timeout: float, check: Check) -> list[tuple[int, object]]:
    """The addresses of the host. A look-up cannot be interrupted: a thread is left to it when the time is over."""
    import threading

    outcome: list[Any] = []

    def look_up() -> None:
        try:
            outcome.append(socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            outcome.append(error)

    if (target.host or "")[-1:].isdigit() or ":" in (target.host or ""):
        look_up()  # an address: there is nothing to wait for
    else:
        thread = threading.Thread(target=look_up, name="look-up", daemon=True)
        thread.start()
        until = time.monotonic() + timeout
        while thread.is_alive() and time.monotonic() < until:
            check()
            thread.join(min(_LOOK, timeout))
    if not outcome:
        raise OSError(errno.ETIMEDOUT, "")
    if isinstance(outcome[0], UnicodeError):
        raise socket.gaierror(socket.EAI_NONAME, "it is no name of a host")
    if isinstance(outcome[0], OSError):
        raise outcome[0]
    return [(family, address) for family, _, _, _, address in outcome[0]]


def _channel(target: Target, family: int, address: Any, timeout: float, check: Check) -> PlainChannel:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        until = time.monotonic() + timeout
        number = sock.connect_ex(address)
        while number == errno.EAGAIN and time.monotonic() < until:  # a Unix socket with more clients than it accepts
            pause(_PAUSE, check)
            number = sock.connect_ex(address)
        if number in _UNDER_WAY:
            while number in _UNDER_WAY and time.monotonic() < until:
                check()
                if ready(sock, min(_LOOK, timeout) + 0.001, to_write=True):
                    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            late = number in (errno.EAGAIN, *_UNDER_WAY)
            raise OSError(errno.ETIMEDOUT if late else number, "")
        channel = PlainChannel(sock)
        channel.peer = str(target)  # errors name what the user named
    except BaseException:
        sock.close()
        raise
    return channel


#: What a path is that is no socket, by the type in its mode.
_KINDS: Final = (
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISCHR, "a character device"),
)


def _unreachable(error: OSError, target: Target) -> LaminaError:
    if isinstance(error, LaminaError):
        return error
    if isinstance(error, socket.gaierror):
        message = f"the host cannot be found: {error.strerror}"
        return BlockIOError(message, errno=errno.EHOSTUNREACH, path=str(target))
    if target.socket is not None and not target.socket.startswith("\0") and error.errno == errno.ECONNREFUSED:
        with contextlib.suppress(OSError):
            mode = os.stat(target.socket).st_mode
            for is_kind, name in _KINDS:
                if is_kind(mode):
                    message = f"{printable(target.socket)} is {name}, and no socket"
                    hint = "name the socket of a running server; an image file is opened by its path alone"
                    return BlockIOError(message, errno=errno.ENOTSOCK, path=str(target), hint=hint)
        hint = "the socket is there and nobody listens: is the server running?"
        return BlockIOError.from_os(error, "cannot connect", path=str(target), hint=hint)
    return BlockIOError.from_os(error, "cannot connect", path=str(target))


def negotiate(
    target: Target,
    wanted: HandshakeOptions,
    task: Task = "enter",
    *,
    all_exports: bool = False,
    connect_timeout: float,
    timeout: float,
    check: Check = never,
) -> tuple[Channel, Negotiation]:
    """Connect in `connect_timeout` seconds, and shake hands in `timeout`: the channel, with a time limit of moments, and the
    negotiation, which is `done`. `check` is called meanwhile, and ends the wait by raising. Any LaminaError; the server was
    then told goodbye as far as the protocol lets one."""
    context: tuple[ssl.SSLContext, str | None] | None = None
    if wanted.tls != "off":
        from ..tls import client_context

        context = client_context(target)
    negotiation = Negotiation(wanted, task, all_exports=all_exports)

    def watch(_: int = 0) -> None:
        check()
        if time.monotonic() >= deadline:
            raise BlockIOError(f"no handshake within {timeout:g} s", errno=errno.ETIMEDOUT, path=str(target))

    # Nothing between the connection and the block that closes it: an interrupt there would leave the socket open.
    channel: Channel = connect(target, connect_timeout, check)
    try:
        deadline = time.monotonic() + timeout
        while True:
            channel.settimeout(min(_LOOK, timeout))
            channel.watch = watch
            if out := negotiation.to_send():
                channel.send(out)
            if negotiation.done:
                break
            watch()
            if negotiation.wants_tls:
                from ..tls_channel import TlsChannel

                assert context is not None
                assert isinstance(channel, PlainChannel)
                channel.watch = None
                left = deadline - time.monotonic()
                ssl_context, name = context
                channel = TlsChannel(channel, ssl_context, server_side=False, hostname=name, timeout=max(left, 0.01))
                negotiation.tls_started()
                continue
            try:
                count = channel.recv_into(negotiation.buffer())
            except BlockIOError as error:
                if error.errno != errno.ETIMEDOUT:
                    raise
                continue
            if not count:
                raise lost(target, "the server closed the connection during the handshake", negotiation.hangup_hint)
            negotiation.received(count)
        channel.watch = None
    except BaseException as error:
        leave(channel, negotiation.farewell())
        if isinstance(error, LaminaError):
            error.path = str(target)
        raise
    return channel, negotiation


def leave(channel: Channel, farewell: bytes) -> None:
    """Say goodbye, if the server still listens, and close. Takes a second at most."""
    try:
        if farewell:
            # The farewell may fail: the server may be gone, and closing the connection says the same.
            with contextlib.suppress(LaminaError):
                channel.watch = None
                channel.settimeout(1.0)
                channel.send((farewell,))
    finally:
        channel.close()


def enter(
    target: Target,
    wanted: HandshakeOptions,
    *,
    connect_timeout: float,
    timeout: float,
    patience: float,
    check: Check = never,
) -> tuple[Channel, ExportDetails]:
    """A connection in transmission. For `patience` seconds, what may pass (`TRANSIENT`) is tried again, with pauses that
    double; other errors, and the last of these, are raised. The other times, and `check`, as for `negotiate`."""
    deadline = time.monotonic() + patience
    rest = _PAUSE
    while True:
        try:
            channel, negotiation = negotiate(
                target, wanted, connect_timeout=connect_timeout, timeout=timeout, check=check
            )
            return channel, cast("ExportDetails", negotiation.result)  # no call of ours that an interrupt could end
        except LaminaError as error:
            if not passes(error) or time.monotonic() + rest > deadline:
                raise
        pause(rest, check)
        rest = min(2 * rest, _LONGEST_PAUSE)

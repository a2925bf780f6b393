"""Where a server listens: Unix sockets that are their owner's alone, and TCP, which others reach only under TLS."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Sequence
from typing import Final

from ...errors import BlockIOError, Hint, OptionError
from ...options import shown
from ..sockets import AF_UNIX, reserve_address, restrict
from ..wire import PORT

#: Seconds for which a socket that is in the way may take to answer.
_PROBE: Final = 1.0


def listen_unix(path: str) -> tuple[socket.socket, tuple[int, int] | None]:
    """A listening Unix socket with mode 0600, and the device and inode of its name; None of an abstract one. A dead one that
    is in the way is removed. Raises BlockIOError, OptionError."""
    if AF_UNIX < 0:
        raise OptionError("this system has no Unix sockets", path=path, hint="listen on a TCP port")
    listener = socket.socket(AF_UNIX)
    try:
        named = not path.startswith("\0")
        if named:
            _remove_stale(path)
            own = restrict(listener)
        listener.bind(path)
        if named and not own:
            os.chmod(path, 0o600)  # before it listens: until then it refuses every client
        made = os.lstat(path) if named else None
        listener.listen(socket.SOMAXCONN)
    except (OSError, ValueError) as error:
        listener.close()
        if isinstance(error, BlockIOError):
            raise
        raise _cannot_listen(error, path) from error
    return listener, None if made is None else (made.st_dev, made.st_ino)


def check_reach(sockets: Sequence[socket.socket]) -> None:
    """OptionError if others than this host could reach one of these listening sockets."""
    for sock in sockets:
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            _check_address(str(sock.getsockname()[0]))


def _check_address(address: str) -> None:
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise OptionError(
            f"{address} can be reached by others, and nothing would be encrypted",
            hint=Hint(
                "require TLS, listen on localhost or a Unix socket, or pass insecure=True",
                command="require TLS, listen on localhost or a Unix socket, or say --insecure",
            ),
        )


def listen_tcp(host: str | None, port: int | None, *, safe: bool) -> list[socket.socket]:
    """Sockets that listen on all addresses of `host`, on one port."""
    place = f"{host or 'localhost'}:{PORT if port is None else port}"
    if port is not None and (not isinstance(port, int) or not 0 <= port <= 65535):
        raise OptionError(f"the port is {shown(port)}", hint="choose 0 to 65535; 0 is any free one")
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(
            host or "localhost", PORT if port is None else port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in dict.fromkeys(found):
            if not safe:
                _check_address(str(address[0]))
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            reserve_address(listener)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if len(listeners) > 1:
                # The same port as the first, which the system may have chosen.
                address = (address[0], listeners[0].getsockname()[1], *address[2:])
            try:
                listener.bind(address)
                listener.listen(socket.SOMAXCONN)
            except OSError as error:
                # A host without IPv6 may still have a name for it.
                if len(found) == 1 or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                listeners.pop().close()
        if not listeners:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except BaseException as error:
        for listener in listeners:
            listener.close()
        if isinstance(error, OSError | UnicodeError):
            raise _cannot_listen(error, place) from error
        raise
    return listeners


def _remove_stale(path: str) -> None:
    """Remove the stale socket of an ended server: one that refuses connections. `bind` fails if anything else is there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            hint = "remove it, or choose another place"
            raise BlockIOError(
                "cannot listen there: a file is there that is no socket", errno=errno.EEXIST, path=path, hint=hint
            )
        with socket.socket(AF_UNIX) as probe:
            probe.settimeout(_PROBE)  # one that is busy answers late: it lives
            probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except FileNotFoundError:
        return
    except (TimeoutError, BlockingIOError) as error:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from error


def _cannot_listen(error: OSError | ValueError, place: str) -> BlockIOError | OptionError:
    if isinstance(error, ValueError):
        return OptionError(f"no socket can have this name: {error}", path=place)
    if isinstance(error, socket.gaierror):
        return BlockIOError(f"this host is not known: {error.strerror}", errno=errno.EADDRNOTAVAIL, path=place)
    hint = "another server listens there; choose another place" if error.errno == errno.EADDRINUSE else None
    if error.errno is None or "too long" in str(error):
        return OptionError("the path of a Unix socket is at most 107 bytes long", path=place)
    return BlockIOError.from_os(error, "cannot listen there", path=place, hint=hint)

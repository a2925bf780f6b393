"""The NBD server: listens, lets clients in within limits, and ends in good order.

Each client has a thread (`server_connection.py`). A client that only connects costs that thread, and leaves after
the handshake time; when the house is full of such, the one that has dallied longest makes room for the next.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import selectors
import socket
import stat
import threading
import time
import weakref
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Self

from ..errors import BlockIOError, OptionError
from .channel import PlainChannel
from .export import Export
from .exports import Folder, Offer, View, check_names
from .server_connection import Connection, Pace
from .server_loop import Loop
from .tls import allowed
from .uri import Target

if TYPE_CHECKING:
    import ssl

log = logging.getLogger("lamina.nbd")


class Server:
    """Serves `exports` (and the images in `folder`) from `start` until `close`; a context manager does both. Construction
    binds the sockets, so that what is wrong is known before anything runs: BlockIOError, OptionError.

    `unix`: path of a Unix socket, made with mode 0600 and removed at the end. `host`, `port`: TCP; without `host` on the
    loopback interface, port 0 is any free one. A host that others can reach needs TLS or `insecure`. `sockets`: listening
    already (socket activation).

    `tls`: "off", "allow" (clients may ask for it) or "require", with the `context` of `tls.server_context`; `allow`: names of
    certificates, one of which every client needs. `clients`: how many may be in transmission, and how many in negotiation,
    at a time. `handshake_time`, `idle_time`: seconds for the negotiation, and without a request; None: any.

    Exports are closed by whoever opened their images, after `close`; images of a folder by the server.
    """

    def __init__(
        self,
        exports: Sequence[Export | Offer] = (),
        *,
        folder: Folder | None = None,
        unix: str | None = None,
        host: str | None = None,
        port: int | None = None,
        sockets: Sequence[socket.socket] = (),
        tls: str = "off",
        context: ssl.SSLContext | None = None,
        allow: Collection[str] | None = None,
        insecure: bool = False,
        clients: int = 100,
        handshake_time: float = 10.0,
        idle_time: float | None = None,
    ) -> None:
        if tls not in ("off", "allow", "require") or (tls == "off") != (context is None):
            raise OptionError("TLS is off, or needs a context", hint='tls="allow" or "require", with context')
        self._offers = [one if isinstance(one, Offer) else Offer(one) for one in exports]
        check_names(self._offers)
        self._folder = folder
        self._tls, self._context, self._allow = tls, context, allow
        self._clients, self._handshake_time, self._idle_time = clients, handshake_time, idle_time
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._connections: dict[Connection, threading.Thread] = {}
        self._ended = {"connections": 0, "refused": 0}
        self._served = 0  # clients that came as far as transmission
        self._paces: weakref.WeakKeyDictionary[Export, Pace] = weakref.WeakKeyDictionary()
        self._loop = Loop()
        self._accepting: threading.Thread | None = None
        self._wake, self._woken = socket.socketpair()
        self._listeners: list[socket.socket] = list(sockets)
        self._unix: tuple[str, tuple[int, int]] | None = None
        try:
            if unix is not None:
                self._listeners.append(self._listen_unix(unix))
            if host is not None or port is not None:
                self._listeners += _listen_tcp(host, port, safe=insecure or tls == "require")
            if not self._listeners:
                raise OptionError("the server has nowhere to listen", hint="give a Unix socket, or a port")
        except BaseException:
            self._close_listeners()
            self._wake.close()
            self._woken.close()
            raise

    # -- life

    def start(self) -> Self:
        """Serve, in threads of its own."""
        selector = selectors.DefaultSelector()
        for listener in self._listeners:
            listener.setblocking(False)
            selector.register(listener, selectors.EVENT_READ)
        selector.register(self._woken, selectors.EVENT_READ)
        self._accepting = threading.Thread(target=self._accept_all, args=(selector,), name="nbd-accept", daemon=True)
        self._accepting.start()
        return self

    def wait(self, *, last_client: bool = False, stop: threading.Event | None = None) -> None:
        """Return when the server was closed, or `stop` is set; with `last_client` also when somebody was served and nobody is
        any more."""
        with self._changed:
            while not (stop is not None and stop.is_set()) and self._listeners:
                if last_client and self._served and not self._transmitting():
                    return
                self._changed.wait(0.2)

    def close(self, grace: float = 5.0) -> None:
        """Let nobody in any more, answer what was received, and end; what takes longer than `grace` seconds is cut off.
        May be called again."""
        self._close_listeners()
        if self._accepting is not None:
            self._accepting.join()
            self._accepting = None
        with self._mutex:
            connections = dict(self._connections)
        for connection in connections:
            connection.drain()
        deadline = time.monotonic() + grace
        for thread in connections.values():
            thread.join(max(deadline - time.monotonic(), 0))
        for connection, thread in connections.items():
            if thread.is_alive():
                connection.close()
                thread.join(1.0)
        for pace in list(self._paces.values()):
            pace.close()
        self._wake.close()
        self._woken.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- facts

    @property
    def uris(self) -> list[str]:
        """Where the first export can be reached: an NBD URI for each socket."""
        name = self._offers[0].export.name if self._offers else ""
        return [str(target) for listener in self._listeners if (target := self._target(listener, name)) is not None]

    @property
    def uri(self) -> str:
        """The first of `uris`."""
        return self.uris[0]

    def _target(self, listener: socket.socket, name: str) -> Target | None:
        address = listener.getsockname()
        # A URI that needs more than it says, the certificates, is still right about where the server is.
        mode = "require" if self._tls == "require" else "off"
        if listener.family == socket.AF_UNIX:
            path = address.decode() if isinstance(address, bytes) else address
            return Target(socket=path, export=name, tls=mode)
        if listener.family in (socket.AF_INET, socket.AF_INET6):
            return Target(host=address[0], port=address[1], export=name, tls=mode)
        return None

    def stats(self) -> dict[str, Any]:
        """Counters since the start: connections that ended, were refused, are in negotiation and in transmission; requests by
        command, bytes read and written, and failures, of all clients together."""
        with self._mutex:
            now = list(self._connections)
            totals = dict(self._ended)
        for connection in now:
            for name, count in connection.counts.items():
                totals[name] = totals.get(name, 0) + count
        transmitting = sum(connection.transmitting for connection in now)
        return {**totals, "negotiating": len(now) - transmitting, "transmitting": transmitting}

    # -- how

    def _listen_unix(self, path: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        try:
            if not path.startswith("\0"):
                _remove_stale(path)
                # What bind makes gets the mode of the socket: nobody else can connect, not even for a moment.
                os.fchmod(listener.fileno(), 0o600)
            listener.bind(path)
            listener.listen(socket.SOMAXCONN)
            if not path.startswith("\0"):
                made = os.stat(path)
                self._unix = (os.path.abspath(path), (made.st_dev, made.st_ino))
        except (OSError, ValueError) as error:
            listener.close()
            raise _cannot_listen(error, path) from error
        return listener

    def _close_listeners(self) -> None:
        # The name goes first: as long as this socket listens, no other server takes the name for a dead one's.
        if self._unix is not None:
            path, identity = self._unix
            self._unix = None
            with contextlib.suppress(FileNotFoundError):
                there = os.lstat(path)
                if (there.st_dev, there.st_ino) == identity:
                    os.unlink(path)
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.close()
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def _accept_all(self, selector: selectors.BaseSelector) -> None:
        with selector:
            while self._listeners:
                for key, _ in selector.select():
                    if key.fileobj is not self._woken:
                        self._accept(key.fileobj)  # type: ignore[arg-type]

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                log.error("no more connections can be accepted: %s", error)
                time.sleep(0.1)  # the listener stays readable: do not spin
            return  # the client is gone already, or the listener was closed
        try:
            channel = PlainChannel(sock)
        except OSError:
            sock.close()
            return
        connection = Connection(
            channel,
            View(self._offers, self._folder),
            tls=self._tls,
            context=self._context,
            admit=lambda names: allowed(names, self._allow),
            handshake_time=self._handshake_time,
            idle_time=self._idle_time,
            admitted=self._admit,
            pace=self._pace,
            loop=self._loop,
        )
        thread = threading.Thread(target=self._run, args=(connection,), name="nbd-client", daemon=True)
        with self._mutex:
            dallying = [one for one in self._connections if not one.transmitting and not one.closing]
            self._connections[connection] = thread
        if len(dallying) >= self._clients:
            oldest = dallying[0]
            log.info("%s: makes room, after %.1f s of negotiation", oldest.peer, time.monotonic() - oldest.begun)
            oldest.close()
        try:
            thread.start()
        except RuntimeError:  # no more threads
            with self._mutex:
                del self._connections[connection]
            log.error("%s: no thread for another client", connection.peer)
            connection.close()

    def _run(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            with self._changed:
                del self._connections[connection]
                self._ended["connections"] += 1
                for name, count in connection.counts.items():
                    self._ended[name] = self._ended.get(name, 0) + count
                self._changed.notify_all()

    def _admit(self) -> bool:
        with self._mutex:
            if self._transmitting() >= self._clients:
                self._ended["refused"] += 1
                return False
            self._served += 1
            return True

    def _transmitting(self) -> int:
        return sum(connection.transmitting for connection in self._connections)

    def _pace(self, export: Export) -> Pace:
        with self._mutex:
            return self._paces.setdefault(export, Pace())


def _listen_tcp(host: str | None, port: int | None, *, safe: bool) -> list[socket.socket]:
    """Sockets that listen on all addresses of `host`, on one port."""
    from .wire import PORT

    place = f"{host or 'localhost'}:{PORT if port is None else port}"
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(
            host or "localhost", PORT if port is None else port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in dict.fromkeys(found):
            if not safe and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
                raise OptionError(
                    f"{address[0]} can be reached by others, and nothing would be encrypted",
                    hint="require TLS, listen on localhost or a Unix socket, or say --insecure",
                )
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
        if isinstance(error, OSError):
            raise _cannot_listen(error, place) from error
        raise
    return listeners


def _remove_stale(path: str) -> None:
    """Remove a socket that a server left behind: one to which nobody answers. Anything else there is an error of `bind`."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except FileNotFoundError:
        return


def _cannot_listen(error: OSError | ValueError, place: str) -> BlockIOError | OptionError:
    if isinstance(error, ValueError):
        return OptionError(f"no socket can have this name: {error}", path=place)
    if isinstance(error, socket.gaierror):
        return BlockIOError(f"this host is not known: {error.strerror}", errno=errno.EADDRNOTAVAIL, path=place)
    hint = "another server listens there; choose another place" if error.errno == errno.EADDRINUSE else None
    if error.errno is None or "too long" in str(error):
        return OptionError("the path of a Unix socket is at most 107 bytes long", path=place)
    return BlockIOError.from_os(error, "cannot listen there", path=place, hint=hint)

"""The NBD server: listens, accepts clients within limits, and ends in good order.

Each client has a thread (`connection.py`). A client that only connects costs this thread, and is disconnected after the
handshake time. When the limit of negotiating clients is reached, a new client replaces one that has been silent for a while;
if there is none, new clients wait in the backlog of the socket. So a flood of silent clients disconnects no active one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

from ... import lifecycle
from ...errors import Closed, LaminaError, OptionError
from ...limits import MIB
from ..channel import PlainChannel
from ..sockets import AF_UNIX, keep_alive
from ..tls import allowed
from ..uri import Target
from .access import check_access
from .connection import CLIENT_MEMORY, Connection
from .export import Export
from .exports import Folder, RestrictedExport, VisibleExports, check_names
from .listen import check_reach, listen_tcp, listen_unix
from .loop import Loop
from .pool import Memory, StoragePool

if TYPE_CHECKING:
    import ssl

    from ...image import Image
    from ..access_rules import AccessRules

log = logging.getLogger("lamina.nbd")

#: The seconds after which a new client may replace one that has sent nothing yet, and one that has stopped.
_SILENT, _STOPPED = 0.01, 2.0
#: The interval in seconds at which the server looks for such clients while new ones wait.
_FULL = 0.005
#: The longest interval in seconds between two checks of the time limits.
_LOOK = 1.0
#: Memory for requests of slow storage, of all clients together, by default.
_MEMORY = 256 * MIB
#: Seconds for which the end of a server waits for threads whose connections it has cut.
_LAST = 1.0
#: Seconds after which `wait` looks again, and bytes that tell it to look sooner.
_WAIT = 0.2
_NEWS = 4096


class Server:
    """Serves `exports` (and the images in `folder`) from `start` until `close`; a context manager does both. Construction
    binds the sockets, so that what is wrong is known before anything runs: BlockIOError, OptionError.

    `unix`: path of a Unix socket, made with mode 0600 and removed at the end. `host`, `port`: TCP; without `host` on the
    loopback interface, port 0 is any free one. A host that others can reach needs TLS or `insecure`. `sockets`: listening
    already (socket activation).

    `tls`: "off", "allow" (clients may ask for it) or "require", with the `context` of `tls.server_context`; `allow`: names of
    certificates, one of which every client needs, or rules for the subjects of certificates; either needs `tls="require"`
    and a context that verifies clients.

    `clients`: how many may be in transmission, and how many in negotiation, at a time; one that finds no room waits for it in
    negotiation. `handshake_time`: seconds for the negotiation; `idle_time`: without a whole request; `stall_time`: in the
    middle of one, or without taking a reply; None is any time.
    `memory_limit`: bytes of requests and replies of all clients together; a client takes 2 MiB of it, and more only while
    storage is slow and there is more. At most three quarters are for the former. By default there is enough for `clients`,
    and 256 MiB more.

    From `start` until `close` each export has a root of its own (`Export.begin`). So the caller may close its images before
    the server or after it; the server closes the images of a folder.

    A forked child closes the server's descriptors at once, and serves no client; its `close` does nothing.
    """

    def __init__(
        self,
        exports: Sequence[Export | RestrictedExport] = (),
        *,
        folder: Folder | None = None,
        unix: str | None = None,
        host: str | None = None,
        port: int | None = None,
        sockets: Sequence[socket.socket] = (),
        tls: str = "off",
        context: ssl.SSLContext | None = None,
        allow: Collection[str] | AccessRules | None = None,
        insecure: bool = False,
        clients: int = 100,
        handshake_time: float = 10.0,
        idle_time: float | None = None,
        stall_time: float | None = 60.0,
        memory_limit: int | None = None,
    ) -> None:
        self._restricted = [one if isinstance(one, RestrictedExport) else RestrictedExport(one) for one in exports]
        check_access(tls, context, allow, self._restricted, folder=folder is not None)
        check_names(self._restricted)
        self._folder = folder
        self._tls, self._context, self._allow = tls, context, allow
        self._clients, self._handshake_time = clients, handshake_time
        self._idle_time, self._stall_time = idle_time, stall_time
        self._look = min(_LOOK, *(limit / 4 for limit in (handshake_time, idle_time, stall_time) if limit is not None))
        wanted = clients * CLIENT_MEMORY
        memory = wanted + _MEMORY if memory_limit is None else memory_limit
        if memory < CLIENT_MEMORY:
            raise OptionError(
                f"{memory} bytes are too few to serve anybody", hint=f"a client takes {CLIENT_MEMORY} bytes"
            )
        # Two limits: the requests of the clients never use the memory that a new client needs.
        self._clients_memory = Memory(min(wanted, max(memory * 3 // 4, CLIENT_MEMORY)))
        self._memory = Memory(memory - self._clients_memory.left)
        self._mutex = threading.Lock()
        # Signal handlers call `close`, `stats` and the like in the middle of each other, so that none of these may hold the
        # mutex. What they look at is copied in single steps; `_moves` is odd while what belongs together is changed.
        self._connections: dict[Connection, threading.Thread] = {}
        self._ended = {"connections": 0, "refused": 0}
        self._moves = 0
        self._closing: set[int] = set()  # the threads that are inside `close`
        self._served = self._left_again = 0  # clients that came as far as transmission, and those of them that are gone
        self._pools: dict[Export, tuple[StoragePool, int]] = {}  # and how many clients the export has
        self._loop = Loop()
        self._accepting: threading.Thread | None = None
        self._begun: list[Export] = []  # the exports that this server serves
        self._wake, self._woken = socket.socketpair()
        self._news, self._heard = socket.socketpair()  # for `wait`: a client has disconnected, or the server was closed
        for end in (self._news, self._heard):
            end.setblocking(False)
        self._listeners: list[socket.socket] = list(sockets)
        self._unix: tuple[str, tuple[int, int]] | None = None
        try:
            if unix is not None:
                self._listeners.append(self._listen_unix(unix))
            safe = insecure or tls == "require"
            if not safe:
                check_reach(sockets)
            if host is not None or port is not None:
                self._listeners += listen_tcp(host, port, safe=safe)
            if not self._listeners:
                raise OptionError("the server has nowhere to listen", hint="give a Unix socket, or a port")
        except BaseException:
            self._close_listeners()
            self._close_signals()
            raise
        lifecycle.connected.add(self)

    # -- life

    def start(self) -> Self:
        """Serve, in threads of its own; a server that serves already goes on. Closed after `close`, and in a child of the
        process whose server it is."""
        if self._woken.fileno() < 0:
            raise Closed("the server was closed, or is another process's", hint="make a new one")
        if self._accepting is not None:
            return self
        for each in self._restricted:
            each.export.begin()
            self._begun.append(each.export)
        selector = selectors.DefaultSelector()
        for listener in self._listeners:
            listener.setblocking(False)
            selector.register(listener, selectors.EVENT_READ)
        selector.register(self._woken, selectors.EVENT_READ)
        self._accepting = threading.Thread(target=self._accept_all, args=(selector,), name="nbd-accept", daemon=True)
        self._accepting.start()
        return self

    def wait(self, *, last_client: bool = False, stop: threading.Event | None = None) -> None:
        """Return when the server is closed, or `stop` is set; with `last_client` also when the last client has
        disconnected."""
        while not (stop is not None and stop.is_set()) and self._listeners:
            if last_client and self._served and self._left_again == self._served:
                return
            with contextlib.suppress(OSError, ValueError):  # closed meanwhile
                if select.select([self._heard], [], [], _WAIT)[0]:
                    self._heard.recv(_NEWS)

    def close(self, grace: float = 5.0) -> None:
        """Accept no further clients, execute the received requests, and end. Requests that take longer are cut short: those
        that are executed in steps after two thirds of `grace` (seconds), all others at its end. Takes at most a second more;
        a thread that is blocked in storage may stay. May be called again, from any thread and from a signal handler; in a
        handler that interrupted this function it returns at once, and the interrupted call continues."""
        self._close_listeners()
        me = threading.get_ident()
        if me in self._closing:
            return
        self._closing.add(me)
        try:
            self._end(grace)
        finally:
            self._closing.discard(me)

    def _end(self, grace: float) -> None:
        accepting = self._accepting
        if accepting is not None:
            accepting.join()
            self._accepting = None
        connections = self._connections.copy()
        begun = time.monotonic()
        for connection in connections:
            connection.drain()
        _join(connections.values(), begun + grace * 2 / 3)
        for connection in connections:
            connection.cut()
        _join(connections.values(), begun + grace)
        for connection, thread in connections.items():
            if thread.is_alive():
                connection.close()
        _join(connections.values(), time.monotonic() + _LAST)
        for pool, _ in list(self._pools.values()):
            pool.close()
        self._end_exports(begun + grace)
        self._close_signals()

    def _end_exports(self, deadline: float) -> None:
        """Close what `start` opened. In threads of its own: a request of this thread, where a signal handler calls this, or
        one that storage does not answer, would be waited for."""
        images = []
        while self._begun:
            image = self._begun.pop().end()
            if image is not None:
                images.append(image)
        closing = [threading.Thread(target=_close, args=(image,), name="nbd-close", daemon=True) for image in images]
        for thread in closing:
            thread.start()
        _join(closing, max(deadline, time.monotonic() + _LAST))

    def _close_signals(self) -> None:
        for end in (self._wake, self._woken, self._news, self._heard):
            end.close()

    def after_fork(self) -> None:
        """Forget everything in a forked child, whose parent goes on serving: no name is removed, and no connection is shut
        down, since both processes share them. Takes no lock: threads of the parent may have held any."""
        for connection in self._connections:
            connection.forsake()
        for listener in self._listeners:
            listener.close()
        self._close_signals()
        self._listeners, self._unix, self._accepting = [], None, None
        while self._begun:
            image = self._begun.pop().end()
            if image is not None:
                image.root.edge.give_up()
        self._mutex = threading.Lock()
        self._connections, self._pools, self._moves = {}, {}, 0
        self._closing.clear()
        self._loop = Loop()

    def unlink(self) -> None:
        """Remove the name of the Unix socket, as `close` does first. From any thread; waits for nothing."""
        unix, self._unix = self._unix, None
        if unix is not None:
            path, identity = unix
            with contextlib.suppress(FileNotFoundError):
                there = os.lstat(path)
                if (there.st_dev, there.st_ino) == identity:
                    os.unlink(path)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- details

    @property
    def uris(self) -> list[str]:
        """Where the first export can be reached: an NBD URI for each socket."""
        name = self._restricted[0].export.name if self._restricted else ""
        return [str(target) for listener in self._listeners if (target := self._target(listener, name)) is not None]

    @property
    def uri(self) -> str:
        """The first of `uris`."""
        return self.uris[0]

    def _target(self, listener: socket.socket, name: str) -> Target | None:
        address = listener.getsockname()
        # A URI that needs more than it says, the certificates, is still right about where the server is.
        mode = "require" if self._tls == "require" else "off"
        if listener.family == AF_UNIX:
            path = address.decode() if isinstance(address, bytes) else address
            return Target(socket=path, export=name, tls=mode)
        if listener.family in (socket.AF_INET, socket.AF_INET6):
            return Target(host=address[0], port=address[1], export=name, tls=mode)
        return None

    def stats(self) -> dict[str, Any]:
        """Counters since the start: connections that ended, were refused, are in negotiation and in transmission; requests by
        command, bytes read and written, and failures, of all clients together."""
        while True:
            moves = self._moves
            now, totals = list(self._connections), self._ended.copy()
            if moves == self._moves and not moves % 2:
                break
            time.sleep(0)
        for connection in now:
            for name, count in connection.counts.items():
                totals[name] = totals.get(name, 0) + count
        transmitting = sum(connection.transmitting for connection in now)
        return {**totals, "negotiating": len(now) - transmitting, "transmitting": transmitting}

    # -- how

    def _listen_unix(self, path: str) -> socket.socket:
        listener, identity = listen_unix(path)
        if identity is not None:
            self._unix = (os.path.abspath(path), identity)
        return listener

    def _close_listeners(self) -> None:
        # The name goes first: as long as this socket listens, no other server takes the name for a dead one's.
        self.unlink()
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.close()
        for end in (self._wake, self._news):
            with contextlib.suppress(OSError):
                end.send(b"\0")

    def _accept_all(self, selector: selectors.BaseSelector) -> None:
        look = time.monotonic() + self._look
        with selector:
            while self._listeners:
                for key, _ in selector.select(self._look):
                    if key.fileobj is self._woken:
                        continue
                    if not self._make_room():
                        select.select([self._woken], [], [], _FULL)  # newcomers wait in the backlog
                        break
                    self._accept(key.fileobj)  # type: ignore[arg-type]
                if time.monotonic() >= look:
                    self._put_out_late()
                    look = time.monotonic() + self._look

    def _make_room(self) -> bool:
        """Whether one more client may negotiate. If the limit is reached, a client that has been silent for a while is
        disconnected: preferably one that has sent nothing at all, from the address with most of such clients."""
        with self._mutex:
            negotiating = [one for one in self._connections if not one.transmitting and not one.closing]
        if len(negotiating) < self._clients:
            return True
        silent = Counter(one.origin for one in negotiating if not one.activity.sent_message)
        worst = max(
            negotiating, key=lambda one: (not one.activity.sent_message, silent[one.origin], one.activity.silence())
        )
        silent_for = worst.activity.silence()
        if silent_for < (_STOPPED if worst.activity.sent_message else _SILENT):
            return False
        worst.put_out(f"another client needed its place, and it had sent nothing for {silent_for:.1f} s")
        return True

    def _put_out_late(self) -> None:
        with self._mutex:
            connections = list(self._connections)
        for connection in connections:
            why = connection.overdue()
            if why is not None:
                connection.put_out(why)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                log.error("no more connections can be accepted: %s", error)
                time.sleep(0.1)  # the listener stays readable: do not spin
            return  # the client is gone already, or the listener was closed
        try:
            keep_alive(sock)
            channel = PlainChannel(sock)
        except OSError:
            sock.close()
            return
        connection = Connection(
            channel,
            VisibleExports(self._restricted, self._folder),
            tls=self._tls,
            context=self._context,
            admit=lambda names: allowed(names, self._allow),
            handshake_time=self._handshake_time,
            idle_time=self._idle_time,
            stall_time=self._stall_time,
            memory=self._memory,
            admitted=self._admit,
            pool=self._pool,
            loop=self._loop,
        )
        thread = threading.Thread(target=self._run, args=(connection,), name="nbd-client", daemon=True)
        with self._mutex:
            self._connections[connection] = thread
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
            with self._mutex:
                self._moves += 1
                del self._connections[connection]
                if connection.admitted:
                    self._clients_memory.give(CLIENT_MEMORY)
                    self._left_again += 1
                if connection.export is not None:
                    self._left(connection.export)
                self._ended["connections"] += 1
                self._ended["refused"] += connection.refused
                for name, count in connection.counts.items():
                    self._ended[name] = self._ended.get(name, 0) + count
                self._moves += 1
            with contextlib.suppress(OSError):  # the server is closed, or `wait` has enough to look at
                self._news.send(b"\0")

    def _admit(self) -> bool:
        with self._mutex:
            if self._transmitting() >= self._clients or not self._clients_memory.take(CLIENT_MEMORY):
                return False
            self._served += 1
            return True

    def _transmitting(self) -> int:
        return sum(connection.transmitting for connection in list(self._connections))

    def _pool(self, export: Export) -> StoragePool:
        with self._mutex:
            pool, clients = self._pools.get(export) or (StoragePool(), 0)
            self._pools[export] = (pool, clients + 1)
            return pool

    def _left(self, export: Export) -> None:
        """A client of `export` is gone. (`_mutex` is held.)"""
        pool, clients = self._pools[export]
        self._pools[export] = (pool, clients - 1)
        if clients == 1 and all(each.export is not export for each in self._restricted):
            del self._pools[export]  # an image of the folder, which is closed now
            pool.close()


def _join(threads: Iterable[threading.Thread], deadline: float) -> None:
    """Wait until all have ended, or the time comes."""
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))


def _close(image: Image) -> None:
    name = image.filename
    with lifecycle.closing():
        try:
            image.close()
        except LaminaError as error:
            log.error("%s: closing failed: %s", name, error)

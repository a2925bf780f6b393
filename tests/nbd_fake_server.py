"""A small NBD server for tests of the client, which does as it is told: it answers late, in another order, wrongly, or not.

It speaks fixed newstyle with structured or simple replies, over a Unix socket, and has its bytes in memory. It shares nothing
with Lamina's own server.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lamina.nbd import wire

from .nbd_scripts import (
    ALL_FLAGS,
    GO,
    Chunks,
    context,
    export,
    greeting,
    info_export,
    info_sizes,
    option,
    refusal,
    simple,
)

CHUNKS = Chunks("structured")


class Asked(NamedTuple):
    """One request as it came."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: bytes


class Gone(Exception):
    """The client closed the connection."""


class FakeServer:
    """Runs `behave(connection, number)` for each connection, in a thread, from construction until `close`. `failures`: what
    it raised, other than that the client is gone."""

    def __init__(self, path: Path, behave: Callable[[socket.socket, int], None]) -> None:
        self.uri = f"nbd+unix:///x?socket={path}"
        self.failures: list[BaseException] = []
        self.connections = 0
        self._behave = behave
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(32)
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(sock)
            thread = threading.Thread(target=self._run, args=(sock, self.connections), daemon=True)
            self.connections += 1
            self._threads.append(thread)
            thread.start()

    def _run(self, sock: socket.socket, number: int) -> None:
        with sock:
            try:
                self._behave(sock, number)
            except (Gone, ConnectionError):
                pass
            except BaseException as error:  # noqa: BLE001 - the test asks for it
                self.failures.append(error)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        assert not self.failures, self.failures


def exactly(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise Gone
        data += part
    return bytes(data)


def shake(
    sock: socket.socket,
    size: int,
    *,
    flags: int = ALL_FLAGS,
    sizes: tuple[int, int, int] | None = None,
    structured: bool = True,
    send: Callable[[bytes], None] | None = None,
) -> None:
    """The handshake, up to the end of GO."""
    send = send or sock.sendall
    send(greeting())
    exactly(sock, 4)
    while True:
        head = wire.OPTION.unpack(exactly(sock, wire.OPTION.size))
        exactly(sock, head.length)
        if head.option == wire.OPT_GO:
            send((info_sizes(*sizes) if sizes else b"") + info_export(size, flags) + GO)
            return
        if head.option == wire.OPT_STRUCTURED_REPLY and structured:
            send(option(wire.OPT_STRUCTURED_REPLY))
        elif head.option == wire.OPT_SET_META_CONTEXT and structured:
            send(context() + option(wire.OPT_SET_META_CONTEXT))
        elif head.option == wire.OPT_INFO:
            send(info_export(size, flags, wire.OPT_INFO) + option(wire.OPT_INFO))
        elif head.option == wire.OPT_LIST:
            send(export(b"x") + option(wire.OPT_LIST))
        elif head.option == wire.OPT_ABORT:
            raise Gone
        else:
            send(refusal(head.option))


def requests(sock: socket.socket) -> Iterator[Asked]:
    """What the client asks, until it says DISC."""
    while True:
        head = wire.REQUEST.unpack(exactly(sock, wire.REQUEST.size))
        assert head.magic == wire.REQUEST_MAGIC
        payload = exactly(sock, head.length) if head.type == wire.CMD_WRITE else b""
        if head.type == wire.CMD_DISC:
            return
        yield Asked(head.flags, head.type, head.cookie, head.offset, head.length, payload)


def answer(disk: bytearray, asked: Asked, *, structured: bool = True) -> bytes:
    """Do what was asked; the reply to it."""
    end = asked.offset + asked.length
    assert end <= len(disk), asked
    if asked.command == wire.CMD_READ:
        data = bytes(disk[asked.offset : end])
        if structured:
            return CHUNKS.data(asked.offset, data, cookie=asked.cookie)
        return simple(asked.cookie, 0, data)
    if asked.command == wire.CMD_WRITE:
        disk[asked.offset : end] = asked.payload
    elif asked.command == wire.CMD_WRITE_ZEROES:
        disk[asked.offset : end] = bytes(asked.length)
    elif asked.command == wire.CMD_BLOCK_STATUS:
        return CHUNKS.status([(asked.length, 0)], cookie=asked.cookie, done=True)
    return simple(asked.cookie)


Behave = Callable[[socket.socket, int], None]
Serve = Callable[[Behave], FakeServer]


@contextlib.contextmanager
def starting(folder: Path) -> Iterator[Serve]:
    """Starts servers with sockets in `folder`; at the end none of them may have failed."""
    servers: list[FakeServer] = []

    def start(behave: Behave) -> FakeServer:
        servers.append(FakeServer(folder / f"socket{len(servers)}", behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
        assert not server.failures, server.failures

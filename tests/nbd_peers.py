"""NBD servers for the tests, ours and others, and a wire between client and server that can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.nbd import Export, Server

from .conftest import missing

#: How long a server may take until it listens.
PATIENCE = 20


def program(name: str, package: str | None = None) -> str:
    """The path of a program that a test needs; without it the test is skipped, and in CI it fails. `package`: what has it,
    where that has another name."""
    return shutil.which(name) or missing(name, f"install {package or name}")


def listens(place: Path | int) -> bool:
    """Whether somebody listens on this Unix socket, or on this port of the loopback interface.

    The kernel's tables are asked. That the socket's file is there does not say it: bind makes the file, and only then comes
    listen. And no connection is made: some servers end after their first client.
    """
    if isinstance(place, int):
        rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        return any(row[1] == f"0100007F:{place:04X}" and row[3] == "0A" for row in rows)
    sockets = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return any(row[7:] == [str(place)] and int(row[3], 16) & 0x10000 for row in sockets)  # __SO_ACCEPTCON


@contextlib.contextmanager
def running(command: Sequence[str | os.PathLike[str]], place: Path | int) -> Iterator[str]:
    """`command`, a server that listens on the Unix socket or port `place`, for as long as the context; its URI."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        deadline = time.monotonic() + PATIENCE
        while not listens(place):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"{list(command)} does not listen: {process.stderr.read().decode()}")
            time.sleep(0.01)
        yield f"nbd://127.0.0.1:{place}/" if isinstance(place, int) else f"nbd+unix:///?socket={place}"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        if isinstance(place, Path):
            place.unlink(missing_ok=True)


def nbdkit(folder: Path, *arguments: str) -> contextlib.AbstractContextManager[str]:
    """nbdkit with these arguments; the URI of its default export."""
    path = folder / "nbdkit.sock"
    return running([program("nbdkit"), "-f", "-U", str(path), *arguments], path)


def qemu_nbd(folder: Path, *arguments: str) -> contextlib.AbstractContextManager[str]:
    """qemu-nbd with these arguments, for any number of clients; the URI of its default export."""
    path = folder / "qemu.sock"
    return running([program("qemu-nbd", "qemu-utils"), "-t", "-k", str(path), *arguments], path)


class Served:
    """Our server with the export "disk", of memory, behind the Unix socket at `path`; `rules`: when it fails."""

    def __init__(
        self, path: str, size: int, content: bytes = b"", *, align: int = 1, rules: list[dict[str, Any]] | None = None
    ) -> None:
        memory: dict[str, Any] = {"driver": "memory", "size": size}
        blocks = {"driver": "blkdebug", "align": align, "image": memory}
        self.image = lamina.open({"driver": "faults", "rules": rules or [], "image": blocks}, read_only=False)
        if content:
            self.image.write(0, content)
        self._server = Server([Export(self.image, "disk", writable=True)], unix=path)
        self.uri = f"nbd+unix:///disk?socket={path}"

    def __enter__(self) -> Served:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self.image.close()


class Wire:
    """A Unix socket at `path` that passes all on to the one at `to`; a context manager. `budget`: after so many bytes from
    the server (or, with `upward`, from the client) the connection is cut, once; None: never."""

    def __init__(self, path: Path, to: Path, *, budget: int | None = None, upward: bool = False) -> None:
        self.uri = f"nbd+unix:///?socket={path}"
        self._to = str(to)
        self._left = budget
        self._upward = upward
        self._mutex = threading.Lock()
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.cuts = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()

    def cut(self) -> None:
        """Cut all connections that there are now."""
        with self._mutex:
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self.cuts += 1

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._to)
            with self._mutex:
                self._open += [client, server]
            self._spawn(client, server, self._upward)
            self._spawn(server, client, not self._upward)

    def _spawn(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        thread = threading.Thread(target=self._pump, args=(source, target, counted), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _pump(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if counted and self._left is not None:
                    if len(data) >= self._left:
                        target.sendall(data[: self._left])
                        self._left = None
                        self.cut()
                        break
                    self._left -= len(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Wire:
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(10)
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for end in self._open:
            end.close()

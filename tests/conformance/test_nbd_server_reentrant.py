"""A program tells its server to end from a signal handler, whatever its main thread does just then, and from several threads.

`LAMINA_HOSTILE_CLIENTS` makes it many more rounds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lamina.image import Image
from lamina.nbd import Export, Server
from lamina.nbd.server.connection import Connection
from lamina.storage.memory import MemoryStorage

from ..nbd_load import nothing_left
from ..nbd_raw import PATIENCE, dial

ROUNDS = 10 if "LAMINA_HOSTILE_CLIENTS" not in os.environ else 300

#: A signal handler closes the server at every line that the main thread executes in `server.py`, one after the other.
_PROGRAM = """
import signal, sys, threading
from lamina.image import Image
from lamina.nbd import Export, Server
from lamina.nbd.server import server as module
from lamina.storage.memory import MemoryStorage

work, where = sys.argv[1:]
image = Image(MemoryStorage(4096))
at = 0
while True:
    server = Server([Export(image)], unix=where).start()
    if work == "wait":
        threading.Timer(0.02, lambda: server._listeners and server._close_listeners()).start()
    left = at

    def trace(frame, event, argument):
        global left
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            left -= 1
            if left == -1:
                signal.raise_signal(signal.SIGUSR1)
        return trace

    signal.signal(signal.SIGUSR1, lambda *_: server.close())
    sys.settrace(trace)
    try:
        server.close() if work == "close" else server.wait() if work == "wait" else server.stats()
    finally:
        sys.settrace(None)
    server.close()
    if left >= 0:
        break
    at += 1
print(at)
"""


@pytest.mark.parametrize("work", ["close", "wait", "stats"])
def test_a_signal_handler_closes_the_server_at_every_line(tmp_path: Path, work: str) -> None:
    command = [sys.executable, "-c", _PROGRAM, work, str(tmp_path / "socket")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert int(done.stdout) > 4


@pytest.mark.parametrize("work", ["close", "stats"])
def test_a_signal_handler_closes_the_server_beside_clients(tmp_path: Path, work: str, seed: int) -> None:
    rng = random.Random(seed)
    before = signal.getsignal(signal.SIGALRM)
    with Image(MemoryStorage(1 << 20)) as image:
        for _ in range(ROUNDS):
            with nothing_left():
                server = Server([Export(image, "disk")], unix=str(tmp_path / "socket")).start()
                close = server.close
                signal.signal(signal.SIGALRM, lambda *_, close=close: close())
                try:
                    with dial(tmp_path / "socket") as raw:
                        raw.begin("disk")
                        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0001, 0.01))
                        if work == "close":
                            server.close()
                        deadline = time.monotonic() + PATIENCE
                        while server._listeners and time.monotonic() < deadline:
                            server.stats()
                        assert not server._listeners
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    signal.signal(signal.SIGALRM, before)
                    server.close()


def test_several_threads_close_one_server(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the test tells of it
            failures.append(error)

    with Image(MemoryStorage(1 << 20)) as image:
        for _ in range(ROUNDS):
            with nothing_left():
                server = Server([Export(image, "disk")], unix=str(tmp_path / "socket")).start()
                threads = [threading.Thread(target=guarded, args=(server.close,)) for _ in range(4)]
                for thread in threads:
                    thread.start()
                server.wait()
                for thread in threads:
                    thread.join(PATIENCE)
    assert not failures


def test_a_client_that_is_just_let_in_is_not_the_last_that_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends with its last client does not end while the first one is on its way from the negotiation into
    transmission."""
    keep_time = Connection._keep_time
    slow = threading.Event()

    def delayed(self: Connection) -> None:
        if self.admitted:
            slow.wait(1)
        keep_time(self)

    monkeypatch.setattr(Connection, "_keep_time", delayed)
    with (
        Image(MemoryStorage(1 << 20)) as image,
        Server([Export(image, "disk")], unix=str(tmp_path / "socket")) as server,
    ):
        waiting = threading.Thread(target=server.wait, kwargs={"last_client": True})
        waiting.start()
        with dial(tmp_path / "socket") as raw:
            raw.begin("disk")
            assert waiting.is_alive()
            assert raw.read(0, 512) == bytes(512)
        waiting.join(PATIENCE)
        assert not waiting.is_alive()

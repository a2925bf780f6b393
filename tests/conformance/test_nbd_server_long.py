"""Requests that take long: nobody else waits for them, and they end with their client or the server (T18).

The disk has a PiB: one WRITE_ZEROES, TRIM or BLOCK_STATUS can ask about all of it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import lamina
from lamina.image import Image
from lamina.limits import GIB, KIB, MIB
from lamina.nbd import Export, Server
from lamina.nbd import wire as w
from lamina.nbd.server.commands import MOST, STEP
from lamina.storage.memory import MemoryStorage

from ..nbd_load import nothing_left, serving, until
from ..nbd_raw import PATIENCE, Raw, dial

PIB = 1 << 50
BOUND = 20.0


class Slow(MemoryStorage):
    """Storage that takes its time to zero and discard, and writes down what it was asked."""

    driver = "slow-zero"

    def __init__(self, size: int, seconds: float) -> None:
        super().__init__(size)
        self.seconds = seconds
        self.asked: list[tuple[str, int, int, int]] = []
        self.begun = threading.Event()
        self.flushes = 0

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self._note("zero", offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self._note("discard", offset, length, 0)

    def flush(self) -> None:
        self.flushes += 1

    def _note(self, kind: str, offset: int, length: int, flags: int) -> None:
        self.asked.append((kind, offset, length, flags))
        self.begun.set()
        time.sleep(self.seconds)


def disk(seconds: float) -> tuple[Slow, Export]:
    storage = Slow(PIB, seconds)
    return storage, Export(Image(storage), "disk", writable=True)


def long(raw: Raw, command: int, length: int = PIB, flags: int = 0) -> None:
    raw.request(command, 0, length, flags=flags)


COMMANDS = [w.CMD_WRITE_ZEROES, w.CMD_TRIM]


@pytest.mark.parametrize("command", COMMANDS)
def test_others_are_served_meanwhile(tmp_path: Path, command: int) -> None:
    """Also where as many clients as the pool has threads ask for as much as they may."""
    storage, export = disk(0.05)
    with serving(tmp_path, export) as (_, path), ExitStack() as stack:
        greedy = [stack.enter_context(dial(path)).begin("disk", "extended") for _ in range(6)]
        for raw in greedy:
            for _ in range(8):
                long(raw, command)
        until(storage.begun.is_set, "nothing is asked")
        for _ in range(3):
            begun = time.monotonic()
            with dial(path) as other:
                other.begin("disk", "extended")
                assert not other.write(4096, b"here").error
                assert other.read(4096, 4) == b"here"
            assert time.monotonic() - begun < BOUND


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_client_is_served_meanwhile(tmp_path: Path, command: int) -> None:
    _, export = disk(0.05)
    with serving(tmp_path, export) as (_, path), dial(path) as raw:
        raw.begin("disk", "extended")
        long(raw, command)
        raw.request(w.CMD_READ, 0, 512)
        assert raw.collect(1)[0].data == bytes(512)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_it_ends_with_its_client(tmp_path: Path, command: int, kind: str) -> None:
    storage, export = disk(0.01)
    with nothing_left(), export.image, Server([export], unix=str(tmp_path / "s"), port=0) as server:
        host, _, port = server.uris[-1].removeprefix("nbd://").split("/")[0].rpartition(":")
        with dial(tmp_path / "s") as raw:
            if kind == "tcp":
                raw.stream.close()
                raw.stream.sock = socket.create_connection((host.strip("[]"), int(port)), PATIENCE)  # type: ignore[attr-defined]
            raw.begin("disk", "extended")
            long(raw, command)
            assert storage.begun.wait(PATIENCE)
        until(lambda: server.stats()["transmitting"] == 0, "it goes on without its client")
        asked = len(storage.asked)
        time.sleep(0.1)
        assert len(storage.asked) == asked


@pytest.mark.parametrize("command", COMMANDS)
def test_it_ends_with_the_server(tmp_path: Path, command: int) -> None:
    """The client is told; what it asked was done in part."""
    storage, export = disk(0.01)
    with nothing_left(), export.image:
        server = Server([export], unix=str(tmp_path / "s")).start()
        with dial(tmp_path / "s") as raw:
            raw.begin("disk", "extended")
            long(raw, command)
            assert storage.begun.wait(PATIENCE)
            begun = time.monotonic()
            server.close(grace=1.0)
            assert time.monotonic() - begun < BOUND
            assert raw.collect(1)[0].error == w.ESHUTDOWN
            assert raw.ended()


@pytest.mark.parametrize("command", COMMANDS)
def test_steps_cover_the_request_once(tmp_path: Path, command: int) -> None:
    """Whatever their lengths: they end at multiples of a step; FUA is one flush at the end, FAST_ZERO is for the first."""
    storage, export = disk(0)
    offset, length = 4096, 40 * GIB + 8192
    flags = w.CMD_FLAG_FUA | (w.CMD_FLAG_FAST_ZERO if command == w.CMD_WRITE_ZEROES else 0)
    with serving(tmp_path, export) as (_, path), dial(path) as raw:
        raw.begin("disk", "extended")
        assert not raw.ask(command, offset, length, flags=flags).error
        assert storage.flushes == 1
    at = offset
    for number, (_, start, size, asked) in enumerate(storage.asked):
        assert start == at
        assert size <= MOST
        at += size
        assert at % STEP == 0 or at == offset + length
        assert bool(asked & lamina.node.NO_FALLBACK) == (number == 0 and command == w.CMD_WRITE_ZEROES)
    assert at == offset + length
    assert len(storage.asked) > 3


def test_a_request_of_one_step_is_passed_on_as_it_is(tmp_path: Path) -> None:
    storage, export = disk(0)
    with serving(tmp_path, export) as (_, path), dial(path) as raw:
        raw.begin("disk", "extended")
        assert not raw.ask(w.CMD_WRITE_ZEROES, 4096, STEP, flags=w.CMD_FLAG_NO_HOLE).error
    assert storage.asked == [("zero", 4096, STEP, 0)]


# -- a qcow2 of a PiB, and the program


@contextmanager
def lamina_serve(folder: Path, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "lamina", "serve", "-t", "-w", "-k", "s", *args]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"ready")
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def qcow2(folder: Path, clusters: int) -> None:
    """As large as its L1 table lets it be, up to a PiB; a backing file, so that zeroing must write something."""
    (folder / "base").write_bytes(b"base" * KIB)
    size = min(PIB, clusters * clusters // 8 * (4 << 20))
    lamina.create(folder / "disk", "qcow2", size, cluster_size=clusters, backing_file="base", backing_fmt="raw")


CASES = [(64 * KIB, w.CMD_WRITE_ZEROES), (2 * MIB, w.CMD_TRIM)]
if "LAMINA_HOSTILE_CLIENTS" in os.environ:
    CASES = [(clusters, command) for clusters in (512, 4 * KIB, 64 * KIB, 2 * MIB) for command in COMMANDS]


@pytest.mark.parametrize(("clusters", "command"), CASES)
def test_a_qcow2_of_a_pib(tmp_path: Path, clusters: int, command: int) -> None:
    qcow2(tmp_path, clusters)
    with lamina_serve(tmp_path, "-f", "qcow2", "disk") as process, ExitStack() as stack:
        greedy = stack.enter_context(dial(tmp_path / "s")).begin("", "extended")
        long(greedy, command, greedy.size)
        time.sleep(0.2)
        for _ in range(3):
            begun = time.monotonic()
            with dial(tmp_path / "s") as other:
                other.begin("", "extended")
                assert not other.write(other.size - 4096, b"here").error
                assert other.read(other.size - 4096, 4) == b"here"
            assert time.monotonic() - begun < BOUND
        begun = time.monotonic()
        process.terminate()
        assert process.wait(BOUND + 10) == 0
        assert time.monotonic() - begun < BOUND
    with lamina.open(tmp_path / "disk", format="qcow2") as image:
        assert image.read(64 * MIB, 16) == bytes(16)


def test_block_status_of_a_pib(tmp_path: Path) -> None:
    """It takes little, tells a part, and others are served meanwhile."""
    qcow2(tmp_path, 2 * MIB)
    with lamina_serve(tmp_path, "-f", "qcow2", "disk"), dial(tmp_path / "s") as raw:
        raw.begin("", "extended", ("base:allocation", "qemu:allocation-depth"))
        begun = time.monotonic()
        assert raw.block_status(0, raw.size)["base:allocation"]
        assert time.monotonic() - begun < BOUND

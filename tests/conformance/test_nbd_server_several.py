"""Several clients of one server that are busy at once, and so are served in its loop: every rule holds there as it does for
one that has a thread of its own. Here all meet, always: a turn is never said to have been free."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lamina.limits import KIB, MIB
from lamina.nbd import Export
from lamina.nbd import wire as w
from lamina.nbd.server import connection as room
from lamina.nbd.server import loop
from lamina.nbd.server.loop import ExecutionLock
from lamina.nbd.wire import CMD_READ as READ
from lamina.nbd.wire import CMD_WRITE as WRITE
from lamina.testing.interrupts import in_another_thread

from ..nbd_load import DISK, PATIENCE, Gate, content, fast, served_beside_others, serving, slow, until
from ..nbd_raw import Raw, dial

CLIENTS = 4
#: Conversations of each kind; the soak has more.
SEEDS = int(os.environ.get("LAMINA_NBD_SEVERAL", "4"))
SHARE = DISK // CLIENTS
MODES = ["simple", "structured", "extended"]


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Everybody meets somebody; how many steps of the loop there were."""
    take, step = ExecutionLock.take, room._LoopMember.step
    counted: list[int] = []

    def counting(self: room._LoopMember) -> bool:
        counted.append(threading.get_ident())
        return step(self)

    monkeypatch.setattr(ExecutionLock, "take", lambda self: (take(self)[0], False))
    monkeypatch.setattr(room._LoopMember, "step", counting)
    yield counted
    assert counted, "nobody was served in the loop: this tested something else"


class Client:
    """Does at random what clients do, in its share of the disk, many requests at a time, and knows what must come."""

    def __init__(self, path: Path, number: int, mode: str, seed: int) -> None:
        self.raw = dial(path).begin("fast", mode)
        self.base = number * SHARE
        self.disk = bytearray(content()[self.base :][:SHARE])
        self.random = random.Random(seed * 1000 + number)
        self.error: BaseException | None = None
        self.asked = 0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            for _ in range(60):
                self._batch()
            self.raw.disc()
            assert self.raw.ended()
        except BaseException as error:  # noqa: BLE001 - raised by `finish`
            self.error = error

    def _batch(self) -> None:
        """Writes and reads that do not touch one another: replies may come in any order."""
        message, expected = b"", {}
        places = self.random.sample(range(SHARE // (8 * KIB)), self.random.choice([1, 1, 4, 20]))
        for place in places:
            at, length = place * 8 * KIB, self.random.choice([1, 512, 4096, 8192])
            kind = self.random.choices([READ, WRITE, w.CMD_WRITE_ZEROES, w.CMD_FLUSH], [10, 10, 1, 1])[0]
            before = set(self.raw.asked)
            if kind == WRITE:
                data = self.random.randbytes(length) if self.random.random() < 0.8 else bytes(length)
                message += self.raw.request(WRITE, self.base + at, length, payload=data, send=False)
                self.disk[at : at + length] = data
            elif kind == w.CMD_WRITE_ZEROES:
                message += self.raw.request(kind, self.base + at, length, send=False)
                self.disk[at : at + length] = bytes(length)
            elif kind == w.CMD_FLUSH:
                message += self.raw.request(kind, send=False)
            else:
                message += self.raw.request(READ, self.base + at, length, send=False)
                (cookie,) = set(self.raw.asked) - before
                expected[cookie] = bytes(self.disk[at : at + length])
            self.asked += 1
        if self.random.random() < 0.1:  # a long one among the short
            self.raw.stream.send(message)
            self._collect(expected)
            assert self.raw.read(self.base, SHARE) == self.disk
            self.asked += 1
            return
        cut = self.random.randrange(len(message) + 1)  # requests come in pieces, too
        self.raw.stream.send(message[:cut])
        self.raw.stream.send(message[cut:])
        self._collect(expected)

    def _collect(self, expected: dict[int, bytes]) -> None:
        """All is answered, and every READ with what `expected` has for its cookie."""
        for reply in self.raw.collect():
            assert not reply.error
            assert reply.cookie not in expected or reply.data == expected.pop(reply.cookie)
        assert not expected

    def finish(self) -> None:
        self.thread.join(60)
        self.raw.stream.close()
        if self.error is not None:
            raise self.error
        assert not self.thread.is_alive()


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("mode", MODES)
def test_each_gets_what_it_wrote_and_all_is_counted(tmp_path: Path, mode: str, seed: int) -> None:
    export = fast()
    with serving(tmp_path, export) as (server, path):
        clients = [Client(path, number, mode, seed) for number in range(CLIENTS)]
        for client in clients:
            client.finish()
        assert export.image.read(0, DISK) == b"".join(client.disk for client in clients)
        until(lambda: not server.stats()["transmitting"], "they are gone")
        stats = server.stats()
        done = sum(stats[name] for name in ("READ", "WRITE", "WRITE_ZEROES", "FLUSH"))
        assert done == sum(client.asked for client in clients)
        assert stats["failed"] == 0


def crowd(path: Path, stack: ExitStack, count: int = 3) -> list[Raw]:
    """Clients in the loop."""
    found = [stack.enter_context(dial(path)).begin("fast", "structured") for _ in range(count)]
    for _ in range(10):  # by then the storage counts as quick
        for raw in found:
            assert raw.read(4096, 512) == content()[4096:4608]
    return found


def test_who_does_not_read_gets_all_later_and_stops_nobody(tmp_path: Path) -> None:
    """What its socket does not take is sent by its own thread, from the byte on where the loop stopped."""
    with serving(tmp_path, fast()) as (_, path), ExitStack() as stack:
        good, deaf = crowd(path, stack, 2)
        count = 1000
        offsets = [random.Random(number).randrange(DISK - 60 * KIB) for number in range(count)]
        feeder = threading.Thread(target=_ask_all, args=(deaf, offsets), daemon=True)
        feeder.start()
        for _ in range(20):
            assert good.read(0, 4096) == content()[:4096]
            served_beside_others(path)
        first = min(deaf.asked)
        for reply in deaf.collect(count):
            at = offsets[reply.cookie - first]
            assert reply.data == content()[at : at + 60 * KIB]
        feeder.join(PATIENCE)


def _ask_all(raw: Raw, offsets: list[int]) -> None:
    message = b"".join(raw.request(READ, at, 60 * KIB, send=False) for at in offsets)
    for at in range(0, len(message), 8 * 28):
        raw.stream.send(message[at : at + 8 * 28])
        time.sleep(0.0005)


def test_storage_that_stops_while_the_loop_reads_it_holds_up_only_its_clients(tmp_path: Path) -> None:
    gate = Gate()
    gate.open.set()
    stops = slow("stops", gate)
    with serving(tmp_path, stops, fast()) as (_, path), ExitStack() as stack:
        stuck = stack.enter_context(dial(path)).begin("stops", "structured")
        others = crowd(path, stack)
        for _ in range(40):  # until it counts as quick
            assert stuck.read(0, 4096) == content()[:4096]
            for raw in others:
                assert raw.read(0, 512) == content()[:512]
        gate.open.clear()
        stuck.request(READ, 4096, 4096)
        until(lambda: gate.waiting, "the storage is not asked")
        for _ in range(5):
            for raw in others:
                assert raw.read(8192, 512) == content()[8192:8704]
            served_beside_others(path)
        gate.open.set()
        assert stuck.collect()[0].data == content()[4096:8192]


@pytest.mark.parametrize("mode", MODES)
def test_what_a_rule_is_broken_with_is_the_same_in_the_loop(tmp_path: Path, mode: str) -> None:
    """A bad request between good ones, then one that ends the connection; the others stay."""
    with serving(tmp_path, fast()) as (_, path), ExitStack() as stack:
        others = crowd(path, stack, 2)
        bad = stack.enter_context(dial(path)).begin("fast", mode)
        for _ in range(3):
            assert bad.read(0, 512) == content()[:512]
        message = b"".join(bad.request(READ, at, 512, send=False) for at in (0, DISK - 511, 512))
        bad.stream.send(message)
        assert sorted(reply.error for reply in bad.collect()) == [0, 0, w.EINVAL]
        assert bad.read(0, 512) == content()[:512]
        assert bad.ask(99).error == w.EINVAL
        assert bad.read(0, 512) == content()[:512]
        bad.stream.send(bad.request(READ, 0, 512, send=False) + bytes(64))
        assert bad.collect()[0].data == content()[:512]
        assert bad.ended()
        for raw in others:
            assert raw.read(0, 512) == content()[:512]


def test_who_says_farewell_in_the_loop_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the loop next looks for the silent."""
    monkeypatch.setattr(loop, "_SWEEP_INTERVAL", 10 * PATIENCE)
    with serving(tmp_path, fast()) as (_, path), ExitStack() as stack:
        leaving, *others = crowd(path, stack)
        leaving.stream.send(leaving.request(READ, 0, 512, send=False))
        leaving.disc()
        assert leaving.collect()[0].data == content()[:512]
        assert leaving.ended()
        for raw in others:
            assert raw.read(0, 512) == content()[:512]


def test_an_end_of_the_server_is_the_same_in_the_loop(tmp_path: Path) -> None:
    with serving(tmp_path, fast()) as (server, path), ExitStack() as stack:
        clients = crowd(path, stack)
        in_another_thread(lambda: server.close(grace=10 * PATIENCE))
        for raw in clients:
            assert raw.ended()


def test_clients_that_are_cut_off_in_the_loop_are_gone(tmp_path: Path) -> None:
    with serving(tmp_path, fast()) as (server, path), ExitStack() as stack:
        clients = crowd(path, stack)
        message = b"".join(clients[0].request(READ, 0, 4096, send=False) for _ in range(200))
        clients[0].stream.send(message)
        clients[0].stream.close()
        for raw in clients[1:]:
            assert raw.read(0, 512) == content()[:512]
        until(lambda: server.stats()["transmitting"] == 2, "it is counted for ever")


def test_the_memory_of_those_who_left_is_free_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megabytes for each: not only when the interpreter next looks for what nobody reaches."""
    kept: weakref.WeakSet[object] = weakref.WeakSet()

    class Known(room.Transmission):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            kept.add(self)

    monkeypatch.setattr(room, "Transmission", Known)
    with serving(tmp_path, fast()) as (server, path), ExitStack() as stack:
        gc.disable()
        stack.callback(gc.enable)
        clients = crowd(path, stack)
        assert len(kept) == len(clients)
        clients[0].disc()
        clients[1].stream.close()
        until(lambda: server.stats()["transmitting"] == 1, "they are gone")
        until(lambda: len(kept) == 1, f"{len(kept)} are kept")
        clients[2].disc()
        until(lambda: not kept, "the last one is kept")


def test_who_falls_silent_in_the_loop_is_put_out_in_time(tmp_path: Path) -> None:
    with serving(tmp_path, fast(), idle_time=1.0) as (_, path), ExitStack() as stack:
        silent, *busy = crowd(path, stack)
        deadline = time.monotonic() + PATIENCE
        ended = threading.Event()
        watch = threading.Thread(target=lambda: silent.ended() and ended.set(), daemon=True)
        watch.start()
        while not ended.is_set():
            assert time.monotonic() < deadline
            for raw in busy:
                assert raw.read(0, 512) == content()[:512]
        watch.join()


def test_an_export_that_takes_no_writes_takes_none_in_the_loop(tmp_path: Path) -> None:
    export = fast()
    fixed = Export(export.image, "fixed")
    with serving(tmp_path, export, fixed) as (_, path), ExitStack() as stack:
        crowd(path, stack, 2)
        raw = stack.enter_context(dial(path)).begin("fixed")
        for _ in range(3):
            assert raw.read(0, 512) == content()[:512]
            assert raw.write(0, b"!" * 512).error == w.EPERM
        assert export.image.read(0, MIB) == content()

"""What an NBD server takes and gives back: clients that dawdle, that are too many, that do not read; slow storage; memory."""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import pytest

from lamina.limits import MIB
from lamina.nbd import Server
from lamina.nbd import wire as w
from lamina.nbd.wire import CMD_READ as READ

from ..nbd_load import (
    DISK,
    Gate,
    content,
    fast,
    served,
    served_beside_others,
    server_threads,
    serving,
    slow,
    until,
)
from ..nbd_raw import PATIENCE, Gone, Raw, dial, info, option_bytes

# -- many who dawdle


@pytest.mark.parametrize("clients", [100, 1000], ids=["they make room", "there is room"])
def test_400_dawdling_clients_hold_nobody_up(tmp_path: Path, clients: int) -> None:
    """T10, CVE-2024-7409: 200 say nothing, 200 a byte each second."""
    greeting = w.CLIENT_FLAGS.pack(flags=w.FLAG_C_FIXED_NEWSTYLE) + option_bytes(w.OPT_LIST) * 4
    with serving(tmp_path, fast(), clients=clients) as (server, path), ExitStack() as stack:
        crowd = []
        for _ in range(400):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(path))
            crowd.append(sock)
        served_beside_others(path)
        for number in range(4):
            for sock in crowd[200:]:
                with suppress(BrokenPipeError, ConnectionResetError):
                    sock.send(greeting[number : number + 1])
            served_beside_others(path)
            time.sleep(1.0)
        assert len(server_threads()) <= min(clients, 400) + 10
        stats = server.stats()
        assert stats["negotiating"] <= min(clients, 400) + 5
        assert stats["READ"] == 5


class NoLock(nullcontext[None]):
    """Stands for a lock, and holds up nobody."""

    def acquire(self) -> None: ...

    def release(self) -> None: ...


class SlowLog(logging.Handler):
    """Clients' threads take a while to end, as on a busy machine: here because what they say last is written slowly."""

    def createLock(self) -> None:
        self.lock = NoLock()  # type: ignore[assignment]

    def emit(self, record: logging.LogRecord) -> None:
        if "nothing asked" in record.getMessage():
            time.sleep(0.05)


def test_a_burst_of_connections_leaves_no_more_than_may_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """They come faster than those that make room for them can end; when all is quiet, no more are left than have room."""
    caplog.set_level(logging.INFO, "lamina.nbd")
    handler = SlowLog()
    logging.getLogger("lamina.nbd").addHandler(handler)
    request.addfinalizer(lambda: logging.getLogger("lamina.nbd").removeHandler(handler))
    with serving(tmp_path, fast(), clients=10) as (server, path), ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
        served_beside_others(path)
        time.sleep(0.5)
        assert server.stats()["negotiating"] <= 10


def test_they_are_gone_after_the_time_for_the_handshake(tmp_path: Path) -> None:
    """Silence, a byte now and then, options without end: none of it buys more time."""
    with serving(tmp_path, fast(), handshake_time=0.5) as (_, path), ExitStack() as stack:
        silent, chatty, slow_one = (stack.enter_context(dial(path)) for _ in range(3))
        chatty.greet()
        message = w.CLIENT_FLAGS.pack(flags=1) + option_bytes(w.OPT_LIST, bytes(1000))
        with suppress(Gone):
            for number in range(1000):
                chatty.option(w.OPT_LIST)
                slow_one.stream.send(message[number : number + 1])
                time.sleep(0.02)
            pytest.fail("they may negotiate as long as they like")
        for raw in (silent, slow_one):
            raw.stream.recv(w.GREETING.size)
            assert raw.ended()
        served_beside_others(path)


def test_a_good_client_gets_in_through_a_stampede(tmp_path: Path) -> None:
    """Attackers who come again at once when they are put out, faster than anybody negotiates, with room for ten."""
    with serving(tmp_path, fast(), clients=10) as (_, path), ExitStack() as stack:
        stop = threading.Event()

        def rush() -> None:
            held = []
            while not stop.is_set():
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(str(path))
                held.append(sock)
                if len(held) > 20:
                    held.pop(0).close()
                time.sleep(0.01)
            for sock in held:
                sock.close()

        rushing = threading.Thread(target=rush)
        rushing.start()
        stack.callback(rushing.join)
        stack.callback(stop.set)
        for _ in range(20):
            served_beside_others(path)


# -- the number of clients, and those that sleep


def test_no_more_clients_than_may_be(tmp_path: Path) -> None:
    with serving(tmp_path, fast(), clients=2, handshake_time=1.0) as (server, path), ExitStack() as stack:
        first, second = (stack.enter_context(dial(path)).begin("fast") for _ in range(2))
        with dial(path) as third, pytest.raises(Gone):
            third.begin("fast")
        until(lambda: server.stats()["refused"] == 1, "it is not counted")
        assert first.read(0, 512) == second.read(0, 512) == content()[:512]
        second.disc()
        assert second.ended()
        until(lambda: server.stats()["transmitting"] == 1, "the second is counted for ever")
        with dial(path) as fourth:
            assert fourth.begin("fast").read(0, 512) == content()[:512]


def test_a_client_that_finds_no_room_waits_for_one_that_leaves(tmp_path: Path) -> None:
    """As scripts do with a server for one client: the next one comes before the server knows that the first one is gone."""
    with serving(tmp_path, fast(), clients=1) as (server, path), dial(path) as first:
        first.begin("fast")
        leaving = threading.Timer(0.3, first.stream.close)
        leaving.start()
        with dial(path) as second:
            assert second.begin("fast").read(0, 512) == content()[:512]
        leaving.join()
        assert server.stats()["refused"] == 0


@pytest.mark.parametrize("end", ["close", "shutdown"])
def test_a_client_that_waits_for_room_is_not_waited_for(tmp_path: Path, end: str) -> None:
    with serving(tmp_path, fast(), clients=1, handshake_time=PATIENCE * 4) as (server, path), dial(path) as first:
        first.begin("fast")
        waiting = dial(path)
        waiting.greet()
        waiting.send_option(w.OPT_GO, info("fast"))
        until(lambda: server.stats()["negotiating"] == 1, "it does not negotiate")
        if end == "close":
            waiting.stream.close()
            until(lambda: server.stats()["negotiating"] == 0, "the server waits for one that is gone")
        else:
            server.close()
            with waiting, suppress(Gone):  # it may get its reply, if the first one left before
                waiting.stream.recv(1)


def test_an_idle_client_is_put_out_and_a_busy_one_is_not(tmp_path: Path) -> None:
    with serving(tmp_path, fast(), idle_time=1.5) as (_, path), dial(path) as idle, dial(path) as busy:
        idle.begin("fast")
        busy.begin("fast")
        idle.stream.sock.setblocking(False)  # type: ignore[attr-defined]
        begun, said = time.monotonic(), None
        while said is None:
            assert time.monotonic() - begun < PATIENCE, "it may sleep for ever"
            assert busy.read(0, 512) == content()[:512]
            time.sleep(0.05)
            with suppress(BlockingIOError):
                said = idle.stream.sock.recv(1)  # type: ignore[attr-defined]
        assert said == b"", "the server says something"
        assert busy.read(0, 512) == content()[:512]


# -- those who do not read


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_who_does_not_read_stops_only_himself(tmp_path: Path, mode: str) -> None:
    with serving(tmp_path, fast()) as (_, path), ExitStack() as stack:
        for _ in range(8):
            deaf = stack.enter_context(dial(path)).begin("fast", mode)
            for _ in range(64):
                deaf.request(READ, 0, DISK)
        for _ in range(5):
            served_beside_others(path)


def test_who_does_not_read_from_slow_storage_stops_only_himself(tmp_path: Path) -> None:
    """Their replies fill the pool of threads if they may wait there: the others' requests then never get one."""
    with serving(tmp_path, slow("slow", time, read_ms=5), fast()) as (_, path), ExitStack() as stack:
        for _ in range(4):
            deaf = stack.enter_context(dial(path)).begin("slow")
            deaf.stream.send(b"".join(deaf.request(READ, 0, DISK, send=False) for _ in range(64)))
        time.sleep(0.5)
        good = stack.enter_context(dial(path)).begin("slow")
        good.stream.send(b"".join(good.request(READ, 4096 * number, 4096, send=False) for number in range(32)))
        assert {reply.data for reply in good.collect()} == {
            content()[at : at + 4096] for at in range(0, 32 * 4096, 4096)
        }
        served_beside_others(path)


# -- slow storage


def test_slow_reads_go_side_by_side(tmp_path: Path) -> None:
    """All 16 are in the storage at once: the gate opens only when the last of them is there."""
    gate = Gate()
    with serving(tmp_path, slow("slow", gate)) as (_, path), dial(path) as raw:
        raw.begin("slow")
        raw.stream.send(b"".join(raw.request(READ, 4096 * number, 4096, send=False) for number in range(16)))
        until(lambda: gate.waiting == 16, "they wait for one another")
        gate.open.set()
        assert {reply.data for reply in raw.collect()} == {content()[at : at + 4096] for at in range(0, 65536, 4096)}


def test_slow_reads_sent_one_by_one_go_side_by_side(tmp_path: Path) -> None:
    """As most clients send them: each in a packet of its own."""
    gate = Gate()
    with serving(tmp_path, slow("slow", gate)) as (_, path), dial(path) as raw:
        raw.begin("slow")
        for number in range(16):
            raw.request(READ, 4096 * number, 4096)
            time.sleep(0.005)
        time.sleep(1.0)
        at_once = gate.waiting
        gate.open.set()
        assert len(raw.collect()) == 16
        assert at_once == 16, f"{at_once} of 16 requests were in the storage at once"


def test_replies_come_in_the_order_in_which_they_are_ready(tmp_path: Path) -> None:
    """50 ms before each read but where the bytes are known: what is quick does not wait for what was asked before it."""

    class Late:
        """The first of all waits longest."""

        def __init__(self) -> None:
            self.turn = iter(range(1000))
            self.others = threading.Event()

        def sleep(self, seconds: float) -> None:
            if next(self.turn) == 0:
                assert self.others.wait(PATIENCE)
            else:
                time.sleep(seconds)

    late = Late()
    with serving(tmp_path, slow("slow", late)) as (_, path), dial(path) as raw:
        raw.begin("slow")
        raw.stream.send(b"".join(raw.request(READ, 4096 * number, 4096, send=False) for number in range(16)))
        replies = raw.collect(15)
        late.others.set()
        replies += raw.collect()
        assert sorted(reply.data for reply in replies) == sorted(
            content()[at : at + 4096] for at in range(0, 65536, 4096)
        )


def test_slow_storage_holds_up_only_its_own_clients(tmp_path: Path) -> None:
    gate = Gate()
    with serving(tmp_path, slow("slow", gate), fast()) as (_, path), ExitStack() as stack:
        stuck = [stack.enter_context(dial(path)).begin("slow") for _ in range(3)]
        for raw in stuck:
            raw.stream.send(b"".join(raw.request(READ, 4096 * number, 4096, send=False) for number in range(40)))
        until(lambda: gate.waiting >= 16, "the slow storage is not asked")
        for _ in range(5):
            served_beside_others(path)
        gate.open.set()
        for raw in stuck:
            assert len(raw.collect()) == 40


def test_disc_answers_all_that_slow_storage_still_has(tmp_path: Path) -> None:
    """1d: MUST. QEMU answers 9 of 20."""
    with serving(tmp_path, slow("slow", time, read_ms=20)) as (_, path), dial(path) as raw:
        raw.begin("slow")
        raw.stream.send(b"".join(raw.request(READ, 4096 * number, 4096, send=False) for number in range(20)))
        raw.disc()
        assert len({reply.data for reply in raw.collect(20)}) == 20
        assert raw.ended()


# -- memory, descriptors, threads


BOUND = 200 * MIB


def transfer(path: str, rounds: int, payload: memoryview) -> None:
    """Four reads and four writes of 32 MiB in flight, `rounds` times. Simple replies: only their number counts."""
    room = memoryview(bytearray(MIB))
    with dial(path) as raw:
        raw.begin("", "simple")
        sock = raw.stream.sock  # type: ignore[attr-defined]
        for _ in range(rounds):
            left = 8 * w.SIMPLE_REPLY.size + 4 * len(payload)

            def send() -> None:
                for _ in range(4):
                    sock.sendall(raw.request(READ, 0, len(payload), send=False))
                    sock.sendall(raw.request(w.CMD_WRITE, 0, len(payload), send=False))
                    sock.sendall(payload)

            sending = threading.Thread(target=send)
            sending.start()
            while left:
                count = sock.recv_into(room, min(left, len(room)))
                assert count, "the server is gone"
                left -= count
            sending.join()


@pytest.mark.parametrize("driver", ["raw", "slow"])
def test_memory_under_load_stays_below_its_bound(tmp_path: Path, driver: str) -> None:
    """8 clients, each with 32 MiB x 4 read and written at a time: 2 GiB. The bound is that of `server.connection`: 2 MiB for
    each client, 2 MiB for each thread of the pool, and the interpreter."""
    disk = tmp_path / "disk"
    payload = memoryview(random.Random(1).randbytes(32 * MIB))
    disk.write_bytes(payload)
    source = str(disk)
    if driver == "slow":
        source = f'json:{{"driver": "delay", "read-ms": 2, "image": {{"driver": "raw", "file": "{disk}"}}}}'
    with served(tmp_path / "socket", driver if driver == "raw" else "graph", source) as process:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                transfer(process.socket, 1, payload)
            except BaseException as error:  # noqa: BLE001 - told by the test
                failures.append(error)

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        told = process.end()
    assert told["bytes_read"] == told["bytes_written"] == 8 * 4 * len(payload)
    assert not told["failed"]
    assert told["peak"] < BOUND, f"{told['peak'] / MIB:.0f} MiB"
    assert disk.read_bytes() == payload


def test_the_measure_of_memory_can_fail(tmp_path: Path) -> None:
    """A server that holds a disk of 256 MiB in memory is above the bound: what is measured is the server's memory."""
    with served(tmp_path / "socket", "memory", str(256 * MIB)) as process, dial(process.socket) as raw:
        raw.begin("", "simple")
        for number in range(8):
            assert not raw.write(32 * MIB * number, random.Random(1).randbytes(MIB) * 32).error
        raw.disc()
        assert process.end()["peak"] > BOUND


def test_300_clients_leave_nothing_behind(tmp_path: Path, seed: int) -> None:
    """However they leave: in good order, in the middle of a message, with replies under way, after nonsense."""
    rng = random.Random(seed)
    with serving(tmp_path, fast(), slow("slow", time, read_ms=1), clients=400) as (server, path):
        served_beside_others(path)
        until(lambda: "nbd-client" not in server_threads(), "the first client's thread stays")
        before = len(os.listdir("/proc/self/fd"))
        with ExitStack() as stack:
            for _ in range(300):
                raw = stack.enter_context(dial(path))
                leave(raw, rng)
        assert stats_of(server, "connections") == 301
        until(lambda: not [name for name in server_threads() if name == "nbd-client"], "threads of clients stay")
        assert len(os.listdir("/proc/self/fd")) <= before
        served_beside_others(path)


def stats_of(server: Server, name: str) -> int:
    until(lambda: not server.stats()["negotiating"] + server.stats()["transmitting"], "clients are counted for ever")
    return int(server.stats()[name])


def leave(raw: Raw, rng: random.Random) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        return
    if kind == 1:
        raw.greet(rng.getrandbits(32))
        return
    if kind == 2:
        raw.greet()
        raw.stream.send(option_bytes(w.OPT_GO, rng.randbytes(9))[: rng.randrange(25)])
        return
    raw.begin(rng.choice(("fast", "slow")), rng.choice(("simple", "structured", "extended")))
    for _ in range(rng.randrange(20)):
        raw.request(READ, rng.randrange(DISK // 2), rng.randrange(1, DISK // 2))
    if kind == 3:
        raw.disc()
    elif kind == 4:
        with suppress(Gone):
            raw.stream.send(rng.randbytes(100))

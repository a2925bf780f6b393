"""Clients that let the server wait, and what the server lets them have meanwhile: T16 and T19 of the safety policy.

Long form: LAMINA_HOSTILE_CLIENTS, the number of connections of a flood.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lamina
from lamina.limits import MIB
from lamina.nbd import Export, Server
from lamina.nbd import wire as w
from lamina.nbd.server.connection import CLIENT_MEMORY
from lamina.nbd.tls import server_context
from tests.certificates import write_certificates

from ..nbd_load import DISK, Gate, content, fast, nothing_left, serving, slow, until
from ..nbd_raw import FIXED, PATIENCE, Gone, Raw, SocketStream, dial, info, option_bytes

FLOOD = int(os.environ.get("LAMINA_HOSTILE_CLIENTS", "500"))


def is_put_out(raw: Raw) -> bool:
    """Whether the server ends the connection; waits for it."""
    assert isinstance(raw.stream, SocketStream)
    with suppress(Gone, OSError):
        while raw.stream.sock.recv(1 << 20):
            pass
    return True


@contextmanager
def trickling(raw: Raw, message: bytes, seconds: float = 0.05) -> Iterator[threading.Event]:
    """One byte after the other, as long as the server takes them; the event says that it does not."""
    ended = threading.Event()
    stop = threading.Event()

    def run() -> None:
        try:
            for byte in message:
                if stop.wait(seconds):
                    return
                raw.stream.send(bytes([byte]))
        except (Gone, OSError):
            ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ended
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("what", ["header", "payload"])
def test_who_trickles_bytes_is_idle(tmp_path: Path, what: str) -> None:
    """Idleness counts whole requests; whoever sends some stays."""
    with serving(tmp_path, fast(), idle_time=1.0) as (_, path), dial(path) as raw, dial(path) as busy:
        raw.begin("fast")
        busy.begin("fast")
        request = raw.write_bytes(0, bytes(4096))
        if what == "payload":
            raw.stream.send(request[: w.REQUEST.size])
            request = request[w.REQUEST.size :]
        else:
            request = request[: w.REQUEST.size - 1] * 100  # nonsense, but no whole request within the time
        with trickling(raw, request, 0.1 if what == "header" else 0.02) as ended:
            deadline = time.monotonic() + PATIENCE
            while not ended.is_set():
                assert time.monotonic() < deadline, "it may trickle for ever"
                assert busy.read(0, 512) == content()[:512]
                time.sleep(0.02)
        assert busy.read(0, 512) == content()[:512]


@pytest.mark.parametrize("sent", [1, 27, 28, 28 + 2000])
def test_who_stops_in_the_middle_of_a_request_is_put_out(tmp_path: Path, sent: int) -> None:
    """And nobody else is: whoever asks nothing may stay."""
    with serving(tmp_path, fast(), stall_time=0.5) as (_, path), dial(path) as raw, dial(path) as silent:
        raw.begin("fast")
        silent.begin("fast")
        raw.stream.send(raw.write_bytes(0, bytes(4096))[:sent])
        assert is_put_out(raw)
        time.sleep(0.7)
        assert silent.read(0, 512) == content()[:512]


def test_a_long_payload_that_goes_on_is_taken(tmp_path: Path) -> None:
    """What counts is whether it goes on, not how long it takes."""
    with serving(tmp_path, fast(), stall_time=0.5) as (_, path), dial(path) as raw:
        raw.begin("fast")
        message = raw.write_bytes(0, b"w" * DISK)
        for at in range(0, len(message), 64 << 10):
            raw.stream.send(message[at : at + (64 << 10)])
            time.sleep(0.06)
        assert not raw.collect()[0].error


def test_slow_storage_is_not_held_against_its_client(tmp_path: Path) -> None:
    gate = Gate()
    export = slow("slow", gate, write_ms=50)
    with serving(tmp_path, export, stall_time=0.5, idle_time=0.5) as (_, path), dial(path) as raw:
        raw.begin("slow")
        message = raw.write_bytes(0, b"w" * DISK)
        raw.stream.send(message[: 700 << 10])
        until(lambda: gate.waiting == 1, "the storage is not asked")
        time.sleep(1.0)
        gate.open.set()
        raw.stream.send(message[700 << 10 :])
        assert not raw.collect()[0].error


@pytest.mark.parametrize("kind", ["slow", "fast"])
def test_who_takes_no_reply_is_put_out(tmp_path: Path, kind: str) -> None:
    """Also where its requests are in the pool; what it held is free again."""
    gate = Gate()
    gate.open.set()
    with serving(tmp_path, fast(), slow("slow", gate), stall_time=0.5) as (server, path), dial(path) as raw:
        raw.begin(kind, "simple")
        left = server._memory.left
        assert isinstance(raw.stream, SocketStream)
        raw.stream.sock.settimeout(0.2)
        with suppress(OSError, Gone):
            for _ in range(64):
                raw.request(w.CMD_READ, 0, DISK)
        until(lambda: not server.stats()["transmitting"], "it holds what it has for ever")
        until(lambda: server._memory.left == left, "its memory is lost")
        with dial(path) as other:
            assert other.begin("fast").read(0, 512) == content()[:512]


# -- the negotiation


def test_a_flood_of_silent_connections_does_not_put_out_who_goes_on(tmp_path: Path) -> None:
    """An honest client, slow but going on, with room for ten, while others connect as fast as they can."""
    stop = threading.Event()
    with serving(tmp_path, fast(), clients=10) as (_, path), ExitStack() as stack:

        def flood() -> None:
            held: list[socket.socket] = []
            for _ in range(FLOOD):
                if stop.is_set():
                    break
                sock = socket.socket(socket.AF_UNIX)
                sock.settimeout(0.2)
                with suppress(OSError):
                    sock.connect(str(path))
                held.append(sock)
                if len(held) > 50:
                    held.pop(0).close()
            for sock in held:
                sock.close()

        honest = stack.enter_context(dial(path))
        honest.greet()
        threads = [threading.Thread(target=flood) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                time.sleep(0.2)
                assert honest.option(w.OPT_LIST)[-1][0] == w.REP_ACK
            assert honest.option(w.OPT_GO, info("fast"))[-1][0] == w.REP_ACK
            assert honest.read(0, 512) == content()[:512]
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_those_who_stopped_make_room(tmp_path: Path) -> None:
    """They said something, and no more: the next one waits a little, and comes in."""
    with serving(tmp_path, fast(), clients=5) as (_, path), ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(dial(path)).greet(FIXED)
        with dial(path) as raw:
            assert raw.begin("fast").read(0, 512) == content()[:512]


def test_a_record_of_tls_that_trickles_buys_no_time(tmp_path: Path) -> None:
    """No single wait is long, and no message ever whole: not of TLS, and so not of NBD."""
    pki = write_certificates(tmp_path / "pki")
    context = server_context(pki)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    with serving(tmp_path, fast(), tls="require", context=context, handshake_time=1.5) as (_, path), dial(path) as raw:
        raw.greet()
        raw.stream.send(option_bytes(w.OPT_STARTTLS))
        assert raw.option_replies(w.OPT_STARTTLS)[-1][0] == w.REP_ACK
        assert isinstance(raw.stream, SocketStream)
        bare = socket.socket(fileno=os.dup(raw.stream.sock.fileno()))
        with bare, client.wrap_socket(raw.stream.sock.dup()):
            bare.settimeout(PATIENCE)
            deadline = time.monotonic() + PATIENCE
            with suppress(BrokenPipeError, ConnectionResetError):
                bare.send(b"\x17\x03\x03\x40\x00")
                while time.monotonic() < deadline:
                    bare.send(b"x")
                    time.sleep(0.02)
            assert time.monotonic() < deadline, "it may trickle for ever"


# -- memory


def test_all_is_done_with_as_little_memory_as_there_is(tmp_path: Path) -> None:
    """Requests that find none are done one after the other; nobody waits for anybody."""
    gate = Gate()
    gate.open.set()
    limit = 4 * CLIENT_MEMORY + 3 * MIB
    exports = (fast(), slow("slow", gate, read_ms=1, write_ms=1))
    with serving(tmp_path, *exports, memory_limit=limit) as (server, path), ExitStack() as stack:
        deaf = stack.enter_context(dial(path)).begin("slow", "simple")
        assert isinstance(deaf.stream, SocketStream)
        deaf.stream.sock.settimeout(0.2)
        with suppress(OSError, Gone):
            for _ in range(32):
                deaf.request(w.CMD_READ, 0, DISK)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                with dial(path) as raw:
                    raw.begin("slow")
                    for _ in range(3):
                        for _ in range(8):
                            raw.request(w.CMD_READ, 0, DISK)
                        assert all(reply.data == content() for reply in raw.collect())
                        for _ in range(4):
                            raw.stream.send(raw.write_bytes(0, content()))
                        assert not any(reply.error for reply in raw.collect())
            except BaseException as error:  # noqa: BLE001 - told by the test
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "they wait for one another"
        assert not failures, failures
        deaf.stream.close()
        until(lambda: server._memory.left + server._clients_memory.left == limit, "memory is lost")


def test_there_are_as_many_clients_as_have_room(tmp_path: Path) -> None:
    with (
        serving(tmp_path, fast(), memory_limit=3 * CLIENT_MEMORY, handshake_time=1.0) as (server, path),
        ExitStack() as stack,
    ):
        two = [stack.enter_context(dial(path)).begin("fast") for _ in range(2)]
        with dial(path) as late:
            late.greet()
            late.send_option(w.OPT_GO, info("fast"))
            assert late.ended()
        assert all(raw.read(0, 512) == content()[:512] for raw in two)
        two[0].stream.close()
        until(lambda: server.stats()["transmitting"] == 1, "it is counted for ever")
        with dial(path) as raw:
            assert raw.begin("fast").read(0, 512) == content()[:512]


# -- the end


def test_many_who_are_stuck_hold_up_the_end_no_longer_than_one(tmp_path: Path) -> None:
    gate = Gate()
    with serving(tmp_path, *(slow(f"slow{number}", gate) for number in range(12))) as (server, path):
        clients = [dial(path).begin(f"slow{number}") for number in range(12)]
        for raw in clients:
            raw.request(w.CMD_READ, 0, 4096)
        until(lambda: gate.waiting == 12, "the storage is not asked")
        begun = time.monotonic()
        server.close(grace=3.0)
        assert time.monotonic() - begun < 30
        gate.open.set()
        for raw in clients:
            raw.stream.close()


def test_a_peer_that_vanishes_is_noticed() -> None:
    """The system asks whether it is there."""
    with (
        nothing_left(),
        lamina.open({"driver": "memory", "size": MIB}) as image,
        Server([Export(image, "disk")], port=0) as server,
    ):
        host, _, port = server.uri.removeprefix("nbd://").split("/")[0].rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), PATIENCE) as sock:
            assert sock.recv(1)
            (connection,) = server._connections
            ours = connection._plain._socket
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


def test_the_time_of_the_storage_is_not_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long write is executed in parts. The limit on idle clients looks between two of them, too."""
    from lamina.nbd.server import activity

    now = [0.0]
    monkeypatch.setattr(activity, "monotonic", lambda: now[0])
    client = activity.ClientActivity(0.0, 0.5, 0.5)
    part: Any = SimpleNamespace(type=activity.PART, payload=(0, 0, False))
    for _ in range(4):
        client.received(True, [part], 1 << 18)
        now[0] += 2.0
        assert client.overdue() is None
        client.requests_done()
        assert client.overdue() is None
    now[0] += 0.6
    assert client.overdue() is not None

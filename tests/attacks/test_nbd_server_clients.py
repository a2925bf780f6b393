"""Clients of the NBD server that are many, slow, silent or greedy, and those who want more than they may before TLS.

As in `test_nbd_server`: whatever they do, the next client is served.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.limits import GIB, KIB, MIB
from lamina.nbd import Export, Folder, Server
from lamina.nbd import wire as w
from lamina.nbd.server.negotiation import MAX_OPTIONS

from ..nbd_raw import CLIENT_FLAGS, PATIENCE, Gone, Raw, SocketStream, dial, info, meta, option_bytes, sized
from .nbd_victim import conversation, rest, served, victim


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with victim(tmp_path_factory.mktemp("nbd")) as path:
        yield path


@pytest.fixture(autouse=True)
def the_next_client_is_served(path: Path) -> Iterator[None]:
    yield
    served(path)


def test_a_flood_of_options(path: Path) -> None:
    """T10: there is an end to options, whatever they are."""
    with dial(path) as raw:
        raw.greet()
        sender = threading.Thread(target=_flood, args=(raw, MAX_OPTIONS + 500))
        sender.start()
        replies = rest(raw).count(w.OPTION_REPLY_MAGIC.to_bytes(8))
        sender.join()
        assert 1000 < replies <= MAX_OPTIONS


def _flood(raw: Raw, count: int) -> None:
    try:
        for _ in range(count):
            raw.send_option(99)
    except Gone:
        return


@pytest.mark.parametrize(
    ("option", "data"),
    [
        (w.OPT_STRUCTURED_REPLY, b""),
        (w.OPT_EXTENDED_HEADERS, b""),
        (w.OPT_STARTTLS, b""),
        (w.OPT_INFO, info("disk", 0, 1, 2, 3)),
        (w.OPT_SET_META_CONTEXT, meta("disk", "base:allocation", "lamina:exact")),
        (w.OPT_LIST_META_CONTEXT, meta("disk")),
        (w.OPT_LIST, b""),
    ],
)
def test_duplicate_options(path: Path, option: int, data: bytes) -> None:
    """Section 7, CVE-2019-14851 (row 69): the same option again and again, then GO."""
    with dial(path) as raw:
        raw.greet()
        for _ in range(60):
            assert raw.option(option, data)
        assert raw.option(w.OPT_GO, info("other"))[-1][0] == w.REP_ACK
        assert raw.read(0, 6) == b"served"


def test_silent_clients(path: Path) -> None:
    """Row 68, CVE-2024-7409, T10: 200 that say nothing, and a good one does not wait for them."""
    silent = [SocketStream(str(path)) for _ in range(200)]
    served(path)
    for stream in silent:
        stream.close()


@pytest.mark.parametrize("said", [0, 1, 4, 10, 40])
def test_the_handshake_has_an_end(tmp_path: Path, said: int) -> None:
    """Row 68: a client that dallies, however it does, leaves after the handshake time; one in transmission does not."""
    message = w.CLIENT_FLAGS.pack(flags=CLIENT_FLAGS) + option_bytes(w.OPT_LIST) + option_bytes(w.OPT_GO, info(""))
    with lamina.open({"driver": "memory", "size": MIB}) as image:
        here = tmp_path / "socket"
        with Server([Export(image, "")], unix=str(here), handshake_time=0.4), dial(here) as good, dial(here) as raw:
            good.begin("", "simple")
            begun = time.monotonic()
            raw.greet(None)
            drip = threading.Thread(target=_drip, args=(raw, message[:said]))
            drip.start()
            rest(raw)
            assert 0.2 < time.monotonic() - begun < PATIENCE
            drip.join()
            assert good.read(0, 512) == bytes(512)


def _drip(raw: Raw, message: bytes) -> None:
    """One byte at a time: no single wait is long."""
    try:
        for byte in message:
            raw.stream.send(bytes([byte]))
            time.sleep(0.05)
    except (Gone, OSError):
        return


def test_the_server_ends_in_spite_of_stalled_clients(tmp_path: Path) -> None:
    """Row 68: clients in every stage, none of whom moves; `close` does not wait for them longer than its grace."""
    with lamina.open({"driver": "memory", "size": 64 * MIB}, read_only=False) as image:
        image.write(0, b"x" * 64 * MIB)
        here = tmp_path / "socket"
        server = Server([Export(image, "", writable=True)], unix=str(here)).start()
        said = conversation("structured").replace(b"\0\0\0\4disk", b"\0\0\0\0")
        stalled = [SocketStream(str(here)) for _ in range(40)]
        for number, stream in enumerate(stalled[:-2]):
            stream.send(said[: number * len(said) // 40])
        for stream in stalled[-2:]:  # one that wants much and reads nothing, one whose payload does not come
            raw = Raw(stream).begin("", "simple")
            if stream is stalled[-1]:
                raw.request(w.CMD_WRITE, 0, 4 * MIB, payload=b"w" * MIB)
            else:
                stream.send(b"".join(raw.request(w.CMD_READ, 0, 32 * MIB, send=False) for _ in range(10)))
        begun = time.monotonic()
        server.close(grace=1.0)
        assert time.monotonic() - begun < PATIENCE  # not the grace for each of the 40
        for stream in stalled:
            stream.close()
        assert not here.exists()
        assert not [thread for thread in threading.enumerate() if thread.name == "nbd-client"]


def test_a_client_that_does_not_read_holds_up_nobody(path: Path) -> None:
    """Requests without end, no reply taken; and writes whose bytes never come."""
    clients = [dial(path).begin("disk", "simple") for _ in range(8)]
    for number, raw in enumerate(clients):
        if number % 2:
            raw.request(w.CMD_WRITE, GIB, 32 * MIB, payload=b"never the rest")
        else:
            assert isinstance(raw.stream, SocketStream)
            raw.stream.sock.setblocking(False)
            message = b"".join(raw.request(w.CMD_READ, 0, 64 * KIB, send=False) for _ in range(500))
            try:
                raw.stream.sock.send(message)
            except BlockingIOError:
                pytest.fail("the server took nothing at all")
    for _ in range(5):
        served(path)
    for raw in clients:
        raw.stream.close()


def test_memory_does_not_follow_lengths(path: Path) -> None:
    """Section 7: 16 clients that announce 32 MiB each, and send a little of it, cost what their connections cost."""
    tracemalloc.start(1)
    try:
        before = tracemalloc.get_traced_memory()[0]
        clients = []
        for number in range(16):
            raw = dial(path).begin("disk", "extended" if number % 2 else "simple")
            flags = w.CMD_FLAG_PAYLOAD_LEN if raw.extended else 0
            raw.request(w.CMD_WRITE, GIB, 32 * MIB, flags=flags, payload=bytes(64 * KIB))
            clients.append(raw)
        served(path)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        for raw in clients:
            raw.stream.close()
    assert held < 16 * 3 * MIB


def test_more_clients_than_may_be(tmp_path: Path) -> None:
    """T10: the limit on clients refuses who comes late, and lets in again when there is room."""
    with lamina.open({"driver": "memory", "size": MIB}) as image:
        here = tmp_path / "socket"
        with Server([Export(image, "")], unix=str(here), clients=3, handshake_time=1.0) as server:
            first = [dial(here).begin("", "simple") for _ in range(3)]
            with dial(here) as late:
                late.greet()
                late.send_option(w.OPT_GO, info(""))
                assert late.ended()
            assert all(raw.read(0, 512) == bytes(512) for raw in first)
            for raw in first:
                raw.stream.close()
            deadline = time.monotonic() + 5
            while server.stats()["transmitting"] and time.monotonic() < deadline:
                time.sleep(0.01)
            with dial(here) as raw:
                assert raw.begin("", "simple").read(0, 512) == bytes(512)


# -- before the export is chosen, and before TLS


def test_nothing_is_opened_for_a_connection(tmp_path: Path) -> None:
    """Row 69, CVE-2019-14850: an image is opened for whoever asks for it by name, and closed when they are gone."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / name).write_bytes(b"x" * 4096)
    (tmp_path / "secret").write_bytes(b"secret")
    os.symlink(tmp_path / "secret", folder / "link")
    opened: list[str] = []

    def open(path: str) -> lamina.Image:
        opened.append(os.path.basename(path))
        return lamina.open(path, format="raw")

    here = tmp_path / "socket"
    with Server(folder=Folder(folder, open), unix=str(here)):
        with dial(here) as raw:
            raw.greet()
            replies = raw.option(w.OPT_LIST)
            assert [data for _, data in replies] == [sized("one"), sized("two"), b""]
            for name in ("", "none", "..", "../secret", "link", "one/../two", "./one", str(folder / "one"), "one\n"):
                assert raw.option(w.OPT_INFO, info(name))[0][0] == w.REP_ERR_UNKNOWN
            assert opened == []
            assert raw.option(w.OPT_GO, info("two"))[-1][0] == w.REP_ACK
            assert opened == ["two"]
            assert raw.read(0, 4) == b"xxxx"
        with dial(here) as raw:
            raw.begin("one", "simple")
            assert opened == ["two", "one"]


@pytest.mark.parametrize("tls", ["allow", "require"])
@pytest.mark.parametrize(
    "injected",
    [
        option_bytes(w.OPT_STRUCTURED_REPLY),
        option_bytes(w.OPT_GO, info("disk")),
        option_bytes(w.OPT_EXPORT_NAME, b"disk"),
        b"\0",
        b"\x16\x03\x01\x00\x05hello",
    ],
)
def test_injection_behind_starttls(tmp_path: Path, tls: str, injected: bytes) -> None:
    """Row 70, CVE-2021-3716, T3: what comes in the clear behind STARTTLS is taken for TLS, and so ends the connection."""
    with lamina.open({"driver": "memory", "size": MIB}) as image:
        here = tmp_path / "socket"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server = Server([Export(image, "disk")], unix=str(here), tls=tls, context=context, handshake_time=0.5)
        with server, dial(here) as raw:
            raw.greet()
            raw.stream.send(option_bytes(w.OPT_STARTTLS) + injected)
            assert raw.option_replies(w.OPT_STARTTLS) == [(w.REP_ACK, b"")]
            said = rest(raw)
            assert said == b"" or said[0] == 0x15, "nothing but an alert of TLS"


def test_the_socket_is_for_its_owner(path: Path) -> None:
    """T12: mode 0600."""
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_wide_bind_wants_tls() -> None:
    """T12: an address that others reach needs TLS, or the word for it."""
    with lamina.open({"driver": "memory", "size": MIB}) as image:
        for host in ("0.0.0.0", "::"):
            with pytest.raises(lamina.LaminaError):
                Server([Export(image, "")], host=host, port=0)
        with Server([Export(image, "")], port=0) as server:
            host, port = _address(server)
            with socket.create_connection((host, port)) as sock:
                assert sock.getpeername()[0] in ("127.0.0.1", "::1")


def _address(server: Any) -> tuple[str, int]:
    host, _, port = server.uri.removeprefix("nbd://").rstrip("/").rpartition(":")
    return host.strip("[]"), int(port)

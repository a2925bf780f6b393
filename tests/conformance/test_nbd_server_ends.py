"""How an NBD server ends, and where it listens: replies for all that was received, and no socket left behind."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.image import Image
from lamina.nbd import Export, Folder, Server
from lamina.nbd import wire as w
from lamina.nbd.tls import server_context
from lamina.nbd.wire import CMD_READ as READ

from ..certificates import write_certificates
from ..nbd_load import DISK, Gate, fast, nothing_left, served_beside_others, serving, slow, until
from ..nbd_raw import PATIENCE, dial, info


def is_draining(server: Server) -> bool:
    return all(connection.draining for connection in list(server._connections))


def test_the_end_of_the_server(tmp_path: Path) -> None:
    """What was received is answered, what comes later is refused with ESHUTDOWN, and everything ends."""
    gate = Gate()
    with serving(tmp_path, slow("slow", gate), fast()) as (server, path), ExitStack() as stack:
        busy, idle, talking = (stack.enter_context(dial(path)) for _ in range(3))
        busy.begin("slow")
        idle.begin("fast")
        talking.greet()
        for number in range(19):
            busy.request(READ, 4096 * number, 4096)
        until(lambda: gate.waiting == 16, "the storage is not asked")
        closing = threading.Thread(target=server.close)
        closing.start()
        until(lambda: is_draining(server) and not path.exists(), "it does not end")
        with socket.socket(socket.AF_UNIX) as late, pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            late.connect(str(path))
        gate.open.set()
        errors = [reply.error for reply in busy.collect()]
        assert sorted(errors) == [*[0] * 16, *[w.ESHUTDOWN] * 3], "16 were begun when the end came"
        for raw in (busy, idle, talking):
            assert raw.ended()
        closing.join(PATIENCE)
        assert not closing.is_alive()
        server.close()  # again


def test_the_end_of_the_server_with_requests_in_the_pool(tmp_path: Path) -> None:
    gate = Gate()
    with serving(tmp_path, slow("slow", gate)) as (server, path), dial(path) as raw:
        raw.begin("slow")
        raw.stream.send(b"".join(raw.request(READ, 4096 * number, 4096, send=False) for number in range(16)))
        until(lambda: gate.waiting == 16, "the pool is not used")
        closing = threading.Thread(target=server.close)
        closing.start()
        until(lambda: is_draining(server), "it does not end")
        gate.open.set()
        assert [reply.error for reply in raw.collect()] == [0] * 16
        assert raw.ended()
        closing.join(PATIENCE)
        assert not closing.is_alive()


def test_the_end_of_the_server_for_one_who_negotiates(tmp_path: Path) -> None:
    """An option that had arrived is refused with ERR_SHUTDOWN; the server waits for no more of them."""
    opening, opened = threading.Event(), threading.Event()

    def slowly(path: str) -> Image:
        opening.set()
        assert opened.wait(PATIENCE)
        return lamina.open(path, format="raw")

    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "disk").write_bytes(bytes(4096))
    with serving(tmp_path, folder=Folder(folder, slowly)) as (server, path), dial(path) as raw:
        raw.greet()
        raw.send_option(w.OPT_INFO, info("disk"))
        assert opening.wait(PATIENCE)
        raw.send_option(w.OPT_LIST)
        closing = threading.Thread(target=server.close)
        closing.start()
        until(lambda: is_draining(server), "it does not end")
        opened.set()
        assert raw.option_replies(w.OPT_INFO)[-1][0] == w.REP_ACK
        assert raw.option_replies(w.OPT_LIST)[-1][0] == w.REP_ERR_SHUTDOWN
        assert raw.ended()
        closing.join(PATIENCE)
        assert not closing.is_alive()


def test_the_end_of_the_server_waits_for_nobody_longer_than_its_grace(tmp_path: Path) -> None:
    """Neither for a client that does not read, nor for storage that does not answer."""
    gate = Gate()
    with serving(tmp_path, slow("slow", gate), fast()) as (server, path), dial(path) as deaf, dial(path) as stuck:
        deaf.begin("fast")
        for _ in range(64):
            deaf.request(READ, 0, DISK)
        stuck.begin("slow").request(READ, 0, 4096)
        until(lambda: gate.waiting == 1, "the storage is not asked")
        closing = threading.Thread(target=server.close, args=(0.2,))
        closing.start()
        closing.join(PATIENCE)
        assert not closing.is_alive()
        gate.open.set()


# -- where it listens


def test_the_unix_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    """T12. Whatever the umask."""
    before = os.umask(0)
    try:
        with serving(tmp_path, fast()) as (_, path):
            assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with serving(tmp_path, fast()) as (_, path):
        with nothing_left(), pytest.raises(lamina.BlockIOError, match="cannot listen"):
            Server([fast()], unix=str(path))
        served_beside_others(path)
    assert not path.exists()


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    """Neither is a file in the way removed, nor at the end a socket that took the place of ours."""
    path = tmp_path / "socket"
    path.write_text("precious")
    with nothing_left(), pytest.raises(lamina.BlockIOError):
        Server([fast()], unix=str(path))
    assert path.read_text() == "precious"
    path.unlink()
    with serving(tmp_path, fast()):
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
@pytest.mark.parametrize("tls", ["off", "allow"])
def test_tcp_for_all_the_world_needs_a_word(host: str, tls: str, tmp_path: Path) -> None:
    """T12: refused where anything could go in the clear."""
    context = None if tls == "off" else server_context(write_certificates(tmp_path / "pki"))
    options: dict[str, Any] = {"host": host, "port": 0, "tls": tls, "context": context}
    with fast().image as image:
        export = Export(image)
        with nothing_left(), pytest.raises(lamina.OptionError, match="reached by others") as refused:
            Server([export], **options)
        assert "insecure=True" in str(refused.value)
        assert "--insecure" in refused.value.command_text()
        try:
            Server([export], **options, insecure=True).close()
        except lamina.BlockIOError:
            assert host == "::", "this system may have no IPv6"
        if context is not None:
            Server([export], **options | {"tls": "require", "host": "0.0.0.0"}).close()


def test_any_free_port_on_the_loopback_interface(tmp_path: Path) -> None:
    ports = set()
    with serving(tmp_path, fast(), port=0) as (first, _), Server([fast()], port=0) as second:
        for server in (first, second):
            for uri in server.uris:
                if uri.startswith("nbd://"):
                    host, _, port = uri[6:].partition("/")[0].rpartition(":")
                    assert host in ("127.0.0.1", "[::1]")
                    with socket.create_connection((host.strip("[]"), int(port)), PATIENCE) as sock:
                        assert sock.recv(8) == b"NBDMAGIC"
                    ports.add(int(port))
    assert len(ports) == 2

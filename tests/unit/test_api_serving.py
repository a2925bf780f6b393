"""`lamina.serve` and `lamina.connect`."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina
from lamina.nbd import Client, Server

from .api_images import MIB, SIZE, WAYS, content, disk, given


@pytest.mark.parametrize("way", WAYS)
def test_serve_and_connect(way: str, tmp_path: Path) -> None:
    path = disk(tmp_path / "a.qcow2")
    with given(way, path, "qcow2") as (it, format):
        with lamina.serve(it, format=format, socket=tmp_path / "socket", name="a") as server:
            assert isinstance(server, Server)
            with lamina.connect(server.uri) as client:
                assert isinstance(client, Client)
                assert client.size == SIZE
                assert client.read(2 * MIB, 10) == bytes([3]) * 10
                with pytest.raises(lamina.ReadOnly):
                    client.write(0, b"x")
            with lamina.open(server.uri, format="raw") as image:
                assert image.size == SIZE
        assert not (tmp_path / "socket").exists()
    lamina.open(path, format="qcow2", read_only=False).close()  # nothing has it open


def test_clients_may_write(tmp_path: Path) -> None:
    path = disk(tmp_path / "a.qcow2")
    with lamina.serve(path, format="qcow2", writable=True) as server:
        assert server.uri.startswith("nbd://127.0.0.1:")
        with lamina.connect(server.uri, connections=2) as client:
            client.write(0, b"written")
    assert content(path, "qcow2")[:7] == b"written"
    with lamina.open(path, format="qcow2") as image, pytest.raises(lamina.ReadOnly):
        lamina.serve(image, writable=True)


def test_bitmaps_are_offered(tmp_path: Path) -> None:
    path = disk(tmp_path / "a.qcow2")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.add_bitmap("daily")
        image.write(0, b"x")
    context = "qemu:dirty-bitmap:daily"
    with (
        lamina.serve(path, format="qcow2", bitmaps=["daily"]) as server,
        lamina.connect(server.uri, contexts=[context]) as client,
    ):
        assert client.block_status(0, SIZE)[context][0] == (65536, 1)
    with pytest.raises(lamina.OptionError, match="no bitmap weekly"):
        lamina.serve(path, format="qcow2", bitmaps=["weekly"])


def test_what_is_refused_leaves_nothing_open(tmp_path: Path) -> None:
    path = disk(tmp_path / "a.qcow2")
    for options, message in (
        ({"host": "0.0.0.0"}, "TLS"),
        ({"tls": "require"}, "contradicts"),
        ({"tls_verify_peer": True}, "without certificates"),
        ({"tls_allow": ["CN=x"]}, "verified certificates"),
        ({"port": 65536}, "65535"),
        ({"port": -1}, "65535"),
        ({"port": 2**63}, "65535"),
        ({"name": "\udcff"}, "UTF-8"),
        ({"description": "\ud800"}, "UTF-8"),
    ):
        with pytest.raises(lamina.OptionError, match=message):
            lamina.serve(path, format="qcow2", **options)  # type: ignore[arg-type]
    lamina.open(path, format="qcow2", read_only=False).close()


def test_a_server_that_was_started_is_not_started_again(tmp_path: Path) -> None:
    with lamina.open(disk(tmp_path / "a.qcow2"), format="qcow2") as image:
        server = lamina.serve(image)
    with server, server:  # the image may be closed before the server
        lamina.connect(server.uri).close()
    with pytest.raises(lamina.Closed):
        server.start()

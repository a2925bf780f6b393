"""Settings of a server that would take the force out of one another are refused (T17): library and command line."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import OptionError
from lamina.cli.main import main
from lamina.nbd import Export, Folder, RestrictedExport, Server
from lamina.nbd.tls import allow_list, server_context
from tests.certificates import write_certificates

NAME = allow_list(["dns:client.example"])


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def export() -> Iterator[Export]:
    with lamina.open({"driver": "memory", "size": 4096}) as image:
        yield Export(image, "disk")


def contexts(pki: Path) -> dict[str, ssl.SSLContext]:
    return {"verifies": server_context(pki, verify_peer=True), "does not": server_context(pki)}


#: (tls, does the context verify, allow, tls_only of the export, allow of the export, is there a folder) -> is it refused
CASES: list[tuple[str, str | None, Any, bool, Any, bool, str | None]] = [
    ("require", "verifies", NAME, False, None, False, None),
    ("require", "verifies", frozenset(), False, None, False, None),
    ("require", "does not", None, True, None, True, None),
    ("require", "verifies", None, False, NAME, True, None),
    ("allow", "does not", None, False, None, True, None),
    ("allow", "does not", None, True, None, False, None),
    ("allow", "verifies", None, True, None, False, None),
    ("allow", "verifies", None, False, NAME, False, None),
    ("off", None, None, True, None, False, None),
    ("allow", "verifies", NAME, False, None, False, "without TLS"),
    ("allow", "verifies", NAME, True, NAME, False, "without TLS"),
    ("allow", "does not", NAME, False, None, False, "certificates"),
    ("require", "does not", NAME, False, None, False, "certificates"),
    ("require", "does not", None, False, NAME, False, "certificates"),
    ("allow", "verifies", None, False, None, False, "without TLS"),
    ("allow", "verifies", None, True, None, True, "without TLS"),
    ("off", None, NAME, False, None, False, "certificates"),
    ("off", "verifies", None, False, None, False, "TLS is off"),
    ("require", None, None, False, None, False, "TLS is off"),
]


@pytest.mark.parametrize(("tls", "context", "allow", "tls_only", "names", "folder", "refused"), CASES)
def test_the_library(
    pki: Path,
    tmp_path: Path,
    export: Export,
    tls: str,
    context: str | None,
    allow: Any,
    tls_only: bool,
    names: Any,
    folder: bool,
    refused: str | None,
) -> None:
    def make() -> Server:
        return Server(
            [RestrictedExport(export, tls_only=tls_only, allow=names)],
            folder=Folder(tmp_path, lambda path: lamina.open(path, format="raw")) if folder else None,
            unix=str(tmp_path / "socket"),
            tls=tls,
            context=None if context is None else contexts(pki)[context],
            allow=allow,
        )

    if refused is None:
        with make():
            pass
    else:
        with pytest.raises(OptionError, match=refused):
            make()
    assert not (tmp_path / "socket").exists()


DISK = ["-f", "raw", "disk.raw"]
CERTIFICATES = ["--tls-certificates", "pki"]
MISTAKES = [
    ([*DISK, *CERTIFICATES, "--tls", "allow", "--tls-verify-peer", "--tls-allow", "dns:a"], "without TLS"),
    ([*DISK, *CERTIFICATES, "--tls", "allow", "--tls-verify-peer"], "without TLS"),
    ([*DISK, *CERTIFICATES, "--tls-allow", "dns:a"], "--tls-verify-peer"),
    ([*DISK, *CERTIFICATES, "--tls-rules", "json:{}"], "--tls-verify-peer"),
    ([*DISK, *CERTIFICATES, "--tls-verify-peer", "--tls-rules", "json:{}", "--tls-allow", "dns:a"], "one of them"),
    ([*DISK, *CERTIFICATES, "--tls-verify-peer", "--tls-rules", "json:{}", "--tls", "allow"], "without TLS"),
    ([*DISK, *CERTIFICATES, "--tls-verify-peer", "--tls-rules", "json:[]"], "mapping"),
    ([*DISK, "--tls-verify-peer"], "--tls-certificates"),
    ([*DISK, "--tls-allow", "dns:a"], "certificates"),
    ([*DISK, *CERTIFICATES, "--tls", "off"], "TLS is on"),
    ([*DISK, *CERTIFICATES, "--tls-psk-file", "keys"], "one of them"),
    ([*DISK, "--tls-psk-file", "keys", "--tls-verify-peer"], "--tls-certificates"),
    ([*DISK, "--tls-psk-file", "keys", "--tls", "allow"], "without TLS"),
    (["--export", "file=disk.raw,format=raw,tls-only=on"], "requires TLS"),
    (["--export", "file=disk.raw,format=raw,allow=dns:a", *CERTIFICATES], "--tls-verify-peer"),
    (["--folder", "images", "-o", "512"], "--folder"),
    (["--folder", "images", "--size", "512"], "--folder"),
    (["--folder", "images", "--partition", "1"], "--folder"),
    (["--folder", "images", "-B", "b"], "--folder"),
    (["--folder", "images", "-x", "name"], "--folder"),
    (["--folder", "images", "-D", "text"], "--folder"),
    (["--folder", "images", "--image-opts"], "--folder"),
    (["--folder", "images", "-f", "blkdebug"], "not a format"),
    (["--folder", "images", "-f", "file"], "not a format"),
    ([*DISK, "--discard", "some"], "discard"),
    ([*DISK, "--cache", "some"], "cache"),
    ([*DISK, "--idle-limit", "nan"], "-limit"),
    ([*DISK, "--idle-limit", "0"], "-limit"),
    ([*DISK, "--stall-limit", "-1"], "-limit"),
    ([*DISK, "--handshake-limit", "inf"], "-limit"),
    ([*DISK, "--handshake-limit", "1e400"], "-limit"),
    ([*DISK, "--memory-limit", "1M"], "too few"),
    ([*DISK, "--stats", "disk.raw"], "a served image"),
    ([*DISK, "--pid-file", "disk.raw"], "not a pid file"),
]


@pytest.mark.parametrize(("args", "said"), MISTAKES, ids=[" ".join(args)[:60] for args, _ in MISTAKES])
def test_the_command_line(
    pki: Path,
    args: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.raw").write_bytes(b"disk" * 1024)
    (tmp_path / "images").mkdir()
    (tmp_path / "pki").symlink_to(pki)
    (tmp_path / "keys").write_text("user:00112233445566778899aabbccddeeff\n")
    (tmp_path / "keys").chmod(0o600)
    assert main(["serve", "-t", "-k", "s", *args]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert (tmp_path / "disk.raw").read_bytes() == b"disk" * 1024
    assert not (tmp_path / "s").exists()


class Wide(socket.socket):
    """A socket on the loopback interface that says it listens everywhere."""

    def getsockname(self) -> Any:
        return ("0.0.0.0", super().getsockname()[1])


def test_an_inherited_socket_that_others_reach_wants_tls(export: Export) -> None:
    """T12: whoever bound it."""
    with Wide(socket.AF_INET) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(OptionError, match="can be reached by others"):
            Server([export], sockets=[listener])


def test_a_file_where_a_socket_should_be_is_named(export: Export, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(lamina.BlockIOError, match="no socket"):
        Server([export], unix=str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_server_with_a_full_backlog_is_not_taken_for_a_dead_one(export: Export, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(path)
        busy.listen(0)
        waiting = []
        try:
            for _ in range(4):
                sock = socket.socket(socket.AF_UNIX)
                waiting.append(sock)
                sock.setblocking(False)
                try:
                    sock.connect(path)
                except BlockingIOError:
                    break
            with pytest.raises(lamina.BlockIOError, match="cannot listen"):
                Server([export], unix=path)
        finally:
            for sock in waiting:
                sock.close()


def test_the_old_name_of_a_restricted_export_is_deprecated() -> None:
    import lamina.nbd.server

    for module in (lamina.nbd, lamina.nbd.server):
        with pytest.warns(DeprecationWarning, match="RestrictedExport"):
            assert module.Offer is RestrictedExport

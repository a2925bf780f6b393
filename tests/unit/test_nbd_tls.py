"""TLS credentials: who is trusted and who is not, both ways, and that each refusal says what to do."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import BlockIOError, LaminaError, NotFound, OptionError, UnsupportedFeature
from lamina.nbd import tls
from lamina.nbd.tls_channel import TlsChannel
from lamina.nbd.uri import Target, parse
from tests.certificates import CLIENT_SUBJECT, revoke, write_certificates

HAS_PSK = getattr(ssl, "HAS_PSK", False) and hasattr(ssl.SSLContext, "set_psk_server_callback")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of another authority."""
    return write_certificates(tmp_path_factory.mktemp("stranger"))


def target(folder: Path | None, uri: str = "nbds://localhost/", **fields: Any) -> Target:
    return parse(uri).replace(**({"tls_certificates": folder and str(folder)} | fields))


def meet(server: ssl.SSLContext, to: Target) -> tuple[BaseException | tuple[str, ...], BaseException | tuple[str, ...]]:
    """What server and client think of each other after a handshake and a byte each way: names, or the error."""
    ours, theirs = socket.socketpair()
    thoughts: dict[str, Any] = {}

    def side(who: str, make: Callable[[], TlsChannel]) -> None:
        try:
            channel = make()
            try:
                channel.settimeout(10)
                channel.send([who[:1].encode()])
                assert channel.recv_into(memoryview(bytearray(1))) == 1
                thoughts[who] = channel.peer_names
            finally:
                channel.close()
        except LaminaError as error:
            thoughts[who] = error

    thread = threading.Thread(target=side, args=("server", lambda: TlsChannel(theirs, server, server_side=True)))
    thread.start()
    context, name = tls.client_context(to)
    side("client", lambda: TlsChannel(ours, context, server_side=False, hostname=name))
    thread.join(30)
    return thoughts["server"], thoughts["client"]


def test_both_sides_trust_each_other(pki: Path) -> None:
    server, client = meet(tls.server_context(pki, verify_peer=True), target(pki))
    assert server == (
        CLIENT_SUBJECT,
        "dns:client.example",
        "email:client@example.org",
        "uri:urn:lamina:client",
        "ip:192.0.2.7",
    )
    assert client == ("CN=server,O=Lamina tests,C=DE", "dns:localhost", "dns:nbd.example", "ip:127.0.0.1", "ip:::1")


@pytest.mark.parametrize(
    "uri",
    [
        "nbds://127.0.0.1/",
        "nbds://[::1]/",
        "nbds://LOCALHOST/",
        "nbds://wrong/?tls-hostname=nbd.example",
        "nbds+unix:///?socket=s&tls-hostname=localhost",
    ],
)
def test_names_that_are_right(pki: Path, uri: str) -> None:
    _, client = meet(tls.server_context(pki), target(pki, uri))
    assert isinstance(client, tuple)


@pytest.mark.parametrize(
    "uri",
    ["nbds://nbd/", "nbds://nbd.example.org/", "nbds://127.0.0.2/", "nbds://localhost/?tls-hostname=other.example"],
)
def test_a_certificate_for_another_host(pki: Path, uri: str) -> None:
    server, client = meet(tls.server_context(pki), target(pki, uri))
    assert isinstance(client, BlockIOError)
    assert client.errno == errno.EACCES
    assert "is not for" in str(client)
    assert "tls-hostname" in str(client)
    assert isinstance(server, BlockIOError)


def test_a_unix_socket_without_a_name_to_expect(pki: Path) -> None:
    with pytest.raises(OptionError, match="tls-hostname=NAME"):
        tls.client_context(target(pki, "nbds+unix:///?socket=s"))
    context, name = tls.client_context(target(pki, "nbds+unix:///?socket=s&tls-verify-peer=0"))
    assert name is None
    assert context.verify_mode == ssl.CERT_NONE


def test_verification_is_on_unless_said_otherwise(pki: Path, stranger: Path) -> None:
    for uri in ("nbds://localhost/", "nbd://localhost/?tls-type=x509"):
        for folder in (pki, None):
            context, name = tls.client_context(target(folder, uri))
            assert (context.verify_mode, context.check_hostname, name) == (ssl.CERT_REQUIRED, True, "localhost")
    _, client = meet(tls.server_context(stranger), target(pki, "nbds://any/?tls-verify-peer=0"))
    assert client == ()


def test_a_server_of_another_authority(pki: Path, stranger: Path) -> None:
    server, client = meet(tls.server_context(stranger), target(pki))
    assert isinstance(client, BlockIOError)
    assert "authority that we trust" in str(client)
    assert "ca-cert.pem" in str(client)
    assert isinstance(server, BlockIOError)
    assert "does not accept our certificate" in str(server)


def test_the_authorities_of_the_system_do_not_know_ours(pki: Path) -> None:
    _, client = meet(tls.server_context(pki), target(None))
    assert isinstance(client, BlockIOError)
    assert client.errno == errno.EACCES


def test_an_expired_server(pki: Path, tmp_path: Path) -> None:
    old = write_certificates(tmp_path / "old", authority=pki, expired=True)
    _, client = meet(tls.server_context(old), target(pki))
    assert "has expired" in str(client)


def test_a_client_without_a_certificate(pki: Path, tmp_path: Path) -> None:
    bare = write_certificates(tmp_path / "bare", authority=pki, client=False)
    server, client = meet(tls.server_context(pki, verify_peer=True), target(bare))
    assert isinstance(server, BlockIOError)
    assert "showed no certificate" in str(server)
    assert isinstance(client, BlockIOError)
    assert "client-cert.pem" in str(client)


def test_a_client_that_is_refused_before_it_speaks_is_told_why(pki: Path, tmp_path: Path) -> None:
    bare = write_certificates(tmp_path / "bare", authority=pki, client=False)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with pytest.raises(BlockIOError, match="showed no certificate"):
            TlsChannel(theirs, tls.server_context(pki, verify_peer=True), server_side=True)

    thread = threading.Thread(target=serve)
    thread.start()
    context, name = tls.client_context(target(bare))
    channel = TlsChannel(ours, context, server_side=False, hostname=name)
    thread.join(30)
    # With TLS 1.3 the client was done before the server saw what is missing. All that a send meets is a broken pipe.
    with pytest.raises(BlockIOError, match=r"client-cert\.pem"):
        channel.send([b"x"])
    channel.close()


def test_a_client_of_another_authority(pki: Path, stranger: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(stranger, mixed)
    shutil.copy(pki / "ca-cert.pem", mixed)
    server, client = meet(tls.server_context(pki, verify_peer=True), target(mixed))
    assert "the client's certificate was not signed" in str(server)
    assert "does not accept our certificate" in str(client)


def test_an_expired_client(pki: Path, tmp_path: Path) -> None:
    old = write_certificates(tmp_path / "old", authority=pki, expired=True)
    server, _ = meet(tls.server_context(pki, verify_peer=True), target(old))
    assert "the client's certificate has expired" in str(server)


def test_a_servers_certificate_is_none_for_a_client(pki: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(pki, mixed)
    shutil.copy(pki / "server-cert.pem", mixed / "client-cert.pem")
    shutil.copy(pki / "server-key.pem", mixed / "client-key.pem")
    server, _ = meet(tls.server_context(pki, verify_peer=True), target(mixed))
    assert isinstance(server, BlockIOError)
    assert "the client's certificate" in str(server)


def test_a_revoked_certificate(tmp_path: Path) -> None:
    folder = write_certificates(tmp_path / "pki")
    revoke(folder, "client")
    server, _ = meet(tls.server_context(folder, verify_peer=True), target(folder))
    assert "was revoked" in str(server)
    _, client = meet(tls.server_context(folder), target(folder))
    assert isinstance(client, tuple)  # the server's own is as good as before


def test_tls_1_1_is_refused(pki: Path) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    ours, theirs = socket.socketpair()
    raised: list[Exception] = []

    def serve() -> None:
        try:
            TlsChannel(theirs, tls.server_context(pki), server_side=True)
        except BlockIOError as error:
            raised.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    with ours, pytest.raises(ssl.SSLError):
        old.wrap_socket(ours)
    thread.join(30)
    assert "TLS 1.2 is the oldest" in str(raised[0])


def test_what_is_not_tls_at_all(pki: Path) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(b"NBDMAGICIHAVEOPT" * 4)
    with pytest.raises(BlockIOError, match="TLS") as caught:
        TlsChannel(theirs, tls.server_context(pki), server_side=True)
    assert caught.value.errno == errno.EPROTO
    ours.close()


def test_contexts_are_hard(pki: Path) -> None:
    for context in (tls.server_context(pki), tls.client_context(target(pki))[0]):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        for option in (ssl.OP_NO_COMPRESSION, ssl.OP_NO_RENEGOTIATION, ssl.OP_NO_TICKET):
            assert context.options & option
        assert not context.options & ssl.OP_IGNORE_UNEXPECTED_EOF
    assert tls.server_context(pki).num_tickets == 0
    assert tls.server_context(pki).verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_a_file_that_is_missing_is_named(pki: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pki, folder)
    (folder / name).unlink()
    with pytest.raises(NotFound, match=name):
        tls.server_context(folder, verify_peer=True)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="does not exist"):
        tls.server_context(tmp_path / "none")
    with pytest.raises(OptionError, match="does not exist"):
        tls.client_context(target(tmp_path / "none"))


def test_a_client_key_without_its_certificate(pki: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pki, folder)
    (folder / "client-cert.pem").unlink()
    with pytest.raises(NotFound, match=r"client-cert\.pem"):
        tls.client_context(target(folder))


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
@pytest.mark.parametrize(
    "content", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"\xff" * 99]
)
def test_a_file_that_is_no_pem(pki: Path, tmp_path: Path, name: str, content: bytes) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pki, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(OptionError, match="OpenSSL"):
        tls.server_context(folder, verify_peer=True)


def test_a_key_of_another_certificate(pki: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pki, folder)
    shutil.copy(folder / "client-key.pem", folder / "server-key.pem")
    with pytest.raises(OptionError, match="do not belong together"):
        tls.server_context(folder)


def test_a_key_that_strangers_can_read(pki: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pki, folder)
    os.chmod(folder / "server-key.pem", 0o644)
    with pytest.raises(OptionError, match="chmod 600"):
        tls.server_context(folder)
    os.chmod(folder / "server-key.pem", 0o640)
    tls.server_context(folder)


def test_a_key_with_a_passphrase_is_not_asked_for(pki: Path, tmp_path: Path) -> None:
    import subprocess

    folder = tmp_path / "copy"
    shutil.copytree(pki, folder)
    key = folder / "server-key.pem"
    words = ["openssl", "pkey", "-in", pki / "server-key.pem", "-aes256", "-passout", "pass:x", "-out", key]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    with pytest.raises(UnsupportedFeature, match="passphrase"):
        tls.server_context(folder)


def test_one_kind_of_credentials(pki: Path) -> None:
    with pytest.raises(OptionError):
        tls.server_context()
    with pytest.raises(OptionError):
        tls.server_context(pki, psk_file=pki / "keys")


@pytest.mark.parametrize(
    ("names", "entries", "verdict"),
    [
        ([CLIENT_SUBJECT], [CLIENT_SUBJECT], True),
        ([CLIENT_SUBJECT, "dns:a.example"], ["dns:A.example"], True),
        (["ip:2001:db8::1"], ["ip:2001:DB8:0::1"], True),
        (["dns:a.example"], [], False),
        ([], ["dns:a.example"], False),
        (["dns:a.example.org"], ["dns:a.example"], False),
        (["dns:a.example"], ["dns:a.example.org"], False),
        (["dns:xa.example"], ["dns:a.example"], False),
        (["CN=client,O=Other"], ["CN=client"], False),
        (["CN=client"], ["CN=client,O=Other"], False),
        (["CN=Client"], ["CN=client"], False),
        (["email:a.example"], ["dns:a.example"], False),
        (["dns:*.example"], ["dns:a.example"], False),
        (["dns:a.example"], ["dns:*.example"], False),
        (["CN=a\\,O=b"], ["CN=a,O=b"], False),
        (["CN=a\\00"], ["CN=a"], False),
    ],
)
def test_who_is_allowed(names: list[str], entries: list[str], verdict: bool) -> None:
    assert tls.allowed(names, tls.allow_list(entries)) is verdict
    assert tls.allowed(names, None)


@pytest.mark.parametrize("entry", ["", "client", "host.example", "CN=a, O=b", "ip:1.2.3", "=x", "*"])
def test_entries_that_no_certificate_can_have(entry: str) -> None:
    with pytest.raises(OptionError):
        tls.allow_list([entry])


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        (((("countryName", "DE"),), (("commonName", "a"),)), "CN=a,C=DE"),
        (((("commonName", "a"), ("userId", "b")),), "CN=a+UID=b"),
        (((("commonName", 'a,b+c"d\\e<f>g;h'),),), 'CN=a\\,b\\+c\\"d\\\\e\\<f\\>g\\;h'),
        (((("commonName", " a "),),), "CN=\\ a\\ "),
        (((("commonName", " "),),), "CN=\\ "),
        (((("commonName", "#a"),),), "CN=\\#a"),
        (((("commonName", "a\0b"),),), "CN=a\\00b"),
        ((), None),
    ],
)
def test_subjects_as_rfc_4514_writes_them(subject: Any, text: str | None) -> None:
    assert tls.peer_names({"subject": subject, "version": 3}) == ((text,) if text else ())
    assert tls.peer_names(None) == tls.peer_names({}) == ()


def keys_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys.psk"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_files_of_keys(tmp_path: Path) -> None:
    path = keys_file(tmp_path, "# made for tests\nalice:00112233445566778899aabbccddeeff\n\nb:ob:0011223344556677\r\n")
    assert tls.read_psk_file(path) == {
        "alice": bytes.fromhex("00112233445566778899aabbccddeeff"),
        "b:ob": bytes.fromhex("0011223344556677"),
    }


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "alice:",
        ":0011223344556677",
        "alice:xy112233445566",
        "alice:00",
        "alice:" + "00" * 257,
        "alice:0011223344556677\nalice:0011223344556677",
    ],
)
def test_files_of_keys_that_are_refused_do_not_show_the_keys(tmp_path: Path, line: str) -> None:
    with pytest.raises(OptionError, match=r"line \d is not") as caught:
        tls.read_psk_file(keys_file(tmp_path, line))
    assert "0011" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_files_of_keys_that_others_can_read(tmp_path: Path, mode: int) -> None:
    with pytest.raises(OptionError, match="chmod 600"):
        tls.read_psk_file(keys_file(tmp_path, "alice:0011223344556677", mode))


def test_an_unknown_user_has_a_key_that_nobody_knows() -> None:
    choose = tls.psk_chooser({"alice": b"k" * 16})
    assert choose("alice") == b"k" * 16
    assert choose("bob") == choose("bob") != choose("carol")
    assert len(choose(None)) == 32
    assert tls.psk_chooser({})("bob") != choose("bob")


def test_a_user_without_a_key(tmp_path: Path) -> None:
    path = keys_file(tmp_path, "alice:0011223344556677")
    with pytest.raises(OptionError, match="'bob'"):
        tls.client_context(Target("h", tls="require", tls_type="psk", tls_psk_file=str(path), username="bob"))


@pytest.mark.skipif(HAS_PSK, reason="this Python has pre-shared keys")
def test_without_pre_shared_keys_in_this_python_it_says_so(tmp_path: Path) -> None:
    path = keys_file(tmp_path, "alice:00112233445566778899aabbccddeeff")
    with pytest.raises(UnsupportedFeature, match=r"Python 3\.13"):
        tls.server_context(psk_file=path)
    with pytest.raises(UnsupportedFeature, match=r"Python 3\.13"):
        tls.client_context(Target("h", tls="require", tls_type="psk", tls_psk_file=str(path), username="alice"))


@pytest.mark.skipif(not HAS_PSK, reason="pre-shared keys need Python 3.13")
def test_pre_shared_keys(tmp_path: Path) -> None:
    path = keys_file(tmp_path, "alice:00112233445566778899aabbccddeeff\nbob:ff112233445566778899aabbccddeeff")
    server = tls.server_context(psk_file=path)
    alice = Target("h", tls="require", tls_type="psk", tls_psk_file=str(path), username="alice")
    assert meet(server, alice) == ((), ())
    wrong = keys_file(tmp_path, "alice:22222222222222222222222222222222\nnobody:22222222222222222222222222222222")
    said = {str(meet(server, alice.replace(username=user, tls_psk_file=str(wrong)))[1]) for user in ("alice", "nobody")}
    assert len({text.partition(": ")[2] for text in said}) == 1
    assert "keys of both sides differ" in said.pop()


def test_keys_from_a_fifo(tmp_path: Path) -> None:
    """As a shell passes them; a certificate is opened by OpenSSL, which would wait without end."""
    fifo = tmp_path / "keys"
    os.mkfifo(fifo, 0o600)
    writing = threading.Thread(target=lambda: fifo.write_text("alice:00112233445566778899\n"))
    writing.start()
    assert tls.read_psk_file(fifo) == {"alice": bytes.fromhex("00112233445566778899")}
    writing.join(20)
    assert not writing.is_alive()
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "server-cert.pem")
    with pytest.raises(LaminaError, match="no regular file"):
        tls.server_context(folder)

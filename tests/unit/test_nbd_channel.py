"""Channels: every byte arrives once and in order, plain and encrypted; every end is told for what it is."""

from __future__ import annotations

import errno
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import BlockIOError, Closed, LaminaError, OptionError
from lamina.nbd import channel as room
from lamina.nbd import sockets, tls
from lamina.nbd.channel import Channel, PlainChannel
from lamina.nbd.tls_channel import TlsChannel
from lamina.nbd.uri import Target
from tests.certificates import CLIENT_SUBJECT, write_certificates

Pair = tuple[Channel, Channel]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificates(tmp_path_factory.mktemp("pki"))


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start `work` in a thread; what is returned waits for it, and gives its result or raises its error."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((work(), None))
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def finish() -> Any:
        thread.join(30)
        assert not thread.is_alive(), "the thread is stuck"
        value, error = result[0]
        if error is not None:
            raise error
        return value

    return finish


def client_tls(pki: Path, **fields: Any) -> tuple[ssl.SSLContext, str | None]:
    fields = {"tls_hostname": "localhost", "tls_certificates": str(pki)} | fields
    return tls.client_context(Target(socket="unused", tls="require", **fields))


def tls_pair(pki: Path, *, verify_peer: bool = False) -> tuple[TlsChannel, TlsChannel]:
    ours, theirs = socket.socketpair()
    context, name = client_tls(pki)
    server = in_thread(lambda: TlsChannel(theirs, tls.server_context(pki, verify_peer=verify_peer), server_side=True))
    return TlsChannel(ours, context, server_side=False, hostname=name), server()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


@pytest.fixture(params=["unix", "tcp", "tls", "tcp by select", "tls by select"])
def pair(request: pytest.FixtureRequest, pki: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    if request.param.endswith("by select"):  # a system whose calls of sockets have no flags and no time limits
        monkeypatch.setattr(sockets, "_COMPLETE", False)
    if request.param.startswith("tls"):
        ends: Pair = tls_pair(pki)
    else:
        ours, theirs = socket.socketpair() if request.param == "unix" else tcp_pair()
        ends = PlainChannel(ours), PlainChannel(theirs)
    yield ends
    for end in ends:
        end.close()


def receive(channel: Channel, count: int | None = None, step: int = 1 << 16) -> bytes:
    """`count` bytes, or all until the orderly end."""
    found = bytearray()
    while count is None or len(found) < count:
        view = memoryview(bytearray(step if count is None else min(step, count - len(found))))
        got = channel.recv_into(view)
        if not got:
            assert count is None, f"the stream ended after {len(found)} bytes"
            break
        found += view[:got]
    return bytes(found)


def test_messages_of_all_shapes_arrive(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    sizes = [0, 1, 16, 20, 4096, 16383, 16384, 16385, 65536, (256 << 10) - 1, 256 << 10, (256 << 10) + 1, 3 << 20]
    messages: list[list[bytes]] = [
        [chance.randbytes(chance.choice(sizes[:9])) for _ in range(chance.randrange(12))] for _ in range(30)
    ]
    messages += [[chance.randbytes(size)] for size in sizes]
    messages += [[b"head", chance.randbytes(size), b"", b"tail"] for size in sizes]
    wanted = b"".join(b"".join(message) for message in messages)
    sender, receiver = pair
    kinds: list[Callable[[bytes], Any]] = [bytes, bytearray, memoryview]

    def send_all() -> None:
        for message in messages:
            sender.send([chance.choice(kinds)(part) for part in message])
        sender.close()

    finish = in_thread(send_all)
    found = receive(receiver, step=chance.choice([1000, 1 << 16, 1 << 20]))
    finish()
    assert found == wanted


def test_more_buffers_than_one_call_takes(pair: Pair) -> None:
    sender, receiver = pair
    parts = [bytes([number % 251]) * (number % 7) for number in range(3 * room.MAX_BUFFERS + 5)]
    finish = in_thread(lambda: sender.send(parts))
    assert receive(receiver, sum(map(len, parts))) == b"".join(parts)
    finish()


class Stingy:
    """A socket's sendmsg that takes at most so many bytes and buffers, and keeps what it took."""

    def __init__(self, most: Sequence[int]) -> None:
        self.most, self.taken, self.calls = list(most), bytearray(), 0

    def __call__(self, buffers: Sequence[Any], ancillary: Any, flags: int) -> int:
        assert len(buffers) <= room.MAX_BUFFERS
        assert flags & socket.MSG_NOSIGNAL
        data = b"".join(buffers)[: self.most[self.calls % len(self.most)]]
        self.calls += 1
        self.taken += data
        return len(data)


@pytest.mark.parametrize("most", [[1], [3, 1], [7, 100], [19, 20, 21], [10**6]])
def test_partial_sends_continue_at_the_byte(most: list[int]) -> None:
    ours, theirs = socket.socketpair()
    channel = PlainChannel(ours)
    stingy = Stingy(most)
    channel._sendmsg = stingy  # type: ignore[method-assign]
    parts = [b"", b"a" * 20, b"", memoryview(b"bcdefgh" * 9), bytearray(b"x"), b"", *([b"yz"] * 1500), b""]
    channel.send(parts)
    assert bytes(stingy.taken) == b"".join(parts)
    channel.close()
    theirs.close()


def test_sends_of_many_threads_never_mix(pair: Pair) -> None:
    ours, theirs = pair
    threads, rounds = 4, 60

    def send(mark: int, channel: Channel) -> None:
        for number in range(rounds):
            body = bytes([mark]) * (1 + (number * 7919) % 40000)
            channel.send((len(body).to_bytes(4, "big"), body[:100], body[100:]))

    def check(channel: Channel) -> None:
        counts = dict.fromkeys(range(threads), 0)
        for _ in range(threads * rounds):
            body = receive(channel, int.from_bytes(receive(channel, 4), "big"))
            assert body == body[:1] * len(body)
            counts[body[0]] += 1
        assert set(counts.values()) == {rounds}

    # Both ends send from several threads while each receives in one: all the concurrency that a channel promises.
    work = [in_thread(lambda end=end, mark=mark: send(mark, end)) for end in pair for mark in range(threads)]
    work += [in_thread(lambda: check(ours)), in_thread(lambda: check(theirs))]
    for finish in work:
        finish()


def test_close_is_an_orderly_end_for_the_peer_and_can_be_repeated(pair: Pair) -> None:
    ours, theirs = pair
    ours.send([b"last"])
    ours.close()
    ours.close()
    assert receive(theirs) == b"last"
    assert theirs.recv_into(memoryview(bytearray(9))) == 0
    assert ours.fileno() == -1
    with pytest.raises(Closed):
        ours.send([b"x"])
    with pytest.raises(Closed):
        ours.recv_into(memoryview(bytearray(9)))


def test_close_wakes_the_receiver(pair: Pair) -> None:
    ours, _ = pair
    finish = in_thread(lambda: ours.recv_into(memoryview(bytearray(9))))
    time.sleep(0.05)
    ours.close()
    with pytest.raises(Closed):
        finish()


def test_close_wakes_a_sender_whose_peer_does_not_read(pair: Pair) -> None:
    ours, _ = pair
    finish = in_thread(lambda: ours.send([bytes(32 << 20)]))
    time.sleep(0.1)
    ours.close()
    with pytest.raises(Closed):
        finish()


def test_a_timeout_of_receiving_loses_nothing(pair: Pair) -> None:
    ours, theirs = pair
    ours.settimeout(0.05)
    with pytest.raises(BlockIOError) as caught:
        ours.recv_into(memoryview(bytearray(9)))
    assert caught.value.errno == errno.ETIMEDOUT
    theirs.send([b"late"])
    ours.settimeout(None)
    assert receive(ours, 4) == b"late"


def test_a_torn_send_is_the_last_one(pair: Pair) -> None:
    ours, theirs = pair
    ours.settimeout(0.05)
    with pytest.raises(BlockIOError) as caught:
        ours.send([bytes(64 << 20)])
    assert caught.value.errno == errno.ETIMEDOUT
    reader = in_thread(lambda: receive(theirs, 1 << 20))
    reader()  # there would be room again, but half a message is out
    with pytest.raises(BlockIOError) as caught:
        ours.send([b"x"])
    assert caught.value.errno == errno.EPIPE


def test_a_peer_that_is_gone(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()

    def send_until_it_fails() -> None:
        for _ in range(100):
            ours.send([bytes(100_000)])

    with pytest.raises(BlockIOError) as caught:
        send_until_it_fails()
    assert caught.value.errno in (errno.EPIPE, errno.ECONNRESET)
    assert ours.peer in str(caught.value)


def test_a_timeout_must_be_one() -> None:
    ours, theirs = socket.socketpair()
    channel = PlainChannel(ours)
    with pytest.raises(OptionError):
        channel.settimeout(0)
    channel.settimeout(1e-9)  # the shortest there is, and not "none"
    with pytest.raises(BlockIOError):
        channel.recv_into(memoryview(bytearray(1)))
    channel.close()
    theirs.close()


def test_tcp_does_not_wait_to_fill_packets_and_peers_have_names() -> None:
    ours, theirs = map(PlainChannel, tcp_pair())
    assert ours._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert ours.peer == f"127.0.0.1:{theirs._socket.getsockname()[1]}"
    ours.close()
    theirs.close()
    one, two = map(PlainChannel, socket.socketpair())
    assert "pid" in one.peer
    assert (one.secure, one.peer_names) == (False, ())
    one.close()
    two.close()


def test_names_of_both_sides(pki: Path) -> None:
    client, server = tls_pair(pki, verify_peer=True)
    assert server.peer_names[0] == CLIENT_SUBJECT
    assert client.peer_names[0] == "CN=server,O=Lamina tests,C=DE"
    assert "dns:localhost" in client.peer_names
    assert client.version == server.version == "TLSv1.3"
    assert client.secure
    client.close()
    server.close()


def test_a_client_that_was_not_verified_has_no_names(pki: Path) -> None:
    client, server = tls_pair(pki)
    assert server.peer_names == ()
    client.close()
    server.close()


def test_a_cut_stream_is_an_error_not_an_end(pki: Path) -> None:
    client, server = tls_pair(pki)
    server.send([b"whole"])
    server._plain.close()  # the socket ends without TLS's farewell, as if somebody between had cut it
    assert receive(client, 5) == b"whole"
    for _ in range(2):
        with pytest.raises(BlockIOError) as caught:
            client.recv_into(memoryview(bytearray(9)))
        assert caught.value.errno == errno.ECONNRESET
    client.close()


def test_a_server_that_leaves_after_the_handshake_may_have_refused_the_client(pki: Path) -> None:
    client, server = tls_pair(pki)
    server._plain.close()
    with pytest.raises(BlockIOError, match="another client certificate"):
        client.recv_into(memoryview(bytearray(9)))
    with pytest.raises(BlockIOError, match="another client certificate"):
        client.send([b"x"])
    client.close()


class Relay:
    """Passes on what goes between two socket pairs, at most `step` bytes at a time, changing it on the way."""

    def __init__(self, step: int, change: Callable[[bytes, int], bytes] = lambda data, at: data) -> None:
        self.client, near = socket.socketpair()
        self.server, far = socket.socketpair()
        self.ends = near, far
        self.up = in_thread(lambda: self._pass(near, far, step, lambda data, at: data))
        self.down = in_thread(lambda: self._pass(far, near, step, change))

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket, step: int, change: Callable[[bytes, int], bytes]) -> None:
        at = 0
        try:
            while data := source.recv(step):
                sink.sendall(change(data, at))
                at += len(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()  # an end went away: the test is about what the other one says

    def close(self) -> None:
        self.up()
        self.down()
        for end in self.ends:
            end.close()


def relayed(pki: Path, relay: Relay) -> tuple[TlsChannel, TlsChannel]:
    context, name = client_tls(pki)
    server = in_thread(lambda: TlsChannel(relay.server, tls.server_context(pki), server_side=True))
    return TlsChannel(relay.client, context, server_side=False, hostname=name), server()


def test_records_split_at_every_byte(pki: Path) -> None:
    relay = Relay(1)
    client, server = relayed(pki, relay)
    data = random.Random(1).randbytes(3000)
    server.send([data[:1000], data[1000:]])
    assert receive(client, 3000) == data
    client.send([data])
    assert receive(server, 3000) == data
    client.close()
    server.close()
    relay.close()


def test_a_changed_byte_is_an_error(pki: Path) -> None:
    changing = threading.Event()
    relay = Relay(1 << 16, lambda data, at: data[:-1] + bytes([data[-1] ^ 1]) if changing.is_set() else data)
    client, server = relayed(pki, relay)
    changing.set()
    server.send([b"secret"])
    for end in (client, server):  # the server learns it from the client's alert
        with pytest.raises(BlockIOError) as caught:
            end.recv_into(memoryview(bytearray(9)))
        assert caught.value.errno in (errno.EPROTO, errno.EACCES)
    client.close()
    server.close()
    relay.close()


@pytest.mark.parametrize("server_side", [True, False])
def test_bytes_from_before_tls_are_refused(pki: Path, server_side: bool) -> None:
    ours, theirs = socket.socketpair()
    context = tls.server_context(pki) if server_side else client_tls(pki)[0]
    with pytest.raises(BlockIOError, match="5 bytes came before TLS"):
        TlsChannel(PlainChannel(ours), context, server_side=server_side, hostname="localhost", buffered=b"hello")
    assert theirs.recv(100) == b""
    theirs.close()


@pytest.mark.parametrize("server_side", [True, False])
def test_a_handshake_has_a_deadline_whatever_trickles_in(pki: Path, server_side: bool) -> None:
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def trickle() -> None:
        # The start of a record of the right kind, one byte at a time: never wrong, never done.
        for byte in (b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc" if server_side else b"\x16\x03\x03\x40\x00") + bytes(1000):
            if stop.wait(0.02):
                return
            theirs.sendall(bytes([byte]))

    finish = in_thread(trickle)
    context = tls.server_context(pki) if server_side else client_tls(pki)[0]
    started = time.monotonic()
    with pytest.raises(BlockIOError, match="no TLS handshake within") as caught:
        TlsChannel(ours, context, server_side=server_side, hostname=None if server_side else "localhost", timeout=0.3)
    assert caught.value.errno == errno.ETIMEDOUT
    assert 0.2 < time.monotonic() - started < 15
    stop.set()
    finish()
    theirs.close()


def test_a_peer_that_leaves_during_the_handshake(pki: Path) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(LaminaError):
        TlsChannel(ours, tls.server_context(pki), server_side=True)


def test_the_plain_channel_closes_the_handshake_over_it(pki: Path) -> None:
    ours, theirs = socket.socketpair()
    plain = PlainChannel(ours)
    finish = in_thread(lambda: TlsChannel(plain, tls.server_context(pki), server_side=True))
    time.sleep(0.05)
    plain.close()
    with pytest.raises(Closed):
        finish()
    theirs.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("server_side", [True, False])
def test_the_peer_is_pythons_own_socket(pki: Path, version: ssl.TLSVersion, server_side: bool) -> None:
    ours, theirs = socket.socketpair()
    data = random.Random(2).randbytes(1 << 20)

    def peer() -> bytes:
        kind = ssl.PROTOCOL_TLS_CLIENT if server_side else ssl.PROTOCOL_TLS_SERVER
        context = ssl.SSLContext(kind)
        context.minimum_version = context.maximum_version = version
        if server_side:
            context.load_verify_locations(pki / "ca-cert.pem")
        else:
            context.load_cert_chain(pki / "server-cert.pem", pki / "server-key.pem")
        name = "localhost" if server_side else None
        with context.wrap_socket(
            theirs, server_side=not server_side, server_hostname=name, suppress_ragged_eofs=False
        ) as wrapped:
            found = bytearray()
            while len(found) < len(data):
                found += wrapped.recv(1 << 16)
            wrapped.sendall(found)
            assert wrapped.recv(1) == b""  # our farewell, not a cut
            return bytes(found)

    finish = in_thread(peer)
    context, name = (tls.server_context(pki), None) if server_side else client_tls(pki)
    channel = TlsChannel(ours, context, server_side=server_side, hostname=name)
    assert channel.version == {ssl.TLSVersion.TLSv1_2: "TLSv1.2", ssl.TLSVersion.TLSv1_3: "TLSv1.3"}[version]
    channel.send([data[:20], data[20:300_000], data[300_000:300_005], data[300_005:]])
    assert receive(channel, len(data)) == data
    channel.close()
    assert finish() == data

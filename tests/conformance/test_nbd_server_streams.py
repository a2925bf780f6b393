"""Conversations with the NBD server of more than one request, and with storage that fails or is slow, rule by rule.

`nbd_rules` says what the numbers of the rules mean; where another server does not follow one, the test says which.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.limits import KIB, MIB
from lamina.nbd import Export, Server
from lamina.nbd import wire as w
from lamina.nbd.wire import CMD_FLUSH as FLUSH
from lamina.nbd.wire import CMD_READ as READ
from lamina.nbd.wire import CMD_WRITE as WRITE
from lamina.nbd.wire import CMD_WRITE_ZEROES as ZERO

from ..nbd_disks import CONTENT, MODES, SIZE, Disks, serve_disks
from ..nbd_raw import Gone, Raw, Reply, SocketStream, dial

PAYLOAD_LEN, FAST_ZERO, STATUS = w.CMD_FLAG_PAYLOAD_LEN, w.CMD_FLAG_FAST_ZERO, w.CMD_BLOCK_STATUS


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    with serve_disks(tmp_path_factory.mktemp("nbd")) as disks:
        yield disks


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def raw(disks: Disks, mode: str) -> Iterator[Raw]:
    disks.reset()
    with dial(disks.path) as raw:
        yield raw.begin("disk", mode)


def _pipeline(raw: Raw, count: int) -> bytes:
    return b"".join(raw.request(READ, 4096 * number, 4096, send=False) for number in range(count))


def test_disc_answers_all_that_is_outstanding(raw: Raw) -> None:
    """1d, 2.5: MUST. QEMU answers 9 of 20, and cuts the last in the middle."""
    raw.stream.send(_pipeline(raw, 20))
    raw.disc()
    assert [reply.data for reply in raw.collect()].count(CONTENT[:4096]) == 1
    assert raw.ended()


def test_disc_ends_it_whatever_it_carries(raw: Raw) -> None:
    """2.5 DISC has no reply, and offset, length and flags do not matter."""
    raw.request(w.CMD_DISC, 123, 456 if not raw.extended else 0, flags=0xFFDF)
    assert raw.ended()


def test_nothing_after_disc_is_looked_at(raw: Raw, disks: Disks) -> None:
    """2.5."""
    message = raw.request(w.CMD_DISC, send=False) + raw.write_bytes(0, b"late" * 128)
    raw.stream.send(message)
    assert raw.ended()
    assert disks.content("disk") == CONTENT


@pytest.mark.parametrize("size", [512, 2 * MIB, 32 * MIB])
@pytest.mark.parametrize("export", ["disk", "fixed"])
def test_disc_with_a_payload_writes_nothing(disks: Disks, export: str, size: int) -> None:
    """2.6: a payload where none is meant; whatever becomes of the connection, DISC changes no disk."""
    disks.reset()
    with dial(disks.path) as raw:
        raw.begin(export, "extended")
        said = b""
        assert isinstance(raw.stream, SocketStream)
        with contextlib.suppress(Gone):  # it hung up before all of the payload was sent
            raw.stream.send(raw.request(w.CMD_DISC, 0, size, flags=PAYLOAD_LEN, payload=b"!" * size, send=False))
            raw.stream.finish()
            said = raw.stream.rest()
    assert disks.content("disk") == CONTENT
    assert not said, "DISC has no reply"


@pytest.mark.parametrize("cookie", [0, 1, 1 << 63, (1 << 64) - 1])
def test_any_cookie_comes_back(raw: Raw, cookie: int) -> None:
    """2.3, invariant 44."""
    for _ in range(2):
        assert raw.ask(READ, 0, 512, cookie=cookie).data == CONTENT[:512]
        assert raw.ask(FLUSH, cookie=cookie).error == 0


def test_many_requests_at_once(raw: Raw) -> None:
    """1c, invariant 44: each is answered exactly once. (QEMU and nbdkit take 16 at a time.)"""
    raw.stream.send(_pipeline(raw, 256))
    first = min(raw.asked)
    replies = {reply.cookie - first: reply.data for reply in raw.collect()}
    assert replies == {number: CONTENT[4096 * number :][:4096] for number in range(256)}


@pytest.mark.parametrize(
    "magic", [0, w.REQUEST_MAGIC + 1, w.SIMPLE_REPLY_MAGIC, w.STRUCTURED_REPLY_MAGIC, w.EXTENDED_REPLY_MAGIC]
)
def test_bad_magic_ends_the_connection(raw: Raw, magic: int) -> None:
    """2.2: a violation, after which the stream cannot be trusted. (QEMU answers EINVAL, then closes.)"""
    raw.stream.send(magic.to_bytes(4) + bytes(28))
    assert raw.ended()


def test_the_other_header_is_bad_magic(raw: Raw) -> None:
    """2.6: after ACK every message uses 32-byte headers, and without it none does."""
    raw.extended = not raw.extended
    message = raw.request(READ, 0, 512, send=False)
    raw.stream.send(message.ljust(w.EXTENDED_REQUEST.size, b"\0"))
    assert raw.ended()


def test_a_good_request_before_a_bad_one_is_answered(raw: Raw) -> None:
    message = raw.request(READ, 0, 512, send=False)
    raw.stream.send(message + bytes(32))
    assert raw.collect()[0].data == CONTENT[:512]
    assert raw.ended()


@pytest.mark.parametrize("length", [32 * MIB + 1, 0xFFFFFFFF, 1 << 32, (1 << 64) - 1])
def test_a_payload_above_the_maximum_ends_the_connection(disks: Disks, length: int) -> None:
    """2.6: payload over the maximum: hard disconnect, before any of it is there."""
    for type in (WRITE, READ, STATUS, 99):
        with dial(disks.path) as raw:
            raw.begin("big", "extended")
            raw.request(type, 0, length, flags=PAYLOAD_LEN)
            assert raw.ended()


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_long_write_is_drained(disks: Disks, mode: str) -> None:
    """1c, 2.2: above the maximum payload: EINVAL; the stream stays in step. (QEMU disconnects.)"""
    with dial(disks.path) as raw:
        raw.begin("big", mode)
        reply = raw.write(0, bytes(32 * MIB + 1))
        assert reply.error == w.EINVAL
        assert raw.read(0, 512) == bytes(512)


def test_a_flush_covers_other_connections(disks: Disks, mode: str) -> None:
    """1b CAN_MULTI_CONN, 2.4, invariant 46: what one connection wrote and flushed, all see, and sooner."""
    disks.reset()
    with dial(disks.path) as one, dial(disks.path) as two:
        one.begin("disk", mode)
        two.begin("disk", "simple")
        assert one.flags & two.flags & w.FLAG_CAN_MULTI_CONN
        for number in range(16):
            assert not one.write(4096 * number, bytes([number + 1]) * 4096).error
            assert two.read(4096 * number, 4096) == bytes([number + 1]) * 4096
            assert not two.ask(FLUSH).error


def test_a_request_in_pieces(raw: Raw) -> None:
    """A stream has no messages: each byte may come alone."""
    message = raw.write_bytes(100, b"piece") + raw.request(READ, 98, 9, send=False)
    for byte in message:
        raw.stream.send(bytes([byte]))
    replies = raw.collect()
    assert replies[-1].data == CONTENT[98:100] + b"piece" + CONTENT[105:107]


# -- errors of the storage below


def _failing(errno: int, iotype: str, **more: Any) -> dict[str, Any]:
    rule = {"event": "none", "iotype": iotype, "errno": errno, **more}
    return {"driver": "blkdebug", "inject-error": [rule], "image": {"driver": "memory", "size": SIZE}}


@pytest.mark.parametrize(
    ("errno", "wire_error"),
    [(1, 1), (5, 5), (12, 5), (22, 22), (27, 28), (28, 28), (30, 1), (75, 5), (95, 5), (108, 108), (122, 28), (71, 5)],
)
@pytest.mark.parametrize("operation", ["read", "write", "flush"])
def test_errors_of_the_storage(tmp_path: Path, mode: str, operation: str, errno: int, wire_error: int) -> None:
    """2.2: only the errors of the protocol; EDQUOT and EFBIG are ENOSPC, EROFS is EPERM, ENOMEM SHOULD NOT be sent, ENOTSUP
    is for FAST_ZERO alone and EOVERFLOW for what is too long. A simple reply with an error has no payload (2.3)."""
    with lamina.open(_failing(errno, operation), read_only=False) as image:
        path = tmp_path / "socket"
        with Server([Export(image, "", writable=True)], unix=str(path)), dial(path) as raw:
            raw.begin("", mode)
            image.write(0, b"x" * SIZE) if operation == "read" else None
            actions: dict[str, Callable[[], Reply]] = {
                "read": lambda: raw.ask(READ, 0, 128 * KIB),
                "write": lambda: raw.write(0, b"w" * 512),
                "flush": lambda: raw.ask(FLUSH),
            }
            assert actions[operation]().error == wire_error
            assert raw.ask(w.CMD_RESIZE).error == w.EINVAL


def test_a_read_that_fails_says_where(tmp_path: Path, mode: str) -> None:
    """2.3: ERROR_OFFSET for a read that fails in its middle; simple replies carry the error instead of any data."""
    options = _failing(5, "read", sector=1536)
    with lamina.open(options, read_only=False) as image:
        image.write(0, b"x" * SIZE)
        path = tmp_path / "socket"
        with Server([Export(image, "", writable=True)], unix=str(path)), dial(path) as raw:
            raw.begin("", mode)
            for length in (SIZE, 4096):
                reply = raw.ask(READ, SIZE - SIZE // 4 if length == 4096 else 0, length)
                assert reply.error == w.EIO
                assert mode == "simple" or reply.text
                assert reply.at is None or reply.at <= 1536 * 512
            assert raw.read(0, 4096) == b"x" * 4096


def test_fast_zero_where_it_is_not_fast(tmp_path: Path, mode: str) -> None:
    """2.4: ENOTSUP, with nothing touched; without the flag it is done, and never ENOTSUP."""
    options = {"driver": "nozero", "image": {"driver": "memory", "size": SIZE}}
    with lamina.open(options, read_only=False) as image:
        image.write(0, b"x" * 4096)
        path = tmp_path / "socket"
        with Server([Export(image, "", writable=True)], unix=str(path)), dial(path) as raw:
            raw.begin("", mode)
            assert raw.ask(ZERO, 0, 4096, flags=FAST_ZERO).error == w.ENOTSUP
            assert raw.read(0, 4096) == b"x" * 4096
            assert raw.ask(ZERO, 0, 4096).error == 0
            assert raw.read(0, 4096) == bytes(4096)


@pytest.mark.parametrize("delay", [0, 3])
def test_replies_stay_whole(tmp_path: Path, mode: str, delay: int) -> None:
    """2.3, invariant 44: requests that are executed side by side are answered side by side, never inside one another."""
    options = {"driver": "delay", "read-ms": delay, "image": {"driver": "memory", "size": 16 * MIB}}
    with lamina.open(options, read_only=False) as image:
        content = random.Random(5).randbytes(16 * MIB)
        image.write(0, content)
        path = tmp_path / "socket"
        with Server([Export(image, "", writable=True)], unix=str(path)), dial(path) as raw:
            raw.begin("", mode)
            for _ in range(4):
                wanted = {}
                message = b""
                for number in range(16):
                    length = 3 * MIB + 5 if number % 3 == 0 else 4096
                    message += raw.request(READ, number * 513 * KIB, length, send=False)
                    wanted[raw._cookie] = content[number * 513 * KIB :][:length]
                raw.stream.send(message)
                for reply in raw.collect():
                    assert reply.data == wanted.pop(reply.cookie)
                assert not wanted


def test_a_server_that_ends_answers_what_it_received(tmp_path: Path, mode: str) -> None:
    """1d, 2.5: drain; ESHUTDOWN for what came later, if there is an answer at all. (QEMU drops its clients at once.)"""
    options = {"driver": "delay", "read-ms": 50, "image": {"driver": "memory", "size": SIZE}}
    with lamina.open(options, read_only=False) as image:
        path = tmp_path / "socket"
        server = Server([Export(image, "", writable=True)], unix=str(path)).start()
        with dial(path) as raw:
            raw.begin("", mode)
            raw.read(0, 512)  # from here on it is known that the storage is slow
            raw.stream.send(_pipeline(raw, 12))
            (first,) = raw.collect(1)
            assert not first.error
            server.close()
            for reply in raw.collect():
                assert reply.error in (0, w.ESHUTDOWN)
            assert raw.ended()
        assert not path.exists()

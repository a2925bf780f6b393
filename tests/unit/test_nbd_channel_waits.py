"""When a channel waits for its peer, how, and when it does not."""

from __future__ import annotations

import errno
import random
import socket
import time
from collections.abc import Iterator

import pytest

from lamina.errors import BlockIOError, Closed
from lamina.nbd import channel as room
from lamina.nbd import sockets
from lamina.nbd.channel import PlainChannel


@pytest.fixture(params=["complete", "by select"])
def pair(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[PlainChannel, socket.socket]]:
    if request.param == "by select":
        monkeypatch.setattr(sockets, "_COMPLETE", False)
    ours, theirs = socket.socketpair()
    channel = PlainChannel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def test_what_is_there_is_received_without_waiting(pair: tuple[PlainChannel, socket.socket]) -> None:
    channel, theirs = pair
    view = memoryview(bytearray(100))
    assert channel.receive_now(view) is None
    theirs.send(b"something")
    assert channel.receive_now(view) == 9
    assert view[:9] == b"something"
    assert channel.receive_now(view) is None
    theirs.close()
    assert channel.receive_now(view) == 0
    channel.close()
    with pytest.raises(Closed):
        channel.receive_now(view)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_not_taken_now_is_sent_later(pair: tuple[PlainChannel, socket.socket], seed: int) -> None:
    """Every byte arrives once, in order, wherever the socket was full."""
    channel, theirs = pair
    chance = random.Random(seed)
    sent, received = bytearray(), bytearray()
    theirs.setblocking(False)
    stopped = 0
    for _ in range(200):
        buffers: list[room.Buffer] = [chance.randbytes(chance.choice([0, 1, 16, 5000, 70_000])) for _ in range(20)]
        sent += b"".join(buffers)
        while buffers := list(channel.send_now(buffers)):
            stopped += 1
            received += theirs.recv(chance.randrange(1, 1_000_000))
    channel.close()
    while part := theirs.recv(1 << 20):
        received += part
    assert stopped
    assert received == sent


def test_nothing_is_sent_now_once_the_peer_is_gone(pair: tuple[PlainChannel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.close()
    for _ in range(2):
        with pytest.raises(BlockIOError) as caught:
            channel.send_now([b"x"])
        assert caught.value.errno in (errno.EPIPE, errno.ECONNRESET)


def test_a_receiver_that_asks_again_in_vain_does_so_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not sleeping is worth its price only where answers come soon: who sends rarely must not cost a processor."""
    monkeypatch.setattr(room, "_CPUS", 2)
    ours, theirs = socket.socketpair()
    channel = PlainChannel(ours)
    soon, asked, slept = False, 0, 0

    def receive(view: memoryview, count: int = 0, flags: int = 0) -> int:
        nonlocal asked, slept
        if flags & socket.MSG_DONTWAIT:
            asked += 1
            if not soon:
                time.sleep(2 * room._EAGER)
                raise BlockingIOError
        else:
            slept += 1
        return 1

    channel._recv_into = receive  # type: ignore[assignment]
    view = memoryview(bytearray(1))
    for _ in range(5000):
        assert channel.recv_into(view) == 1
    assert slept == 5000
    assert asked <= 15
    soon = True
    for _ in range(room._MOST_SKIPPED + 1):
        channel.recv_into(view)
    asked = slept = 0
    for _ in range(100):
        channel.recv_into(view)
    assert (asked, slept) == (100, 0)  # it pays again
    monkeypatch.setattr(room, "_CPUS", 1)  # nobody could send meanwhile
    channel.recv_into(view)
    assert (asked, slept) == (100, 1)
    for end in ours, theirs:
        end.close()

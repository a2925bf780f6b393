"""A server is killed, or its client cut off, in the middle of writing: what was flushed is there, and nothing else is new.

SIGKILL takes what the process holds back, and leaves what the system has: what is tested is that a reply to FLUSH, or to a
write with FUA, came late enough, and that an image is whole at any moment. Lost power is for `test_qcow2_power_loss`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.limits import KIB, MIB
from lamina.nbd import Export, Server
from lamina.nbd import wire as w
from lamina.testing.image_checks import check_whole
from tests import evidence

from ..nbd_load import nothing_left, served
from ..nbd_raw import CLIENT_FLAGS, Gone, Raw, dial, info, meta, option_bytes

SECTOR = 512
SIZE = 8 * MIB
#: How often the server is killed.
KILLS = int(os.environ.get("LAMINA_NBD_KILLS", "40"))
#: Kills of one image, each going on where the last one ended.
ROUNDS = 4
_ANSWERED_AT_ONCE = 12


class Change:
    """What one request makes of a sector: one of `values`. `done`: when it was answered, None before that."""

    def __init__(self, values: frozenset[int], done: int | None = None) -> None:
        self.values = values
        self.done = done


class Model:
    """What a disk may hold, sector by sector, if its server is gone at this moment. A sector holds the number of the write
    that filled it, 0 for zeros. No two requests for the same sector are under way at a time."""

    def __init__(self, count: int) -> None:
        self.sectors = [[Change(frozenset([0]), 0)] for _ in range(count)]
        self.now = 0

    def sent(self, sectors: range, number: int | None) -> list[Change]:
        """A write of `number` sets out, or with None a TRIM, after which the sectors may also be what they were."""
        self.now += 1
        changes = []
        for sector in sectors:
            history = self.sectors[sector]
            changes.append(Change(history[-1].values | {0} if number is None else frozenset([number])))
            history.append(changes[-1])
        return changes

    def answered(self, sectors: range, changes: list[Change], *, durable: bool) -> None:
        self.now += 1
        for sector, change in zip(sectors, changes, strict=True):
            change.done = self.now
            if durable:
                self._forget(sector, self.now + 1)

    def flushed(self, since: int) -> None:
        """A FLUSH that was sent at `since` was answered: what was done before it lasts."""
        for sector, history in enumerate(self.sectors):
            if len(history) > 1:
                self._forget(sector, since)

    def _forget(self, sector: int, since: int) -> None:
        history = self.sectors[sector]
        lasting = [at for at, change in enumerate(history) if change.done is not None and change.done < since]
        if lasting:
            del history[: lasting[-1]]

    def may_be(self, sector: int) -> frozenset[int]:
        return frozenset().union(*(change.values for change in self.sectors[sector]))

    def holds(self, content: bytes) -> None:
        """Hold what is there against what may be, and go on from that."""
        for sector, history in enumerate(self.sectors):
            data = content[sector * SECTOR : (sector + 1) * SECTOR]
            value = int.from_bytes(data[:8])
            assert data == filled(value), f"sector {sector} is torn, or holds what nobody wrote: {data[:24]!r}"
            assert value in self.may_be(sector), (
                f"sector {sector} holds write {value}, and may hold {sorted(self.may_be(sector))}"
            )
            history[:] = [Change(frozenset([value]), 0)]
        self.now = 0


def filled(number: int) -> bytes:
    return number.to_bytes(8) * (SECTOR // 8)


class Writer:
    """A client that keeps some requests under way, and the model up to date."""

    def __init__(self, raw: Raw, model: Model, rng: random.Random, first: int) -> None:
        self.raw, self.model, self.rng, self.number = raw, model, rng, first
        self.under_way: dict[int, tuple[range, list[Change], bool]] = {}
        self.flushes: dict[int, int] = {}
        self.answers = self.flushed = 0

    def work(self, answers: int) -> None:
        """Until so many requests were answered; then some more are under way."""
        while self.answers < answers:
            self.send_some()
            for reply in self.raw.collect(1 + self.rng.randrange(_ANSWERED_AT_ONCE // 2)):
                assert not reply.error
                self.take(reply.cookie)
        self.send_some()

    def send_some(self) -> None:
        messages = []
        while len(self.raw.asked) < _ANSWERED_AT_ONCE:
            messages.append(self.request())
        self.raw.stream.send(b"".join(messages))

    def request(self) -> bytes:
        rng = self.rng
        if rng.randrange(10) == 0:
            self.model.now += 1
            message = self.raw.request(w.CMD_FLUSH, send=False)
            self.flushes[next(reversed(self.raw.asked))] = self.model.now
            return message
        sectors = self.free_sectors()
        offset, length = sectors.start * SECTOR, len(sectors) * SECTOR
        kind = rng.choices(("write", "zero", "trim"), (8, 2, 1))[0]
        fua = rng.randrange(8) == 0
        flags = w.CMD_FLAG_FUA if fua else 0
        if kind == "write":
            self.number += 1
            changes = self.model.sent(sectors, self.number)
            message = self.raw.write_bytes(offset, filled(self.number) * len(sectors), flags=flags)
        elif kind == "zero":
            changes = self.model.sent(sectors, 0)
            flags |= rng.choice((0, w.CMD_FLAG_NO_HOLE))
            message = self.raw.request(w.CMD_WRITE_ZEROES, offset, length, flags=flags, send=False)
        else:
            changes = self.model.sent(sectors, None)
            message = self.raw.request(w.CMD_TRIM, offset, length, flags=flags, send=False)
        self.under_way[next(reversed(self.raw.asked))] = (sectors, changes, fua)
        return message

    def free_sectors(self) -> range:
        """A stretch that no request under way touches."""
        while True:
            length = self.rng.choice((1, 1, 3, 8, 64, 130, 300))
            start = self.rng.randrange(SIZE // SECTOR - length)
            if all(start >= other.stop or start + length <= other.start for other, _, _ in self.under_way.values()):
                return range(start, start + length)

    def take(self, cookie: int) -> None:
        self.answers += 1
        if cookie in self.flushes:
            self.flushed += 1
            self.model.flushed(self.flushes.pop(cookie))
        else:
            sectors, changes, fua = self.under_way.pop(cookie)
            self.model.answered(sectors, changes, durable=fua)


GEOMETRIES: list[dict[str, Any]] = [
    {"cluster_size": 65536},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 4096, "refcount_bits": 1},
]


@pytest.mark.parametrize("number", range(-(-KILLS // ROUNDS)))
def test_what_was_flushed_survives_a_kill(tmp_path: Path, seed: int, number: int) -> None:
    rng = random.Random(seed * 1000 + number)
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, **GEOMETRIES[number % len(GEOMETRIES)])
    model = Model(SIZE // SECTOR)
    numbers = 0
    for _ in range(ROUNDS):
        with served(tmp_path / "socket", "qcow2", str(path)) as process, dial(process.socket) as raw:
            raw.begin("", rng.choice(("simple", "structured", "extended")))
            writer = Writer(raw, model, rng, numbers)
            writer.work(rng.randrange(20, 250))
            time.sleep(rng.choice((0, 0, rng.random() / 100)))
            process.kill()
            numbers = writer.number
            assert writer.answers
        with lamina.open(path, format="qcow2") as image:
            check_whole(image)
            model.holds(image.read(0, SIZE))
        evidence.count("servers killed while they wrote")


def half_done() -> Model:
    """Four sectors: write 1 of the first two was answered and flushed, write 2 of the second and third is under way."""
    model = Model(4)
    one, two = range(2), range(1, 3)
    model.answered(one, model.sent(one, 1), durable=False)
    model.now += 1
    since = model.now
    model.sent(two, 2)
    assert [model.may_be(sector) for sector in range(4)] == [{0, 1}, {0, 1, 2}, {0, 2}, {0}]
    model.flushed(since)
    assert [model.may_be(sector) for sector in range(4)] == [{1}, {1, 2}, {0, 2}, {0}]
    return model


@pytest.mark.parametrize("wrong", [[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 2, 2, 9]])
def test_a_lost_write_is_found(wrong: list[int]) -> None:
    """The model can fail: for a flushed write that is not there, and for bytes that nobody wrote."""
    with pytest.raises(AssertionError, match="and may hold"):
        half_done().holds(b"".join(map(filled, wrong)))


def test_a_torn_sector_is_found() -> None:
    with pytest.raises(AssertionError, match="torn"):
        half_done().holds(filled(1)[:-1] + b"x" + filled(1) + filled(0) * 2)
    half_done().holds(b"".join(map(filled, (1, 2, 0, 0))))


# -- a client that is cut off


OLD, NEW = b"o", b"n"
DISK = 2 * MIB


class Conversation:
    """What a client sends, from the greeting to the farewell, and where each write's payload lies in it."""

    def __init__(self, mode: str) -> None:
        self.bytes = b""
        self.writes: list[tuple[int, int, int]] = []  # (where its last byte is, offset, length)
        raw = Raw(self)  # its requests come here
        self._negotiate(raw, mode)
        for offset, length, flags in ((0, 512, 0), (4096, 700, w.CMD_FLAG_FUA), (8193, 1, 0), (65000, 2000, 0)):
            self._write(raw, offset, NEW * length, flags)
            raw.request(w.CMD_READ, offset, length)
        raw.request(w.CMD_FLUSH)
        if mode != "simple":
            raw.request(w.CMD_BLOCK_STATUS, 0, DISK)
        #: Up to here every byte is a place to cut at; what follows is a write that comes in parts.
        self.every = len(self.bytes)
        self._write(raw, 256 * KIB, NEW * (3 * MIB // 2), 0)
        raw.request(w.CMD_DISC)

    def _negotiate(self, raw: Raw, mode: str) -> None:
        self.bytes += w.CLIENT_FLAGS.pack(flags=CLIENT_FLAGS)
        if mode != "simple":
            self.bytes += option_bytes(w.OPT_EXTENDED_HEADERS if mode == "extended" else w.OPT_STRUCTURED_REPLY)
            self.bytes += option_bytes(w.OPT_SET_META_CONTEXT, meta("", w.BASE_ALLOCATION))
        self.bytes += option_bytes(w.OPT_LIST) + option_bytes(w.OPT_GO, info("", w.INFO_BLOCK_SIZE))
        raw.structured, raw.extended = mode != "simple", mode == "extended"

    def _write(self, raw: Raw, offset: int, payload: bytes, flags: int) -> None:
        self.send(raw.write_bytes(offset, payload, flags=flags))
        self.writes.append((len(self.bytes), offset, len(payload)))

    def send(self, data: bytes) -> None:
        self.bytes += data

    def recv(self, length: int) -> bytes:
        raise Gone

    def close(self) -> None:
        pass

    def expected(self, cut: int, content: bytes) -> None:
        """Each write is old or new in all its bytes, but for the one that is cut, which is old or new in each; and a write
        that was not even begun is old."""
        position = 0
        for end, offset, length in sorted(self.writes, key=lambda write: write[1]):
            assert content[position:offset] == OLD * (offset - position), (
                f"cut at {cut}: bytes beside the writes changed"
            )
            data = content[offset : offset + length]
            position = offset + length
            if cut >= end:
                assert data in (OLD * length, NEW * length), f"cut at {cut}: a part of the write at {offset} is missing"
            elif cut <= end - length:
                assert data == OLD * length, f"cut at {cut}: the write at {offset} was done before it came"
            else:
                new = len(data) - len(data.lstrip(NEW))
                assert data[new:] == OLD * (length - new), f"cut at {cut}: neither old nor new"
                assert new <= cut - (end - length), f"cut at {cut}: more was written than came"
        assert content[position:] == OLD * (len(content) - position)


@pytest.fixture
def served_disk(tmp_path: Path) -> Iterator[tuple[Server, lamina.Image]]:
    with (
        nothing_left(),
        lamina.open({"driver": "memory", "size": DISK}, read_only=False) as image,
        Server([Export(image, writable=True)], unix=str(tmp_path / "socket")) as server,
    ):
        yield server, image


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
@pytest.mark.parametrize("reading", [False, True], ids=["unread", "read"])
def test_cut_at_every_byte(
    served_disk: tuple[Server, lamina.Image], tmp_path: Path, seed: int, mode: str, reading: bool
) -> None:
    """The client is gone after each number of bytes that it sends; with the replies unread, or read."""
    server, image = served_disk
    talk = Conversation(mode)
    rng = random.Random(seed)
    long = range(talk.every, len(talk.bytes) + 1)
    cuts = [*range(talk.every), *rng.sample(long, 20), long[-2], long[-1]]
    image.write(0, OLD * DISK)
    for number, cut in enumerate(cuts):
        with dial(tmp_path / "socket") as raw:
            sock = raw.stream.sock  # type: ignore[attr-defined]
            sock.sendall(talk.bytes[:cut])
            if reading:
                sock.shutdown(1)
                with suppress(ConnectionResetError):
                    while sock.recv(1 << 20):
                        pass
        settled(server)
        content = image.read(0, DISK if cut > talk.every else 128 * KIB)
        talk.expected(cut, content.ljust(DISK, OLD))
        if reading:
            ended = [(end, offset, length) for end, offset, length in talk.writes if end <= cut]
            for _, offset, length in ended:
                assert content[offset : offset + length] == NEW * length, f"cut at {cut}: a whole write was not done"
        image.write(0, OLD * (DISK if cut > talk.every else 128 * KIB))
        if number % 25 == 0:
            with dial(tmp_path / "socket") as good:
                good.begin("", mode)
                assert good.read(0, 4096) == OLD * 4096
                good.disc()
                assert good.ended()
            settled(server)


def settled(server: Server) -> None:
    """Wait until the server has no client any more."""
    deadline = time.monotonic() + 20
    while server._connections:
        assert time.monotonic() < deadline, "the server does not notice that its client is gone"
        time.sleep(0.0002)

"""Nonsense for a running NBD server: conversations from a grammar, with lies in them, mutated; in the clear and under TLS.

After each batch the server serves a good client, has no thread or descriptor left of the others, logged no error of its
own, and changed no byte that it may not change. `LAMINA_SEED` repeats a run; `LAMINA_NBD_FUZZ=1000000` is the soak: so many
messages.
"""

from __future__ import annotations

import logging
import os
import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import lamina
from lamina.bitmap import MemoryBitmap
from lamina.limits import MIB
from lamina.nbd import Export, RestrictedExport, Server
from lamina.nbd import wire as w
from lamina.nbd.tls import client_context, server_context
from lamina.nbd.uri import Target
from tests import evidence

from ..certificates import write_certificates
from ..nbd_load import nothing_left, server_threads
from ..nbd_raw import dial, info, meta, option_bytes

#: Messages in all; the soak has a million or more.
MESSAGES = int(os.environ.get("LAMINA_NBD_FUZZ", "60000"))
#: Connections in a batch, and how many of them at a time.
BATCH, AT_ONCE = 40, 4
#: Seconds that one conversation may take.
PATIENCE = 30.0
SIZE = 1 * MIB
NAMES = ("disk", "fixed", "blocks", "secret", "", "none", "snö")
_LENGTHS = (0, 1, 3, 4, 5, 8, 511, 512, 513, 4095, 4096, 4097, 65536, 65537, 1 << 20, (1 << 20) + 1)
_LARGE = (1 << 25, (1 << 25) + 1, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, (1 << 32) - 512, 0xFFFFFFF0)
_OFFSETS = (0, 1, 511, 512, 4096, SIZE - 4096, SIZE - 512, SIZE - 1, SIZE, SIZE + 1, 1 << 32, 1 << 63, (1 << 64) - 1)
_OPTIONS = (*range(12), 0x4C414D49, 0xFFFFFFFF)


class Grammar:
    """Conversations, mostly well-formed. `count` is the number of messages that it made."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.count = 0

    def conversation(self) -> bytes:
        rng = self.rng
        flags = w.FLAG_C_FIXED_NEWSTYLE | rng.choice((0, w.FLAG_C_NO_ZEROES))
        parts = [(flags if rng.random() < 0.97 else rng.getrandbits(32)).to_bytes(4)]
        mode = rng.choice(("simple", "structured", "extended"))
        parts += [self.option() for _ in range(rng.choice((0, 0, 1, 2, 5, 20)))]
        if rng.random() < 0.9:
            parts += self.beginning(mode)
            parts += [self.request(mode) for _ in range(rng.choice((1, 5, 20, 60, 200)))]
        self.count += len(parts)
        if rng.random() < 0.3:
            self.mutate(parts)
        whole = b"".join(parts)
        return whole[: rng.randrange(len(whole) + 1)] if rng.random() < 0.1 else whole

    def beginning(self, mode: str) -> list[bytes]:
        """Options that lead to transmission."""
        rng = self.rng
        name = rng.choice(("disk", "fixed", "blocks"))
        parts = []
        if mode != "simple":
            parts.append(option_bytes(w.OPT_EXTENDED_HEADERS if mode == "extended" else w.OPT_STRUCTURED_REPLY))
            wanted = rng.sample(
                (w.BASE_ALLOCATION, w.ALLOCATION_DEPTH, w.EXACT, w.DIRTY_BITMAP + "b0"), rng.randrange(5)
            )
            parts.append(option_bytes(w.OPT_SET_META_CONTEXT, meta(name, *wanted)))
        if rng.random() < 0.1:
            parts.append(option_bytes(w.OPT_EXPORT_NAME, name.encode()))
        else:
            parts.append(option_bytes(w.OPT_GO, info(name, *rng.sample(range(5), rng.randrange(4)))))
        return parts

    def option(self) -> bytes:
        rng = self.rng
        option = rng.choice(
            [number for number in _OPTIONS if number not in (1, 2, 7)] if rng.random() < 0.9 else _OPTIONS
        )
        kind = rng.randrange(6)
        lie = rng.choice((None, None, None, 0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
        name = self.string()
        if kind == 0:
            data = b""
        elif kind == 1:
            data = rng.randbytes(rng.choice((1, 3, 4, 7, 100, 5000)))
        elif kind in (2, 3):
            data = info(
                name,
                *(rng.randrange(6) for _ in range(rng.randrange(5))),
                length=lie,
                count=rng.choice((None, lie and lie & 0xFFFF)),
            )
        else:
            queries = [
                rng.choice((self.string(), b"base:", b"base:allocation", b"qemu:", b":"))
                for _ in range(rng.randrange(4))
            ]
            data = meta(name, *queries, length=lie, count=rng.choice((None, lie)))
        length = rng.choice(_LENGTHS + _LARGE) if rng.random() < 0.02 else None
        magic = rng.getrandbits(64) if rng.random() < 0.005 else w.OPTS_MAGIC
        return option_bytes(option, data, length=length, magic=magic)

    def string(self) -> bytes:
        rng = self.rng
        kind = rng.randrange(8)
        if kind == 0:
            return rng.randbytes(rng.choice((1, 20, 4096, 4097, 70000)))
        if kind == 1:
            return b"%n\x1b[2J\0../\xc3"[: rng.randrange(12)] * rng.choice((1, 400))
        return rng.choice(NAMES).encode()

    def request(self, mode: str) -> bytes:
        rng = self.rng
        kind = (
            rng.choice((0, 0, 0, 1, 1, 1, 3, 4, 5, 6, 7, 7)) if rng.random() < 0.97 else rng.choice((2, 8, 99, 0xFFFF))
        )
        flags = rng.choice((0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, 0x8000, 0x1F)) if rng.random() < 0.5 else 0
        length = rng.choice(_LENGTHS) if rng.random() < 0.97 else rng.choice(_LARGE)
        offset = rng.choice(_OFFSETS) if rng.random() < 0.3 else rng.randrange(SIZE)
        cookie = rng.getrandbits(64)
        payload = b""
        if kind == w.CMD_FLUSH and rng.random() < 0.8:
            offset = length = 0
        if kind == w.CMD_WRITE:
            length = min(length, 100_000) if rng.random() < 0.98 else length
            payload = bytes([rng.randrange(256)]) * min(length, 2 * MIB)
            flags |= w.CMD_FLAG_PAYLOAD_LEN if mode == "extended" and rng.random() < 0.9 else 0
        elif mode == "extended" and flags & w.CMD_FLAG_PAYLOAD_LEN:
            payload = rng.randrange(2 * SIZE).to_bytes(8) + b"".join(
                rng.randrange(6).to_bytes(4) for _ in range(rng.randrange(5))
            )
            length = len(payload) if rng.random() < 0.9 else length
        if mode == "extended":
            length = length if rng.random() < 0.99 else rng.getrandbits(64)
            return (
                w.EXTENDED_REQUEST.codec.pack(w.EXTENDED_REQUEST_MAGIC, flags, kind, cookie, offset, length) + payload
            )
        return w.REQUEST.codec.pack(w.REQUEST_MAGIC, flags, kind, cookie, offset, length) + payload

    def mutate(self, parts: list[bytes]) -> None:
        """Messages left out, repeated and swapped; bytes changed, cut out and put in."""
        rng = self.rng
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(parts))
            part = bytearray(parts[at])
            spot = rng.randrange(min(len(part), 64) + 1)
            kind = rng.randrange(7)
            if kind == 0:
                parts[at] = b""
            elif kind == 1:
                parts.insert(at, parts[rng.randrange(len(parts))])
            elif kind == 2:
                other = rng.randrange(len(parts))
                parts[at], parts[other] = parts[other], parts[at]
            elif kind == 3 and part:
                part[min(spot, len(part) - 1)] ^= 1 << rng.randrange(8)
                parts[at] = bytes(part)
            elif kind == 4:
                del part[spot : spot + rng.choice((1, 4, 100))]
                parts[at] = bytes(part)
            elif kind == 5:
                part[spot:spot] = rng.randbytes(rng.choice((1, 4, 100)))
                parts[at] = bytes(part)
            else:
                width = rng.choice((1, 2, 4, 8))
                part[spot : spot + width] = (rng.choice(_LENGTHS + _LARGE) & ((1 << 8 * width) - 1)).to_bytes(width)
                parts[at] = bytes(part)


def play(path: str, data: bytes, rng: random.Random) -> None:
    """Send it all, in pieces, while reading whatever comes, until the server closes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        sock.setblocking(False)
        left = memoryview(data)
        room = bytearray(1 << 18)
        rude = rng.random() < 0.1  # gone without reading the end
        deadline = time.monotonic() + PATIENCE
        sending = True
        while True:
            ready = select.select([sock], [sock] if sending else [], [], 1.0)
            assert time.monotonic() < deadline, (
                f"the server neither answers nor closes: {len(left)} bytes are left to send"
            )
            if ready[1]:
                piece = left if rng.random() < 0.7 else left[: rng.choice((1, 28, 32, 1000))]
                try:
                    left = left[sock.send(piece) :] if left else left
                except BlockingIOError:
                    pass
                except (BrokenPipeError, ConnectionResetError):
                    left = left[:0]
                if not left:
                    if rude:
                        return
                    sending = False
                    with suppress(OSError):
                        sock.shutdown(socket.SHUT_WR)
            if ready[0]:
                try:
                    if not sock.recv_into(room):
                        return
                except BlockingIOError:
                    continue
                except ConnectionResetError:
                    return


def play_secured(path: str, data: bytes, context: ssl.SSLContext, rng: random.Random) -> None:
    """STARTTLS, then the same under TLS; or bytes in the clear behind STARTTLS, or no TLS at all."""
    head = (w.FLAG_C_FIXED_NEWSTYLE | w.FLAG_C_NO_ZEROES).to_bytes(4) + option_bytes(w.OPT_STARTTLS)
    kind = rng.randrange(4)
    if kind == 0:
        play(path, head + data, rng)
        return
    if kind == 1:
        play(path, head + b"\x16\x03\x01" + data[:3000], rng)
        return
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        sock.sendall(head)
        want = w.GREETING.size + w.OPTION_REPLY.size
        while want:
            want -= len(sock.recv(want))
        with context.wrap_socket(sock, server_hostname="localhost") as secured, suppress(ssl.SSLError, OSError):
            sent = threading.Thread(target=_send_quietly, args=(secured, data[4:]))
            sent.start()
            try:
                deadline = time.monotonic() + PATIENCE
                while secured.recv(1 << 16):
                    assert time.monotonic() < deadline, "the server goes on for ever"
            finally:
                sent.join(PATIENCE)


def _send_quietly(sock: ssl.SSLSocket, data: bytes) -> None:
    with suppress(OSError, ValueError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_RDWR)


class Victim:
    """The server, and what must not change."""

    def __init__(self, server: Server, path: str, images: dict[str, lamina.Image], fixed: bytes) -> None:
        self.server, self.path, self.images, self.fixed = server, path, images, fixed

    def is_well(self) -> None:
        """It serves a good client, and has got rid of the others."""
        for mode in ("simple", "structured", "extended"):
            with dial(self.path) as raw:
                raw.begin("disk", mode, () if mode == "simple" else (w.BASE_ALLOCATION,))
                raw.write(SIZE - 512, b"good" * 128)
                assert raw.read(SIZE - 512, 512) == b"good" * 128
                raw.disc()
                assert raw.ended()
        deadline = time.monotonic() + PATIENCE
        while "nbd-client" in server_threads() or self.server.stats()["transmitting"]:
            assert time.monotonic() < deadline, f"threads of clients that are gone: {server_threads()}"
            time.sleep(0.002)
        assert self.images["fixed"].read(0, SIZE) == self.fixed
        assert [image.size for image in self.images.values()] == [SIZE] * 3


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Callable[..., Victim]]:
    """A server with the exports "disk", "fixed" (read-only), "blocks" (minimum 4096) and "secret" (under TLS alone)."""
    memory = {"driver": "memory", "size": SIZE}
    fixed = random.Random(0).randbytes(SIZE)
    bitmap = MemoryBitmap()
    bitmap.mark(65536, 65536)
    with (
        nothing_left(),
        lamina.open(memory, read_only=False) as disk,
        lamina.open(memory, read_only=False) as constant,
        lamina.open({"driver": "blkdebug", "align": 4096, "image": memory}, read_only=False) as blocks,
    ):
        constant.write(0, fixed)
        exports: list[Export | RestrictedExport] = [
            Export(disk, "disk", writable=True, bitmaps={"b0": bitmap}),
            Export(constant, "fixed", bitmaps={"b0": bitmap}),
            Export(blocks, "blocks", writable=True, bitmaps={"b0": bitmap}),
            RestrictedExport(Export(constant, "secret"), tls_only=True),
        ]
        images = {"disk": disk, "fixed": constant, "blocks": blocks}
        servers: list[Server] = []

        def start(context: ssl.SSLContext | None = None) -> Victim:
            path = str(tmp_path / "socket")
            server = Server(exports, unix=path, tls="off" if context is None else "allow", context=context)
            servers.append(server.start())
            return Victim(server, path, images, fixed)

        yield start
        for server in servers:
            server.close()


def batches(victim: Victim, seed: int, messages: int, play_one: Callable[[bytes, random.Random], None]) -> None:
    """Conversations until so many messages were sent, some at a time; after each batch the server must be well."""
    total, batch = 0, 0
    descriptors = 0
    while total < messages:
        grammar = Grammar(random.Random(seed + batch))
        talks = [(grammar.conversation(), random.Random(grammar.rng.getrandbits(64))) for _ in range(BATCH)]
        failures: list[str] = []

        def run(own: list[tuple[bytes, random.Random]]) -> None:
            for data, rng in own:
                try:
                    play_one(data, rng)
                except Exception as error:  # noqa: BLE001 - told below, with what provokes it
                    failures.append(f"{error!r} after {data[:2000].hex()}")  # noqa: B023

        threads = [threading.Thread(target=run, args=(talks[number::AT_ONCE],)) for number in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, f"batch {batch}: {failures[0]}"
        victim.is_well()
        now = len(os.listdir("/proc/self/fd"))
        descriptors = descriptors or now
        assert now <= descriptors, f"batch {batch}: {now - descriptors} more descriptors"
        total += grammar.count
        batch += 1
    evidence.count("messages to the NBD server", total)


@pytest.fixture
def no_error_of_its_own(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a client sends is an error of the server: those are logged with a traceback."""
    caplog.set_level(logging.ERROR, "lamina.nbd")
    yield
    found = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not found, found[0].getMessage() + str(found[0].exc_info)


@pytest.mark.usefixtures("no_error_of_its_own")
def test_nonsense_in_the_clear(victim: Callable[..., Victim], seed: int) -> None:
    target = victim()
    batches(target, seed, MESSAGES, lambda data, rng: play(target.path, data, rng))


@pytest.mark.usefixtures("no_error_of_its_own")
def test_nonsense_around_tls(victim: Callable[..., Victim], seed: int, tmp_path: Path) -> None:
    """T15: before STARTTLS, in its place, and after it."""
    folder = write_certificates(tmp_path / "pki")
    target = victim(server_context(folder))
    context, _ = client_context(Target(host="localhost", tls="require", tls_certificates=str(folder)))
    batches(target, seed, MESSAGES // 10, lambda data, rng: play_secured(target.path, data, context, rng))


def test_the_grammar_leads_to_transmission(victim: Callable[..., Victim], seed: int) -> None:
    """Most of it is not thrown away at the door: the fuzzer is worth something."""
    target = victim()
    batches(target, seed, 5000, lambda data, rng: play(target.path, data, rng))
    stats = target.server.stats()
    for name in ("READ", "WRITE", "FLUSH", "TRIM", "CACHE", "WRITE_ZEROES", "BLOCK_STATUS", "failed"):
        # A good client reads and writes once after each batch, in each mode.
        assert stats[name] > stats["connections"] // 10, stats

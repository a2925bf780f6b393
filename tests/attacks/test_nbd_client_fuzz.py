"""Nonsense for the NBD client: what a server says, from a grammar, with lies in it, mutated. To its machines, in pieces of
any size, and to the whole client over a socket.

The client ends in a LaminaError or in the truth: no other exception, no byte outside a reader's view, no hang, no descriptor
or thread left. `LAMINA_SEED` repeats a run; `LAMINA_NBD_FUZZ=1000000` is the soak: so many messages.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from pathlib import Path

from lamina.errors import LaminaError
from lamina.nbd import wire as w
from lamina.nbd.client import Client
from lamina.nbd.client.details import ExportDetails, HandshakeOptions, Mode
from lamina.nbd.client.negotiation import Negotiation, Task
from lamina.nbd.client.transmission import Request, Transmission
from tests import evidence

from ..nbd_fake_server import FakeServer
from ..nbd_scripts import (
    GO,
    SIZE,
    Chunks,
    context,
    details,
    export,
    greeting,
    info_export,
    info_sizes,
    option,
    read,
    refusal,
    simple,
    status,
)

#: Messages in all; the soak has a million or more.
MESSAGES = int(os.environ.get("LAMINA_NBD_FUZZ", "40000"))
_NUMBERS = (0, 1, 4, 8, 9, 12, 511, 512, 4096, 4097, 65536, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
_ERRORS = (0, 1, 5, 12, 22, 28, 75, 95, 108, 9999, 0xFFFFFFFF)
_MODES: tuple[Mode, ...] = ("simple", "structured", "extended")
_TASKS: tuple[Task, ...] = ("enter", "list", "describe")


class Grammar:
    """What servers say, mostly right. `count`: the messages that it made."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.count = 0

    def text(self) -> bytes:
        rng = self.rng
        return rng.choice((b"", b"x", b"base:allocation", b"\x1b[2J", b"\xff\0", b"%n" * 50, rng.randbytes(5000)))

    def handshake(self, task: Task, wanted: HandshakeOptions) -> list[bytes]:
        """A greeting, and answers to what a client with this task asks."""
        rng = self.rng
        if rng.random() < 0.05:
            return [struct.pack(">QQQI124x", w.INIT_MAGIC, w.OLDSTYLE_MAGIC, rng.choice(_NUMBERS), 1)]
        parts = [greeting(rng.choice((3, 3, 3, 1, 2, 0)))]
        if task == "list":
            return [*parts, *self.listing()]
        extended = wanted.extended and rng.random() < 0.5
        if wanted.extended:
            parts.append(option(11) if extended else self.refusal(11))
        structured = not extended and wanted.structured and rng.random() < 0.8
        if wanted.structured and not extended:
            parts.append(option(8) if structured else self.refusal(8))
        if task == "describe":
            parts += self.listing()
        ask, learn = (10, 7) if task == "enter" else (9, 6)
        for _ in range(1 if task == "enter" else rng.randrange(4)):
            if extended or structured:
                parts += self.contexts(ask)
                if extended and task == "describe":
                    parts += self.contexts(10)
            items = [info_export(rng.choice((SIZE, SIZE, 1000, rng.choice(_NUMBERS))), number=learn)]
            if rng.random() < 0.5:
                sizes = rng.choice(
                    ((1, 4096, 1 << 25), (512, 4096, 0xFFFFFFFF), (rng.choice(_NUMBERS) & 0xFFFFFFFF,) * 3)
                )
                items.append(info_sizes(*sizes, number=learn))
            if rng.random() < 0.3:
                items.append(option(learn, w.REP_INFO, struct.pack(">H", rng.choice((1, 2, 99))) + self.text()))
            rng.shuffle(items)
            parts += [*items, option(learn)] if rng.random() < 0.9 else [self.refusal(learn)]
        return parts

    def listing(self) -> list[bytes]:
        return [*(export(self.text(), self.text()) for _ in range(self.rng.randrange(4))), option(3)]

    def contexts(self, of: int) -> list[bytes]:
        rng = self.rng
        if rng.random() < 0.1:
            return [self.refusal(of)]
        names = [b"base:allocation"] if rng.random() < 0.8 else [self.text()]
        return [*(context(name, number, of) for number, name in enumerate(names, 1)), option(of)]

    def refusal(self, of: int) -> bytes:
        return refusal(of, w.REP_FLAG_ERROR | self.rng.choice((1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 999)), self.text())

    def replies(self, mode: Mode, requests: list[Request]) -> list[bytes]:
        """Answers to `requests` (with the cookies 1, 2, ...) in any order, some of them wrong."""
        rng = self.rng
        parts: list[bytes] = []
        numbered = list(enumerate(requests, 1))
        rng.shuffle(numbered)
        for cookie, request in numbered:
            if rng.random() < 0.02:
                cookie = rng.choice((0, cookie + 1, (1 << 64) - 1))
            parts += self.reply(mode, cookie, request)
        return parts

    def reply(self, mode: Mode, cookie: int, request: Request) -> list[bytes]:
        rng = self.rng
        fails = rng.random() < 0.1
        if mode == "simple" or (
            mode == "structured" and request.command not in (w.CMD_READ, w.CMD_BLOCK_STATUS) and rng.random() < 0.5
        ):
            data = b"r" * request.length if request.command == w.CMD_READ and not fails else b""
            return [simple(cookie, rng.choice(_ERRORS[1:]) if fails else 0, data)]
        chunks = Chunks(mode, request.offset)
        parts = []
        if request.command == w.CMD_READ:
            at = request.offset
            end = at + request.length
            while at < end:
                length = min(rng.choice((1, 100, 512, 4096, 1 << 20)), end - at)
                make = rng.random()
                if make < 0.03:
                    parts.append(chunks.data(rng.choice(_NUMBERS), b"r" * length, cookie=cookie, done=False))
                elif make < 0.06:
                    parts.append(chunks.hole(at, rng.choice(_NUMBERS) & 0xFFFFFFFF, cookie=cookie, done=False))
                elif make < 0.5:
                    parts.append(chunks.hole(at, length, cookie=cookie, done=False))
                else:
                    parts.append(chunks.data(at, b"r" * length, cookie=cookie, done=False))
                at += length
                if len(parts) > 20:
                    break
            if rng.random() < 0.3:
                rng.shuffle(parts)
        elif request.command == w.CMD_BLOCK_STATUS:
            for number in (1, 7)[: rng.choice((2, 2, 2, 1))]:
                extents = [
                    (rng.choice((512, 4096, 4096, 65536, rng.choice(_NUMBERS) & 0xFFFFFFFF)), rng.randrange(4))
                    for _ in range(rng.choice((1, 1, 2, 5)))
                ]
                parts.append(chunks.status(extents, number if rng.random() < 0.97 else 3, cookie=cookie))
        if fails:
            at = rng.choice((None, request.offset, rng.choice(_NUMBERS)))
            kind = rng.choice((None, None, 0x8063))
            length = rng.choice((None, None, 0xFFFF))
            text = self.text()[:4096]
            parts.append(
                chunks.error(rng.choice(_ERRORS), text, at=at, cookie=cookie, done=False, kind=kind, length=length)
            )
        if rng.random() < 0.02:
            odd = rng.choice((3, 4, 6, 99, 0x7FFF))
            parts.append(chunks.chunk(odd, rng.randbytes(rng.randrange(30)), cookie=cookie, done=False))
        return [*parts, chunks.none(cookie)]

    def mutated(self, parts: list[bytes]) -> bytes:
        """All of it; sometimes with messages lost, repeated or swapped, with bytes changed, and cut off."""
        rng = self.rng
        self.count += len(parts)
        if parts and rng.random() < 0.3:
            for _ in range(rng.choice((1, 1, 2, 5))):
                at = rng.randrange(len(parts))
                part = bytearray(parts[at])
                spot = rng.randrange(min(len(part), 64) + 1)
                kind = rng.randrange(6)
                if kind == 0:
                    part.clear()
                elif kind == 1:
                    part += parts[rng.randrange(len(parts))]
                elif kind == 2:
                    part[spot:spot] = rng.randbytes(rng.choice((1, 4, 100)))
                elif kind == 3:
                    del part[spot : spot + rng.choice((1, 4, 100))]
                elif kind == 4 and spot < len(part):
                    part[spot] ^= 1 << rng.randrange(8)
                else:
                    width = rng.choice((1, 2, 4, 8))
                    part[spot : spot + width] = (rng.choice(_NUMBERS) & ((1 << 8 * width) - 1)).to_bytes(width)
                parts[at] = bytes(part)
        whole = b"".join(parts)
        return whole[: rng.randrange(len(whole) + 1)] if rng.random() < 0.1 else whole


def hear(machine: Negotiation | Transmission, script: bytes, rng: random.Random) -> str | None:
    """Give the machine all of `script`, in pieces; the text of the error in which it ended."""
    step = rng.choice((1 << 30, 1 << 30, 1000, 13))
    at = 0
    try:
        while at < len(script) and not getattr(machine, "done", False):
            if getattr(machine, "wants_tls", False):
                machine.tls_started()  # type: ignore[union-attr]
                continue
            room = machine.buffer()
            assert 0 < len(room) <= 2 << 20, "room for what nobody can send"
            count = min(len(room), step, len(script) - at)
            room[:count] = script[at : at + count]
            at += count
            machine.received(count)
    except LaminaError as error:
        return str(error)
    return None


def asked(rng: random.Random) -> list[Request]:
    """Requests of all kinds; the bytes of a read are "?" until they come."""
    found: list[Request] = []
    for _ in range(rng.choice((1, 3, 10))):
        offset, length = 512 * rng.randrange(100), rng.choice((1, 512, 4096, 40_000))
        kind = rng.randrange(5)
        if kind < 2:
            found.append(read(offset, length, rng.choice((0, 0, w.CMD_FLAG_DF))))
        elif kind == 2:
            found.append(status(offset, 65536, rng.choice((0, 0, w.CMD_FLAG_REQ_ONE))))
        elif kind == 3:
            found.append(Request(w.CMD_WRITE, offset, 512, payload=bytes(512)))
        else:
            found.append(Request(w.CMD_FLUSH))
    return found


def test_nonsense_for_the_machines(seed: int) -> None:
    rng = random.Random(seed)
    grammar = Grammar(rng)
    ended = {"agreed": 0, "answered": 0, "refused": 0}
    while grammar.count < MESSAGES:
        task = rng.choice(_TASKS)
        modes = rng.choice(((True, True), (True, False), (False, False)))
        wanted = HandshakeOptions("x", rng.choice(("off", "off", "allow")), structured=modes[0], extended=modes[1])
        script = grammar.mutated(grammar.handshake(task, wanted if wanted.tls == "off" else HandshakeOptions("x")))
        machine = Negotiation(wanted, task, all_exports=True)
        error = hear(machine, script, rng)
        assert error is None or (error.isprintable() and len(error) < 2000)
        ended["refused"] += error is not None
        if machine.done:
            ended["agreed"] += 1
            assert machine.result is not None
            for one in (machine.result,) if isinstance(machine.result, ExportDetails) else machine.result:
                told = one if isinstance(one, ExportDetails) else one.details
                assert told is None or 0 <= told.size < 1 << 63
        mode = rng.choice(_MODES)
        # Without contexts, as with simple replies, nobody asks for block status.
        requests = [one for one in asked(rng) if mode != "simple" or one.command != w.CMD_BLOCK_STATUS]
        known = details(mode, contexts={}) if mode == "simple" else details(mode)
        heard = Transmission(known)
        rooms = {}
        for request in requests:
            if request.view is not None:
                rooms[request] = bytearray(b"?" * (request.length + 32))
                request.view = memoryview(rooms[request])[16:-16]
            heard.start(request)
        error = hear(heard, grammar.mutated(grammar.replies(mode, requests)), rng)
        assert error is None or error.isprintable()
        for room in rooms.values():
            assert room[:16] == room[-16:] == b"?" * 16, "bytes outside the view"
        for request in requests:
            if request.done and request.error is None:
                ended["answered"] += 1
                if request.command == w.CMD_BLOCK_STATUS:
                    assert request.status
                    for extents in request.status.values():
                        assert all(size > 0 for size, _ in extents)
                        assert sum(size for size, _ in extents) <= request.length
    # It is worth something only if neither all nor none of it is thrown away at the door.
    assert min(ended.values()) > MESSAGES // 500, ended
    evidence.count("messages to the NBD client", grammar.count)


def test_nonsense_for_a_whole_client(seed: int, tmp_path: Path) -> None:
    """Over sockets, with threads, reconnects and time limits: every call ends, and nothing is left."""
    rng = random.Random(seed + 1)
    grammar = Grammar(rng)
    scripts: list[bytes] = []

    def behave(sock: socket.socket, number: int) -> None:
        sock.settimeout(5)
        script = scripts[-1]
        for at in range(0, len(script), 50_000):
            sock.sendall(script[at : at + 50_000])
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 16):
            pass

    before = threading.active_count()
    server = FakeServer(tmp_path / "socket", behave)
    works = 0
    with server:
        while grammar.count < MESSAGES // 20:
            mode = rng.choice(_MODES)
            requests = asked(rng)
            agreed = [greeting(), option(11) if mode == "extended" else refusal(11)]
            if mode != "extended":
                agreed.append(option(8) if mode == "structured" else refusal(8))
            if mode != "simple":
                agreed += [context(), context(b"x:y", 7), option(10)]
            agreed += [info_export(), GO]
            scripts.append(b"".join(agreed) + grammar.mutated(grammar.replies(mode, requests)))
            said = ""
            try:
                with Client.connect(
                    server.uri, reconnect=rng.choice((0.0, 0.0, 0.0, 0.02)), request_timeout=5.0
                ) as client:
                    pending = []
                    for one in requests:
                        if one.command == w.CMD_READ:
                            pending.append(client.start_read(one.offset, bytearray(one.length)))
                        elif one.command == w.CMD_WRITE:
                            pending.append(client.start_write(one.offset, bytes(512)))
                        elif one.command == w.CMD_FLUSH:
                            pending.append(client.start_flush())
                        elif mode != "simple":
                            pending.append(client.start_block_status(one.offset, 65536))
                    for each in pending:
                        each.wait()
                    works += 1
            except LaminaError as error:
                said = str(error)
            assert said.isprintable()
    assert works > 0
    assert threading.active_count() == before
    evidence.count("messages to the NBD client", grammar.count)

"""The server's machines as the other end of a stream: no threads, no sockets, all at once. For fuzzers and properties."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from lamina.errors import BlockIOError, LaminaError, NotSupported
from lamina.nbd import wire
from lamina.nbd.server.export import Export
from lamina.nbd.server.negotiation import Negotiation, Phase, Refused
from lamina.nbd.server.transmission import PART, REFUSED, Request, Transmission

from .nbd_raw import Gone


class Shelf:
    """Some exports, by name; the first is the default one."""

    def __init__(self, exports: Collection[Export]) -> None:
        self.exports = {export.name: export for export in exports}

    def names(self) -> Iterable[tuple[str, str]]:
        return [(export.name, export.description) for export in self.exports.values()]

    def find(self, name: str) -> Export:
        if name in self.exports:
            return self.exports[name]
        if not name:
            return next(iter(self.exports.values()))
        raise Refused(wire.REP_ERR_UNKNOWN, "there is no such export")


class MemoryServer:
    """A stream whose other end is a server that does everything at once, in the thread of its client.

    `tls` as for Negotiation; STARTTLS brings no encryption, only `secured`, and what was sent along with it in the clear is
    gone. `most`: the largest piece in which it takes what is sent. `requests` counts what was executed."""

    def __init__(self, exports: Collection[Export], *, tls: str = "off", most: int = 1 << 62) -> None:
        self.shelf = Shelf(exports)
        self.negotiation = Negotiation(self.shelf, tls=tls)
        self.transmission: Transmission | None = None
        self.closed = False
        self.failure: str | None = None
        self.most = most
        self.requests: list[Request] = []
        self.out = bytearray()
        self._said()

    def send(self, data: bytes) -> None:
        left = memoryview(data)
        while left and not self.closed:
            machine = self.transmission or self.negotiation
            room = machine.buffer()
            assert room, "nowhere to receive into"
            count = min(len(room), len(left), self.most)
            room[:count] = left[:count]
            left = left[count:]
            if self.transmission is None:
                self.negotiation.received(count)
                self._said()
                if self.negotiation.phase is Phase.STARTTLS:
                    self.negotiation.secured(self.shelf)
                    return
            else:
                self._execute(self.transmission, count)

    def recv(self, length: int) -> bytes:
        assert len(self.out) in (0, *range(length, len(self.out) + 1)), f"{len(self.out)} of {length} bytes are there"
        if not self.out:
            assert self.closed, f"{length} more bytes are waited for, and will never come"
            raise Gone
        data = bytes(self.out[:length])
        del self.out[:length]
        return data

    def close(self) -> None:
        self.closed = True

    def _said(self) -> None:
        self.out += b"".join(self.negotiation.take())
        if self.negotiation.phase is Phase.CLOSED:
            self.closed = True
        elif self.negotiation.phase is Phase.TRANSMISSION:
            assert self.negotiation.agreed is not None
            self.transmission = Transmission(self.negotiation.agreed)

    def _execute(self, transmission: Transmission, count: int) -> None:
        assert self.negotiation.agreed is not None
        for request in transmission.received(count):
            self.requests.append(request)
            if request.type != wire.CMD_DISC:
                self.out += b"".join(
                    answer(self.negotiation.agreed.export, transmission, request, self._names(request))
                )
        self.closed, self.failure = transmission.finished, transmission.violation

    def _names(self, request: Request) -> dict[int, str]:
        assert self.negotiation.agreed is not None
        selected = dict(self.negotiation.agreed.contexts)
        wanted = request.payload if request.type == wire.CMD_BLOCK_STATUS and request.payload is not None else selected
        return {number: selected[number] for number in wanted}


def answer(export: Export, transmission: Transmission, request: Request, contexts: dict[int, str]) -> Sequence[Any]:
    """What a server without any finesse answers."""
    kind, flags, _, offset, length, payload = request
    if kind == REFUSED:
        return transmission.error(request, *payload)
    try:
        if kind == PART:
            at, data, last = payload
            export.write(at, data)
            return transmission.done(request) if last else []
        if kind == wire.CMD_READ:
            view = memoryview(bytearray(length))
            export.read_into(offset, view)
            return transmission.data(request, offset, view, last=True) if length else transmission.done(request)
        if kind == wire.CMD_BLOCK_STATUS:
            one = bool(flags & wire.CMD_FLAG_REQ_ONE)
            found = export.status(list(contexts.values()), offset, length, one=one, wide=transmission.extended)
            rows = [(number, *row) for number, row in zip(contexts, found, strict=True)]
            return transmission.status(request, rows)
        action: dict[int, Callable[[], None]] = {
            wire.CMD_WRITE: lambda: export.write(offset, payload or memoryview(b""), flags),
            wire.CMD_FLUSH: export.flush,
            wire.CMD_TRIM: lambda: export.trim(offset, length, flags),
            wire.CMD_CACHE: lambda: export.cache(offset, length, memoryview(bytearray(1 << 16))),
            wire.CMD_WRITE_ZEROES: lambda: export.zero(offset, length, flags),
        }
        action[kind]()
        return transmission.done(request)
    except NotSupported as error:
        return transmission.error(request, wire.ENOTSUP, error.args[0])
    except BlockIOError as error:
        return transmission.error(request, wire.to_wire(error.errno), error.args[0])
    except LaminaError as error:
        return transmission.error(request, wire.EIO, error.args[0])

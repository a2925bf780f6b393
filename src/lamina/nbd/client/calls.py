"""The calls of a client as requests: long ones are split, unaligned ones are widened, and those that the server does not
support are refused. `client` has their public form.

Each call registers its requests in a list before it sends them. So after an exception at any line of the call, `take_leave`
finds the requests whose replies still arrive.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ...buffers import byte_view
from ...errors import BlockIOError, Closed, LaminaError, NotSupported, OutOfRange, ReadOnly
from ...limits import GIB, MAX_SIZE, align_down, align_up
from .. import wire
from ..uri import Target
from .details import ExportDetails, Handshake, HandshakeOptions, Mode, violation
from .link import Link
from .request import Durability, Group, Pending, Sent, take_leave

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]  # Python 3.12

#: The longest effect of one request without payload where lengths have 32 bits; half of what fits, and of what broke servers.
_MAX_EFFECT: Final = 1 * GIB
#: Requests without payload of one call that are on their way at once.
_AT_ONCE: Final = 64
#: An answer about block status that tells of less is short, unless no more was asked; and so many of them are too many, where
#: they are more than half of all.
_SHORT, _MOST_SHORT = 4096, 1 << 12


class Calls:
    """What a client knows of its export, and the requests that its calls are made of."""

    def __init__(
        self, target: Target, wanted: HandshakeOptions, details: ExportDetails, durability: Durability
    ) -> None:
        self.target = target
        self.details = details
        self.size: int = details.size
        self.flags: int = details.flags
        self.minimum: int = details.minimum
        self.preferred: int = details.preferred
        self.maximum: int = details.maximum
        self.block_sizes_known: bool = details.block_sizes_known
        self.name: str = details.name
        self.description: str | None = details.description
        self.contexts: Mapping[str, int] = details.contexts
        self.mode: Mode = details.mode
        self.handshake: Handshake = details.handshake
        self.tls: bool = details.tls
        self._wanted = wanted
        self._durability = durability
        self._links: list[Link] = []
        self._turn = itertools.count()
        self._closed = False
        #: Answers about block status, and those of them that told of next to nothing.
        self._answers = self._short = 0
        #: The largest payload of one request: that of the server, as far as every peer takes it.
        self._most = max(align_down(min(details.maximum, wire.MAX_PAYLOAD), details.minimum), details.minimum)
        self._effect = MAX_SIZE if details.mode == "extended" else _MAX_EFFECT

    def _has(self, flag: int) -> bool:
        return bool(self.flags & flag)

    @property
    def read_only(self) -> bool:
        """Whether the export refuses writes."""
        return self._has(wire.FLAG_READ_ONLY)

    @property
    def is_rotational(self) -> bool:
        """Whether it is on a rotating disk."""
        return self._has(wire.FLAG_ROTATIONAL)

    @property
    def can_flush(self) -> bool:
        """Whether the server takes flushes."""
        return self._has(wire.FLAG_SEND_FLUSH)

    @property
    def can_fua(self) -> bool:
        """Whether it takes writes that are to be on stable storage."""
        return self._has(wire.FLAG_SEND_FUA)

    @property
    def can_trim(self) -> bool:
        """Whether it takes discards."""
        return self._has(wire.FLAG_SEND_TRIM)

    @property
    def can_zero(self) -> bool:
        """Whether it takes zero requests."""
        return self._has(wire.FLAG_SEND_WRITE_ZEROES)

    @property
    def can_fast_zero(self) -> bool:
        """Whether it takes zero requests that fail rather than be slow."""
        return self._has(wire.FLAG_SEND_FAST_ZERO)

    @property
    def can_cache(self) -> bool:
        """Whether it takes cache requests."""
        return self._has(wire.FLAG_SEND_CACHE)

    @property
    def can_df(self) -> bool:
        """Whether it reads in one part if asked to."""
        return self._has(wire.FLAG_SEND_DF)

    @property
    def can_multi_conn(self) -> bool:
        """Whether several connections see the same bytes."""
        return self._has(wire.FLAG_CAN_MULTI_CONN)

    @property
    def can_status_payload(self) -> bool:
        """Whether block status may be asked for some contexts."""
        return self._has(wire.FLAG_BLOCK_STATUS_PAYLOAD)

    # -- calls

    def _whole(self, begin: Callable[[list[Sent]], Pending]) -> Any:
        """The outcome of what `begin` starts. It notes each request before it is sent: so whatever exception ends this, and
        wherever, nobody touches the caller's buffers afterwards."""
        started: list[Sent] = []
        try:
            return begin(started).wait()
        except BaseException:
            take_leave(started)
            raise

    def _begun(self, begin: Callable[[list[Sent]], Pending]) -> Pending:
        """What `begin` starts; nothing of it if it is interrupted."""
        started: list[Sent] = []
        try:
            return begin(started)
        except BaseException:
            take_leave(started)
            raise

    def _read(self, started: list[Sent], offset: int, view: Buffer, piece: int) -> Pending:
        into = byte_view(view)
        length = len(into)
        self._check("read", offset, length)
        most = min(self._most, piece)
        if length <= most and not (offset | length) & (self.minimum - 1):
            return self._start(started, wire.CMD_READ, offset, length, 0, into) if length else Group(())
        lo, hi = self._widened(offset, offset + length)
        if (lo, hi) == (offset, offset + length):
            for at, part in _pieces(into, lo, most):
                self._start(started, wire.CMD_READ, lo + at, len(part), 0, part)
            return Group(started)
        if hi - lo <= most:
            room = memoryview(bytearray(hi - lo))
            self._start(started, wire.CMD_READ, lo, hi - lo, 0, room)

            def finish(_: list[Any]) -> None:
                into[:] = room[offset - lo : offset - lo + length]

            return Group(started, finish)
        # Only the two ends are read through a buffer of their own.
        first, last = align_up(offset, self.minimum), align_down(offset + length, self.minimum)
        cuts = [offset, *sorted({first, last} - {offset, offset + length}), offset + length]
        parts: list[Pending] = []
        for a, b in itertools.pairwise(cuts):
            own: list[Sent] = []
            try:
                parts.append(self._read(own, a, into[a - offset : b - offset], piece))
            finally:
                started += own
        return Group(parts)

    def _write(self, started: list[Sent], offset: int, data: Buffer, fua: bool, piece: int) -> Pending:
        view = byte_view(data)
        self._check_change("write", offset, len(view))
        flags = self._fua(fua)
        if self.mode == "extended":
            flags |= wire.CMD_FLAG_PAYLOAD_LEN
        most = min(self._most, piece)
        if 0 < len(view) <= most:
            return self._start(started, wire.CMD_WRITE, offset, len(view), flags, payload=view)
        for at, part in _pieces(view, offset, most) if len(view) else ():
            self._start(started, wire.CMD_WRITE, offset + at, len(part), flags, payload=part)
        return Group(started)

    def _zero(self, started: list[Sent], offset: int, length: int, fua: bool, no_hole: bool, fast: bool) -> Pending:
        self._need(self.can_zero, "WRITE_ZEROES", "zero")
        if fast:
            self._need(self.can_fast_zero, "FAST_ZERO", "zero")
        self._check_change("zero", offset, length)
        flags = self._fua(fua)
        flags |= wire.CMD_FLAG_NO_HOLE if no_hole else 0
        flags |= wire.CMD_FLAG_FAST_ZERO if fast else 0
        return self._effects(started, wire.CMD_WRITE_ZEROES, offset, length, flags)

    def _trim(self, started: list[Sent], offset: int, length: int, fua: bool) -> Pending:
        self._need(self.can_trim, "TRIM", "trim")
        self._check_change("trim", offset, length)
        return self._effects(started, wire.CMD_TRIM, offset, length, self._fua(fua))

    def _cache(self, started: list[Sent], offset: int, length: int) -> Pending:
        self._need(self.can_cache, "CACHE", "cache")
        self._check("cache", offset, length)
        lo, hi = self._widened(offset, offset + length)
        return self._effects(started, wire.CMD_CACHE, lo, hi - lo, 0, self._most)

    def _flush(self, started: list[Sent]) -> Pending:
        self._open()
        durability = self._durability
        if durability.doubtful:
            raise durability.error()
        if not self.can_flush:
            return Group(())
        request = Sent(wire.CMD_FLUSH)
        started.append(request)
        request.covers, durability.answered = durability.answered, False
        try:
            self._link().submit(request)
        except BaseException:
            durability.answered |= request.covers
            raise
        return request

    def _status(
        self, started: list[Sent], offset: int, length: int, contexts: Sequence[str] | None, one: bool
    ) -> Pending:
        self._check("block status", offset, length)
        wanted = list(self.contexts if contexts is None else dict.fromkeys(contexts))
        missing = [name for name in wanted if name not in self.contexts]
        if missing or not wanted:
            what = f"metadata context {missing[0]}" if missing else "metadata context"
            raise NotSupported(f"the server gave no {what}", path=str(self.target), operation="block status")
        if not length:
            return Group((), lambda _: {name: [] for name in wanted})
        lo, hi = self._widened(offset, offset + length)
        if hi - lo > self.minimum:
            # The odd tail of an export is a question of its own.
            hi = align_down(min(hi, lo + self._effect), self.minimum)
        flags = wire.CMD_FLAG_REQ_ONE if one else 0
        payload = None
        if self.can_status_payload and len(wanted) < len(self.contexts):
            flags |= wire.CMD_FLAG_PAYLOAD_LEN
            payload = struct.pack(f">Q{len(wanted)}I", hi - lo, *(self.contexts[name] for name in wanted))
        self._start(started, wire.CMD_BLOCK_STATUS, lo, hi - lo, flags, payload=payload)

        def finish(found: list[Any]) -> dict[str, list[tuple[int, int]]]:
            told = {name: _cut(found[0][name], offset - lo, length) for name in wanted}
            if not one:
                self._count(length, min(sum(size for size, _ in extents) for extents in told.values()))
            return told

        return Group(started, finish)

    @property
    def terse(self) -> bool:
        """Whether the server tells so little of block status each time that an export would never be through."""
        return self._short > _MOST_SHORT and 2 * self._short > self._answers

    def _count(self, asked: int, told: int) -> None:
        self._answers += 1
        if told < min(asked, _SHORT):
            self._short += 1
            if self.terse:
                many = f"{self._short} of {self._answers}"
                error = violation(f"{many} answers about block status tell of less than {_SHORT} bytes")
                error.path = str(self.target)
                raise error

    # -- how

    def _open(self) -> None:
        if self._closed:
            raise Closed("the client was closed", path=str(self.target))
        if self._links[0].inherited:
            hint = "open it in this process, after the fork"
            message = "another process opened it, and this one was forked from that: the connection is not its own"
            raise Closed(message, path=str(self.target), hint=hint)

    def _link(self) -> Link:
        links = self._links
        return links[0] if len(links) == 1 else links[next(self._turn) % len(links)]

    def _start(
        self,
        started: list[Sent],
        command: int,
        offset: int,
        length: int,
        flags: int,
        view: memoryview | None = None,
        payload: memoryview | bytes | None = None,
    ) -> Sent:
        if self._durability.unsettled:
            self._settle(offset, length)
        request = Sent(command, offset, length, flags, view, payload)
        started.append(request)
        try:
            self._link().submit(request)
        except LaminaError as error:
            # `wait` tells: other parts of the same read may be on their way over other links, and must be waited for.
            request.error, request.done = error, True
        return request

    def _settle(self, offset: int, length: int) -> None:
        """Wait for changes of these bytes that may still be carried out, although the threads that made them were
        interrupted."""
        unsettled = self._durability.unsettled
        for change in list(unsettled):
            if not change.done and change.touches(offset, length):
                assert change.link is not None
                change.link.wait(change)
            if change.done:
                with contextlib.suppress(ValueError):  # another thread was faster
                    unsettled.remove(change)

    def _effects(
        self, started: list[Sent], command: int, offset: int, length: int, flags: int, most: int = 0
    ) -> Pending:
        """A request without payload, in as many as it takes."""
        step = most or self._effect
        end = offset + length
        for at in range(offset, end, step):
            if len(started) == _AT_ONCE:
                # Later ones would be thrown away after an error; of those before only this number is remembered.
                started.pop(0).wait()
            self._start(started, command, at, min(step, end - at), flags)
        return started[0] if len(started) == 1 else Group(started)

    def _widened(self, offset: int, end: int) -> tuple[int, int]:
        """The same in whole blocks; the end of the export counts as one."""
        return align_down(offset, self.minimum), min(align_up(end, self.minimum), self.size)

    def _fua(self, fua: bool) -> int:
        if fua:
            self._need(self.can_fua, "FUA", "write")
        return wire.CMD_FLAG_FUA if fua else 0

    def _need(self, has: bool, what: str, operation: str) -> None:
        if not has:
            raise NotSupported(f"the server has no {what}", path=str(self.target), operation=operation)

    def _check(self, operation: str, offset: int, length: int) -> None:
        self._open()
        if offset < 0 or length < 0 or offset > self.size or length > self.size - offset:
            raise self._outside(operation, offset, length)

    def _check_change(self, operation: str, offset: int, length: int) -> None:
        if self.read_only:
            hint = "open it for reading"
            raise ReadOnly("the export is read-only", path=str(self.target), operation=operation, hint=hint)
        self._check(operation, offset, length)
        end = offset + length
        if self.minimum > 1 and (offset % self.minimum or (end % self.minimum and end != self.size)):
            raise BlockIOError(
                f"the server takes only whole blocks of {self.minimum} bytes",
                errno=errno.EINVAL,
                path=str(self.target),
                operation=operation,
                offset=offset,
                length=length,
                hint="open it with lamina.open, which reads and rewrites blocks",
            )

    def _outside(self, operation: str, offset: int, length: int) -> OutOfRange:
        message = f"the request is not inside the {self.size} bytes of the export"
        return OutOfRange(message, path=str(self.target), operation=operation, offset=offset, length=length)


def _pieces(view: memoryview, offset: int, most: int) -> list[tuple[int, memoryview]]:
    """`view` cut into parts of at most `most` bytes, at multiples of `most` of the export where there is a choice."""
    first = most - offset % most
    cuts = [0, *range(first, len(view), most), len(view)] if first < len(view) else [0, len(view)]
    return [(a, view[a:b]) for a, b in itertools.pairwise(cuts)]


def _cut(extents: list[tuple[int, int]], skip: int, length: int) -> list[tuple[int, int]]:
    """The extents of `length` bytes behind the first `skip`, which were asked about only for the sake of whole blocks."""
    if skip == 0 and sum(size for size, _ in extents) <= length:
        return extents
    found = []
    for size, flags in extents:
        size, skip = size - min(size, skip), skip - min(size, skip)
        if size and length:
            found.append((min(size, length), flags))
            length -= min(size, length)
    return found

"""The client's half of the NBD handshake, as a state machine without I/O.

A driver asks `buffer()` where the next bytes go, tells with `received(n)` how many came, and sends what `to_send()` hands
out; nothing is ever read ahead, so that no plaintext can slip behind STARTTLS and no reply behind the last option. What the
server says is held against a bound before anything is allocated for it, and against the specification (proto.md, "Handshake
phase", and its extensions) before it is believed. Then comes transmission: `transmission`.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Generator, Sequence
from typing import Final, Literal

from ...errors import BlockIOError, NotFound, NotSupported, printable
from ...limits import MAX_SIZE, MIB, align_down, is_power_of_two
from .. import wire
from .details import ExportDetails, Handshake, HandshakeOptions, Listed, Mode, Refused, server_text, violation

Task = Literal["enter", "list", "describe"]
_Steps = Generator[int, bytes, None]

#: What one option may be answered with before we stop listening: replies, and bytes in all of them.
MAX_REPLIES: Final = 10_000
MAX_REPLY_BYTES: Final = 8 * MIB
#: And all options of one handshake together: an export takes about ten replies to describe.
MAX_ALL_REPLIES: Final = 20 * MAX_REPLIES
MAX_ALL_BYTES: Final = 4 * MAX_REPLY_BYTES
#: Metadata contexts that a server may select besides those that were asked for.
_MORE_CONTEXTS: Final = 16
#: The longest single reply that has a meaning: an export's name with its description.
_MAX_REPLY: Final = 4 + 2 * wire.MAX_STRING
#: Errors after which no other option would fare better.
_FATAL: Final = (wire.REP_ERR_TLS_REQD, wire.REP_ERR_SHUTDOWN)


def encoded(name: str, errors: str = "strict") -> bytes:
    """A name as it goes over the wire: UTF-8 without NUL. BlockIOError (EINVAL) for what a server may list all the same.
    `errors`: "surrogateescape" for a name that goes back to the server in the bytes in which it came."""
    try:
        data = name.encode("utf-8", errors)
        wrong = len(data) > wire.MAX_STRING or b"\0" in data
    except UnicodeEncodeError:
        wrong = True
    if wrong:
        hint = f"it has at most {wire.MAX_STRING} bytes of UTF-8, without NUL"
        message = "the name cannot be asked for: it is none of an export or context"
        raise BlockIOError(message, errno=errno.EINVAL, hint=hint)
    return data


class Negotiation:
    """One handshake. `task`: "enter" begins transmission with `wanted.export` and results in `ExportDetails`; "list" and
    "describe" ask for all exports and result in a tuple of `Listed` ("describe": of `wanted.export` alone, unless
    `all_exports`).

    While `wants_tls`, the driver must run the TLS handshake of the client and then call `tls_started`; nothing is to be sent
    or received before. When `done`, `result` is there. Errors of `received` are LaminaErrors: the driver then sends
    `farewell()`, if that is anything, and closes. Not thread-safe.
    """

    def __init__(self, wanted: HandshakeOptions, task: Task = "enter", *, all_exports: bool = False) -> None:
        self.wanted = wanted
        self.task = task
        self.all_exports = all_exports
        self.done = False
        self.wants_tls = False
        self.result: ExportDetails | tuple[Listed, ...] | None = None
        self.tls = False
        self._mode: Mode = "simple"
        self._handshake: Handshake = "oldstyle"
        self._no_zeroes = False
        self._polite = False
        self._entered = False
        self._naming = False
        self._out: list[bytes] = []
        #: Replies to options, and their bytes, that are still listened to.
        self._replies, self._bytes = MAX_ALL_REPLIES, MAX_ALL_BYTES
        self._have = 0
        self._steps = self._run()
        self._room = bytearray(next(self._steps))

    # -- what the driver does

    def buffer(self) -> memoryview:
        """Where the next bytes of the server go; never empty, and never more than is due."""
        return memoryview(self._room)[self._have :]

    def received(self, count: int) -> None:
        """`count` bytes were put into `buffer()`."""
        self._have += count
        if self._have == len(self._room):
            self._advance(bytes(self._room))

    def tls_started(self) -> None:
        """The connection is under TLS now, and everything from here on is. What was agreed before does not count."""
        self.wants_tls = False
        self.tls = True
        self._polite = True
        self._advance(b"")

    def to_send(self) -> list[bytes]:
        """What is to be sent now, in order; handed out once."""
        out, self._out = self._out, []
        return out

    def farewell(self) -> bytes:
        """The message that a client which leaves now must send first: ABORT between options, DISC after the last one; b""
        where the protocol has none, or where the server broke it."""
        if self._entered:
            layout = wire.EXTENDED_REQUEST if self._mode == "extended" else wire.REQUEST
            return layout.pack(flags=0, type=wire.CMD_DISC, cookie=0, offset=0, length=0)
        return wire.OPTION.pack(option=wire.OPT_ABORT, length=0) if self._polite else b""

    @property
    def hangup_hint(self) -> str | None:
        """What it may mean that the server hangs up now."""
        if not self._naming:
            return None
        return f'a server without the option GO hangs up if it has no export "{printable(self.wanted.export)}"'

    def _advance(self, data: bytes) -> None:
        self._have = 0
        while True:
            try:
                need = self._steps.send(data)
            except StopIteration:
                self.done, self._room = True, bytearray()
                return
            self._room = bytearray(max(need, 0))
            if need < 0:
                self.wants_tls = True
                return
            if need:
                return
            data = b""

    # -- what is said

    def _run(self) -> _Steps:
        """All of it: yields how many bytes it needs next, -1 for TLS, and is sent them."""
        magic, style = struct.unpack(">QQ", (yield 16))
        if magic != wire.INIT_MAGIC:
            raise violation("it does not begin with NBDMAGIC (is this an NBD server?)")
        if style == wire.OLDSTYLE_MAGIC:
            yield from self._oldstyle()
            return
        if style != wire.OPTS_MAGIC:
            raise violation(f"unknown style of negotiation {style:#018x}")
        (flags,) = struct.unpack(">H", (yield 2))
        known = flags & (wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES)
        self._no_zeroes = bool(flags & wire.FLAG_NO_ZEROES)
        self._handshake = "newstyle-fixed" if flags & wire.FLAG_FIXED_NEWSTYLE else "newstyle"
        if self._handshake == "newstyle":
            self._refuse_without_options("has no options (newstyle without the flag FIXED)")
        self._out.append(wire.CLIENT_FLAGS.pack(flags=known))
        if self._handshake == "newstyle":
            self._result((yield from self._export_name()))
            return
        self._polite = True
        try:
            yield from self._with_options()
        except Refused as refused:
            raise refused.error(self.wanted.export) from None

    def _with_options(self) -> _Steps:
        if self.wanted.tls != "off":
            yield from self._start_tls()
        if self.task == "list":
            self.result = yield from self._list()
            return
        yield from self._choose_mode()
        if self.task == "enter":
            self.result = yield from self._enter()
            return
        names = (yield from self._list()) if self.all_exports else (Listed(self.wanted.export),)
        found = []
        for one in names:
            found.append((yield from self._describe(one)))
        self.result = tuple(found)

    def _refuse_without_options(self, what: str) -> None:
        if self.wanted.tls == "require":
            hint = "somebody between may have taken TLS away; nbd:// would go on without it"
            raise BlockIOError(f"TLS is required, and the server {what}", errno=errno.EPERM, hint=hint)
        if self.task != "enter" and (self.task == "list" or self.all_exports):
            raise NotSupported(f"the server cannot list its exports: it {what}")

    def _result(self, details: ExportDetails) -> None:
        self._entered = True
        self.result = details if self.task == "enter" else (Listed(details.name, details=details),)

    def _oldstyle(self) -> _Steps:
        self._refuse_without_options("speaks oldstyle, which has no options")
        size, flags, _ = struct.unpack(">QI124s", (yield 136))
        if self.wanted.export:
            hint = "leave the name out"
            raise NotFound("the server speaks oldstyle: it has one export, without a name", hint=hint)
        self._result(self._details(size, flags & 0xFFFF, name=""))

    def _export_name(self) -> Generator[int, bytes, ExportDetails]:
        """The way of entering that every newstyle server has. One that has no such export just hangs up."""
        name = encoded(self.wanted.export)
        self._polite, self._naming = False, True
        self._out += (wire.OPTION.pack(option=wire.OPT_EXPORT_NAME, length=len(name)), name)
        size, flags = wire.EXPORT_REPLY.codec.unpack((yield wire.EXPORT_REPLY.size))
        if not self._no_zeroes:
            yield wire.EXPORT_REPLY_ZEROES
        self._entered = True
        return self._details(size, flags, name=self.wanted.export)

    def _start_tls(self) -> _Steps:
        try:
            yield from self._option(wire.OPT_STARTTLS)
        except Refused as refused:
            if self.wanted.tls == "require" or refused.kind == wire.REP_ERR_SHUTDOWN:
                if refused.kind == wire.REP_ERR_SHUTDOWN:
                    raise
                said = f": {refused.text}" if refused.text else ""
                hint = "nbd:// would go on without it"
                error = BlockIOError(f"TLS is required, and the server refuses it{said}", errno=errno.EPERM, hint=hint)
                raise error from None
            return
        self._polite = False  # nothing more is said in the clear
        yield -1

    def _choose_mode(self) -> _Steps:
        for wanted, option, mode in (
            (self.wanted.extended, wire.OPT_EXTENDED_HEADERS, "extended"),
            (self.wanted.structured, wire.OPT_STRUCTURED_REPLY, "structured"),
        ):
            if wanted and (yield from self._accepts(option)):
                self._mode = "extended" if mode == "extended" else "structured"
                return

    def _accepts(self, option: int) -> Generator[int, bytes, bool]:
        try:
            yield from self._option(option)
        except Refused as refused:
            if refused.kind in _FATAL:
                raise
            return False
        return True

    def _enter(self) -> Generator[int, bytes, ExportDetails]:
        name = encoded(self.wanted.export)
        contexts: dict[str, int] = {}
        if self._mode != "simple" and self.wanted.contexts:
            contexts = yield from self._contexts(wire.OPT_SET_META_CONTEXT, name, self.wanted.contexts)
        try:
            details = yield from self._information(wire.OPT_GO, self.wanted.export)
        except Refused as refused:
            # EXPORT_NAME says no to nothing, and is forbidden with extended headers.
            if refused.kind != wire.REP_ERR_UNSUP or self._mode == "extended":
                raise
            details = yield from self._export_name()
        return _with_contexts(details, contexts)._replace(contexts=contexts)

    def _describe(self, one: Listed) -> Generator[int, bytes, Listed]:
        available: dict[str, int] = {}
        selected: dict[str, int] = {}
        try:
            name = encoded(one.name)
        except BlockIOError as error:
            if not self.all_exports:
                raise
            return one._replace(error=error)
        try:
            if self._mode != "simple":
                available = yield from self._contexts(wire.OPT_LIST_META_CONTEXT, name, ())
            if self._mode == "extended" and available:
                # Whether block status may have a payload, a server says only where some context is selected.
                wanted = min(available, key=lambda context: context != wire.BASE_ALLOCATION)
                selected = yield from self._contexts(wire.OPT_SET_META_CONTEXT, name, (wanted,))
            details = yield from self._information(wire.OPT_INFO, one.name)
        except Refused as refused:
            if refused.kind == wire.REP_ERR_SHUTDOWN or not self.all_exports:
                raise
            return one._replace(error=refused.error(one.name))
        return one._replace(details=_with_contexts(details, selected)._replace(available=tuple(available)))

    def _list(self) -> Generator[int, bytes, tuple[Listed, ...]]:
        found = []
        for data in (yield from self._option(wire.OPT_LIST, expect=wire.REP_SERVER)):
            (length,) = struct.unpack_from(">I", data) if len(data) >= 4 else (len(data),)
            if length > len(data) - 4 or length > wire.MAX_STRING or len(data) - 4 - length > wire.MAX_STRING:
                raise violation(f"an export in its list has a name of {length} bytes in a reply of {len(data)}")
            rest = server_text(data[4 + length :])
            found.append(Listed(data[4 : 4 + length].decode("utf-8", "surrogateescape"), rest or None))
        return tuple(found)

    def _contexts(self, option: int, name: bytes, queries: Sequence[str]) -> Generator[int, bytes, dict[str, int]]:
        words = [encoded(query, "surrogateescape") for query in queries]
        parts = [struct.pack(">I", len(name)), name, struct.pack(">I", len(words))]
        for word in words:
            parts += (struct.pack(">I", len(word)), word)
        try:
            replies = yield from self._option(option, b"".join(parts), expect=wire.REP_META_CONTEXT)
        except Refused as refused:
            # Without contexts everything counts as data. That an export is not there, GO or INFO will say.
            if refused.kind in _FATAL:
                raise
            return {}
        if option == wire.OPT_SET_META_CONTEXT and len(replies) > len(queries) + _MORE_CONTEXTS:
            raise violation(f"{len(replies)} metadata contexts, and {len(queries)} were asked for")
        found: dict[str, int] = {}
        numbers: set[int] = set()
        for data in replies:
            if not 4 < len(data) <= 4 + wire.MAX_STRING:
                raise violation(f"a metadata context in {len(data)} bytes")
            (number,) = struct.unpack_from(">I", data)
            context = data[4:].decode("utf-8", "surrogateescape")
            if context in found or (option == wire.OPT_SET_META_CONTEXT and number in numbers):
                raise violation(f'the metadata context "{server_text(data[4:])}" is named twice, or its number is')
            found[context] = number
            numbers.add(number)
        return found

    def _information(self, option: int, export: str) -> Generator[int, bytes, ExportDetails]:
        """INFO or GO. Its items come in any order, so they are looked at when all are there."""
        name = encoded(export)
        asked = (wire.INFO_NAME, wire.INFO_DESCRIPTION, wire.INFO_BLOCK_SIZE)
        payload = struct.pack(">I", len(name)) + name + struct.pack(f">{1 + len(asked)}H", len(asked), *asked)
        items: dict[int, bytes] = {}
        replies = yield from self._option(option, payload, expect=wire.REP_INFO)
        self._entered = option == wire.OPT_GO
        for data in replies:
            if len(data) < 2 or len(data) > 2 + wire.MAX_STRING:
                raise violation(f"an item of information in {len(data)} bytes")
            (kind,) = struct.unpack_from(">H", data)
            if items.setdefault(kind, data) != data:
                raise violation(f"two different items of information number {kind}")
        if wire.INFO_EXPORT not in items or len(items[wire.INFO_EXPORT]) != wire.INFO_EXPORT_DATA.size:
            raise violation("no size of the export, or one of the wrong length")
        _, size, flags = wire.INFO_EXPORT_DATA.codec.unpack(items[wire.INFO_EXPORT])
        canonical = items.get(wire.INFO_NAME)
        text = items.get(wire.INFO_DESCRIPTION)
        details = self._details(
            size,
            flags,
            name=export if canonical is None else canonical[2:].decode("utf-8", "surrogateescape"),
            description=None if text is None else server_text(text[2:]),
        )
        return self._with_sizes(details, items.get(wire.INFO_BLOCK_SIZE))

    def _with_sizes(self, details: ExportDetails, data: bytes | None) -> ExportDetails:
        if data is None:
            return details
        if len(data) != wire.INFO_BLOCK_SIZE_DATA.size:
            raise violation(f"block sizes in {len(data)} bytes")
        _, minimum, preferred, maximum = wire.INFO_BLOCK_SIZE_DATA.codec.unpack(data)
        powers = is_power_of_two(minimum) and is_power_of_two(preferred) and minimum <= wire.MAX_MINIMUM
        if not powers or not minimum <= preferred <= maximum:
            raise violation(f"block sizes that cannot be: minimum {minimum}, preferred {preferred}, maximum {maximum}")
        return details._replace(
            minimum=minimum,
            preferred=preferred,
            maximum=align_down(maximum, minimum),
            maximum_told=maximum,
            block_sizes_known=True,
        )

    def _details(self, size: int, flags: int, *, name: str, description: str | None = None) -> ExportDetails:
        if size > MAX_SIZE:
            raise violation(f"an export of {size} bytes, above 2**63 - 1")
        return ExportDetails(
            name=name,
            size=size,
            flags=self._true_flags(flags),
            mode=self._mode,
            handshake=self._handshake,
            tls=self.tls,
            description=description,
            contexts={},
        )

    def _true_flags(self, flags: int) -> int:
        """The transmission flags without those that mean nothing in what was agreed."""
        if not flags & wire.FLAG_HAS_FLAGS:
            return wire.FLAG_HAS_FLAGS
        if self._mode == "simple":
            flags &= ~wire.FLAG_SEND_DF
        if self._mode != "extended":
            flags &= ~wire.FLAG_BLOCK_STATUS_PAYLOAD
        return flags

    def _option(self, option: int, data: bytes = b"", expect: int = 0) -> Generator[int, bytes, list[bytes]]:
        """Send an option; the data of its replies of type `expect`, up to the ACK. Raises Refused for an error reply."""
        self._out.append(wire.OPTION.pack(option=option, length=len(data)))
        if data:
            self._out.append(data)
        self._polite = False
        found: list[bytes] = []
        room = MAX_REPLY_BYTES
        while True:
            magic, answered, kind, length = wire.OPTION_REPLY.codec.unpack((yield wire.OPTION_REPLY.size))
            name = wire.OPTION_NAMES[option]
            if magic != wire.OPTION_REPLY_MAGIC:
                raise violation(f"a reply to {name} begins with {magic:#x}")
            if answered != option:
                raise violation(f"a reply to option {answered}, and {name} was asked")
            if length > (wire.MAX_STRING if kind & wire.REP_FLAG_ERROR else _MAX_REPLY):
                raise violation(f"a reply of {length} bytes to {name}")
            body = (yield length) if length else b""
            if kind & wire.REP_FLAG_ERROR:
                self._polite = True
                raise Refused(option, kind, server_text(body))
            if kind == wire.REP_ACK:
                if length:
                    raise violation(f"an ACK with {length} bytes of data, in answer to {name}")
                self._polite = True
                return found
            if kind != expect:
                raise violation(f"a reply of type {kind} to {name}")
            room -= length + wire.OPTION_REPLY.size
            self._replies -= 1
            self._bytes -= length + wire.OPTION_REPLY.size
            if self._replies < 0 or self._bytes < 0:
                raise violation(f"more than {MAX_ALL_REPLIES} replies to all options, or {MAX_ALL_BYTES} bytes")
            if len(found) == MAX_REPLIES or room < 0:
                raise violation(f"more than {MAX_REPLIES} replies to {name}, or {MAX_REPLY_BYTES} bytes")
            found.append(body)


def _with_contexts(details: ExportDetails, selected: dict[str, int]) -> ExportDetails:
    """`details` without the flag that means nothing unless contexts are `selected`."""
    return details if selected else details._replace(flags=details.flags & ~wire.FLAG_BLOCK_STATUS_PAYLOAD)

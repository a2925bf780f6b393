"""The negotiation phase of the server, without I/O: bytes in, bytes out, until transmission begins or the client is gone.

The caller receives into `buffer()`, reports `received(count)`, sends the result of `take()`, and checks `phase`. The buffer
is never longer than the next message, so that no plaintext is left in it when TLS begins (CVE-2021-3716).

An option is received in full before its reply, even if it is invalid, so that the next one is found where it begins. Every
length that a client sends is checked against a limit before it is used. Sections of the specification: "Handshake", "Option
types"."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ...errors import LaminaError, printable
from ...limits import KIB, MIB
from .. import wire

if TYPE_CHECKING:
    from .export import Export

#: The longest data of an option that is looked at; more is drained and refused.
MAX_OPTION = 64 * KIB
#: A client that announces more than this is dropped at once (CVE-2017-15119).
MAX_DRAIN = 32 * MIB
#: Options in one negotiation. A client needs about ten; one that lists a thousand exports with contexts, a few thousand.
MAX_OPTIONS = 8192
#: Characters of a client's own words that are repeated to it (CVE-2020-10761).
_REPEATED = 200


class Phase(Enum):
    """Where a negotiation is."""

    OPTIONS = "options"
    STARTTLS = "starttls"  #: send what is there, begin TLS, then `secured`
    TRANSMISSION = "transmission"  #: `agreed` says what was agreed
    CLOSED = "closed"  #: send what is there and close the connection


class Refused(Exception):
    """Why a client does not get an export: a reply type of the wire, and a text for people."""

    def __init__(self, reply: int, text: str) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


class Exports(Protocol):
    """What a client may see, as it is known at this point of its connection."""

    def names(self) -> Iterable[tuple[str, str]]:
        """(name, description) of every export, for LIST."""

    def find(self, name: str) -> Export:
        """The export of that name, opened; "" is the default one. Raises Refused, or the LaminaError of opening it."""


class Agreed(NamedTuple):
    """What a negotiation came to."""

    export: Export
    structured: bool
    extended: bool
    contexts: tuple[tuple[int, str], ...]  #: (id, name), as selected
    aligned: bool  #: the client was told the block sizes on request, and must keep to them


class Negotiation:
    """One client's handshake. `tls`: "off", "allow" or "require". Used by one thread at a time."""

    def __init__(self, exports: Exports, *, tls: str = "off", reports: Callable[[str], None] | None = None) -> None:
        self.phase = Phase.OPTIONS
        self.agreed: Agreed | None = None
        #: Set by the driver when the server ends: options are refused from then on.
        self.shutting_down = False
        #: Whether the client goes on with the export that `Exports.find` gave last. False: it only asked, and the driver may
        #: give it back.
        self.keeps_export = False
        self._exports = exports
        self._tls = tls
        self._secure = False
        self._reports = reports or (lambda text: None)
        self._out: list[bytes] = [
            wire.GREETING.pack(flags=wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES),
        ]
        self._client_flags = 0
        self._count = 0
        self._reset()
        self._expect(wire.CLIENT_FLAGS.size, self._flags)

    def _reset(self) -> None:
        """Everything that was agreed is forgotten: at the start, and when TLS begins."""
        self._structured = self._extended = self._aligned = False
        self._contexts: tuple[str, tuple[tuple[int, str], ...]] = ("", ())

    # -- bytes in and out

    def buffer(self) -> memoryview:
        """Where the next bytes go. Never empty while the phase is OPTIONS."""
        return self._view[self._filled :]

    def received(self, count: int) -> None:
        """`count` bytes were received into `buffer()`."""
        self._filled += count
        if self._filled == len(self._view):
            self._complete(self._view)

    def take(self) -> list[bytes]:
        """What is to be sent, in order; given once."""
        out, self._out = self._out, []
        return out

    def secured(self, exports: Exports) -> None:
        """TLS has begun; `exports` are those that this client, now known, may see."""
        self._exports = exports
        self._secure = True
        self._reset()
        self._next_option()

    def _expect(self, length: int, complete: Callable[[memoryview], None]) -> None:
        self.phase = Phase.OPTIONS
        self._view = memoryview(bytearray(length))
        self._filled = 0
        self._complete = complete

    def _close(self) -> None:
        self.phase = Phase.CLOSED

    # -- messages

    def _flags(self, data: memoryview) -> None:
        flags = int.from_bytes(data)
        if flags & ~(wire.FLAG_C_FIXED_NEWSTYLE | wire.FLAG_C_NO_ZEROES):
            self._reports(f"unknown client flags {flags:#x}")
            self._close()
            return
        self._client_flags = flags
        self._next_option()

    def _next_option(self) -> None:
        self._expect(wire.OPTION.size, self._option)

    def _option(self, data: memoryview) -> None:
        magic, option, length = wire.OPTION.codec.unpack(data)
        self._count += 1
        if magic != wire.OPTS_MAGIC:
            self._reports("no option where one must begin")
            self._close()
        elif length > MAX_DRAIN or self._count > MAX_OPTIONS:
            self._reports(f"an option of {length} bytes" if length > MAX_DRAIN else "too many options")
            self._close()
        elif option != wire.OPT_EXPORT_NAME and not self._client_flags & wire.FLAG_C_FIXED_NEWSTYLE:
            self._reports("an option of fixed newstyle, from a client that does not have it")
            self._close()
        elif option == wire.OPT_EXPORT_NAME and length > wire.MAX_STRING:
            self._reports("an export name that is too long")
            self._close()
        elif length > MAX_OPTION:
            self._drain(length, option)
        elif length:
            self._expect(length, lambda data: self._answer(option, bytes(data)))
        else:
            self._answer(option, b"")

    def _drain(self, left: int, option: int) -> None:
        """Take in and forget `left` bytes, then refuse the option."""
        if left:
            length = min(left, MAX_OPTION)
            self._expect(length, lambda data: self._drain(left - length, option))
            return
        self._next_option()
        if option == wire.OPT_SET_META_CONTEXT:
            self._contexts = ("", ())  # what was selected is gone even if this fails
        if self._wants_tls(option):
            self._refuse(option, wire.REP_ERR_TLS_REQD, "begin TLS first (STARTTLS)")
        elif option in wire.OPTION_NAMES and option != wire.OPT_PEEK_EXPORT:
            self._refuse(option, wire.REP_ERR_TOO_BIG, "the data of this option is too long")
        else:
            self._refuse(option, wire.REP_ERR_UNSUP, "this option is not known")

    def _wants_tls(self, option: int) -> bool:
        return self._tls == "require" and not self._secure and option not in (wire.OPT_STARTTLS, wire.OPT_ABORT)

    def _answer(self, option: int, data: bytes) -> None:
        self._next_option()
        if option == wire.OPT_ABORT:
            self._reply(option, wire.REP_ACK)
            self._close()
        elif option == wire.OPT_EXPORT_NAME:
            self._export_name(data)
        elif self._wants_tls(option):
            self._refuse(option, wire.REP_ERR_TLS_REQD, "begin TLS first (STARTTLS)")
        elif self.shutting_down:
            self._refuse(option, wire.REP_ERR_SHUTDOWN, "the server is about to end")
        else:
            handler = _HANDLERS.get(option)
            if handler is None:
                self._refuse(option, wire.REP_ERR_UNSUP, "this option is not known")
                return
            try:
                handler(self, option, data)
            except Refused as why:
                self._refuse(option, why.reply, why.text)

    def _reply(self, option: int, type: int, data: bytes = b"") -> None:
        self._out.append(wire.OPTION_REPLY.codec.pack(wire.OPTION_REPLY_MAGIC, option, type, len(data)) + data)

    def _refuse(self, option: int, type: int, text: str) -> None:
        self._reports(f"{wire.OPTION_NAMES.get(option, option)} refused: {text}")
        self._reply(option, type, text.encode()[: wire.MAX_STRING])

    def _begin(self, export: Export, name: str) -> None:
        selected_for, contexts = self._contexts
        self.agreed = Agreed(
            export,
            self._structured or self._extended,
            self._extended,
            contexts if selected_for == name else (),
            self._aligned,
        )
        self.phase = Phase.TRANSMISSION

    def _transmission_flags(self, export: Export, name: str) -> int:
        selected_for, contexts = self._contexts
        payload = self._extended and selected_for == name and bool(contexts)
        return export.flags(structured=self._structured or self._extended, payload=payload)

    # -- options

    def _export_name(self, data: bytes) -> None:
        # There is no way to say no, but to leave.
        try:
            if self._wants_tls(wire.OPT_EXPORT_NAME) or self.shutting_down or self._extended:
                raise Refused(wire.REP_ERR_INVALID, "not now")
            name = _string(data)
            export = self._find(name, keep=True)
        except Refused as why:
            self._reports(f"EXPORT_NAME refused: {why.text}")
            self._close()
            return
        self._out.append(wire.EXPORT_REPLY.pack(size=export.size, flags=self._transmission_flags(export, name)))
        if not self._client_flags & wire.FLAG_C_NO_ZEROES:
            self._out.append(bytes(wire.EXPORT_REPLY_ZEROES))
        self._aligned = False
        self._begin(export, name)

    def _find(self, name: str, *, keep: bool) -> Export:
        self.keeps_export = keep
        try:
            return self._exports.find(name)
        except LaminaError as error:
            # The text names files of this host: it is for the log, not for the client.
            self._reports(f'the export "{printable(name)}" cannot be opened: {error}')
            raise Refused(wire.REP_ERR_UNKNOWN, "this export cannot be opened") from error

    def _list(self, option: int, data: bytes) -> None:
        _nothing(data)
        for name, description in self._exports.names():
            encoded = name.encode()
            self._reply(option, wire.REP_SERVER, len(encoded).to_bytes(4) + encoded + description.encode())
        self._reply(option, wire.REP_ACK)

    def _starttls(self, option: int, data: bytes) -> None:
        _nothing(data)
        if self._secure:
            raise Refused(wire.REP_ERR_INVALID, "TLS has begun already")
        if self._tls == "off":
            raise Refused(wire.REP_ERR_POLICY, "this server has no TLS")
        self._reply(option, wire.REP_ACK)
        self.phase = Phase.STARTTLS

    def _info(self, option: int, data: bytes) -> None:
        name, at = _name(data, spare=2)
        (count,) = struct.unpack_from(">H", data, at)
        if len(data) != at + 2 + 2 * count:
            raise Refused(wire.REP_ERR_INVALID, "the lengths in this option contradict each other")
        asked = set(struct.unpack_from(f">{count}H", data, at + 2))
        export = self._find(name, keep=option == wire.OPT_GO)
        # The block sizes come before the size: a client of QEMU's judges the size by them.
        if wire.INFO_BLOCK_SIZE in asked or export.minimum > 1:
            sizes = {"minimum": export.minimum, "preferred": export.preferred, "maximum": export.maximum}
            self._reply(option, wire.REP_INFO, wire.INFO_BLOCK_SIZE_DATA.pack(**sizes))
        flags = self._transmission_flags(export, name)
        self._reply(option, wire.REP_INFO, wire.INFO_EXPORT_DATA.pack(size=export.size, flags=flags))
        for item, text in ((wire.INFO_NAME, export.name), (wire.INFO_DESCRIPTION, export.description)):
            if item in asked and (text or item == wire.INFO_NAME):
                self._reply(option, wire.REP_INFO, item.to_bytes(2) + text.encode()[: wire.MAX_STRING])
        self._reply(option, wire.REP_ACK)
        if option == wire.OPT_GO:
            self._aligned = wire.INFO_BLOCK_SIZE in asked
            self._begin(export, name)

    def _structured_reply(self, option: int, data: bytes) -> None:
        _nothing(data)
        if self._extended:
            raise Refused(wire.REP_ERR_EXT_HEADER_REQD, "extended headers bring structured replies")
        if self._structured:
            raise Refused(wire.REP_ERR_INVALID, "structured replies are agreed already")
        self._structured = True
        self._reply(option, wire.REP_ACK)

    def _extended_headers(self, option: int, data: bytes) -> None:
        _nothing(data)
        if self._extended:
            raise Refused(wire.REP_ERR_INVALID, "extended headers are agreed already")
        self._extended = True
        self._reply(option, wire.REP_ACK)

    def _meta_context(self, option: int, data: bytes) -> None:
        setting = option == wire.OPT_SET_META_CONTEXT
        if setting:
            self._contexts = ("", ())  # what was selected is gone even if this fails
        if not self._structured and not self._extended:
            raise Refused(wire.REP_ERR_INVALID, "agree on structured replies first")
        name, at = _name(data, spare=4)
        queries = _queries(data, at)
        export = self._find(name, keep=setting)  # GO for the same export follows
        if not queries and not setting:
            queries = [context.partition(":")[0] + ":" for context in export.contexts]
        chosen: dict[str, None] = {}
        for query in queries:
            for context in export.contexts:
                # A query is a context's name; or, to list them, a namespace, or the beginning that ends with a colon.
                if query == context or (not setting and query.endswith(":") and context.startswith(query)):
                    chosen[context] = None
        for number, context in enumerate(chosen, 1):
            self._reply(option, wire.REP_META_CONTEXT, (number if setting else 0).to_bytes(4) + context.encode())
        if setting:
            self._contexts = (name, tuple(enumerate(chosen, 1)))
        self._reply(option, wire.REP_ACK)


_HANDLERS: dict[int, Callable[[Negotiation, int, bytes], None]] = {
    wire.OPT_LIST: Negotiation._list,
    wire.OPT_STARTTLS: Negotiation._starttls,
    wire.OPT_INFO: Negotiation._info,
    wire.OPT_GO: Negotiation._info,
    wire.OPT_STRUCTURED_REPLY: Negotiation._structured_reply,
    wire.OPT_EXTENDED_HEADERS: Negotiation._extended_headers,
    wire.OPT_LIST_META_CONTEXT: Negotiation._meta_context,
    wire.OPT_SET_META_CONTEXT: Negotiation._meta_context,
}


def _nothing(data: bytes) -> None:
    if data:
        raise Refused(wire.REP_ERR_INVALID, "this option has no data")


def _string(data: bytes) -> str:
    """A string of the protocol: UTF-8 without NUL, at most 4096 bytes."""
    if len(data) > wire.MAX_STRING:
        raise Refused(wire.REP_ERR_TOO_BIG, f"a string is longer than {wire.MAX_STRING} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Refused(wire.REP_ERR_INVALID, "a string is not UTF-8") from None
    if "\0" in text:
        raise Refused(wire.REP_ERR_INVALID, "a string has a NUL")
    return text


def _sized(data: bytes, at: int, spare: int) -> tuple[str, int]:
    """The string at `at`, with its length before it and at least `spare` bytes behind it; and where it ends."""
    if len(data) - at < 4 + spare:
        raise Refused(wire.REP_ERR_INVALID, "the data of this option is too short")
    length = int.from_bytes(data[at : at + 4])
    if length > len(data) - at - 4 - spare:
        raise Refused(wire.REP_ERR_INVALID, "the lengths in this option contradict each other")
    return _string(data[at + 4 : at + 4 + length]), at + 4 + length


def _name(data: bytes, spare: int) -> tuple[str, int]:
    return _sized(data, 0, spare)


def _queries(data: bytes, at: int) -> list[str]:
    count = int.from_bytes(data[at : at + 4])
    at += 4
    if count > (len(data) - at) // 4:
        raise Refused(wire.REP_ERR_INVALID, "the lengths in this option contradict each other")
    queries = []
    for _ in range(count):
        query, at = _sized(data, at, 0)
        if ":" not in query:
            raise Refused(wire.REP_ERR_INVALID, f'the query "{printable(query[:_REPEATED])}" has no namespace')
        queries.append(query)
    if at != len(data):
        raise Refused(wire.REP_ERR_INVALID, "the lengths in this option contradict each other")
    return queries

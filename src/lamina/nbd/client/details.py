"""What a client wants of an NBD server and what it is told: the agreed details, the listed exports, the refusals.

Plain values without I/O, which `negotiation` makes of the server's bytes and the rest of the client relies on.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from ...errors import BlockIOError, Hint, LaminaError, NotFound, NotSupported, printable
from .. import wire

Mode = Literal["simple", "structured", "extended"]
Handshake = Literal["oldstyle", "newstyle", "newstyle-fixed"]

#: Characters of a server's text that an error repeats.
_MAX_SHOWN: Final = 500


class HandshakeOptions(NamedTuple):
    """What a client wants of a server. `tls`: "off", "allow" (an attacker can take it away) or "require". `contexts` are
    queries for SET_META_CONTEXT; they need `structured` or `extended`, as does every reply in chunks."""

    export: str = ""
    tls: str = "off"
    contexts: tuple[str, ...] = (wire.BASE_ALLOCATION,)
    structured: bool = True
    extended: bool = True


class ExportDetails(NamedTuple):
    """What was agreed about one export. Sizes are bytes. Without `block_sizes_known` the three block sizes are what a client
    may assume. `maximum` is a multiple of the minimum; `maximum_told` is what the server said, 2**32 - 1 for no limit.
    `contexts`: the metadata contexts that were selected, with their numbers on this connection; `available`: all that the
    server named, where it was asked (`describe`)."""

    name: str
    size: int
    flags: int
    mode: Mode
    handshake: Handshake
    tls: bool
    description: str | None = None
    minimum: int = wire.MIN_BLOCK
    preferred: int = wire.PREFERRED_BLOCK
    maximum: int = wire.MAX_PAYLOAD
    maximum_told: int = wire.MAX_PAYLOAD
    block_sizes_known: bool = False
    contexts: Mapping[str, int] = MappingProxyType({})
    available: tuple[str, ...] = ()


class Listed(NamedTuple):
    """One export as LIST names it; `description` is None where the server gave none. `details` or `error`: what INFO said of
    it, where it was asked."""

    name: str
    description: str | None = None
    details: ExportDetails | None = None
    error: LaminaError | None = None


def violation(message: str) -> BlockIOError:
    """The error (EPROTO) for a server that breaks the protocol: the connection is of no further use."""
    return BlockIOError(f"the server breaks the NBD protocol: {message}", errno=errno.EPROTO)


def server_text(data: bytes | bytearray | memoryview) -> str:
    """Text of a server for people: printable, and no longer than a message may be."""
    text = printable(bytes(data[: wire.MAX_STRING]).decode("utf-8", "replace").strip("\0\n "))
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


class Refused(Exception):
    """An option that the server answered with an error; never leaves this package."""

    kind: int
    option: int
    text: str

    def __init__(self, option: int, kind: int, text: str) -> None:
        self.option, self.kind, self.text = option, kind, text

    def error(self, export: str) -> LaminaError:
        """The Lamina error that says so."""
        name = wire.OPTION_NAMES.get(self.option, str(self.option))
        said = f": {self.text}" if self.text else ""
        reason = wire.REP_ERROR_NAMES.get(self.kind, f"error {self.kind & ~wire.REP_FLAG_ERROR}")
        if self.kind == wire.REP_ERR_UNKNOWN:
            hint: str = Hint(
                "lamina.nbd.inspect.list_exports lists what there is", command="list what there is: lamina info --list"
            )
            return NotFound(f'the server has no export "{printable(export)}"{said}', hint=hint)
        if self.kind == wire.REP_ERR_TLS_REQD:
            hint = "use nbds:// (or tls=require)"
            return BlockIOError(f"the server demands TLS{said}", errno=errno.EPERM, hint=hint)
        if self.kind == wire.REP_ERR_SHUTDOWN:
            return BlockIOError(f"the server is shutting down{said}", errno=errno.ESHUTDOWN, hint="try again later")
        if self.kind in (wire.REP_ERR_UNSUP, wire.REP_ERR_PLATFORM):
            return NotSupported(f"the server does not know {name}{said}")
        number = errno.EPERM if self.kind == wire.REP_ERR_POLICY else errno.EINVAL
        return BlockIOError(f"the server refuses {name} ({reason}){said}", errno=number)

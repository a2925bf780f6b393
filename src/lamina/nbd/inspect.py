"""A server's description of its exports, without opening one: for `lamina info` and for programs that choose one.

Exports are listed and described over a single connection (LIST, INFO, LIST_META_CONTEXT). A server that is too old for these
tells of one export only, by entering it.
"""

from __future__ import annotations

from collections.abc import Sequence
from errno import ETIMEDOUT
from typing import Final, NamedTuple

from ..detection import HEAD_BYTES, TAIL_BYTES, detect
from ..errors import FormatError, LaminaError, OptionError
from . import wire
from .client.client import Client
from .client.connection import leave, negotiate
from .client.details import ExportDetails, HandshakeOptions, Listed
from .client.negotiation import Task
from .client.times import Times
from .uri import Target, parse


class ExportInfo(NamedTuple):
    """One export in the list of a server; `description` is "" where it gave none. A name in no good UTF-8, by which an export
    cannot be asked for, is shown with backslashes."""

    name: str
    description: str


class Inspection(NamedTuple):
    """What is known of one export: `details` (its `available` are all metadata contexts that the server names), or the
    `error` with which the server refused to tell. `description` is None where there is none; `uri` for an export whose name
    is not valid UTF-8 or has a NUL: `name` then has backslashes, and cannot be asked for. `content`: the format that the
    magic at its ends says, where that was asked for and its bytes could be read."""

    name: str
    description: str | None
    uri: str | None
    details: ExportDetails | None
    error: LaminaError | None
    content: str | None = None

    @property
    def contexts(self) -> tuple[str, ...]:
        """The metadata contexts that the server names; none where it did not tell."""
        return () if self.details is None else tuple(map(_shown, self.details.available or self.details.contexts))

    @property
    def features(self) -> dict[str, bool]:
        """What the transmission flags say, by nbdinfo's keys and in its order."""
        details = self.details
        return {} if details is None else {name: bool(details.flags & flag) for name, flag in FEATURES.items()}

    @property
    def block_sizes(self) -> dict[str, int]:
        """The block sizes that the server told, as it told them, by nbdinfo's keys; none if it told none."""
        details = self.details
        if details is None or not details.block_sizes_known:
            return {}
        return {
            "block_size_minimum": details.minimum,
            "block_size_preferred": details.preferred,
            "block_size_maximum": details.maximum_told,
        }

    def as_dict(self) -> dict[str, object]:
        """One of `exports` in the JSON of nbdinfo: its keys, sizes in bytes; absent is what was not told. Ours is `error`."""
        told = {"description": self.description, "content": self.content, "uri": self.uri}
        found: dict[str, object] = {"export-name": self.name}
        found |= {key: text for key, text in told.items() if text is not None}
        if self.details is not None:
            found |= {"contexts": list(self.contexts), **self.features, **self.block_sizes}
            found |= {"export-size": self.details.size, "export-size-str": _short(self.details.size)}
        return found if self.error is None else found | {"error": str(self.error)}


def as_dict(found: Sequence[Inspection]) -> dict[str, object]:
    """What `inspect` returned in the form of nbdinfo's JSON. Its first keys are those of the connection, absent where no
    export could be described."""
    details = next((one.details for one in found if one.details is not None), None)
    head: dict[str, object] = {}
    if details is not None:
        head = {
            "protocol": details.handshake,
            "TLS": details.tls,
            "structured": details.mode != "simple",
            "extended": details.mode == "extended",
        }
    return head | {"exports": [one.as_dict() for one in found]}


#: What the transmission flags say of an export, by the keys of nbdinfo, in its order.
FEATURES: Final = {
    "is_rotational": wire.FLAG_ROTATIONAL,
    "is_read_only": wire.FLAG_READ_ONLY,
    "can_block_status_payload": wire.FLAG_BLOCK_STATUS_PAYLOAD,
    "can_cache": wire.FLAG_SEND_CACHE,
    "can_df": wire.FLAG_SEND_DF,
    "can_fast_zero": wire.FLAG_SEND_FAST_ZERO,
    "can_flush": wire.FLAG_SEND_FLUSH,
    "can_fua": wire.FLAG_SEND_FUA,
    "can_multi_conn": wire.FLAG_CAN_MULTI_CONN,
    "can_trim": wire.FLAG_SEND_TRIM,
    "can_zero": wire.FLAG_SEND_WRITE_ZEROES,
}
_UNITS: Final = "KMGTPE"


def _short(size: int) -> str:
    """`size` in the largest unit of 1024 that divides it, as nbdinfo writes it: 64M, 1025."""
    unit = ""
    for next_unit in _UNITS:
        if size == 0 or size % 1024:
            break
        size, unit = size // 1024, next_unit
    return f"{size}{unit}"


def _shown(name: str) -> str:
    """A name of the server as text: bytes that are no UTF-8 with backslashes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def list_exports(
    target: Target | str,
    *,
    connect_timeout: float | None = None,
    handshake_timeout: float | None = None,
    timeout: float | None = None,
) -> list[ExportInfo]:
    """All exports that the server names; the export in `target` does not matter. Times are seconds: for the connection, for
    the handshake, or for each (`timeout`; None: 10). Any LaminaError; NotSupported where the server is too old to have a
    list, BlockIOError (EPERM) where it may not give one."""
    where = parse(target) if isinstance(target, str) else target
    wanted = HandshakeOptions(where.export, where.tls)
    times = _times(where, timeout)
    listed = _ask(where, wanted, "list", False, connect_timeout or times.connect, handshake_timeout or times.connect)
    return [ExportInfo(_shown(one.name), one.description or "") for one in listed]


def inspect(
    target: Target | str,
    *,
    exports: bool = False,
    content: bool = False,
    connect_timeout: float | None = None,
    handshake_timeout: float | None = None,
    timeout: float | None = None,
) -> list[Inspection]:
    """What the server says of the export in `target`, or with `exports` of all that it lists. `content`: their first and last
    bytes are read too, over a connection for each. Times as for `list_exports`; `timeout` is also that of a client. Errors
    as `list_exports`, and NotFound; an error of one export out of several is in its `Inspection`, but a server that says
    nothing any more is not asked about the others."""
    where = parse(target) if isinstance(target, str) else target
    wanted = HandshakeOptions(where.export, where.tls)
    times = _times(where, timeout)
    found = []
    before = (connect_timeout or times.connect, handshake_timeout or times.connect)
    for one in _ask(where, wanted, "describe", exports, *before):
        name = one.details.name if one.details and not exports else one.name
        description = one.description
        if description is None and one.details is not None:
            description = one.details.description
        try:
            place = where.replace(export=one.name)
        except OptionError:
            found.append(Inspection(_shown(name), description, None, None, one.error))
            continue
        error, magic = one.error, None
        if content and one.details is not None:
            try:
                magic = _content(place, *before, timeout)
            except LaminaError as reason:
                if not exports or reason.errno == ETIMEDOUT:
                    raise
                error = reason
        found.append(Inspection(_shown(name), description, str(place), one.details, error, magic))
    return found


def _ask(
    where: Target, wanted: HandshakeOptions, task: Task, exports: bool, connect_timeout: float, handshake_timeout: float
) -> tuple[Listed, ...]:
    channel, negotiation = negotiate(
        where, wanted, task, all_exports=exports, connect_timeout=connect_timeout, timeout=handshake_timeout
    )
    leave(channel, negotiation.farewell())
    listed = negotiation.result
    assert listed is not None
    assert not isinstance(listed, ExportDetails)
    return listed


def _times(where: Target, timeout: float | None) -> Times:
    return Times.all(where.timeout if timeout is None else timeout)


def _content(where: Target, connect_timeout: float, handshake_timeout: float, timeout: float | None) -> str | None:
    """The format that the magic in the export says; None where it could be several."""
    with Client.connect(
        where,
        contexts=(),
        connect_timeout=connect_timeout,
        handshake_timeout=handshake_timeout,
        request_timeout=timeout,
    ) as client:
        head = client.read(0, min(client.size, HEAD_BYTES))
        tail = client.read(client.size - min(client.size, TAIL_BYTES), min(client.size, TAIL_BYTES))
        try:
            return detect(head, tail, client.size, path=str(where)).format
        except FormatError:
            return None

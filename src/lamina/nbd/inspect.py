"""What a server says of its exports, without entering one: for `lamina info` and for who wants to choose.

Exports are listed and described over a single connection (LIST, INFO, LIST_META_CONTEXT). A server that is too old for these
tells of one export only, by entering it.
"""

from __future__ import annotations

from typing import NamedTuple

from ..detect import HEAD_BYTES, TAIL_BYTES, detect
from ..errors import FormatError, LaminaError
from . import wire
from .client import Client
from .client_connection import leave, negotiate
from .client_negotiation import Facts, Listed, Task, Wish
from .uri import Target, parse


class ExportInfo(NamedTuple):
    """One export in the list of a server; `description` is "" where it gave none."""

    name: str
    description: str


class Inspection(NamedTuple):
    """What is known of one export: `facts` (its `available` are all metadata contexts that the server names), or the `error`
    with which it refused to tell. `description` is None where there is none. `content`: the format that the magic at its
    ends says, where that was asked for and its bytes could be read."""

    name: str
    description: str | None
    uri: str
    facts: Facts | None
    error: LaminaError | None
    content: str | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON: the keys of nbdinfo, sizes in bytes, and ours: handshake, mode, block-size-known, error."""
        facts = self.facts
        found: dict[str, object] = {"export-name": self.name, "description": self.description, "uri": self.uri}
        if facts is None:
            return found | {"error": str(self.error)}
        found |= {
            "export-size": facts.size,
            "content": self.content,
            "contexts": list(facts.available or facts.contexts),
            "handshake": facts.handshake,
            "mode": facts.mode,
            "tls": facts.tls,
            "block-size-known": facts.block_sizes_known,
            "block-size-minimum": facts.minimum,
            "block-size-preferred": facts.preferred,
            "block-size-maximum": facts.maximum,
        }
        return found | {name: bool(facts.flags & flag) for name, flag in FEATURES.items()}


#: What the transmission flags say of an export, by the names that nbdinfo gives them.
FEATURES = {
    "is-read-only": wire.FLAG_READ_ONLY,
    "is-rotational": wire.FLAG_ROTATIONAL,
    "can-cache": wire.FLAG_SEND_CACHE,
    "can-df": wire.FLAG_SEND_DF,
    "can-fast-zero": wire.FLAG_SEND_FAST_ZERO,
    "can-flush": wire.FLAG_SEND_FLUSH,
    "can-fua": wire.FLAG_SEND_FUA,
    "can-multi-conn": wire.FLAG_CAN_MULTI_CONN,
    "can-status-payload": wire.FLAG_BLOCK_STATUS_PAYLOAD,
    "can-trim": wire.FLAG_SEND_TRIM,
    "can-zero": wire.FLAG_SEND_WRITE_ZEROES,
}


def list_exports(
    target: Target | str, *, connect_timeout: float = 10.0, handshake_timeout: float = 10.0
) -> list[ExportInfo]:
    """All exports that the server names; the export in `target` does not matter. Any LaminaError; NotSupported where the
    server is too old to have a list, BlockIOError (EPERM) where it may not give one."""
    where = parse(target) if isinstance(target, str) else target
    wish = Wish(where.export, where.tls)
    listed = _ask(where, wish, "list", False, connect_timeout, handshake_timeout)
    return [ExportInfo(one.name, one.description or "") for one in listed]


def inspect(
    target: Target | str,
    *,
    exports: bool = False,
    content: bool = False,
    connect_timeout: float = 10.0,
    handshake_timeout: float = 10.0,
) -> list[Inspection]:
    """What the server says of the export in `target`, or with `exports` of all that it lists. `content`: their first and last
    bytes are read too, over a connection for each. Errors as `list_exports`, and NotFound; an error of one export out of
    several is in its `Inspection`."""
    where = parse(target) if isinstance(target, str) else target
    wish = Wish(where.export, where.tls)
    found = []
    for one in _ask(where, wish, "describe", exports, connect_timeout, handshake_timeout):
        name = one.facts.name if one.facts and not exports else one.name
        description = one.description
        if description is None and one.facts is not None:
            description = one.facts.description
        place, error = where.replace(export=one.name), one.error
        magic = None
        if content and one.facts is not None:
            try:
                magic = _content(place, connect_timeout, handshake_timeout)
            except LaminaError as reason:
                if not exports:
                    raise
                error = reason
        found.append(Inspection(name, description, str(place), one.facts, error, magic))
    return found


def _ask(
    where: Target, wish: Wish, task: Task, exports: bool, connect_timeout: float, handshake_timeout: float
) -> tuple[Listed, ...]:
    channel, negotiation = negotiate(
        where, wish, task, all_exports=exports, connect_timeout=connect_timeout, timeout=handshake_timeout
    )
    leave(channel, negotiation.farewell())
    assert isinstance(negotiation.result, tuple)
    return negotiation.result


def _content(where: Target, connect_timeout: float, handshake_timeout: float) -> str | None:
    """The format that the magic in the export says; None where it could be several."""
    with Client.connect(
        where, contexts=(), connect_timeout=connect_timeout, handshake_timeout=handshake_timeout
    ) as client:
        head = client.read(0, min(client.size, HEAD_BYTES))
        tail = client.read(client.size - min(client.size, TAIL_BYTES), min(client.size, TAIL_BYTES))
        try:
            return detect(head, tail, client.size, path=str(where)).format
        except FormatError:
            return None

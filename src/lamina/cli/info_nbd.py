"""`lamina info` of NBD exports: what a server says of one of them, or of all. The keys of the JSON are those of nbdinfo."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, printable
from ..options import format_size
from .nbd_names import export_target, names_export

if TYPE_CHECKING:
    from ..nbd.client_negotiation import Facts
    from ..nbd.inspect import Inspection

_UNITS = "KMGTPE"


def show(name: str, *, every: bool, content: bool, json: bool) -> int:
    """Print what there is to say of the export `name`, or of `every` export of its server, to standard output. Returns the
    exit status: 1 if the server told of some export that it has, and refused to tell more. Errors as `nbd.inspect`."""
    from ..nbd.inspect import inspect

    if not names_export(name):
        raise OptionError("this is no NBD address, and only servers have a list", path=name, hint="nbd://HOST")
    found = inspect(export_target(name), exports=every, content=content)
    if json:
        from json import dumps

        sys.stdout.write(dumps(described(found), indent=4) + "\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in _human(found)))
    return 1 if any(one.error is not None for one in found) else 0


def described(found: list[Inspection]) -> dict[str, Any]:
    """The same as one object. Its first keys are those of the connection (absent where no export could be described); sizes
    are bytes. An export that could not be described has its name, its uri, and an `error`."""
    facts = next((one.facts for one in found if one.facts is not None), None)
    head: dict[str, Any] = {}
    if facts is not None:
        head = {
            "protocol": facts.handshake,
            "TLS": facts.tls,
            "structured": facts.mode != "simple",
            "extended": facts.mode == "extended",
        }
    return head | {"exports": [_export(one) for one in found]}


def _export(one: Inspection) -> dict[str, Any]:
    row: dict[str, Any] = {"export-name": one.name}
    if one.description is not None:
        row["description"] = one.description
    if one.content is not None:
        row["content"] = one.content
    row["uri"] = one.uri
    if one.facts is not None:
        row |= {"contexts": list(_contexts(one.facts)), **_features(one.facts)}
        if one.facts.block_sizes_known:
            row |= _block_sizes(one.facts)
        row |= {"export-size": one.facts.size, "export-size-str": _short(one.facts.size)}
    if one.error is not None:
        row["error"] = str(one.error)
    return row


def _contexts(facts: Facts) -> tuple[str, ...]:
    return facts.available or tuple(facts.contexts)


def _features(facts: Facts) -> dict[str, bool]:
    """What the transmission flags say, by nbdinfo's words."""
    from ..nbd.inspect import FEATURES

    words = {"can-status-payload": "can_block_status_payload"}
    found = {words.get(name, name.replace("-", "_")): bool(facts.flags & flag) for name, flag in FEATURES.items()}
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith("is_"), item[0])))


def _block_sizes(facts: Facts) -> dict[str, int]:
    return {
        "block_size_minimum": facts.minimum,
        "block_size_preferred": facts.preferred,
        "block_size_maximum": facts.maximum,
    }


def _short(size: int) -> str:
    """`size` in the largest unit of 1024 that divides it, as nbdinfo writes it: 64M, 1025."""
    unit = ""
    for next_unit in _UNITS:
        if size == 0 or size % 1024:
            break
        size, unit = size // 1024, next_unit
    return f"{size}{unit}"


# -- for people


def _human(found: list[Inspection]) -> Iterator[str]:
    facts = next((one.facts for one in found if one.facts is not None), None)
    if facts is not None:
        replies = {"simple": "simple packets", "structured": "structured packets", "extended": "extended packets"}
        tls = "with" if facts.tls else "without"
        yield f"protocol: {facts.handshake} {tls} TLS, using {replies[facts.mode]}"
    for one in found:
        yield f'export="{printable(one.name)}":'
        for line in _lines(one):
            yield f"\t{line}"


def _lines(one: Inspection) -> Iterator[str]:
    facts = one.facts
    if one.description:
        yield f"description: {printable(one.description)}"
    if facts is not None:
        yield f"export-size: {facts.size} ({format_size(facts.size)})"
    if one.content is not None:
        yield f"content: {printable(one.content)}"
    yield f"uri: {printable(one.uri)}"
    if facts is not None:
        contexts = _contexts(facts)
        yield "contexts:" if contexts else "contexts: none"
        yield from (f"\t{printable(name)}" for name in contexts)
        yield from (f"{name}: {str(value).lower()}" for name, value in _features(facts).items())
        if facts.block_sizes_known:
            yield from (f"{name}: {size} ({format_size(size)})" for name, size in _block_sizes(facts).items())
        else:
            yield "block sizes: not told by the server"
    if one.error is not None:
        yield f"error: {printable(str(one.error))}"

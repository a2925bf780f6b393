"""NBD exports on the command line: which names mean one, and which export that is. Imports nothing of NBD until asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..options import parse_name

if TYPE_CHECKING:
    from ..nbd.uri import Target

_SCHEMES = frozenset(("nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix"))


def names_export(name: str) -> bool:
    """Whether `name` is an NBD URI, or one of QEMU's spellings (`nbd:HOST:PORT`). Nothing is looked up."""
    scheme, colon, _ = name.partition(":")
    return bool(colon) and scheme.lower() in _SCHEMES


def export_target(name: str) -> Target:
    """The export that `name` means; OptionError if it is not well formed."""
    from ..nbd.uri import parse

    return parse(name)


def export_options(name: str, connections: int) -> dict[str, Any]:
    """The options of the storage node for the export `name`, with so many connections."""
    return {**parse_name(name), "connections": connections}

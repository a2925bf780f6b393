"""NBD exports on the command line: detection and parsing of their names. NBD modules are imported on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..options import parse_name

if TYPE_CHECKING:
    from ..nbd.uri import Target

_SCHEMES = frozenset(("nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix"))


def names_export(name: str) -> bool:
    """Whether `name` is an NBD URI, or has a notation of QEMU (`nbd:HOST:PORT`). Nothing is looked up."""
    scheme, colon, _ = name.partition(":")
    return bool(colon) and scheme.lower() in _SCHEMES


def export_target(name: str) -> Target:
    """The address of the export `name`; OptionError if it is malformed."""
    from ..nbd.uri import parse

    return parse(name)


def export_options(name: str, connections: int) -> dict[str, Any]:
    """The options of the storage node for the export `name`, with this number of connections."""
    return {**parse_name(name), "connections": connections}

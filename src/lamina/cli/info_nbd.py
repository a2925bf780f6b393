"""`lamina info` for NBD exports: one export, or all exports of a server. The keys of the JSON are those of nbdinfo."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import OptionError, printable
from ..options import format_size
from . import program
from .nbd_names import export_target, names_export

if TYPE_CHECKING:
    from ..nbd.inspect import Inspection


def show(name: str, *, every: bool, content: bool, json: bool, timeout: float | None) -> int:
    """Print the details of the export `name`, or of `every` export of its server, to standard output. Returns the exit
    status: 1 if the server listed an export and refused its details. Raises the errors of `nbd.inspect`."""
    from ..nbd.inspect import as_dict, inspect

    if not names_export(name):
        raise OptionError("only NBD servers have a list of exports", path=name, hint="give an NBD address: nbd://HOST")
    found = inspect(export_target(name), exports=every, content=content, timeout=timeout)
    text = program.current.exports(found)
    if text is not None:
        sys.stdout.write(text)
    elif json:
        from json import dumps

        sys.stdout.write(dumps(as_dict(found), indent=4) + "\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in _human(found)))
    return 1 if any(one.error is not None for one in found) else 0


# -- for people


def _human(found: list[Inspection]) -> Iterator[str]:
    details = next((one.details for one in found if one.details is not None), None)
    if details is not None:
        replies = {"simple": "simple packets", "structured": "structured packets", "extended": "extended packets"}
        tls = "with" if details.tls else "without"
        yield f"protocol: {details.handshake} {tls} TLS, using {replies[details.mode]}"
    for one in found:
        yield f'export="{printable(one.name)}":'
        for line in _lines(one):
            yield f"\t{line}"


def _lines(one: Inspection) -> Iterator[str]:
    details = one.details
    if one.description:
        yield f"description: {printable(one.description)}"
    if details is not None:
        yield f"export-size: {details.size} ({format_size(details.size)})"
    if one.content is not None:
        yield f"content: {printable(one.content)}"
    if one.uri is not None:
        yield f"uri: {printable(one.uri)}"
    if details is not None:
        yield "contexts:" if one.contexts else "contexts: none"
        yield from (f"\t{printable(name)}" for name in one.contexts)
        yield from (f"{name}: {str(value).lower()}" for name, value in one.features.items())
        if one.block_sizes:
            yield from (f"{name}: {size} ({format_size(size)})" for name, size in one.block_sizes.items())
        else:
            yield "block sizes: not reported by the server"
    if one.error is not None:
        yield f"error: {printable(str(one.error))}"

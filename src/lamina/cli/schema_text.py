"""Schemas as text, for `-o help`, `driver=NAME,help` and `lamina drivers`."""

from __future__ import annotations

import sys

from .. import registry
from ..errors import printable
from ..schema import REQUIRED, Schema
from . import program


def print_schema(schema: Schema, title: str | None = None, *, amend: bool = False) -> None:
    """Print the options with types and defaults. `title`: the line above them; None: for `-o help`, about a new image, or
    one that is to `amend`."""
    text = program.current.options_text(schema, amend=amend) if title is None else None
    if text is not None:
        sys.stdout.write(text)
        return
    rows = [
        (
            f"{name}={kind}",
            doc if not default else f"{doc} ({default if default == REQUIRED else f'default: {default}'})",
        )
        for name, kind, default, doc in schema.help()
    ]
    width = max((len(left) for left, _ in rows), default=0)
    print(title or f"Options of {schema.driver}:")
    for left, right in rows:
        print(f"  {left:<{width}}  {right}")


def print_driver(name: str) -> None:
    """Print what the driver is, and its options. Raises the errors of `registry.lookup`."""
    found, groups = registry.entry(name), driver_schemas(name)
    aliases = f" (also {', '.join(found.aliases)})" if found.aliases else ""
    print(printable(f"{found.name}{aliases}: {found.kind}, {found.summary}"))
    for title, schema in groups.values():
        print()
        print_schema(schema, title)


def driver_schemas(name: str) -> dict[str, tuple[str, Schema]]:
    """The groups of options of a driver: the key in JSON, the title in text, and the schema."""
    from ..format import lookup_format
    from ..graph import COMMON_SCHEMA

    found = registry.entry(name)
    kind = registry.lookup(name)
    groups = {"options": (f"Options of {found.name}:", kind.schema)}
    if found.kind == "format":
        driver = lookup_format(name)
        if driver.create_schema is not None:
            groups["create-options"] = ("Options of a new image (create and convert -o):", driver.create_schema)
        if driver.amend_schema is not None:
            groups["amend-options"] = ("Options that can be changed later (amend -o):", driver.amend_schema)
    groups["common-options"] = ("Options of every node:", COMMON_SCHEMA)
    return groups

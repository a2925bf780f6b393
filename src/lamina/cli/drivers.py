"""`lamina drivers`: the storage, formats and filters that there are, and their options, all from their schemas."""

from __future__ import annotations

import sys
from typing import Any

from .. import registry
from ..errors import printable
from .arguments import Parser
from .schema_text import driver_schemas, print_driver

_EXAMPLES = """
  lamina drivers                           all drivers
  lamina drivers qcow2                     the options of qcow2: to open, to create, to amend
  lamina drivers --output=json throttle
"""

_TITLES: dict[registry.Kind, str] = {
    "storage": "storage: where bytes are stored",
    "format": "formats: how a disk is laid out in storage",
    "filter": "filters: what observes or changes requests",
}


def main(argv: list[str]) -> int:
    parser = Parser("drivers", "List the drivers, or show the options of one. Nothing is opened.", _EXAMPLES)
    parser.add_output()
    parser.add_argument("name", metavar="NAME", nargs="?", help="a driver, or an alias of it")
    args = parser.parse(argv)

    if args.output == "json":
        import json

        sys.stdout.write(json.dumps(_all() if args.name is None else _one(args.name), indent=4) + "\n")
    elif args.name is None:
        _print_all()
    else:
        print_driver(args.name)
    return 0


def _entries() -> list[registry.Entry]:
    registry.add_installed()
    return [registry.entry(name) for name in registry.names()]


def _print_all() -> None:
    entries = _entries()
    width = max(len(entry.name) for entry in entries)
    for kind, title in _TITLES.items():
        print(f"{title}\n")
        for entry in entries:
            if entry.kind == kind:
                aliases = f" (also {', '.join(entry.aliases)})" if entry.aliases else ""
                print(printable(f"  {entry.name:<{width}}  {entry.summary}{aliases}"))
        print()
    print("`lamina drivers NAME` shows the options of a driver.")


def _all() -> list[dict[str, Any]]:
    return [_head(entry) for entry in _entries()]


def _one(name: str) -> dict[str, Any]:
    return _head(registry.entry(name)) | {key: schema.to_json() for key, (_, schema) in driver_schemas(name).items()}


def _head(entry: registry.Entry) -> dict[str, Any]:
    return {"name": entry.name, "kind": entry.kind, "summary": entry.summary, "aliases": list(entry.aliases)}

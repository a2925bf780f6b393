"""Writes docs/nbd-protocol.md from `lamina.nbd.wire`, the table of the protocol: `make docs`. A test holds both equal."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lamina.layout import Structure
from lamina.nbd import wire

PAGE = Path(__file__).with_name("nbd-protocol.md")

_HEAD = """\
# The NBD protocol, as Lamina speaks it

Generated from `src/lamina/nbd/wire.py`: do not edit. Names are those of the published specification without `NBD_`; all
integers are big-endian. Extended headers and what depends on them are an experimental extension of the specification.
"""


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for title, rows in groups(Path(wire.__file__).read_text(encoding="utf-8")):
        parts += [f"\n## {title}\n", "| name | value | meaning |", "|---|---|---|"]
        parts += [f"| `{name}` | {shown(getattr(wire, name))} | {meaning} |" for name, meaning in rows]
    parts.append("\n## Layouts")
    for structure in (one for one in vars(wire).values() if isinstance(one, Structure)):
        parts.append(f"\n### {structure.name} ({structure.size} bytes)\n")
        if structure.doc:
            parts.append(f"{structure.doc[0].upper()}{structure.doc[1:]}.\n")
        parts += ["| offset | type | field | meaning |", "|---|---|---|---|"]
        parts += [f"| {field.offset} | {field.type} | `{field.name}` | {field.doc} |" for field in structure]
    return "\n".join(parts) + "\n"


def groups(source: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """The titled groups of constants with their meanings, in the order of the file."""
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for line in source.splitlines():
        if title := re.fullmatch(r"# == (.+)", line):
            found.append((title[1], []))
        elif (constant := re.fullmatch(r"(\w+): Final = .+?  #: (.+)", line)) and found:
            found[-1][1].append((constant[1], constant[2]))
    return [(title, rows) for title, rows in found if rows]


def shown(value: int | str) -> str:
    """A value as its readers know it: small numbers and sizes in decimal, magic numbers in hexadecimal."""
    if isinstance(value, str):
        return f"`{value}`"
    if value >= 1 << 31:
        return f"{value:#x}"
    return f"{value:,}" if value > 4096 and value & (value - 1) else f"{value}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name}: {len(page().splitlines())} lines\n")

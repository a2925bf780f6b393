"""`lamina graph`: the opened nodes of an image as a tree: text, JSON or a picture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from ..errors import printable
from ..node_tree import tree
from ..options import format_size
from .arguments import Parser, open_image

_EXAMPLES = """
  lamina graph -f qcow2 overlay.qcow2
  lamina graph --output=svg -f qcow2 overlay.qcow2 > overlay.svg
  lamina graph --image-opts driver=throttle,image.driver=qcow2,image.file.filename=disk.qcow2
"""

#: The marks of a branch, of the last one, and what continues below them; for terminals that have such characters, and others.
_LINES = (("├─ ", "└─ ", "│  ", "   "), ("|- ", "`- ", "|  ", "   "))


def main(argv: list[str]) -> int:
    parser = Parser("graph", "Show the nodes that an image consists of when it is open. Nothing is changed.", _EXAMPLES)
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: detected)")
    parser.add_argument(
        "--output",
        choices=("human", "json", "svg"),
        default="human",
        help="format of the output (default: human); svg is a picture in one file",
    )
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image")
    args = parser.parse(argv)

    with open_image(args.filename, args, args.format) as image:
        found = tree(image)
    if args.output == "json":
        import json

        sys.stdout.write(json.dumps(found, indent=4) + "\n")
    elif args.output == "svg":
        from .graph_picture import picture

        sys.stdout.write(picture(found))
    else:
        lines = _LINES[0] if _has_lines() else _LINES[1]
        sys.stdout.write("".join(f"{line}\n" for line in _text(found, "", "", "", lines)))
    return 0


def _has_lines() -> bool:
    try:
        "".join(_LINES[0]).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _text(node: dict[str, Any], role: str, first: str, rest: str, lines: tuple[str, ...]) -> Iterator[str]:
    yield first + (f"{printable(role)}: " if role else "") + printable(", ".join(words(node)))
    edges = node.get("children", ())
    for number, edge in enumerate(edges):
        branch, below = (lines[1], lines[3]) if number + 1 == len(edges) else (lines[0], lines[2])
        yield from _text(edge["node"], edge["role"], rest + branch, rest + below, lines)


def words(node: dict[str, Any]) -> Iterator[str]:
    """What people read about a node: its driver and name, then its properties."""
    yield f"{node['driver']} ({node['name']})" if not node["name"].startswith(node["driver"] + "#") else node["name"]
    if "shared" in node:
        yield "see above"
        return
    if node.get("filename") is not None:
        yield node["filename"]
    yield format_size(node["size"])
    if node.get("allocated") is not None:
        yield f"{format_size(node['allocated'])} allocated"
    yield "read-only" if node["read-only"] else "writable"
    yield from (f"{key}={value}" for key, value in node["options"].items())

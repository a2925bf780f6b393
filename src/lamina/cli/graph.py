"""`lamina graph`: the opened nodes of an image as a tree: text, JSON or a picture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import command_hint, printable
from ..graph import open_graph
from ..node_tree import tree_of_opened
from ..options import format_size
from .arguments import Parser, image_source, tell_of_writers

if TYPE_CHECKING:
    from ..node import Node
    from ..references import Unopened

_EXAMPLES = """
  lamina graph -f qcow2 overlay.qcow2
  lamina graph --svg -o overlay.svg -f qcow2 overlay.qcow2
  lamina graph --image-opts driver=throttle,image.driver=qcow2,image.file.filename=disk.qcow2
"""

#: The marks of a branch, of the last one, and what continues below them; for terminals that have such characters, and others.
_LINES = (("├─ ", "└─ ", "│  ", "   "), ("|- ", "`- ", "|  ", "   "))
#: An older output begins with the same characters, which no image does: "<svg", "{" and spaces, or the name of a driver.
_ALIKE = 4


def main(argv: list[str]) -> int:
    parser = Parser("graph", "Show the nodes that an image consists of when it is open. Nothing is changed.", _EXAMPLES)
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: detected)")
    parser.add_argument(
        "--output",
        choices=("human", "json", "svg"),
        default="human",
        help="format of the output (default: human); svg is a picture in one file",
    )
    parser.add_argument("--svg", dest="output", action="store_const", const="svg", help="the same as --output svg")
    parser.add_argument(
        "-o", "--output-file", metavar="FILE", default="-", help="write to this file (default: standard output)"
    )
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image")
    args = parser.parse(argv)

    unopened: Unopened = {}
    node = open_graph(
        image_source(args.filename, args, args.format),
        format=args.format or "probe",
        policy=args.references,
        budget=args.limits,
        force_share=args.force_share,
        unopened=unopened,
    )
    try:
        if args.force_share:
            tell_of_writers(node)
        found = tree_of_opened(node, unopened)
        if args.output_file == "-":
            sys.stdout.write(_told(found, args.output, blocks=_has_lines()))
        else:
            _write(args.output_file, node, _told(found, args.output, blocks=True))
    finally:
        node.close()
    for one in (one for ones in unopened.values() for one in ones):
        raise one.error  # what could be opened is told; the command did not do all that it was asked for
    return 0


def _write(path: str, node: Node, text: str) -> None:
    """Write the output to a file that is no file of the image, and is new, empty, or an older output of the same kind."""
    from ..own_files import refuse_other, refuse_own
    from ..side_file import SideFile

    refuse_own(node, path, what="image")
    refuse_other(path, text[:_ALIKE].lower().encode("utf-8"), "older output of this command")
    with SideFile(path) as file:
        file.write(text)


def _told(found: dict[str, Any], output: str, *, blocks: bool) -> str:
    if output == "json":
        import json

        return json.dumps(_in_words_of_the_command(found), indent=4) + "\n"
    if output == "svg":
        from .graph_picture import picture

        return picture(found)
    lines = _LINES[0] if blocks else _LINES[1]
    return "".join(f"{line}\n" for line in _text(found, "", "", "", lines))


def _in_words_of_the_command(node: dict[str, Any]) -> dict[str, Any]:
    """The node, and those below it, with hints as the command line gives them."""
    if "not-opened" in node:
        why = node["not-opened"]
        return node | {"not-opened": why | {"hint": command_hint(why["hint"])}}
    if "children" not in node:
        return node
    edges = [edge | {"node": _in_words_of_the_command(edge["node"])} for edge in node["children"]]
    return node | {"children": edges}


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
    if "not-opened" in node:
        why = node["not-opened"]
        yield node["driver"] or "unknown format"
        yield node["filename"]
        yield f"not opened: {why['message']}"
        return
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

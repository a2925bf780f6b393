"""Storage that is far away is no special case: jobs and commands know nodes and their options, and no protocol by name.

What a command line says of servers (`--timeout`, `--connections`, `--reconnect`) it says as options of storage.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent.parent / "src" / "lamina"
#: Commands that are about servers themselves, and what they are made of.
ABOUT_SERVERS = {"serve", "serve_folder", "info", "info_nbd", "map_nbd", "nbd_names"}
#: `map` has `map --context`, and hands it on.
HANDS_ON = {"map": {"map_nbd"}, "program": {"nbd.inspect"}}
#: The names of the reference tools, one of which is a server.
TOOLS = "personality"
#: The last resort of a program whose server says nothing: connections are broken.
ENDS = {"signals": {"lamina.nbd.links"}}
FILES = [
    file
    for folder in ("jobs", "cli")
    for file in sorted((SOURCE / folder).rglob("*.py"))
    if not (folder == "cli" and (file.stem in ABOUT_SERVERS or file.parent.name == TOOLS))
]


def named(source: str) -> Iterator[str]:
    """The names in `source` that speak of NBD: modules, variables, attributes, arguments, and texts that name a module."""
    for node in ast.walk(ast.parse(source)):
        words: list[str] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            words = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        elif isinstance(node, ast.Name):
            words = [node.id]
        elif isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.arg | ast.keyword):
            words = [node.arg or ""]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            words = [node.name]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            words = [node.value]
        yield from (word for word in words if "nbd" in word.lower())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_nobody_names_nbd(file: Path) -> None:
    allowed = {**HANDS_ON, **ENDS}.get(file.stem, set())
    assert set(named(file.read_text())) <= allowed


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..nbd import Client", {"nbd"}),
        ("from .nbd_names import names_export", {"nbd_names"}),
        ("import lamina.nbd.links", {"lamina.nbd.links"}),
        ("x = NbdStorage", {"NbdStorage"}),
        ("open({'driver': 'nbd'})", {"nbd"}),
        ("f(nbd=1)", {"nbd"}),
        ('"""As in `lamina copy nbd://server/disk there`."""', set()),
    ],
)
def test_what_names_nbd(source: str, found: set[str]) -> None:
    assert set(named(source)) == found

"""The examples are short, use only public names, and are all shown; `test_blocks` runs them as the page shows them."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_public(path: Path) -> None:
    source = path.read_text()
    assert sum(bool(line.strip()) for line in source.splitlines()) < 20
    assert ast.get_docstring(ast.parse(source))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr == "__name__"
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lamina":
            module = importlib.import_module(node.module or "")
            assert {alias.name for alias in node.names} <= set(module.__all__)


def test_all_examples_are_shown_and_run() -> None:
    page = (ROOT / "docs" / "examples.md").read_text()
    assert len(EXAMPLES) >= 11
    for path in EXAMPLES:
        assert f"<!-- generated: example examples/{path.name} -->" in page
        assert f"$ python {path.name} " in page or f"$ python -m pytest -q {path.name}\n" in page

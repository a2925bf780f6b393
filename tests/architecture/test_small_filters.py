"""Filters stay small: code that two filters need belongs to the layer of the nodes. Only lines that hold code are counted."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

FILTERS = Path(__file__).resolve().parent.parent.parent / "src" / "lamina" / "filters"

#: So many filters have at most so many lines.
SMALL, MOST = 10, 30

_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """How many lines of `source` hold code: neither blank nor only a comment, and not part of a docstring."""
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                held.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(held)


def statements_on_one_line(source: str) -> list[int]:
    """Lines on which more than one simple statement stands, which the count of lines would miss."""
    starts = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    return sorted({line for line in starts if starts.count(line) > 1})


def test_the_smallest_filters_are_small() -> None:
    counts = sorted(
        (code_lines(file.read_text()), file.stem) for file in FILTERS.glob("*.py") if file.stem != "__init__"
    )[:SMALL]
    assert len(counts) == SMALL
    large = [f"{name}: {lines}" for lines, name in counts if lines > MOST]
    assert not large, f"more than {MOST} lines of code: {', '.join(large)}"


def test_no_filter_is_small_by_crowding() -> None:
    crowded = {file.name: lines for file in FILTERS.glob("*.py") if (lines := statements_on_one_line(file.read_text()))}
    assert not crowded


def test_how_lines_are_counted() -> None:
    source = '''"""A docstring
of two lines."""

import os  # a comment

# only a comment


class Thing:
    """What it is."""

    text = """not
    a docstring"""

    def work(
        self,
    ) -> None:
        """Says it."""
        "a string that is no docstring"
'''
    assert code_lines(source) == 1 + 1 + 2 + 3 + 1
    assert statements_on_one_line("x = 1; y = 2\nif x: y = 3\nz = 4\n") == [1, 2]

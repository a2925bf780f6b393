"""The shape of the code inside its layers: no circle of imports, and formats that use only public members of others.

Read from the source with `ast`, as in `test_layers`; each rule has a test that shows that it can fail.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_layers import MODULES, PACKAGE, PACKAGE_FILES, from_root, imported, module_name

#: They make up the contract of a node together.
TOGETHER = [{"node", "request", "graph"}]
#: Public members of named tuples, whose names begin with an underscore so that no field has them.
OF_NAMED_TUPLES = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules each of which imports, by way of others, every other one of its group."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        found: set[str] = set()
        waiting = [module]
        while waiting:
            for target in imports.get(waiting.pop(), set()) - found:
                found.add(target)
                waiting.append(target)
        reached[module] = found
    inside = [module for module, found in reached.items() if module in found]
    groups = {frozenset(other for other in reached[module] if module in reached.get(other, ())) for module in inside}
    return [set(group) for group in groups]


def test_no_import_circle() -> None:
    imports = {}
    for file in PACKAGE_FILES:
        module = module_name(file)
        targets = {target for _, target in imported(file.read_text(), module, file.name == "__init__.py", MODULES)}
        imports[module] = targets - {module, ""}  # names of the package's own __init__ are loaded on demand
    wrong = [sorted(group) for group in circles(imports) if not any(group <= pair for pair in TOGETHER)]
    assert not wrong, f"modules that import one another: {wrong}"


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def foreign(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each use of a private member of an object of another module."""
    tree = ast.parse(source)
    # What this module calls so itself: a class may use private members of others of its kind.
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own |= {
        node.attr for node in uses if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls")
    }
    for node in uses:
        if not node.attr.startswith("_") or node.attr.startswith("__") or node.attr in own | OF_NAMED_TUPLES:
            continue
        if ast.unparse(node.value) not in ("self", "cls", "super()"):
            yield node.lineno, ast.unparse(node)


FORMATS = [file for file in PACKAGE_FILES if file.is_relative_to(PACKAGE / "formats")]


@pytest.mark.parametrize("file", FORMATS, ids=from_root)
def test_formats_use_no_private_member_of_another_object(file: Path) -> None:
    assert not list(foreign(file.read_text())), "public methods of that object should do this"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("node._tables", ["node._tables"]),
        ("self._node._tables.flush()", ["self._node._tables"]),
        ("class A:\n    def f(self, other):\n        self._x = other._x", []),
        ("row._replace(a=1)", []),
        ("super()._close()", []),
    ],
)
def test_private_members_are_found(source: str, found: list[str]) -> None:
    assert [text for _, text in foreign(source)] == found

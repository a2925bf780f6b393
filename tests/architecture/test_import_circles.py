"""No module imports itself by way of others, function-level imports included; imports for the type checker are free."""

from __future__ import annotations

from collections.abc import Mapping

from .test_layers import MODULES, PACKAGE_FILES, imported, module_name

#: Modules that may import one another.
ALLOWED = (
    {"node", "request", "graph"},
    # A channel makes the encrypted one over itself, in a function.
    {"nbd.channel", "nbd.tls_channel"},
    # A new image is laid out by the driver, in a function.
    {"formats.qcow2.create", "formats.qcow2.driver"},
)


def circles(imports: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of two or more modules of which each imports every other, directly or not."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        found, line = set(), [module]
        while line:
            new = imports.get(line.pop(), set()) - found
            found |= new
            line += new
        reached[module] = found
    each = {frozenset(other for other in reached[one] if one in reached.get(other, ())) for one in reached}
    return [set(one) for one in each if len(one) > 1]


def test_no_module_imports_itself_by_way_of_others() -> None:
    imports = {}
    for file in PACKAGE_FILES:
        module = module_name(file)
        targets = {name for _, name in imported(file.read_text(), module, file.name == "__init__.py", MODULES)}
        imports[module] = targets - {module, ""}
    wrong = [sorted(circle) for circle in circles(imports) if not any(circle <= known for known in ALLOWED)]
    assert not wrong, f"these modules import one another: {wrong}"


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == [{"a", "b", "c"}]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []

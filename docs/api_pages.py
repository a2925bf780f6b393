"""Writes the pages of the Python API from signatures and docstrings, for the site alone: `site_hooks` adds them to each
build, so they are never older than the code."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

#: Page -> (title, what the page is about, names of `lamina.__all__`). Names that no page has are on the page `functions`.
_PUBLIC: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "functions": ("Functions", "What a program calls first. All names are imported from `lamina`.", ()),
    "images": ("Images and graphs", "An opened disk, and the graph of nodes that serves it.", ("Image", "Graph")),
    "extents": ("Extents", "The status and the location of bytes, exact, in columns.", ("Extents", "Extent")),
    "errors": (
        "Errors",
        "Every error that Lamina raises on purpose derives from `LaminaError`.",
        (
            "LaminaError", "BlockIOError", "Cancelled", "Closed", "CorruptImage", "FormatError", "LimitExceeded", "Locked",
            "NotFound", "NotSupported", "OptionError", "OutOfRange", "PolicyError", "ReadOnly", "UnsupportedFeature",
        ),
    ),
    "limits": (
        "Policies, budgets and secrets",
        "What an image may open, and what it may cost: see [Untrusted images](../safety.md).",
        ("Policy", "Budget", "Limits", "Secret"),
    ),
}  # fmt: skip

#: Module -> what its page is about.
_MODULES = {
    "aio": "Images and whole-image work that are awaited: see [asyncio](../asyncio.md).",
    "nbd": "Servers and clients of NBD: see [NBD](../nbd/index.md).",
    "testing": "Tests for drivers, and for any code that stores data: see [its tutorial](../testing-your-own.md).",
}
#: The lists of public names, which a test holds: FOR_PROGRAMS and FOR_DRIVERS, by modules.
_LISTS = Path(__file__).resolve().parent.parent / "tests" / "architecture" / "test_public_names.py"

#: The page of which `pages` yields only the list at its end.
INDEX = "api/index.md"

#: Names of `__all__` that no page describes, with the reason.
_LEFT_OUT = {"__version__": "a string"}


def pages() -> Iterator[tuple[str, str]]:
    """(path below the folder of the pages, Markdown) of each page."""
    import lamina

    placed = {name for _, _, names in _PUBLIC.values() for name in names} | set(_LEFT_OUT)
    rest = [name for name in lamina.__all__ if name not in placed]
    types = [name for name in rest if inspect.isclass(getattr(lamina, name))]
    listed = dict(_PUBLIC)
    title, text, _ = listed["functions"]
    listed["functions"] = (title, text, tuple(name for name in rest if name not in types))
    if types:
        listed["results"] = (
            "Results",
            "What functions return: immutable, with `to_json` where a command prints it.",
            tuple(types),
        )
    contents: list[str] = []
    for name, (title, text, names) in listed.items():
        yield f"api/{name}.md", "\n".join([f"# {title}\n", f"{text}\n", *_members(lamina, names)])
        contents.append(_entry(title, f"{name}.md", "lamina", names))
    for name, text in _MODULES.items():
        names = sorted(public("FOR_PROGRAMS")[name])
        module = import_module(f"lamina.{name}")
        yield f"api/{name}.md", "\n".join([f"# lamina.{name}\n", f"{text}\n", *_members(module, names)])
        contents.append(_entry(f"lamina.{name}", f"{name}.md", module.__name__, names))
    contents.append("\n## For authors of drivers\n")
    for name, of in sorted(public("FOR_DRIVERS").items()):
        if of == {"*"}:  # forms of JSON, which have a page
            continue
        module = import_module(f"lamina.{name}")
        head = [f"# lamina.{name}\n", f"{_docstring(module)}\n"]
        yield f"api/drivers/{name}.md", "\n".join([*head, *_members(module, sorted(of))])
        contents.append(_entry(f"lamina.{name}", f"drivers/{name}.md", module.__name__, sorted(of)))
    yield INDEX, "\n".join(contents) + "\n"


def public(of: str) -> dict[str, set[str]]:
    """The public names by modules, from the list `of` of the test that holds them."""
    for node in ast.parse(_LISTS.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == of:
            return {name: set(text.split()) for name, text in ast.literal_eval(node.value).items()}
    raise ValueError(f"{_LISTS} has no list {of}")


def _entry(title: str, page: str, module: str, names: Iterable[str]) -> str:
    return f"- [{title}]({page}): " + ", ".join(f"[`{one}`]({page}#{module}.{one})" for one in names)


def _members(module: ModuleType, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        value = getattr(module, name)
        anchor = f"{module.__name__}.{name}"
        yield f"## {name} {{ #{anchor} }}\n"
        if inspect.isclass(value):
            yield from _class(value, anchor)
        elif callable(value):
            yield from _function(name, value)
        else:
            yield f"`{name} = {value!r}`\n"


def _class(value: type, anchor: str) -> Iterator[str]:
    bases = [base.__name__ for base in value.__bases__ if base not in (object, tuple)]
    of = f"({', '.join(bases)})" if bases else ""
    shown = [] if "__init__" not in vars(value) else [f"\n{_signature(value.__name__, value)}"]
    yield f"```text\nclass {value.__name__}{of}{''.join(shown)}\n```\n"
    yield f"{_docstring(value)}\n"
    if fields := list(_fields(value)):
        yield "| field | type | default | meaning |\n|---|---|---|---|"
        yield from (
            f"| `{name}` | `{_cell(kind)}` | {default and f'`{_cell(default)}`'} | {_cell(text)} |"
            for name, kind, default, text in fields
        )
        yield ""
    for name, member in inspect.getmembers_static(value):
        if name.startswith(("_", "test_")) or not _is_own(value, name) or name in {field for field, *_ in fields}:
            continue
        found = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if isinstance(found, property):
            yield f"### {name} {{ #{anchor}.{name} }}\n"
            kind = found.fget.__annotations__.get("return", "") if found.fget else ""
            yield f"```text\n{name}: {kind}\n```\n\n{_docstring(found)}\n"
        elif callable(found):
            yield f"### {name} {{ #{anchor}.{name} }}\n"
            yield from _function(name, found, kind="classmethod " if isinstance(member, classmethod) else "")


def _is_own(value: type, name: str) -> bool:
    """Whether a class of Lamina defines the member, not Python."""
    owner = next((one for one in value.__mro__ if name in vars(one)), object)
    return owner.__module__.partition(".")[0] == "lamina"


def _function(name: str, function: Any, kind: str = "") -> Iterator[str]:
    yield f"```text\n{kind}{_signature(name, function)}\n```\n"
    yield f"{_docstring(function)}\n"


def _signature(name: str, function: Any) -> str:
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return f"{name}(...)"
    parameters = [one for key, one in found.parameters.items() if key not in ("self", "cls")]
    short = str(found.replace(parameters=parameters))
    line = f"{name}{_unquoted(short)}"
    if len(line) <= 100:
        return line
    rows: list[str] = []
    star = False
    for one in parameters:
        if one.kind is inspect.Parameter.VAR_POSITIONAL:
            star = True
        elif one.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            rows.append("    *,")
            star = True
        rows.append(f"    {_unquoted(str(one))},")
    tail = (
        "" if found.return_annotation is inspect.Signature.empty else f" -> {_unquoted(str(found.return_annotation))}"
    )
    return "\n".join([f"{name}(", *rows, f"){tail}"])


def _unquoted(text: str) -> str:
    """Annotations are strings in the modules of Lamina."""
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)
    return re.sub(r"<(?:function|object|class)[^<>]*>", "...", text)


def _docstring(value: Any) -> str:
    """The docstring as Markdown: its indented examples are code."""
    text = inspect.cleandoc(value.__doc__ or "").replace("<", "&lt;")
    parts = re.split(r"\n\n", text)
    for number, part in enumerate(parts):
        if part.startswith("    "):
            parts[number] = f"```text\n{textwrap.dedent(part).replace('&lt;', '<')}\n```"
    return "\n\n".join(parts)


def _fields(value: type) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of the fields of a record; the meaning is the comment `#:` beside the field."""
    if not (hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__")):
        return
    source = textwrap.dedent(inspect.getsource(value))
    lines = source.splitlines()
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if (
            not isinstance(node, ast.AnnAssign)
            or not isinstance(node.target, ast.Name)
            or node.target.id.startswith("_")
        ):
            continue
        comment = [lines[node.end_lineno - 1].partition("#:")[2].strip()] if node.end_lineno else []
        above = node.lineno - 2
        before: list[str] = []
        while lines[above].strip().startswith("#:"):
            before.insert(0, lines[above].strip()[2:].strip())
            above -= 1
        default = ast.unparse(node.value) if node.value is not None else ""
        yield node.target.id, ast.unparse(node.annotation), default, " ".join(filter(None, before + comment))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for path, content in pages():
        sys.stdout.write(f"{path}: {len(content.splitlines())} lines\n")

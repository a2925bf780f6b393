"""Writes the parts of pages that are made from the code: `make docs`. A test holds the pages equal to it.

A part stands between `<!-- generated: KIND WORDS -->` and `<!-- end -->`:

| kind | words | content |
|---|---|---|
| `command` | a command | its usage, its options by groups, and its exit statuses |
| `commands` | | all commands, with links to their pages |
| `opening` | | the options that all commands have which open images |
| `statuses` | | the exit statuses of every command |
| `driver` | a driver | its options: of a node, of a new image, those that can be changed |
| `drivers` | `storage`, `format` or `filter` | all drivers of the kind, with links to their pages |
| `node` | | the options of every node |
| `example` | a file | its text |
| `detected` | | the formats that are detected, and whether Lamina opens them |
| `io` | | the commands of `lamina io` |
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lamina import detection, registry
from lamina.cli.described import Option, groups_of, names_of, parser_of, statuses_of
from lamina.cli.io.commands import COMMANDS as COMMANDS_OF_IO
from lamina.cli.main import COMMANDS
from lamina.cli.schema_text import driver_schemas
from lamina.schema import REQUIRED, Schema
from lamina.schema import Option as SchemaOption

ROOT = Path(__file__).resolve().parent.parent
_PART = re.compile(
    r"(?P<begin><!-- generated: (?P<kind>[\w-]+)(?P<words>[^\n]*?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)
_OPENING = "opening images"


def pages() -> Iterator[Path]:
    """The pages that may have such parts."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def filled(text: str) -> str:
    """The text of a page with its generated parts made anew."""
    return _PART.sub(lambda found: found["begin"] + _made(found["kind"], found["words"].split()) + found["end"], text)


def _made(kind: str, words: list[str]) -> str:
    return "\n" + "\n".join(_KINDS[kind](*words)).strip("\n") + "\n\n"


def _command(command: str) -> Iterator[str]:
    parser = parser_of(command)
    names = " ".join(names_of(parser))
    yield f"```text\nlamina {command} [OPTIONS] {names}".rstrip() + "\n```\n"
    groups = list(groups_of(parser))
    for title, options in groups:
        if title == _OPENING:
            flags = ", ".join(f"`{option.flags[-1]}`" for option in options)
            yield f"Also the [options for opening images](index.md#options-for-opening-images): {flags}.\n"
            continue
        options = [option for option in options if "--help" not in option.flags]
        if options:
            if title != "options":
                yield f"{title.capitalize()}:\n"
            yield from _options(options)
    yield "| exit status | |\n|---|---|"
    yield from (f"| {status} | {meaning} |" for status, meaning in statuses_of(command))


def _options(options: list[Option]) -> Iterator[str]:
    yield "| option | meaning |\n|---|---|"
    for option in options:
        flags = ", ".join(f"`{flag}`" for flag in option.flags)
        value = f" `{option.value}`" if option.value else ""
        yield f"| {flags}{_cell(value)} | {_cell(option.help)} |"
    yield ""


def _commands() -> Iterator[str]:
    yield "| command | |\n|---|---|"
    yield from (f"| [`{name}`]({name}.md) | {summary} |" for name, (_, summary) in COMMANDS.items())


def _opening() -> Iterator[str]:
    found = {
        option.flags: option
        for command in COMMANDS
        for title, options in groups_of(parser_of(command))
        if title == _OPENING
        for option in options
    }
    yield from _options(list(found.values()))


def _statuses() -> Iterator[str]:
    for command in COMMANDS:
        yield f"### lamina {command}\n\n| exit status | |\n|---|---|"
        yield from (f"| {status} | {meaning} |" for status, meaning in statuses_of(command))
        yield ""


def _driver(name: str) -> Iterator[str]:
    for key, (title, schema) in driver_schemas(name).items():
        if key == "common-options":
            continue
        if key != "options":
            yield f"{title}\n"
        yield from _schema(schema)
    yield "Every node also has the [common options](../graphs.md#options-of-every-node)."


def _schema(schema: Schema) -> Iterator[str]:
    yield "| option | takes | default | meaning |\n|---|---|---|---|"
    for name, _, default, doc in schema.help():
        option = _found(schema, name)
        shown = "required" if default == REQUIRED else default and f"`{default}`"
        also = f" (also {', '.join(f'`{alias}`' for alias in option.aliases)})" if option.aliases else ""
        yield f"| `{name}` | {_cell(_takes(option))} | {_cell(shown)} | {_cell(doc)}{also} |"
    yield ""


def _found(schema: Schema, name: str) -> SchemaOption:
    """The option with this dotted name; `N` stands for the number of an element of a list."""
    first, _, rest = name.partition(".")
    option = schema[first]
    inside = rest.removeprefix("N.")
    return _found(option.items, inside) if inside and isinstance(option.items, Schema) else option


def _takes(option: SchemaOption) -> str:
    if option.type == "list" and isinstance(option.items, SchemaOption):
        return f"a list; each: {option.items.takes()}"
    return {"list": "a list of groups", "dict": "a group", "any": "a value"}.get(option.type) or option.takes()


def _drivers(kind: str) -> Iterator[str]:
    yield "| driver | |\n|---|---|"
    for name in registry.names():
        found = registry.entry(name)
        if found.kind == kind:
            also = f" (also {', '.join(f'`{alias}`' for alias in found.aliases)})" if found.aliases else ""
            page = "../qcow2.md" if name == "qcow2" else f"{name}.md"
            yield f"| [`{name}`]({page}) | {found.summary}{also} |"


def _node() -> Iterator[str]:
    _, schema = driver_schemas("raw")["common-options"]
    yield from _schema(schema)


def _example(name: str) -> Iterator[str]:
    yield f'```python title="{Path(name).name}"\n{(ROOT / name).read_text(encoding="utf-8").rstrip()}\n```'


def _detected() -> Iterator[str]:
    yield "| name | format | opened |\n|---|---|---|"
    supported = registry.names("format")
    for name, found in detection.FORMATS.items():
        also = f" (also {', '.join(f'`{alias}`' for alias in found.aliases)})" if found.aliases else ""
        yield f"| `{name}` | {found.summary}{also} | {'yes' if name in supported else 'no'} |"


def _io() -> Iterator[str]:
    yield "| command | |\n|---|---|"
    for name, one in sorted(COMMANDS_OF_IO.items()):
        short = f", `{one.alias}`" if one.alias else ""
        yield f"| `{name}`{short} | {_cell(one.summary)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


_KINDS: dict[str, Callable[..., Iterator[str]]] = {
    "command": _command,
    "commands": _commands,
    "opening": _opening,
    "statuses": _statuses,
    "driver": _driver,
    "drivers": _drivers,
    "node": _node,
    "example": _example,
    "detected": _detected,
    "io": _io,
}


def main() -> None:
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{page.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()

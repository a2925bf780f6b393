"""Writes docs/json.md, the JSON outputs, from their schemas: `make docs`. A test holds both equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lamina import json_forms as forms
from lamina import json_forms_nbd as nbd_forms
from lamina import json_schema
from lamina.check_result import CheckResult
from lamina.detection import Detection
from lamina.explanation import Explanation, Overview, Step
from lamina.job_results import (
    BenchResult,
    CommitResult,
    CompactResult,
    CompareResult,
    ConvertResult,
    CopyResult,
    FlattenResult,
    MeasureResult,
    RebaseResult,
    ResizeResult,
)
from lamina.layers import Layer
from lamina.results import ImageInfo, Snapshot
from lamina.status import Extent
from lamina.verdict.result import Verdict

PAGE = Path(__file__).with_name("json.md")

_HEAD = """\
# JSON

Commands with `--output json` print one JSON value on standard output, in UTF-8; `lamina serve` prints one line. Offsets,
lengths and sizes are bytes, unless a key names another unit. What is unknown, or does not exist for an image, is left out
where the table says "optional", and null where it says so. Programs should ignore keys that they do not know: a later version
may print more.

In Python the results of functions have the same by `to_json()`, and `lamina.json_schema` returns a JSON Schema (draft
2020-12) of it, by name or by class. The schema is that of the installed version, and admits no other key. Where a command
prints what no function returns, the types are in
`lamina.json_forms` and `lamina.json_forms_nbd`:

```python
import lamina
from lamina.json_forms import DriverJson

lamina.json_schema("ImageInfo")  # one image
lamina.json_schema(list[lamina.ImageInfo])  # a chain
lamina.json_schema(DriverJson)  # a driver
```

This page is made from these schemas.
"""


class Output(NamedTuple):
    """What a command prints. `python`: how a program gets the same."""

    command: str
    kind: Any
    text: str
    python: str = ""


OUTPUTS = (
    Output("lamina info", ImageInfo, "One object.", "`lamina.info`"),
    Output("lamina info --backing-chain", list[ImageInfo], "A list, from top to bottom.", "`lamina.info_chain`"),
    Output("lamina info nbd://...", nbd_forms.ExportsJson, "For an NBD server, and with `--list` all its exports."),
    Output("lamina snapshot -l", list[Snapshot], "A list, in the order of the image.", "`Image.snapshots`"),
    Output("lamina check", CheckResult, "One object.", "`lamina.check`"),
    Output("lamina map", list[Extent], "A list without gaps, in order.", "`Image.extents`"),
    Output("lamina map --context", list[nbd_forms.ContextRangeJson], "A list, by the names of nbdinfo."),
    Output(
        "lamina map --context --totals", list[nbd_forms.ContextTotalJson], "A list, with one member for each status."
    ),
    Output("lamina explain FILE", Overview, "Without an offset: an overview.", "`lamina.structures`"),
    Output("lamina explain FILE OFFSET", list[Explanation], "A list: one for each offset.", "`lamina.explain`"),
    Output("lamina explain --guest", list[forms.GuestPathJson], "A list: one for each offset."),
    Output("", list[Step], "The layers of one such path.", "`lamina.explain_guest`"),
    Output("lamina inspect", Verdict, "One object.", "`lamina.inspect`"),
    Output("lamina diff", forms.DiffJson, "One object. `lamina.diff` returns the same ranges one by one."),
    Output("lamina graph", forms.NodeJson, "The node on top, with those below it.", "`lamina.tree`"),
    Output("lamina measure", MeasureResult, "One object.", "`lamina.measure`"),
    Output("lamina compact", CompactResult, "One object.", "`lamina.compact`"),
    Output("lamina copy", CopyResult, "One object.", "`lamina.copy`"),
    Output("lamina bench", BenchResult, "One object.", "`lamina.bench`"),
    Output("lamina drivers", list[forms.DriverJson], "A list of drivers, without their options."),
    Output("lamina drivers NAME", forms.DriverJson, "One driver, with its options."),
    Output("lamina serve", nbd_forms.ServingJson, "One line, when clients can connect."),
    Output("Errors", forms.ErrorJson, "On standard error, where a command with `--output json` fails."),
    Output("Whole images", ConvertResult, "No command prints the results of this section.", "`lamina.convert`"),
    Output("", CompareResult, "A comparison.", "`lamina.compare`"),
    Output("", CommitResult, "A commit.", "`lamina.commit`"),
    Output("", RebaseResult, "Another backing file.", "`lamina.rebase`"),
    Output("", FlattenResult, "No backing file any more.", "`lamina.flatten`"),
    Output("", ResizeResult, "Another size.", "`lamina.resize`"),
    Output("", Detection, "The format of a file.", "`lamina.detect`"),
    Output("Layers", list[Layer], "No command prints it; a list from top to bottom.", "`Image.layers`"),
)


def page() -> str:
    """The content of docs/json.md."""
    parts, done = [_HEAD], set[str]()
    for output in OUTPUTS:
        schema = json_schema(output.kind)
        objects = dict(_objects(schema))
        same = f" In Python: {output.python}." if output.python else ""
        title = f"## {output.command}\n\n" if output.command else ""
        new = [name for name in objects if name not in done]
        known = ", ".join(f"[{name}](#{name.lower()})" for name in objects if name not in new)
        parts.append(f"{title}{output.text}{same}" + (f" Its objects: {known}." if known and not new else "") + "\n")
        parts += [_table(name, objects[name]) for name in new]
        done |= objects.keys()
    return "\n".join(parts)


def _objects(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The named objects of a schema, the outermost first."""
    if schema.get("type") == "object":
        yield schema["title"], schema
    yield from schema.get("$defs", {}).items()


def _table(name: str, schema: dict[str, Any]) -> str:
    rows = [f"| `{key}` | {_cell(key in schema['required'], one)} |" for key, one in schema["properties"].items()]
    return (
        f"### {name}\n\n{schema.get('description', '')}\n\n| key | value | meaning |\n| --- | --- | --- |\n"
        + "\n".join(rows)
    ).replace("\n\n\n", "\n\n") + "\n"


def _cell(required: bool, schema: dict[str, Any]) -> str:
    text = schema.get("description", "").replace("|", "\\|")
    return f"{_type(schema)}{'' if required else ', optional'} | {text}"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{_literal(one)}`" for one in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any value")
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    if kind == "object":
        inner = schema.get("additionalProperties", {})
        return f"object of {_type(inner)} by name" if inner else "object"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def main() -> None:
    PAGE.write_text(page())
    print(PAGE)


if __name__ == "__main__":
    main()

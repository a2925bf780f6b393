"""One HTML page of a document: style, script and data in one text that refers to nothing else.

The content security policy allows this style and this script alone, by their hashes, and no connection to anywhere. The
data is JSON in which no markup can begin. The script only ever creates text from it, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import Any

from .. import palette
from ..errors import printable
from ..file_map import KINDS
from ..version import __version__

#: The parts of the script, in order. Each is about one subject.
SCRIPTS = (
    "model.js", "inflate.js", "columns.js", "rounding.js", "numbers.js", "elements.js", "theme.js", "tracks.js",
    "painting.js", "lanes.js", "describe.js", "disk.js", "files.js", "chain.js", "start.js",
)  # fmt: skip


def page(document: dict[str, Any], title: str) -> str:
    """The text of the page for a result of `document.document`."""
    script = "\n".join(['"use strict";', *(_part(name) for name in SCRIPTS)])
    style = _variables() + _part("page.css")
    shown = json_in_html(
        document | {"version": __version__, "palette": _palette(), "kinds": [list(one) for one in KINDS]}
    )
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    values = {"policy": policy, "title": escaped(title), "style": style, "data": shown, "script": script}
    text = _part("page.html")
    parts = []
    for piece in text.split("{{"):
        name, found, rest = piece.partition("}}")
        parts.append(values[name] + rest if found else piece)
    return "".join(parts)


def escaped(text: str) -> str:
    """`text` for HTML: printable, and without a character that has a meaning there."""
    text = printable(text)
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#39;")):
        text = text.replace(mark, entity)
    return text


def _part(name: str) -> str:
    return resources.files(__package__).joinpath("page", name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def json_in_html(value: Any) -> str:
    """JSON that may stand inside an HTML element: no character in it ends the element, or begins one."""
    text = json.dumps(value, separators=(",", ":"))  # ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _palette() -> dict[str, Any]:
    """The colours, each as [light, dark]."""
    return {
        "content": [[name, *colour] for name, colour in palette.CONTENT.items()],
        "layers": [list(colour) for colour in palette.LAYERS],
        "structure": {name: list(colour) for name, colour in palette.STRUCTURE.items()},
        "dirty": list(palette.DIRTY),
        "difference": list(palette.DIFFERENCE),
        "sequence": list(palette.SEQUENCE),
    }


def _variables() -> str:
    """The colours of text and background as variables of the style."""
    named = {"background": palette.BACKGROUND, "text": palette.TEXT, "quiet": palette.QUIET_TEXT}
    named |= {"accent": palette.CONTENT["data"], "problem": palette.STRUCTURE["overlap"]}
    light = "".join(f"--{name}:{colour.light};" for name, colour in named.items())
    dark = "".join(f"--{name}:{colour.dark};" for name, colour in named.items())
    return (
        f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}\n"
        f":root[data-theme=dark]{{{dark}}}\n"
    )

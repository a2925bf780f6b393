"""Text in SVG and HTML: escaped, since names come from images, whoever made them."""

from __future__ import annotations

from ..errors import printable


def escaped(text: str) -> str:
    """`text` with entities for what has a meaning in markup. Control characters, and all else that XML does not allow, are
    shown as escape sequences."""
    text = printable(text)
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#39;")):
        text = text.replace(mark, entity)
    return text


def shortened(text: str, longest: int) -> str:
    """`text`, or its beginning and end with "..." between them, so that it has at most `longest` characters (5 or more)."""
    if len(text) <= longest:
        return text
    tail = (longest - 3) // 2
    return f"{text[: longest - 3 - tail]}...{text[-tail:]}"

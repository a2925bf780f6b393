"""A tree of nodes as a picture: one SVG file without references, whose colours suit light and dark backgrounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import printable
from ..options import format_size

#: Pixels: of a character and a line of text, around the text of a box, between boxes, between rows, around all.
_CHARACTER, _LINE = 7.4, 17
_PADDING, _GAP, _ROW, _MARGIN = 10, 24, 58, 16
#: Characters of a line; what is longer is cut in the middle, and whole in the tool tip.
_LONGEST = 44

#: Fill and stroke of boxes by kind of node, of text, and of edges, on light backgrounds. They are attributes, which every
#: program that shows SVG knows; on dark backgrounds the style has precedence.
_LIGHT = {
    "storage": ("#e9eef5", "#5b6b82"),
    "format": ("#e2f3e7", "#2f7d4a"),
    "filter": ("#fbefd9", "#a56a14"),
    "shared": ("none", "#5b6b82"),
}
_TEXT, _EDGE = "#1d2330", "#6b7484"
_DARK = """
@media (prefers-color-scheme: dark) {
text { fill: #e8ebf1; }
.edge { stroke: #97a1b2; }
.storage rect { fill: #27303d; stroke: #8fa1ba; }
.format rect { fill: #1d3526; stroke: #63b981; }
.filter rect { fill: #3d2f17; stroke: #d9a24e; }
.shared rect { stroke: #8fa1ba; }
}
"""


class _Box(NamedTuple):
    """A node with its subtree. `width`: of the subtree; `own`: of the box."""

    node: dict[str, Any]
    lines: list[str]
    own: float
    width: float
    below: list[tuple[str, bool, _Box]]

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + 2 * _PADDING

    @property
    def depth(self) -> float:
        """The height of the subtree."""
        return self.height + max((_ROW + one.depth for _, _, one in self.below), default=0)


def picture(tree: dict[str, Any]) -> str:
    """The text of the SVG file for a result of `lamina.tree`."""
    top = _box(tree)
    width, height = top.width + 2 * _MARGIN, top.depth + 2 * _MARGIN
    title = _escaped(f"Graph of {tree['name']}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" font-size="12" fill="{_TEXT}" '
        f"font-family=\"ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace\">\n"
        f"<title>{title}</title>\n<style>{_DARK}</style>\n" + "".join(_drawn(top, _MARGIN, _MARGIN)) + "</svg>\n"
    )


def _box(node: dict[str, Any]) -> _Box:
    lines = list(_lines(node))
    below = [(edge["role"], edge["writes"], _box(edge["node"])) for edge in node.get("children", ())]
    own = max(len(_cut(line)) for line in lines) * _CHARACTER + 2 * _PADDING
    row = sum(one.width for _, _, one in below) + _GAP * (len(below) - 1)
    return _Box(node, lines, own, max(own, row), below)


def _lines(node: dict[str, Any]) -> Iterator[str]:
    yield printable(node["driver"])
    yield printable(node["name"])
    if "shared" in node:
        yield "drawn elsewhere"
        return
    if node.get("filename") is not None:
        yield printable(node["filename"])
    yield f"{format_size(node['size'])}, {'read-only' if node['read-only'] else 'writable'}"
    if node.get("allocated") is not None:
        yield f"{format_size(node['allocated'])} allocated"
    yield from (printable(f"{key}={value}") for key, value in node["options"].items())


def _drawn(box: _Box, x: float, y: float) -> Iterator[str]:
    """The elements of a subtree whose area begins at `x` and `y`."""
    left, middle = x + (box.width - box.own) / 2, x + box.width / 2
    bottom = y + box.height
    row = sum(one.width for _, _, one in box.below) + _GAP * (len(box.below) - 1)
    at = x + (box.width - row) / 2
    for role, writes, one in box.below:
        end, half = at + one.width / 2, bottom + _ROW / 2
        side, anchor = (-6, "end") if end < middle else (6, "start")
        curve = (
            f"M{middle:.1f} {bottom:.1f} C{middle:.1f} {half:.1f} {end:.1f} {half:.1f} {end:.1f} {bottom + _ROW:.1f}"
        )
        label = _escaped(role) + (", writes" if writes else "")
        yield f'<path class="edge" fill="none" stroke="{_EDGE}" stroke-width="1.5" d="{curve}"/>\n'
        yield f'<text x="{end + side:.1f}" y="{bottom + _ROW - 6:.1f}" text-anchor="{anchor}">{label}</text>\n'
        yield from _drawn(one, at, bottom + _ROW)
        at += one.width + _GAP
    dash = ' stroke-dasharray="5 3"' if "shared" in box.node else ""
    kind = "shared" if "shared" in box.node else box.node["kind"]
    fill, stroke = _LIGHT[kind]
    yield (
        f'<g class="{kind}"><title>{_escaped(chr(10).join(box.lines))}</title>'
        f'<rect x="{left:.1f}" y="{y:.1f}" width="{box.own:.1f}" height="{box.height:.1f}" rx="6" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"{dash}/>\n'
    )
    for number, line in enumerate(box.lines):
        style = ' font-weight="bold"' if not number else ""
        base = y + _PADDING + (number + 0.75) * _LINE
        yield f'<text{style} x="{left + _PADDING:.1f}" y="{base:.1f}">{_escaped(_cut(line))}</text>\n'
    yield "</g>\n"


def _cut(line: str) -> str:
    """The line, or its beginning and end."""
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[: half - 1]}...{line[-half + 2 :]}"


def _escaped(text: str) -> str:
    """Text for SVG: what has a meaning there as entities, and only characters that XML allows. (Names are from images.)"""
    text = "\n".join(printable(line) for line in text.split("\n"))
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(mark, entity)
    return text

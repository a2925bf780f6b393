"""A tree of nodes as a picture: one SVG file without references, whose colours suit light and dark backgrounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import printable
from ..options import format_size
from ..palette import BACKGROUND, QUIET_TEXT, TEXT
from ..picture.markup import escaped, shortened

#: Pixels: of a character and a line of text, around the text of a box, between boxes, between rows, around all.
_CHARACTER, _LINE = 7.4, 17
_PADDING, _GAP, _ROW, _MARGIN = 12, 24, 58, 16
#: Characters of a line; what is longer is cut in the middle, and whole in the tool tip.
_LONGEST = 44

#: Fill and stroke of boxes by kind of node, on light backgrounds. They are attributes, which every
#: program that shows SVG knows; on dark backgrounds the style has precedence.
_LIGHT = {
    "storage": ("#e9eef5", "#5b6b82"),
    "format": ("#e2f3e7", "#2f7d4a"),
    "filter": ("#fbefd9", "#a56a14"),
    "shared": ("none", "#5b6b82"),
    "refused": ("#fdeceb", "#b3261e"),
}
_DARK = f"""
@media (prefers-color-scheme: dark) {{
.background {{ fill: {BACKGROUND.dark}; }}
text {{ fill: {TEXT.dark}; }}
.quiet {{ fill: {QUIET_TEXT.dark}; }}
.edge {{ stroke: {QUIET_TEXT.dark}; }}
.storage rect {{ fill: #27303d; stroke: #8fa1ba; }}
.format rect {{ fill: #1d3526; stroke: #63b981; }}
.filter rect {{ fill: #3d2f17; stroke: #d9a24e; }}
.shared rect {{ stroke: #8fa1ba; }}
.refused rect {{ fill: #43201e; stroke: #ff8a80; }}
}}
"""


class _Box(NamedTuple):
    """A node with its subtree. `width`: of the subtree; `own`: of the box."""

    node: dict[str, Any]
    lines: list[str]
    own: float
    width: float
    below: list[tuple[str, _Box]]

    @property
    def kind(self) -> str:
        if "not-opened" in self.node:
            return "refused"
        return "shared" if "shared" in self.node else str(self.node["kind"])

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + 2 * _PADDING

    @property
    def depth(self) -> float:
        """The height of the subtree."""
        return self.height + max((_ROW + one.depth for _, one in self.below), default=0)


def picture(tree: dict[str, Any]) -> str:
    """The text of the SVG file for a result of `lamina.tree`."""
    top = _box(tree)
    width, height = top.width + 2 * _MARGIN, top.depth + 2 * _MARGIN
    nodes = list(_all(top))
    refused = sum(one.kind == "refused" for one in nodes)
    title = f"Graph of {tree['name']}"
    text = f"{len(nodes)} nodes, {refused} of them not opened. {_sentence(tree)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-labelledby="title description" font-size="12" fill="{TEXT.light}" '
        f"font-family=\"ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace\">\n"
        f'<title id="title">{escaped(title)}</title>\n<desc id="description">{escaped(text)}</desc>\n'
        f'<style>{_DARK}</style>\n<path class="background" fill="{BACKGROUND.light}" d="M0 0H{width:.0f}V{height:.0f}H0z"/>\n'
        + "".join(_drawn(top, _MARGIN, _MARGIN))
        + "</svg>\n"
    )


def _all(box: _Box) -> Iterator[_Box]:
    yield box
    for _, one in box.below:
        yield from _all(one)


def _sentence(node: dict[str, Any]) -> str:
    """The tree in words, for readers who do not see it."""
    edges = "; ".join(f"{edge['role']}: {_sentence(edge['node'])}" for edge in node.get("children", ()))
    return ", ".join(_lines(node)) + (f" ({edges})" if edges else "")


def _box(node: dict[str, Any]) -> _Box:
    lines = list(_lines(node))
    below = [
        (edge["role"] + (", writes" if edge["writes"] else ""), _box(edge["node"])) for edge in node.get("children", ())
    ]
    own = max(len(shortened(line, _LONGEST)) for line in lines) * _CHARACTER + 2 * _PADDING
    row = sum(one.width for _, one in below) + _GAP * (len(below) - 1)
    return _Box(node, lines, own, max(own, row), below)


def _lines(node: dict[str, Any]) -> Iterator[str]:
    yield printable(node["driver"] or "unknown format")
    if "not-opened" in node:
        yield printable(node["filename"])
        yield "not opened"
        yield from _filled(printable(node["not-opened"]["message"]))
        return
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


def _filled(text: str, most: int = 5) -> Iterator[str]:
    """The words of `text` in lines of `_LONGEST` characters, `most` of them."""
    lines = [""]
    for word in text.split(" "):
        word = shortened(word, _LONGEST)
        if lines[-1] and len(lines[-1]) + 1 + len(word) > _LONGEST:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    yield from lines[:most]
    if len(lines) > most:
        yield "..."


def _drawn(box: _Box, x: float, y: float) -> Iterator[str]:
    """The elements of a subtree whose area begins at `x` and `y`."""
    left, middle = x + (box.width - box.own) / 2, x + box.width / 2
    bottom = y + box.height
    row = sum(one.width for _, one in box.below) + _GAP * (len(box.below) - 1)
    at = x + (box.width - row) / 2
    for label, one in box.below:
        end, half = at + one.width / 2, bottom + _ROW / 2
        side, anchor = (-6, "end") if end < middle else (6, "start")
        curve = (
            f"M{middle:.1f} {bottom:.1f} C{middle:.1f} {half:.1f} {end:.1f} {half:.1f} {end:.1f} {bottom + _ROW:.1f}"
        )
        dash = ' stroke-dasharray="5 3"' if one.kind == "refused" else ""
        yield f'<path class="edge" fill="none" stroke="{QUIET_TEXT.light}" stroke-width="1.5"{dash} d="{curve}"/>\n'
        yield (
            f'<text class="quiet" fill="{QUIET_TEXT.light}" x="{end + side:.1f}" y="{bottom + _ROW - 7:.1f}" '
            f'text-anchor="{anchor}">{escaped(label)}</text>\n'
        )
        yield from _drawn(one, at, bottom + _ROW)
        at += one.width + _GAP
    dash = ' stroke-dasharray="5 3"' if box.kind in ("shared", "refused") else ""
    fill, stroke = _LIGHT[box.kind]
    yield (
        f'<g class="{box.kind}"><title>{chr(10).join(map(escaped, box.lines))}</title>'
        f'<rect x="{left:.1f}" y="{y:.1f}" width="{box.own:.1f}" height="{box.height:.1f}" rx="6" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"{dash}/>\n'
    )
    for number, line in enumerate(box.lines):
        style = ' font-weight="bold"' if not number else ""
        base = y + _PADDING + (number + 0.75) * _LINE
        yield f'<text{style} x="{left + _PADDING:.1f}" y="{base:.1f}">{escaped(shortened(line, _LONGEST))}</text>\n'
    yield "</g>\n"

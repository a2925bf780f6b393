"""The ratios of a run as a picture: one bar for each row of ours, its length the ratio to the best of the peers.

Bars begin at the ratio 1 on a logarithmic scale: to the left Lamina is faster, to the right slower. A mark shows the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Protocol

_WIDTH, _ROW, _NAMES, _RIGHT = 860, 22, 330, 60
#: The ends of the scale, as ratios.
_LEAST, _MOST = 0.1, 4.0
_TICKS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)


class Measured(Protocol):
    """A row of the table (`run.Row`)."""

    work: str
    program: str
    ratio: float | None
    target: float | None


def svg(rows: Sequence[Measured]) -> str:
    """A picture (SVG) of the rows that have a ratio."""
    shown = [row for row in rows if row.ratio is not None]
    height = (len(shown) + 2) * _ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif"',
        ' font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for tick in _TICKS:
        x = _x(tick)
        parts.append(
            f'<line x1="{x}" y1="{_ROW}" x2="{x}" y2="{height - _ROW}" stroke="#{"888" if tick == 1 else "ddd"}"/>'
        )
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{_NAMES}" y="14">time of Lamina, relative to the faster qemu-img</text>')
    for number, row in enumerate(shown, 1):
        parts += _bar(row, number * _ROW)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(row: Measured, y: int) -> list[str]:
    ratio = row.ratio or 1.0
    one, x = _x(1.0), _x(ratio)
    missed = row.target is not None and ratio > row.target
    color = "#c44" if missed else "#4a8" if ratio <= 1 else "#999"
    name = escape(f"{row.work}" if row.program == "lamina" else f"{row.work}, {row.program}")
    found = [
        f'<text x="{_NAMES - 8}" y="{y + 15}" text-anchor="end">{name}</text>',
        f'<rect x="{min(one, x)}" y="{y + 4}" width="{max(abs(x - one), 1):.1f}" height="{_ROW - 8}" fill="{color}"/>',
        f'<text x="{_WIDTH - 8}" y="{y + 15}" text-anchor="end">{ratio:.2f}</text>',
    ]
    if row.target is not None:
        at = _x(row.target)
        found.append(f'<line x1="{at}" y1="{y + 2}" x2="{at}" y2="{y + _ROW - 2}" stroke="black" stroke-width="2"/>')
    return found


def _x(ratio: float) -> float:
    """The place of a ratio; one beyond an end is shown there."""
    inside = min(max(ratio, _LEAST), _MOST)
    share = math.log(inside / _LEAST) / math.log(_MOST / _LEAST)
    return round(_NAMES + share * (_WIDTH - _RIGHT - _NAMES), 1)

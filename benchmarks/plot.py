"""The ratios of a section as a picture: a bar for each promise of ours, its length the ratio to the best of the peers.

Bars begin at the ratio 1 on a logarithmic scale: to the left Lamina is faster (or smaller), to the right slower. A ratio of
rates is shown as its reciprocal, so that all bars mean times. A thick mark shows the target, a thin line the least and the
most of single rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from .results import Work

_WIDTH, _ROW, _NAMES, _RIGHT = 860, 22, 400, 60
#: The ends of the scale, as ratios.
_LEAST, _MOST = 0.1, 4.0
_TICKS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)


class Bar(NamedTuple):
    """`ratio` and `ends` (least and most) are of times."""

    name: str
    ratio: float
    ends: tuple[float, float] | None
    target: float | None
    missed: bool


def bars(works: Sequence[Work]) -> list[Bar]:
    """The bars of the works: the first promise of each row of ours, and of other kinds those that have a ratio."""
    found = []
    for work in works:
        for row in work.rows:
            for promise in row.promises:
                if promise.found is None or promise.unit or promise.found.value <= 0:
                    continue
                words = f"{work.name}, {row.program.removeprefix('lamina').strip(' ,')}".rstrip(", ")
                if promise.what in ("CPU", "size", "memory"):
                    words += f", {promise.what}"
                elif promise is not row.promises[0]:
                    words += f", of {promise.of}"
                one = _time(promise.found.value, promise.at_least) or 0.0
                least, most = (_time(end, promise.at_least) for end in (promise.found.least, promise.found.most))
                ends = (min(least, most), max(least, most)) if least is not None and most is not None else None
                target = _time(promise.target, promise.at_least)
                found.append(Bar(words, one, ends, target, promise.verdict == "missed"))
    return found


def svg(works: Sequence[Work], title: str) -> str:
    """A picture (SVG) of the bars of these works."""
    shown = bars(works)
    height = (len(shown) + 2) * _ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif"'
        ' font-size="12" role="img">',
        f"<title>{escape(title)}: Lamina relative to the best peer</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for tick in _TICKS:
        x = _x(tick)
        parts.append(
            f'<line x1="{x}" y1="{_ROW}" x2="{x}" y2="{height - _ROW}" stroke="#{"888" if tick == 1 else "ddd"}"/>'
        )
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{_NAMES}" y="14">time of Lamina, relative to the best peer</text>')
    for number, bar in enumerate(shown, 1):
        parts += _drawn(bar, number * _ROW)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _drawn(bar: Bar, y: int) -> list[str]:
    one, x = _x(1.0), _x(bar.ratio)
    color = "#c44" if bar.missed else "#4a8" if bar.ratio <= 1 else "#999"
    found = [
        f'<text x="{_NAMES - 8}" y="{y + 15}" text-anchor="end">{escape(bar.name)}</text>',
        f'<rect x="{min(one, x)}" y="{y + 4}" width="{max(abs(x - one), 1):.1f}" height="{_ROW - 8}" fill="{color}"/>',
        f'<text x="{_WIDTH - 8}" y="{y + 15}" text-anchor="end">{bar.ratio:.2f}</text>',
    ]
    if bar.ends:
        least, most = map(_x, bar.ends)
        found.append(f'<line x1="{least}" y1="{y + 11}" x2="{most}" y2="{y + 11}" stroke="black"/>')
    if bar.target is not None:
        at = _x(bar.target)
        found.append(f'<line x1="{at}" y1="{y + 2}" x2="{at}" y2="{y + _ROW - 2}" stroke="black" stroke-width="2"/>')
    return found


def _time(ratio: float | None, at_least: bool) -> float | None:
    """The ratio of times, of one of rates if `at_least`."""
    if ratio is None or not at_least:
        return ratio
    return 1 / max(ratio, 1e-9)


def _x(ratio: float) -> float:
    """The place of a ratio; one beyond an end is shown there."""
    inside = min(max(ratio, _LEAST), _MOST)
    share = math.log(inside / _LEAST) / math.log(_MOST / _LEAST)
    return round(_NAMES + share * (_WIDTH - _RIGHT - _NAMES), 1)

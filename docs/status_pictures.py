"""Draws the pictures of docs/block-status.md from what the library says about the images of that page: `make docs`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import lamina
from lamina.extents import Extents

PICTURE = Path(__file__).with_name("block-status.svg")
_MIB = 1 << 20
#: The part of the disk that the picture shows to scale, and the pixels of a byte.
_SHOWN, _SCALE = 5120, 0.13
_LEFT, _TOP, _ROW = 215, 46, 62

_STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #222 } .note { font-size: 11px; fill: #555 }
.data { fill: #2f6fb0 } .zero { fill: #e4e7ea } .cell { stroke: #fff }
.in { fill: #fff; font-size: 11px } .on { fill: #444; font-size: 11px }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .note { fill: #aaa } .zero { fill: #3a4046 } .cell { stroke: #1e2126 } .on { fill: #ccc }
}"""


def views() -> list[tuple[str, str, Extents]]:
    """(title, note, extents) of each row of the picture."""
    with tempfile.TemporaryDirectory() as folder:
        back, top = os.path.join(folder, "back.qcow2"), os.path.join(folder, "top.qcow2")
        lamina.create(back, "qcow2", 100 * _MIB, cluster_size=512)
        with lamina.open(back, format="qcow2", read_only=False) as image:
            image.write(0, b"\1" * 512)
            image.write(1024, b"\1" * 512)
        lamina.create(top, "qcow2", cluster_size=_MIB, backing_file="back.qcow2", backing_fmt="qcow2")
        with lamina.open(top, format="qcow2") as image:
            exact = image.extents()
    return [
        ("exact", "what the library works with", exact),
        ("rounded to 1024", "for a consumer with blocks of 1024", exact.align(1024)),
        ("rounded to 4096", "through a filter with align=4k", exact.align(4096)),
    ]


def picture() -> str:
    """The text of the picture."""
    rows = views()
    height = _TOP + _ROW * len(rows) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height}" role="img" '
        'aria-label="The first 5 KiB of a disk: exact status, and the same rounded to 1024 and to 4096 bytes">',
        f"<style>{_STYLE}</style>",
    ]
    for offset in range(0, _SHOWN + 1, 512):
        x = _LEFT + offset * _SCALE
        parts.append(f'<text class="note" x="{x:.0f}" y="30" text-anchor="middle">{offset}</text>')
    for number, (title, note, extents) in enumerate(rows):
        y = _TOP + number * _ROW
        parts.append(f'<text x="10" y="{y + 17}">{title}</text><text class="note" x="10" y="{y + 33}">{note}</text>')
        for row in extents:
            if row.start >= _SHOWN:
                continue
            x, width = _LEFT + row.start * _SCALE, (min(row.end, _SHOWN) - row.start) * _SCALE
            kind, text = ("data", "in") if row.data else ("zero", "on")
            told = "zero" if not row.data else f"data, layer {row.depth}" if width > 90 else "data"
            parts.append(f'<rect class="cell {kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="28"/>')
            parts.append(
                f'<text class="{text}" x="{x + width / 2:.1f}" y="{y + 18}" text-anchor="middle">{told}</text>'
            )
            if row.data and row.offset is not None:
                parts.append(
                    f'<text class="note" x="{x + width / 2:.1f}" y="{y + 42}" text-anchor="middle">at {row.offset}</text>'
                )
    end = _LEFT + _SHOWN * _SCALE
    parts.append(f'<text class="note" x="{end:.0f}" y="{height - 8}" text-anchor="end">... zero up to 100 MiB</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    sys.stdout.write(f"{PICTURE.name}\n")

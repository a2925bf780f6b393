"""The colours of every picture that Lamina draws: of the status of bytes, of layers, and of the structures of a file.

Each colour has a variant for light and one for dark backgrounds, as `#rrggbb`. A test holds their contrast to the background,
and that colours which a picture shows side by side differ for colour-blind people as well. Base layer, without imports of
Lamina.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class Colour(NamedTuple):
    """A colour on light and on dark backgrounds."""

    light: str
    dark: str


#: The background of a picture, its text, and text of less weight.
BACKGROUND: Final = Colour("#fcfcfb", "#15181d")
TEXT: Final = Colour("#1c2430", "#e6e9ee")
QUIET_TEXT: Final = Colour("#5a6472", "#9aa4b2")

#: What a range of a disk contains. Exactly one holds for each byte: "compressed" data; "data" that is stored as it is;
#: "reserved" storage that reads as zero; "zero" without storage, which a layer decides; and a "hole", which no layer owns.
CONTENT: Final[Mapping[str, Colour]] = {
    "data": Colour("#2b6cb0", "#5aa2e6"),
    "compressed": Colour("#0f4c5c", "#9be3ef"),
    "reserved": Colour("#94bfe6", "#3a5f88"),
    "zero": Colour("#cdb67c", "#85754a"),
    "hole": Colour("#e9e8e4", "#272c34"),
}
#: Marks over the content: written since a bitmap was added, and different from another image.
DIRTY: Final = Colour("#c2570c", "#f0904a")
DIFFERENCE: Final = Colour("#b3205f", "#ff7fab")

#: The layers of a chain, from the top; see `layer`.
LAYERS: Final = (
    Colour("#2b6cb0", "#5aa2e6"),
    Colour("#c97f10", "#d2993a"),
    Colour("#54937a", "#2f8a66"),
    Colour("#943069", "#f5a3b5"),
    Colour("#1f2833", "#e2e7f2"),
    Colour("#7d6a0a", "#f1e48f"),
)


def layer(depth: int) -> Colour:
    """The colour of the layer at `depth`. Beyond the last one the colours repeat."""
    return LAYERS[depth % len(LAYERS)]


def content(flags_data: bool, zero: bool, present: bool, compressed: bool) -> str:
    """The key of `CONTENT` for an extent with these flags."""
    if compressed:
        return "compressed"
    if flags_data:
        return "reserved" if zero else "data"
    return "zero" if present else "hole"


#: What a range of the file of an image is. "snapshot data" belongs to snapshots alone; "shared data" has several references.
STRUCTURE: Final[Mapping[str, Colour]] = {
    "header": Colour("#121825", "#edf2f7"),
    "mapping tables": Colour("#8272d4", "#8472e4"),
    "reference counts": Colour("#1f4f35", "#4d9862"),
    "snapshots": Colour("#c06fae", "#ffb3c8"),
    "bitmaps": Colour("#b8560c", "#dda24c"),
    "encryption": Colour("#76737d", "#939aa1"),
    "data": Colour("#2b6cb0", "#5aa2e6"),
    "compressed data": Colour("#0f4c5c", "#9be3ef"),
    "shared data": Colour("#141f58", "#2d74bf"),
    "snapshot data": Colour("#94bfe6", "#3a5f88"),
    "leaked": Colour("#d99a0b", "#f7e463"),
    "overlap": Colour("#d62430", "#e8432f"),
    "unknown": Colour("#a3abb0", "#5e636a"),
    "free": Colour("#e9e8e4", "#272c34"),
}

#: From the beginning to the end of something: colours that become lighter evenly.
SEQUENCE: Final = ("#243f78", "#4c6a86", "#86898a", "#bfae63", "#f0d94f")

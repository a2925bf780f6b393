"""Random extents, and models of pictures made of them."""

from __future__ import annotations

import random

from lamina.extents import COMPRESSED, DATA, PRESENT, ZERO, Extents, HostPath
from lamina.numeric import np
from lamina.palette import CONTENT
from lamina.results import ImageInfo
from lamina.viewer.collect import Disk, File, Layer, Model
from lamina.viewer.rows import Rows

FILES = HostPath("top.qcow2"), HostPath("base.qcow2")
#: The flags that a contiguous result may have: data, data in a hole, zero, a hole, compressed.
_FLAGS = (DATA | PRESENT, DATA | ZERO | PRESENT, ZERO | PRESENT, ZERO, DATA | PRESENT | COMPRESSED)


def random_extents(rng: random.Random, count: int, unit: int = 1, *, sequential: float = 0.5) -> Extents:
    """`count` extents of random status; some follow the one before in their file."""
    made = np.random.default_rng(rng.randrange(1 << 32))
    length = made.integers(1, 40, count) * unit
    start = np.cumsum(length) - length
    flags = made.choice(np.array(_FLAGS, np.uint8), count)
    stored = ((flags & DATA) != 0) & ((flags & COMPRESSED) == 0)
    file = np.where(stored, made.integers(0, 2, count), -1)
    offset = made.integers(0, count * 40, count) * unit
    for row in np.flatnonzero(made.random(count - 1) < sequential).tolist() if count < 100_000 else ():
        if stored[row] and stored[row + 1]:
            file[row + 1], offset[row + 1] = file[row], offset[row] + length[row]
    offset = np.where(stored, offset, -1)
    depth = made.integers(0, 3, count)
    return Extents.from_columns(
        start, length, flags, depth=depth, file=file.astype(np.int32), offset=offset, files=FILES
    ).coalesce()


def model_of(extents: Extents, grain: int = 1) -> Model:
    """A model of a disk with these extents, in layers without maps of their files."""
    size = max(int((extents.offset + extents.length).max()), 1)
    files = tuple(File(one.filename, "qcow2", size, None) for one in FILES)
    layers = tuple(Layer(name, "qcow2", extents.end, min(at, 1), 0, ImageInfo()) for at, name in enumerate("abc"))
    disk = Disk("a disk", (), True, "qcow2", extents.end, 1, Rows(extents), (0, 1), layers, {})
    return Model((disk,), files)


def content_of(extents: Extents) -> list[int]:
    """The bytes of each class of content, one extent after the other."""
    from lamina.palette import content

    found = dict.fromkeys(CONTENT, 0)
    for one in extents:
        found[content(one.data, one.zero, one.present, one.compressed)] += one.length
    return list(found.values())

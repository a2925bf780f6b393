"""Random disks in every format that Lamina creates, each beside the bytes that it reads as, for the laws of the tools.

The formats come from the registry: a new one takes part as soon as its driver has a `create_schema`. What is known about
a format in addition stands in `GEOMETRIES` and `UNITS`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lamina
from lamina import registry
from lamina.creation import create_driver
from lamina.errors import OptionError, UnsupportedFeature
from lamina.format import lookup_format
from lamina.image import Image
from lamina.limits import KIB, MIB, align_up
from lamina.node import COMPRESS
from tests import evidence

#: The formats that Lamina creates.
FORMATS = [name for name in registry.names("format") if lookup_format(name).create_schema is not None]
#: (source, target) of every conversion between them.
PAIRS = [(one, other) for one in FORMATS for other in FORMATS]
#: Those whose images may have a backing file.
OVERLAYS = [name for name in FORMATS if "backing_file" in create_driver(name).creation_schema()]

#: How many random disks a run of one law tries; `make soak` sets more.
ROUNDS = int(os.environ.get("LAMINA_SOAK_TOOLS", "8"))
#: The size of a disk is a multiple of this number of bytes; of a format that is not here nothing is known.
UNITS = {"raw": 1, "qcow2": 512}

Options = dict[str, Any]


def qcow2_options(dice: random.Random) -> Options:
    """Clusters of 512 bytes to 2 MiB, both versions, all widths of reference counts, subclusters, both compressions."""
    if dice.random() < 0.25:
        return {"extended_l2": True, "cluster_size": dice.choice([16 * KIB, 32 * KIB, 64 * KIB, 2 * MIB])}
    options: Options = {"cluster_size": dice.choice([512, 512, 1024, 4 * KIB, 4 * KIB, 64 * KIB, 64 * KIB, 2 * MIB])}
    if dice.random() < 0.25:
        return options | {"compat": "0.10"}
    if dice.random() < 0.5:
        options["refcount_bits"] = 1 << dice.randrange(7)
    if dice.random() < 0.3:
        options["lazy_refcounts"] = True
    if dice.random() < 0.3:
        options["compression_type"] = "zstd"
    return options


GEOMETRIES: dict[str, Callable[[random.Random], Options]] = {"qcow2": qcow2_options}


def options_of(format: str, dice: random.Random) -> Options:
    """Options of a new image that the format accepts. Of a format without an entry of its own: one choice of an enum."""
    if format in GEOMETRIES:
        return GEOMETRIES[format](dice)
    kind = create_driver(format)
    choices = [(one.name, word) for one in kind.creation_schema().options for word in one.choices or ()]
    if not choices or dice.random() < 0.3:
        return {}
    options = dict([dice.choice(choices)])
    try:
        kind.prepare_create(kind.creation_schema().parse({"size": MIB, **options}), "new image")
    except (OptionError, UnsupportedFeature):
        return {}
    return options


def padded(content: bytes, size: int) -> bytes:
    return content[:size].ljust(size, b"\0")


def spelt(value: object) -> str:
    """The value of an option, as a command line has it."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def packs(format: str, options: Options) -> bool:
    """Whether an image with these options stores compressed data."""
    return _packs(format, tuple(options.items()))


@cache
def _packs(format: str, options: tuple[tuple[str, Any], ...]) -> bool:
    with TemporaryDirectory() as folder:
        lamina.create(Path(folder, "disk"), format, MIB, **dict(options))
        with lamina.open(Path(folder, "disk"), format=format, read_only=False) as image:
            return bool(image.node.supported_flags & COMPRESS and image.node.limits.compress_alignment)


class Disk(NamedTuple):
    """An image at `path`, which reads as `content`; `below`: its backing file."""

    path: Path
    format: str
    content: bytes
    options: Options
    below: Disk | None = None

    def opened(self, *, read_only: bool = True) -> Image:
        return lamina.open(self.path, format=self.format, read_only=read_only)

    def __repr__(self) -> str:
        over = "" if self.below is None else f" over {self.below}"
        return f"{self.format} {len(self.content)} {self.options}{over}"


def content_of(path: Path, format: str) -> bytes:
    """The bytes of the disk, in an image that is clean where its format has a check."""
    with lamina.open(path, format=format) as image:
        require_clean(path, format)
        return image.read(0, image.size)


def require_clean(path: Path, format: str) -> None:
    try:
        found = lamina.check(path, format=format)
    except UnsupportedFeature:
        return
    assert found.clean, f"{path}: {found.findings}"


def require_padded(found: bytes, content: bytes, format: str, about: object) -> None:
    """`found` is `content`, with zeros up to the next size that the format has."""
    if found[: len(content)] != content:
        at = next((at for at, (a, b) in enumerate(zip(found, content, strict=False)) if a != b), len(found))
        raise AssertionError(f"byte {at} of {len(content)} differs: {about}")
    assert not any(found[len(content) :]), f"bytes after {len(content)} are not zero: {about}"
    if format in UNITS:
        assert len(found) == align_up(len(content), UNITS[format]), about


class Disks:
    """Random disks in a folder, each in a file of its own."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.dice = folder, dice
        self._count = 0

    def path(self) -> Path:
        """The path of a file that does not exist."""
        self._count += 1
        return self.folder / f"{self._count}.img"

    def size(self) -> int:
        dice = self.dice
        whole = 2100 * KIB if dice.random() < 0.05 else dice.choice([0, 1, 60, 100, 128, 200, 300, 700]) * KIB
        return whole + dice.choice([0, 0, 512, 1536, 1, 300, 511])

    def new(
        self, format: str, *, size: int | None = None, overlay: float = 0.4, options: Options | None = None
    ) -> Disk:
        """A disk with data, stored zeros, known zeros and holes; compressed clusters, and a backing file in another format,
        where the format has them. `overlay`: how likely it has a backing file."""
        dice = self.dice
        options = options_of(format, dice) if options is None else options
        size, path = self.size() if size is None else size, self.path()
        below: Disk | None = None
        if format in OVERLAYS and dice.random() < overlay:
            below = self.new(dice.choice(FORMATS), overlay=overlay / 2)
            over = {"backing_file": below.path.name, "backing_fmt": below.format}
            lamina.create(path, format, size, **options, **over)
        else:
            lamina.create(path, format, size, **options)
        with lamina.open(path, format=format, read_only=False) as image:
            content = bytearray(below.content[: image.size] if below is not None else b"")
            content += bytes(image.size - len(content))
            if dice.random() < 0.4:  # full of data, which layers above it hide with zeros
                content[:] = dice.randbytes(image.size)
                image.write(0, content)
            for _ in range(dice.randrange(9)):
                change(image, content, dice, options.get("cluster_size", 64 * KIB))
        return Disk(path, format, bytes(content), options, below)

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


def change(image: Image, content: bytearray, dice: random.Random, unit: int) -> tuple[int, int]:
    """One random write, or request for zeros, on an image and on its bytes. `unit`: what is compressed at once. Returns the
    offset and the length."""
    if not image.size:
        return 0, 0
    offset = dice.randrange(image.size)
    length = min(dice.choice([1, 512, 700, 4 * KIB, 9 * KIB, 20 * KIB, 64 * KIB, 200 * KIB]), image.size - offset)
    if dice.random() < 0.5:
        step = dice.choice([512, 4 * KIB])
        offset -= offset % step
        length = min(align_up(length, step), image.size - offset)
    what = dice.randrange(7)
    if what in (0, 6):
        image.zero(offset, length, unmap=dice.random() < 0.5)
        data = bytes(length)
    elif what == 1 and image.node.supported_flags & COMPRESS and image.size >= unit:
        offset = dice.randrange(image.size // unit) * unit
        length = unit
        data = (dice.randbytes(100) * (unit // 100 + 1))[:unit]
        image.write(offset, data, compress=True)
    else:
        data = bytes(length) if what == 2 else dice.randbytes(length)
        if what == 3:
            data = (dice.randbytes(3) + bytes(length))[:length]  # whose tail is zero
        image.write(offset, data)
    content[offset : offset + length] = data
    return offset, length


def rounds(folder: Path, seed: int, law: object, count: int) -> Iterator[Disks]:
    """`count` empty folders for random disks, one after the other, with dice that depend on `seed` and on `law`."""
    for number in range(count):
        disks = Disks(folder / str(number), random.Random(f"{seed}/{law}/{number}"))
        print(f"{law}, round {number}")
        yield disks
        disks.clear()
        evidence.count("random disks held to a law of the tools")

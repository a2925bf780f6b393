"""Disks with a known content behind a running NBD server, for the conformance tests of its transmission."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lamina
from lamina.image import Image
from lamina.limits import GIB, KIB, MIB
from lamina.nbd import Export, Server

from .nbd_raw import await_server

SIZE = 1 * MIB
BIG = 16 * GIB
MODES = ("simple", "structured", "extended")
CHUNKS = MODES[1:]
#: What each disk holds at first: data, zeros that are stored, a hole, data again; and 1000 bytes.
_RANDOM = random.Random(4)
CONTENT = _RANDOM.randbytes(128 * KIB) + bytes(512 * KIB) + _RANDOM.randbytes(384 * KIB)
ODD = CONTENT[:1000]


class Disks(NamedTuple):
    """Exports "disk" and "fixed", the same read-only; "blocks", with a minimum block of 4096, "odd", 1000 bytes with one of
    512, and "big", 16 GiB of nothing."""

    path: Path
    images: dict[str, Image]

    def reset(self) -> None:
        """As they were at first."""
        for name, image in self.images.items():
            if name == "big":
                image.zero(0, BIG, unmap=True)
            elif name == "odd":
                image.write(0, ODD)
            else:
                image.write(0, CONTENT)
                image.zero(256 * KIB, 256 * KIB, unmap=True)

    def content(self, export: str) -> bytes:
        """What is on the disk of an export; of the big one its beginning."""
        if export == "big":
            return self.images["big"].read(0, 4096)
        image = self.images["disk" if export == "fixed" else export]
        return image.read(0, image.size)


@contextmanager
def serve_disks(folder: Path) -> Iterator[Disks]:
    def behind(size: int, align: int) -> dict[str, Any]:
        return {"driver": "blkdebug", "align": align, "image": {"driver": "memory", "size": size}}

    images = {
        "disk": lamina.open({"driver": "memory", "size": SIZE}, read_only=False),
        "blocks": lamina.open(behind(SIZE, 4096), read_only=False),
        "odd": lamina.open(behind(1000, 512), read_only=False),
        "big": lamina.open({"driver": "memory", "size": BIG}, read_only=False),
    }
    path = folder / "disks"
    exports = [Export(image, name, writable=True) for name, image in images.items()]
    with Server([*exports, Export(images["disk"], "fixed")], unix=str(path)):
        await_server(path)
        yield Disks(path, images)
    for image in images.values():
        image.close()

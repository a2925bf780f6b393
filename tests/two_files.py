"""A qcow2 image and its external data file on one disk, for tests that watch or disturb all writes to it."""

from __future__ import annotations

from collections.abc import Mapping
from tempfile import NamedTemporaryFile
from typing import Any

from lamina.filters.offset import Offset
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.node import Node
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.window import WindowNode

#: The data file has so many bytes, and lies in front of its image.
ROOM = 256 << 10


class Behind(WindowNode):
    """What lies behind the data file, and grows."""

    driver = "behind"

    @property
    def size(self) -> int:
        return self.image.size - ROOM

    @property
    def growable(self) -> bool:
        return True

    def truncate(self, size: int) -> None:
        self.image.truncate(ROOM + size)


def two_files(node: Node) -> dict[str, Any]:
    """The edges to the image and to its data file, both on one disk."""
    front = Offset(Child(node, "image"), 0, ROOM)
    behind = Behind(Child(node, "image", grows=True), ROOM, node.size - ROOM)
    return {"file": Child(behind, "file", grows=True), "data-file": Child(front, "data-file", grows=True)}


def image_behind_data_file(options: Mapping[str, Any], size: int) -> bytes:
    """The content of a disk with a new image and its empty data file."""
    kind: Any = Qcow2
    storage = MemoryStorage()
    values = kind.create_schema.parse({**options, "size": size})
    with NamedTemporaryFile() as data:
        kind.create(Child(storage, "file", grows=True), size, values | {"data_file_path": data.name})
    content = bytearray(storage.size)
    storage.read_into(0, memoryview(content))
    return bytes(ROOM) + bytes(content)


def open_two_files(options: dict[str, Any], opener: Opener) -> Node:
    """Open the image with these options, whose `file` is an edge to the disk with both files."""
    disk: Child = options["file"]
    edges = two_files(disk.node)
    try:
        node = Qcow2.open(Qcow2.schema.parse(options | edges), opener)
    except BaseException:
        for edge in edges.values():
            edge.close()
        raise
    disk.give_up()
    return node

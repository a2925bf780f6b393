"""The storage driver `nbd` against `StorageConformance`: over our own server, and with blocks that are not bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.filters.blocksize import BlockSize
from lamina.graph import open_graph
from lamina.image import Image
from lamina.nbd.node import NbdStorage
from lamina.nbd.server import Server
from lamina.nbd.server.export import Export
from lamina.node import Node
from lamina.request import Child
from lamina.storage.memory import PAGE, MemoryStorage
from lamina.testing import StorageConformance


class TestNbd(StorageConformance):
    resizes = False
    unit = PAGE
    options: dict[str, object] = {"connections": 2}

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> Iterator[None]:
        self.path = tmp_path
        self.servers: list[tuple[Server, Image]] = []
        yield
        for server, image in self.servers:
            server.close()
            image.close()

    def served(self, size: int) -> Node:
        return MemoryStorage(size)

    def make(self, size: int) -> Node:
        image = Image(self.served(size))
        path = self.path / f"socket{len(self.servers)}"
        server = Server([Export(image, "disk", writable=True)], unix=str(path)).start()
        self.servers.append((server, image))
        return self.open(path, read_only=False)

    def open(self, path: Path, read_only: bool) -> Node:
        return open_graph({"driver": "nbd", "path": str(path), "export": "disk", **self.options}, read_only=read_only)

    def reopened(self, node: Node, *, read_only: bool = False) -> Node:
        assert isinstance(node, NbdStorage)
        path = node.client.target.socket
        node.close()
        assert path is not None
        return self.open(Path(path), read_only)


class TestNbdWithBlocks(TestNbd):
    """Requests are read, changed and written in whole blocks, above the driver. (A server rounds the size up to them.)"""

    size = 300_032
    unit = 512

    def served(self, size: int) -> Node:
        return BlockSize(Child(MemoryStorage(size), "image"), minimum=512)

    def test_new_storage_reads_as_zero(self) -> None:
        with self.image() as image:
            assert image.node.limits.request_alignment == 512
            assert not any(image.read(0, image.size))
        with Image(self.make(1)) as image:
            assert image.size == 512, "the padding of the last block is the server's, and reads as zero"
            assert image.read(0, 512) == bytes(512)

"""The storage drivers against `StorageConformance`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lamina.graph import open_graph
from lamina.node import Node
from lamina.storage.memory import PAGE, MemoryStorage
from lamina.storage.null import NullStorage
from lamina.testing import StorageConformance


class TestMemory(StorageConformance):
    unit = PAGE

    def make(self, size: int) -> Node:
        return MemoryStorage(size)


class TestNull(StorageConformance):
    keeps = resizes = False

    def make(self, size: int) -> Node:
        return NullStorage(size)


class TestFile(StorageConformance):
    options: dict[str, Any] = {}

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self.path = tmp_path / "disk"

    def make(self, size: int) -> Node:
        with self.path.open("wb") as file:
            file.truncate(size)
        return self.open(read_only=False)

    def open(self, read_only: bool) -> Node:
        spec = {"driver": "file", "filename": str(self.path), **self.options}
        return open_graph(spec, read_only=read_only)

    def reopened(self, node: Node, *, read_only: bool = False) -> Node:
        node.close()
        return self.open(read_only)

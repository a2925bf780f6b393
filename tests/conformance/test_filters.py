"""The filters against `FilterConformance`; and how a write through one that limits transfers is split."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import pytest

from lamina.filters.blkdebug import Blkdebug
from lamina.graph import Opener
from lamina.image import Image
from lamina.node import Node
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing import FilterConformance


class BlkdebugConformance(FilterConformance):
    options: ClassVar[dict[str, Any]] = {}

    def make(self, image: Child) -> Node:
        return Blkdebug.open(Blkdebug.schema.parse({"image": image, **self.options}), Opener(read_only=False))


class TestBlkdebug(BlkdebugConformance):
    pass


class TestBlkdebugAlign512(BlkdebugConformance):
    options = {"align": 512}


class TestBlkdebugAlign4k(BlkdebugConformance):
    options = {"align": "4k", "max-transfer": "8k"}


class TestBlkdebugAlign1M(BlkdebugConformance):
    options = {"align": "1M"}


class TestBlkdebugZeroes(BlkdebugConformance):
    options = {"align": 512, "opt-write-zero": 1536, "max-write-zero": 3072, "max-transfer": 1024}


class TestBlkdebugDiscards(BlkdebugConformance):
    options = {"opt-discard": 3000, "max-discard": 9000, "opt-write-zero": 10_000}


class TestBlkdebugTransfers(BlkdebugConformance):
    options = {"max-transfer": 1024}


class Recording(MemoryStorage):
    """Remembers where the writes that it got began and ended."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.edges: list[tuple[int, int]] = []

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.edges.append((offset, offset + len(view)))
        super().write(offset, view, flags)


@pytest.mark.parametrize("most", [512, 1000, 1024, 3000])
def test_a_write_that_is_split_is_cut_between_blocks(most: int) -> None:
    """Else two writes that overlap and are split at different places could leave a block that is half of each."""
    storage = Recording(20_000)
    options = Blkdebug.schema.parse({"image": Child(storage, "image"), "max-transfer": most})
    disk = Image(Blkdebug.open(options, Opener(read_only=False)))
    disk.write(100, b"x" * 9001)
    assert (storage.edges[0][0], storage.edges[-1][1]) == (100, 9101)
    for (_, end), (begin, _) in pairwise(storage.edges):
        assert end == begin
        assert end % 512 == 0
    assert max(end - begin for begin, end in storage.edges) <= most

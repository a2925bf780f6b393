"""The suite for storage: all laws of `disk`, growth, and host offsets in the node itself."""

from __future__ import annotations

from contextlib import closing

from hypothesis import given
from hypothesis import strategies as st

from ..image import Image
from ..node import Node, StorageNode
from ..request import Child
from .disk import LAW, DiskConformance, pattern, spans
from .model import Disk, check_disk


class StorageConformance(DiskConformance):
    """Derive from it and implement `make`. Override `reopened` if a disk can be closed and opened again."""

    size = 300_001

    def make(self, size: int) -> Node:
        """New storage of `size` bytes that reads as zeros, open for writing."""
        raise NotImplementedError

    def opened(self) -> Node:
        return self.make(self.size)

    def test_it_is_its_own_host_file(self) -> None:
        with self.image() as image:
            node = image.node
            assert isinstance(node, StorageNode)
            assert node.host_base == (node, 0)
            image.write(self.unit, b"x" * self.unit)
            for row in image.extents():
                assert (row.depth, row.present) == (0, True)
                assert row.file is None or (row.file is node and row.offset == row.start)

    def test_new_storage_reads_as_zero(self) -> None:
        with self.image() as image:
            content = image.read(0, image.size)
            assert content.count(0) == self.size
        for size in (0, 1):
            with Image(self.make(size)) as image:
                assert image.size == size
                assert image.read(0, size) == bytes(size)
                assert image.extents().end == size

    @LAW
    @given(st.data())
    def test_storage_that_grows_leaves_zeros_between(self, data: st.DataObject) -> None:
        node = self.make(self.size)
        edge = Child(node, "file", grows=True)
        with Image(node) as image, closing(edge):  # both edges keep the node open
            if not node.growable:
                return
            disk = Disk(bytes(self.size), keeps=self.keeps)
            for value in range(1, 4):
                offset, length = data.draw(spans(self.size + 5 * self.unit, self.unit).filter(lambda span: span[1] > 0))
                end = offset + length
                # Past its end a block of storage may be longer than the request, never shorter.
                if data.draw(st.booleans()):
                    edge.write(offset, memoryview(pattern(length, value)))
                else:
                    edge.zero(offset, length)
                    value = 0
                assert node.size >= end
                disk.truncate(max(node.size, len(disk)))
                if value:
                    disk.write(offset, pattern(length, value))
                else:
                    disk.zero(offset, length)
                beyond = bytearray(b"x" * 100)
                edge.read_into(node.size - 10, memoryview(beyond))
                assert not any(beyond[10:])
                check_disk(image, disk)

"""The filters that change bytes, offsets or lengths, or that keep bytes of their own, against the laws of every node; and
those among them that leave bytes alone against `FilterConformance`."""

from __future__ import annotations

from lamina.filters.blkverify import Blkverify
from lamina.filters.cache import Cache
from lamina.filters.concat import Concat
from lamina.filters.copy_on_read import CopyOnRead
from lamina.filters.cow import Cow
from lamina.filters.offset import Offset
from lamina.filters.partition import MBR_ENTRY, Partition
from lamina.filters.preallocate import Preallocate
from lamina.filters.quorum import Quorum
from lamina.filters.truncate import Truncate
from lamina.image import Image
from lamina.node import Node
from lamina.request import Child
from lamina.testing import FilterConformance
from lamina.testing.disk import DiskConformance
from lamina.testing.formats import KeptMemory


class OverMemory(DiskConformance):
    """The laws of every node, for a filter that `make` puts over memory of `below` bytes, which outlives it."""

    below = 300_001
    resizes = False

    def make(self, image: Child) -> Node:
        raise NotImplementedError

    def opened(self) -> Node:
        storage = KeptMemory(self.below)
        storage.write(0, memoryview(b"\xee" * 70_000))  # what lies below is not all zero
        return self.make(Child(storage, "image", grows=True))

    def reopened(self, node: Node, *, read_only: bool = False) -> Node:
        storage = node.children["image"].node
        node.close()
        storage.read_only = read_only
        again = self.make(Child(storage, "image", grows=True))
        again.read_only = read_only
        return again


class TestOffset(OverMemory):
    def make(self, image: Child) -> Node:
        return Offset(image, 1000, 150_001)


class TestOffsetToTheEnd(OverMemory):
    def make(self, image: Child) -> Node:
        return Offset(image, 4096)


class TestTruncateShorter(OverMemory):
    def make(self, image: Child) -> Node:
        return Truncate(image, 123_457)


class TestTruncateRounded(OverMemory):
    def make(self, image: Child) -> Node:
        return Truncate(image, round_down=4096)


class TestPartition(OverMemory):
    def make(self, image: Child) -> Node:
        """A disk with one partition, from sector 3 up to sector 501. Its table is written anew each time, outside of it."""
        entry = MBR_ENTRY.pack(type=0x83, first=3, sectors=498)
        node = image.node
        read_only, node.read_only = node.read_only, False
        image.write(446, memoryview(entry + bytes(48) + b"\x55\xaa"))
        node.read_only = read_only
        return Partition(image, 1)


class TestCow(OverMemory):
    resizes = True

    def make(self, image: Child) -> Node:
        return Cow(image)

    def reopened(self, node: Node, *, read_only: bool = False) -> Node:
        """What it keeps is gone when it is closed, so it stays open."""
        node.read_only = read_only
        return node


class TestCopyOnRead(FilterConformance):
    def make(self, image: Child) -> Node:
        return CopyOnRead(image)


class TestPreallocate(FilterConformance):
    def make(self, image: Child) -> Node:
        return Preallocate(image, 10_000, 4096)


class TestBlkverify(FilterConformance):
    def make(self, image: Child) -> Node:
        """Over `image` and a copy of it."""
        raw = KeptMemory()
        raw.write(0, memoryview(Image(image.node).read(0, image.size)))
        return Blkverify(image, Child(raw, "raw", grows=True))


class TestQuorum(DiskConformance):
    def opened(self) -> Node:
        return self.over([KeptMemory(300_001) for _ in range(3)])

    def over(self, copies: list[Node], *, read_only: bool = False) -> Node:
        for copy in copies:
            copy.read_only = read_only
        return Quorum([Child(copy, "copy") for copy in copies], 2, read_only=read_only)

    def reopened(self, node: Node, *, read_only: bool = False) -> Node:
        copies = [child.node for child in node.children.values()]
        node.close()
        return self.over(copies, read_only=read_only)


class TestConcat(DiskConformance):
    sizes = (4096, 0, 131_075, 164_830)
    resizes = False

    def opened(self) -> Node:
        return self.over([KeptMemory(size) for size in self.sizes])

    def over(self, disks: list[Node], *, read_only: bool = False) -> Node:
        for disk in disks:
            disk.read_only = read_only
        return Concat([Child(disk, "disk") for disk in disks], read_only=read_only)

    def reopened(self, node: Node, *, read_only: bool = False) -> Node:
        disks = [child.node for child in node.children.values()]
        node.close()
        return self.over(disks, read_only=read_only)


class TestCacheWriteback(OverMemory):
    resizes = True

    def make(self, image: Child) -> Node:
        return Cache(image, 3, 4096)


class TestCacheWritebackLarge(OverMemory):
    resizes = True

    def make(self, image: Child) -> Node:
        return Cache(image)


class TestCacheWritethrough(FilterConformance):
    def make(self, image: Child) -> Node:
        return Cache(image, 3, 4096, "writethrough")

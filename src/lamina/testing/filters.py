"""The suite for filters that leave bytes alone: all laws of `disk`, and no effect on the exact status."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ..image import Image
from ..node import Node
from ..request import Child
from .disk import LAW, DiskConformance, operations, spans
from .formats import KeptMemory
from .model import check_disk


class FilterConformance(DiskConformance):
    """Derive from it and implement `make`. For observers only: filters that change bytes, offsets or lengths violate these
    laws by design."""

    size = 300_001

    def make(self, image: Child) -> Node:
        """The filter over `image`, which is in memory."""
        raise NotImplementedError

    def opened(self) -> Node:
        return self.make(Child(KeptMemory(self.size), "image", grows=True))

    def reopened(self, node: Node, *, read_only: bool = False) -> Node:
        below = node.children["image"].node
        node.close()
        below.read_only = read_only
        again = self.make(Child(below, "image", grows=True))
        again.read_only = read_only
        return again

    @LAW
    @given(st.data())
    def test_the_exact_status_is_that_of_the_bare_node(self, data: st.DataObject) -> None:
        below = KeptMemory(self.size)
        bare = Image(below)
        disk = self.model(bare)
        for operation in data.draw(operations(self.size, 1 << 16)):
            self.apply_bare(bare, operation)
        disk = self.model(bare)
        node: Node = below
        for layers in range(1, 4):
            node = self.make(Child(node, "image", grows=True))
            seen = Image(node)
            assert (seen.size, node.host_base, seen.filename) == (bare.size, below.host_base, bare.filename)
            assert seen.extents() == bare.extents()
            offset, length = data.draw(spans(self.size, self.unit))
            assert seen.extents(offset, length) == bare.extents(offset, length)
            assert seen.read(offset, length) == bare.read(offset, length)
            rounded = seen.extents().align(seen.alignment)
            assert rounded == bare.extents().align(seen.alignment)
            assert not (rounded.start % seen.alignment).any()
            check_disk(seen, disk)
            assert len({row.depth for row in seen.extents()}) == 1, f"{layers} filters changed the depth"

    def apply_bare(self, bare: Image, operation: tuple[str, int, int, int]) -> None:
        """Call the node below, which cannot be reopened."""
        if operation[0] != "reopen":
            self.apply(bare, self.model(bare), operation)

    @LAW
    @given(st.data())
    def test_what_is_done_through_it_is_there_without_it(self, data: st.DataObject) -> None:
        below = KeptMemory(self.size)
        seen, bare = Image(self.make(Child(below, "image", grows=True))), Image(below)
        disk = self.model(bare)
        for operation in data.draw(operations(self.size, self.unit)):
            if operation[0] != "reopen":
                self.apply(seen, disk, operation)
        assert check_disk(seen, disk) == check_disk(bare, disk)
        assert seen.extents() == bare.extents()

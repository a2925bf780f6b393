"""The suite for formats: all laws of `disk`, over storage in memory, and agreement of all results of the mapping."""

from __future__ import annotations

import random
from collections.abc import Mapping as Options
from typing import Any, ClassVar, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from ..errors import BlockIOError, NotSupported, UnsupportedFeature
from ..format import Format, lookup_format
from ..format_node import Columns, FormatNode
from ..graph import Opener
from ..image import Image
from ..limits import Limits
from ..node import Node
from ..numeric import np
from ..report import ERROR
from ..request import Child
from ..storage.memory import MemoryStorage
from .disk import LAW, DiskConformance, operations, pattern, spans
from .model import check_disk


class KeptMemory(MemoryStorage):
    """Storage in memory that outlives the nodes over it. `budget`: the number of writes that still succeed; None: all."""

    def __init__(self, size: int = 0) -> None:
        super().__init__(size)
        self.budget: int | None = None

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        if self.budget is not None:
            self.budget -= 1
            if self.budget < 0:
                raise BlockIOError("no space is left (a fault of the test)", errno=28, node=self.name)
        super().write(offset, view, flags)

    def close(self) -> None:
        self.read_only = False


class DemandingMemory(KeptMemory):
    """The same with limits that the requests of no format match by chance, and without fast zero requests."""

    @property
    def limits(self) -> Limits:
        return Limits(request_alignment=4096, max_transfer=8192, zero_alignment=4096, discard_alignment=4096)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        raise NotSupported("cannot", node=self.name)


class FormatConformance(DiskConformance):
    """Derive from it and set the driver and the options. Override `make` if the image is not created from options."""

    #: The driver's name in the registry.
    driver: ClassVar[str]
    #: The size of the disk in bytes.
    size = 300_001
    #: The options for `create` and `open` of the driver.
    create_options: ClassVar[Options[str, Any]] = {}
    open_options: ClassVar[Options[str, Any]] = {}
    #: The size of the backing disk in bytes; None: there is none. Half of it is random bytes.
    backing: int | None = None

    def kind(self) -> type[Format]:
        """The class of the driver."""
        return lookup_format(self.driver)

    def make(self, storage: Child) -> None:
        """Create a new image in `storage`, which is empty."""
        kind = self.kind()
        kind.create(storage, self.size, kind.creation_schema().parse({**self.create_options, "size": self.size}))

    def over(self, storage: KeptMemory, below: KeptMemory | None, *, read_only: bool = False) -> Node:
        """Open the image in `storage`. `storage` and `below` outlive it."""
        kind = self.kind()
        storage.read_only = read_only
        options: dict[str, Any] = {**self.open_options, "file": Child(storage, "file", grows=True)}
        if below is not None:
            options["backing"] = Child(below, "backing")
        node: Node = kind.open(kind.schema.parse(options), Opener(read_only=read_only))
        return node

    def below(self) -> KeptMemory | None:
        """The storage of the backing node; None without one."""
        if self.backing is None:
            return None
        below = KeptMemory(self.backing)
        rng = random.Random(self.backing)
        for at in range(0, self.backing, 1 << 16):
            length = min(rng.randrange(1, 1 << 16), self.backing - at)
            below.write(at, memoryview(rng.randbytes(length)))
        below.read_only = True
        return below

    def opened(self, kind: type[KeptMemory] = KeptMemory) -> Node:
        storage = kind()
        self.make(Child(storage, "file", grows=True))
        return self.over(storage, self.below())

    def reopened(self, node: Node, *, read_only: bool = False) -> Node:
        storage = node.children["file"].node
        backing = node.children.get("backing")
        node.close()
        assert isinstance(storage, KeptMemory)
        below = backing.node if backing else None
        assert below is None or isinstance(below, KeptMemory)
        return self.over(storage, below, read_only=read_only)

    def check(self, node: Node) -> None:
        """The check of the driver finds no error in the structures of the image."""
        assert isinstance(node, Format)
        try:
            findings = node.check().findings
        except UnsupportedFeature:
            return
        wrong = [finding for finding in findings if finding.kind == ERROR]
        assert not wrong, wrong

    @LAW
    @given(st.data())
    def test_map_and_map_columns_are_one_answer(self, data: st.DataObject) -> None:
        image = Image(self.opened())
        try:
            if not isinstance(image.node, FormatNode):
                return
            disk = self.model(image)
            for operation in data.draw(operations(image.size, self.unit)):
                image = self.apply(image, disk, operation)
            for _ in range(6):
                offset, length = data.draw(spans(image.size, self.unit).filter(lambda span: span[1] > 0))
                assert isinstance(image.node, FormatNode)
                found = image.node.map_columns(offset, length)
                assert found.start.dtype == found.length.dtype == found.offset.dtype == np.int64
                assert found.flags.dtype == np.uint8
                assert walk(image.node, offset, length) == listed(found)
        finally:
            image.close()

    @LAW
    @given(st.data())
    def test_demanding_storage_changes_nothing(self, data: st.DataObject) -> None:
        images = [Image(self.opened()), Image(self.opened(DemandingMemory))]
        try:
            disk = self.model(images[0])
            for operation in data.draw(operations(images[0].size, self.unit).filter(lambda ops: len(ops) < 6)):
                if operation[0] in ("fast", "discard"):  # the storage may ignore them
                    continue
                images = [self.apply(image, disk, operation) for image in images]
            for image in images:
                check_disk(image, disk)
                image.flush()
                self.check(image.node)
        finally:
            for image in images:
                image.close()

    @LAW
    @given(st.data())
    def test_the_layer_below_is_never_written(self, data: st.DataObject) -> None:
        image = Image(self.opened())
        try:
            backing = image.node.children.get("backing")
            if backing is None:
                return
            whole = bytearray(backing.size)
            backing.read_into(0, memoryview(whole))
            content = image.read(0, image.size)
            length = min(len(whole), image.size)
            assert content[:length] == whole[:length]
            assert content[length:].count(0) == image.size - length
            disk = self.model(image)
            for operation in data.draw(operations(image.size, self.unit)):
                image = self.apply(image, disk, operation)
            if self.resizes:
                for size in (image.size // 2, image.size):
                    image.truncate(size - size % self.size_unit)
                    disk.truncate(image.size)
            check_disk(image, disk)
            again = bytearray(len(whole))
            backing.read_into(0, memoryview(again))
            assert again == whole
        finally:
            image.close()

    @LAW
    @given(st.data())
    def test_a_write_that_fails_harms_no_neighbour(self, data: st.DataObject) -> None:
        image = Image(self.opened())
        storage = image.node.children["file"].node
        assert isinstance(storage, KeptMemory)
        try:
            disk = self.model(image)
            image = self.apply(image, disk, ("write", 1, self.unit, 5))
            for value in range(6, 9):
                offset, length = data.draw(spans(image.size, self.unit))
                storage.budget = data.draw(st.integers(0, 3))
                try:
                    image.write(offset, pattern(length, value))
                except BlockIOError:
                    # The bytes of the failed request are undefined; their present values must stay.
                    disk.write(offset, image.read(offset, length))
                else:
                    disk.write(offset, pattern(length, value))
                finally:
                    storage.budget = None
                check_disk(image, disk)
            image = Image(self.reopened(image.node))
            check_disk(image, disk)
            self.check(image.node)
        finally:
            storage.budget = None
            image.close()


def walk(node: FormatNode, offset: int, length: int) -> list[Row]:
    """The mapping of a whole range by repeated calls of `map`, with equal and contiguous rows merged."""
    rows: list[Row] = []
    end = offset + length
    while offset < end:
        flags, run, place, child, _ = node.map(offset, end - offset)
        assert 0 < run <= end - offset
        assert (child is not None) or place < 0
        _join(rows, Row(offset, run, flags, place, child if place >= 0 else None))
        offset += run
    return rows


def listed(columns: Columns) -> list[Row]:
    """The rows of `map_columns`."""
    places = columns.offset.tolist()
    which = [0] * len(places) if columns.child is None else columns.child.tolist()
    children = [columns.children[index] if place >= 0 else None for index, place in zip(which, places, strict=True)]
    told = (columns.start.tolist(), columns.length.tolist(), columns.flags.tolist(), places, children)
    return [Row(*row) for row in zip(*told, strict=True)]


class Row(NamedTuple):
    start: int
    length: int
    flags: int
    offset: int
    child: Child | None


def _join(rows: list[Row], new: Row) -> None:
    if rows and rows[-1].flags == new.flags and rows[-1].child is new.child:
        last = rows[-1]
        if new.offset == (last.offset + last.length if last.offset >= 0 else -1):
            rows[-1] = last._replace(length=last.length + new.length)
            return
    rows.append(new)

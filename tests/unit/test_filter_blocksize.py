"""The filter `blocksize`: what it declares, and what arrives below it then."""

from __future__ import annotations

import pytest

from lamina.errors import OptionError
from lamina.filters.blocksize import BlockSize
from lamina.graph import Opener
from lamina.image import Image
from lamina.limits import Limits
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


class LimitedMemory(MemoryStorage):
    """Memory that declares limits."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(1 << 20)
        self._limits = limits

    @property
    def limits(self) -> Limits:
        return self._limits


class Watched(BlockSize):
    """Notes each request that gets past the edge above it."""

    def __init__(self, image: Child, minimum: int = 1, maximum: int = 0) -> None:
        super().__init__(image, minimum, maximum)
        self.requests: list[tuple[str, int, int]] = []

    def read_into(self, offset: int, view: memoryview) -> None:
        self.requests.append(("read", offset, len(view)))
        super().read_into(offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.requests.append(("write", offset, len(view)))
        super().write(offset, view, flags)


@pytest.mark.parametrize(
    ("minimum", "maximum", "below", "align", "most"),
    [
        (1, 0, Limits(), 1, 0),
        (4096, 0, Limits(), 4096, 0),
        (4096, 8192, Limits(), 4096, 8192),
        (512, 0, Limits(request_alignment=4096), 4096, 0),
        (4096, 65536, Limits(max_transfer=8192), 4096, 8192),
        (65536, 0, Limits(max_transfer=8192), 65536, 0),  # the edge below splits again
        (1, 512, Limits(request_alignment=512, max_transfer=4096), 512, 512),
        (64 << 20, 0, Limits(), 64 << 20, 0),
    ],
)
def test_limits(minimum: int, maximum: int, below: Limits, align: int, most: int) -> None:
    node = BlockSize(Child(LimitedMemory(below), "image"), minimum, maximum)
    assert node.limits == below._replace(request_alignment=align, max_transfer=most)


@pytest.mark.parametrize(("minimum", "maximum"), [(0, 0), (3, 0), (4096, 512), (128 << 20, 0), (1, 511)])
def test_what_cannot_be_is_refused(minimum: int, maximum: int) -> None:
    below = LimitedMemory(Limits(request_alignment=512))
    options = {"driver": "blocksize", "image": Child(below, "image"), "minimum": minimum, "maximum": maximum}
    with pytest.raises(OptionError):
        Opener(read_only=False).open(options)


def test_what_arrives_are_whole_blocks_not_too_many_at_a_time() -> None:
    storage = LimitedMemory(Limits())
    node = Watched(Child(storage, "image"), 4096, 8192)
    image = Image(node)
    image.write(5000, b"x" * 20_000)
    assert Image(storage).read(4999, 20_002) == b"\0" + b"x" * 20_000 + b"\0"
    writes = [(offset, length) for name, offset, length in node.requests if name == "write"]
    assert sum(length for _, length in writes) == 24576
    node.requests.clear()
    assert image.read(1, 30_000) == Image(storage).read(1, 30_000)
    for _, offset, length in [*node.requests, *(("write", *write) for write in writes)]:
        assert offset % 4096 == length % 4096 == 0
        assert length <= 8192


def test_the_end_of_the_disk_counts_as_aligned() -> None:
    storage = MemoryStorage(10_000)
    node = Watched(Child(storage, "image"), 4096)
    Image(node).write(9_999, b"x")
    assert node.requests == [("read", 8192, 1808), ("write", 8192, 1808)]
    assert storage.size == 10_000

"""The filter `nodiscard`: no discard arrives below, nor a permission to unmap."""

from __future__ import annotations

import pytest

from lamina.errors import NotSupported
from lamina.filters.nodiscard import NoDiscard
from lamina.image import Image
from lamina.node import FUA, MAY_UNMAP, NO_FALLBACK
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


class Recording(MemoryStorage):
    """Remembers its zeroes and discards."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.changes: list[tuple[str, int, int, int]] = []

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.changes.append(("zero", offset, length, flags))
        super().zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.changes.append(("discard", offset, length, 0))
        super().discard(offset, length)


def test_a_discard_does_nothing_and_is_no_failure() -> None:
    storage = Recording(1 << 20)
    node = NoDiscard(Child(storage, "image"))
    image = Image(node)
    image.write(0, b"kept" * 1000)
    image.discard(0, 1 << 20)
    assert storage.changes == []
    assert image.read(0, 4000) == b"kept" * 1000
    with pytest.raises(NotSupported):  # what the request path is told
        node.discard(0, 4096)


def test_zeroes_pass_without_the_permission_to_unmap() -> None:
    storage = Recording(1 << 20)
    image = Image(NoDiscard(Child(storage, "image")))
    image.zero(0, 4096, unmap=True, fast=True, fua=True)
    image.zero(4096, 4096)
    assert storage.changes == [("zero", 0, 4096, NO_FALLBACK | FUA), ("zero", 4096, 4096, 0)]
    assert not any(flags & MAY_UNMAP for _, _, _, flags in storage.changes)

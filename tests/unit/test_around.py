"""The base `AroundNode`: every request passes its one hook, with its range and flags, and the hook's answer counts."""

from __future__ import annotations

from typing import Any

import pytest

from lamina.around import AroundNode, Request
from lamina.errors import BlockIOError
from lamina.image import Image
from lamina.node import FUA, MAY_UNMAP
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


class Watching(AroundNode):
    driver = "watching"

    def __init__(self, image: Child, **common: Any) -> None:
        super().__init__(image, **common)
        self.seen: list[tuple[Any, ...]] = []
        self.refused = ""

    def around(self, kind: str, request: Request, offset: int, length: int, flags: int, /) -> Any:
        self.seen.append((kind, offset, length, flags))
        if kind == self.refused:
            raise BlockIOError("refused", errno=5)
        return request()


def test_every_request_passes_the_hook() -> None:
    storage = MemoryStorage(8192)
    node = Watching(Child(storage, "image", grows=True))
    edge = Child(node, "root")
    edge.write(1, memoryview(b"abc"), FUA)
    edge.zero(0, 4096, MAY_UNMAP)
    edge.discard(4096, 4096)
    edge.write(5, memoryview(b"abc"))
    buffer = bytearray(5)
    edge.read_into(4, memoryview(buffer))
    assert buffer == b"\0abc\0"
    assert edge.extents(0, 8192) == Child(storage, "root").extents(0, 8192)
    edge.flush()
    edge.truncate(10_000)
    assert storage.size == edge.size == 10_000
    assert node.seen == [
        ("write", 1, 3, FUA),
        ("zero", 0, 4096, MAY_UNMAP),
        ("discard", 4096, 4096, 0),
        ("write", 5, 3, 0),
        ("read", 4, 5, 0),
        ("extents", 0, 8192, 0),
        ("flush", 0, 0, 0),
        ("truncate", 10_000, 0, 0),
    ]


@pytest.mark.parametrize("kind", ["read", "write", "zero", "flush", "truncate", "extents"])
def test_what_the_hook_raises_ends_the_request(kind: str) -> None:
    storage = MemoryStorage(4096)
    image = Image(Watching(Child(storage, "image", grows=True)))
    image.node.refused = kind  # type: ignore[attr-defined]
    operations: dict[str, Any] = {
        "read": lambda: image.read(0, 1),
        "write": lambda: image.write(0, b"x"),
        "zero": lambda: image.zero(0, 4096),
        "flush": image.flush,
        "truncate": lambda: image.truncate(0),
        "extents": image.extents,
    }
    for name, operation in operations.items():
        if name == kind:
            with pytest.raises(BlockIOError, match="refused"):
                operation()
        elif name != "truncate":
            operation()
    assert storage.size == 4096


def test_the_schema_is_made_of_the_options() -> None:
    assert [option.name for option in Watching.schema.options] == ["image"]
    assert Watching.schema.driver == "watching"

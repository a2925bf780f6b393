"""The limits that the filter `blkdebug` imposes, and which limits it accepts (side by side with QEMU)."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import NotSupported, OptionError
from lamina.filters.blkdebug import Blkdebug
from lamina.graph import Opener, open_graph
from lamina.limits import Limits
from lamina.node import NO_FALLBACK
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


class LimitedMemory(MemoryStorage):
    """Memory that declares limits."""

    def __init__(self, size: int, limits: Limits) -> None:
        super().__init__(size)
        self._limits = limits

    @property
    def limits(self) -> Limits:
        return self._limits


def over(storage: MemoryStorage, **options: Any) -> Blkdebug:
    spelt = {key.replace("_", "-"): value for key, value in options.items()}
    values = Blkdebug.schema.parse({"image": Child(storage, "image", grows=True), **spelt})
    return Blkdebug.open(values, Opener(read_only=False))


LEGAL = [
    "align=512",
    "align=1",
    "align=0",
    "max-transfer=2147483646",
    "align=512,max-transfer=2147483136",
    "align=4096,opt-write-zero=12288",
    "align=4096,opt-write-zero=12288,max-write-zero=36864",
    "opt-discard=12288,max-discard=24576",
    "max-transfer=0,opt-discard=0",
]
ILLEGAL = [
    ("align=3", "align"),
    ("align=2147483648", "align"),
    ("max-transfer=2147483647", "max-transfer"),
    ("align=512,max-transfer=2147483647", "max-transfer"),
    ("align=4096,max-transfer=512", "max-transfer"),
    ("opt-write-zero=2147483647", "opt-write-zero"),
    ("align=4096,opt-write-zero=512", "opt-write-zero"),
    ("align=4096,opt-write-zero=12288,max-write-zero=4096", "max-write-zero"),
    ("align=4096,max-write-zero=2048", "max-write-zero"),
    ("align=4096,opt-discard=512", "opt-discard"),
    ("opt-discard=12288,max-discard=4096", "max-discard"),
    ("align=8192,max-discard=4096", "max-discard"),
]


def values(text: str) -> dict[str, Any]:
    return dict(item.split("=") for item in text.split(","))


@pytest.mark.parametrize("text", LEGAL)
def test_legal(text: str) -> None:
    over(MemoryStorage(1 << 20), **values(text))


@pytest.mark.parametrize(("text", "name"), ILLEGAL)
def test_illegal(text: str, name: str) -> None:
    with pytest.raises(OptionError, match=f" {name} ") as caught:
        over(MemoryStorage(1 << 20), **values(text))
    assert caught.value.hint


@pytest.mark.peers
def test_qemu_draws_the_same_line(qemu: Any, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    for text in LEGAL + [text for text, _ in ILLEGAL]:
        options = f"driver=blkdebug,image.driver=raw,image.file.filename={path},{text}"
        done = qemu.io("--image-opts", options, "-c", "read 0 4k", check=False)
        assert (done.returncode == 0) == (text in LEGAL), text


def test_what_is_absent_is_the_childs() -> None:
    below = Limits(
        request_alignment=512,
        max_transfer=8192,
        zero_alignment=1024,
        max_zero=65536,
        discard_alignment=2048,
        max_discard=4096,
    )
    storage = LimitedMemory(1 << 20, below)
    # Zeroing is aligned by the edge below: the filter is never handed more than was asked for.
    assert over(storage).limits == below._replace(zero_alignment=512)
    assert over(storage, align=256).limits.request_alignment == 512
    with pytest.raises(OptionError):
        over(storage, max_transfer=256)  # not a multiple of the child's alignment
    changed = over(storage, align=4096, opt_write_zero=8192).limits
    assert (changed.request_alignment, changed.zero_alignment, changed.max_zero) == (4096, 8192, 65536)
    assert (changed.max_transfer, changed.discard_alignment, changed.max_discard) == (8192, 2048, 4096)


def test_what_is_too_short_is_refused() -> None:
    node = over(MemoryStorage(1 << 20), align=4096, opt_write_zero=12288)
    with pytest.raises(NotSupported):
        node.zero(0, 12287)
    node.zero(0, 12288)
    with pytest.raises(NotSupported):
        node.discard(0, 4095)
    node.discard(0, 4096)


def test_through_the_graph_and_by_name(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 1000)
    node = open_graph(
        {"driver": "blkdebug", "align": "512", "image": {"driver": "raw", "file": str(path)}}, read_only=False
    )
    edge = Child(node, "root")
    assert (edge.size, node.limits.request_alignment) == (1000, 512)
    edge.write(998, memoryview(b"ab"))
    assert [(e.start, e.end, e.data, e.offset) for e in edge.extents(1, 999)] == [(1, 1000, True, 1)]
    edge.close()
    assert path.read_bytes() == b"x" * 998 + b"ab"


class Watched(Blkdebug):
    """Fails the test when a request from above breaks the limits it declares."""

    def watch(self, offset: int, length: int, unit: int, most: int) -> None:
        unit = math.lcm(unit, self.limits.request_alignment)  # a block of 3 over one of 16 is 48, whatever the maximum
        assert length > 0
        assert offset % unit == 0
        assert (offset + length) % unit == 0 or offset + length == self.size
        assert not most or length <= max(most, unit)

    def read_into(self, offset: int, view: memoryview) -> None:
        self.watch(offset, len(view), 1, self.limits.max_transfer)
        super().read_into(offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.watch(offset, len(view), 1, self.limits.max_transfer)
        super().write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.watch(offset, length, self.limits.zero_alignment, self.limits.max_zero)
        super().zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.watch(offset, length, self.limits.discard_alignment, self.limits.max_discard)
        super().discard(offset, length)


@settings(max_examples=150)
@given(data=st.data(), size=st.integers(1, 3000))
def test_a_disk_behind_two_of_them_is_the_same_disk(data: st.DataObject, size: int) -> None:
    def chosen(below: Limits) -> dict[str, int]:
        align = data.draw(st.sampled_from([0, 1, 16, 64, 512]))
        unit = max(align, below.request_alignment)
        times = st.integers(0, 3)
        zero, discard = unit * data.draw(times), unit * data.draw(times)
        return {
            "align": align,
            "max-transfer": unit * data.draw(times),
            "opt-write-zero": zero,
            "max-write-zero": max(zero, unit) * data.draw(times),
            "opt-discard": discard,
            "max-discard": max(discard, unit) * data.draw(times),
        }

    model = bytearray(random.Random(size).randbytes(size))
    storage = MemoryStorage(size)
    storage.write(0, memoryview(model))
    node: Any = storage
    for _ in range(2):
        options = Watched.schema.parse({"image": Child(node, "image", grows=True), **chosen(node.limits)})
        node = Watched.open(options, Opener(read_only=False))
    edge = Child(node, "root")
    for number in range(data.draw(st.integers(1, 6))):
        offset = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(1, size - offset))
        what = data.draw(st.sampled_from(["write", "zero", "fast zero", "discard"]))
        buffer = bytearray(size)
        if what == "write":
            model[offset : offset + length] = bytes([number + 1]) * length
            edge.write(offset, memoryview(model)[offset : offset + length])
        elif what == "discard":
            edge.discard(offset, length)
            storage.read_into(0, memoryview(buffer))
            model[offset : offset + length] = buffer[offset : offset + length]
        else:
            try:
                edge.zero(offset, length, NO_FALLBACK if what == "fast zero" else 0)
                model[offset : offset + length] = bytes(length)
            except NotSupported:
                assert what == "fast zero"
        edge.read_into(0, memoryview(buffer))
        assert buffer == model
    assert edge.size == size
    assert edge.extents(0, size) == Child(storage, "all").extents(0, size)

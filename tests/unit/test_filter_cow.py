"""The filter `cow`: the image below never changes, the status is exact to the byte; `snapshot=on` in all its spellings."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.cli.main import main
from lamina.errors import OptionError, ReadOnly
from lamina.filters.cow import Cow, _RangeMap
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import PAGE, MemoryStorage
from lamina.testing.model import check_status

SIZE = 3 * PAGE


def over() -> tuple[Image, MemoryStorage]:
    storage = MemoryStorage(SIZE)
    Image(storage).write(PAGE, b"\xaa" * PAGE)
    storage.read_only = True
    return Image(Cow(Child(storage, "image"))), storage


def test_the_image_below_stays_as_it_is() -> None:
    image, storage = over()
    before = Image(storage).read(0, SIZE)
    image.write(100, b"x" * PAGE, fua=True)
    image.zero(PAGE, 100, unmap=True)
    image.discard(PAGE + 200, 100)
    image.truncate(2 * PAGE)
    image.truncate(4 * PAGE)
    image.flush()
    expected = bytearray(before[: 2 * PAGE].ljust(4 * PAGE, b"\0"))
    expected[100 : 100 + PAGE] = b"x" * PAGE
    expected[PAGE : PAGE + 100] = bytes(100)
    expected[PAGE + 200 : PAGE + 300] = bytes(100)
    assert image.read(0, image.size) == expected
    check_status(image.extents(), 0, bytes(expected))
    assert Image(storage).read(0, SIZE) == before
    assert storage.size == SIZE


def test_the_status_is_exact_and_no_layer_is_added() -> None:
    image, storage = over()
    assert image.extents() == Image(storage).extents()
    image.write(10, b"x" * 5)
    image.zero(PAGE + 10, 5)
    rows = [(row.start, row.length, row.data, row.zero, row.present, row.depth, row.offset) for row in image.extents()]
    assert rows == [
        (0, 10, False, True, True, 0, 0),
        (10, 5, True, False, True, 0, None),
        (15, PAGE - 15, False, True, True, 0, 15),
        (PAGE, 10, True, False, True, 0, PAGE),
        (PAGE + 10, 5, False, True, True, 0, None),
        (PAGE + 15, PAGE - 15, True, False, True, 0, PAGE + 15),
        (2 * PAGE, PAGE, False, True, True, 0, 2 * PAGE),
    ]
    assert image.root.reads_zero(15, PAGE - 15)
    assert not image.root.reads_zero(14, 2)
    assert image.root.reads_zero(PAGE + 10, 5)
    assert not image.root.reads_zero(PAGE + 10, 6)


def test_huge_zeroes_cost_nothing() -> None:
    storage = MemoryStorage(1 << 50)
    image = Image(Cow(Child(storage, "image")))
    image.write(1 << 40, b"x" * (4 * PAGE))
    image.zero(0, 1 << 50)
    image.truncate(1 << 51)
    assert len(image.extents()) == 1
    assert image.node._memory.node.allocated == 0  # type: ignore[attr-defined]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(0, 40), st.integers(1, 12)), max_size=25))
def test_stretches_are_what_was_set(steps: list[tuple[int, int, int]]) -> None:
    stretches, flat = _RangeMap(), [-1] * 60
    for kind, start, length in steps:
        if kind == 2:
            stretches.cut(start)
            flat[start:] = [-1] * (60 - start)
        else:
            stretches.set(start, start + length, kind)
            flat[start : start + length] = [kind] * length
        rows = list(stretches.within(3, 57))
        assert [kind for low, high, kind in rows for _ in range(low, high)] == flat[3:57]
        assert all(left[2] != right[2] for left, right in pairwise(rows)), "equal neighbours"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\x07" * 4096)
    path.chmod(0o444)
    return path


def test_snapshot_of_open(disk: Path) -> None:
    with lamina.open(disk, format="raw", read_only=False, snapshot=True) as image:
        image.write(0, b"x" * 100)
        assert image.read(0, 101) == b"x" * 100 + b"\x07"
        assert image.node.children["image"].node.read_only
    with lamina.open(disk, format="raw", snapshot=True) as image, pytest.raises(ReadOnly):
        image.write(0, b"x")
    assert disk.read_bytes() == b"\x07" * 4096


def test_snapshot_as_an_option(disk: Path) -> None:
    spec = {"driver": "raw", "snapshot": "on", "file": {"driver": "file", "filename": str(disk)}}
    with lamina.open(spec, read_only=False) as image:
        image.write(0, b"x")
        assert image.format == "cow"
    spec["snapshot"] = "off"
    with lamina.open(spec) as image:
        assert image.format == "raw"
    with pytest.raises(OptionError, match="snapshot is 'maybe'"):
        lamina.open({**spec, "snapshot": "maybe"})
    spec = {"driver": "raw", "file": {"driver": "file", "filename": str(disk), "snapshot": True}}
    with lamina.open(spec, read_only=False) as image:
        image.write(0, b"x" * 4096)
        image.truncate(8192)
        assert image.read(0, 8192) == b"x" * 4096 + bytes(4096)
    assert disk.read_bytes() == b"\x07" * 4096


def test_snapshot_of_the_shell(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = "open -s -o driver=raw " + str(disk)
    assert main(["io", "-s", "-f", "raw", "-c", "write -q -P 1 0 512", "-c", "read -qP 1 0 512", str(disk)]) == 0
    assert main(["io", "-c", line, "-c", "write -q -P 1 0 512", "-c", "read -qP 1 0 512"]) == 0
    assert capfd.readouterr().out == ""
    assert disk.read_bytes() == b"\x07" * 4096

"""`diff`: every differing byte is in a range, every block of a range differs, and what is known to be equal is not read."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina import workers
from lamina.bitmap import MemoryBitmap
from lamina.errors import BlockIOError, Cancelled, OptionError
from lamina.image import Image
from lamina.jobs import diff as module
from lamina.jobs.diff import MAX_GRANULARITY, Range, changed_since, diff
from lamina.jobs.progress import Monitor
from lamina.node import plain
from lamina.storage.memory import MemoryStorage

KIB, MIB = 1 << 10, 1 << 20
GRANULARITIES = [1, 2, 4, 8, 64, 512, 4 * KIB, 64 * KIB, 1 * MIB]


def model(first: bytes, second: bytes, unit: int) -> list[Range]:
    """The ranges by comparing bytes."""
    first = first[: len(second)].ljust(len(second), b"\0")
    unequal = np.frombuffer(first, np.uint8) != np.frombuffer(second, np.uint8)
    found: list[Range] = []
    for block in sorted({at // unit for at in np.flatnonzero(unequal).tolist()}):
        at, end = block * unit, min((block + 1) * unit, len(second))
        if found and sum(found[-1]) == at:
            found[-1] = Range(found[-1].offset, end - found[-1].offset)
        else:
            found.append(Range(at, end - at))
    return found


def content(image: Image) -> bytes:
    return image.read(0, image.size)


class Chains:
    """Images of random chains in a folder, many of which share layers."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.dice = folder, random.Random(seed)
        self.made: list[tuple[Path, str]] = []
        self.snapshots: list[dict[str, Any]] = []

    def size(self) -> int:
        return self.dice.choice([1, 60, 100, 128, 200]) * KIB + self.dice.choice([0, 0, 512])

    def image(self) -> tuple[Path, str]:
        dice = self.dice
        path = self.folder / str(len(self.made))
        backing = dice.choice(self.made) if self.made and dice.random() < 0.8 else None
        if backing is None and dice.random() < 0.3:
            lamina.create(path, "raw", self.size() + dice.choice([0, 0, 1, 300]))
            self.made.append((path, "raw"))
        else:
            options: dict[str, Any] = {"cluster_size": dice.choice([512, 4 * KIB, 64 * KIB])}
            if backing is not None:
                options |= {"backing_file": backing[0].name, "backing_fmt": backing[1]}
            lamina.create(path, "qcow2", self.size(), **options)
            self.made.append((path, "qcow2"))
        with lamina.open(path, format=self.made[-1][1], read_only=False) as image:
            self.fill(image)
            if self.made[-1][1] == "qcow2" and dice.random() < 0.3:
                id = image.create_snapshot("then").id
                file = {"driver": "file", "filename": str(path)}
                self.snapshots.append({"driver": "qcow2", "file": file, "snapshot-id": id})
                self.fill(image)
        return self.made[-1]

    def fill(self, image: Image) -> None:
        dice = self.dice
        for _ in range(dice.randrange(6)):
            at = dice.randrange(image.size)
            length = min(dice.choice([1, 7, 512, 700, 4 * KIB, 20 * KIB, 64 * KIB]), image.size - at)
            what = dice.randrange(5)
            if what == 0:
                image.zero(at, length, unmap=dice.random() < 0.5)
            elif what == 1:
                image.write(at, bytes(length))
            elif what == 2:  # the same bytes again, in this layer
                image.write(at, image.read(at, length))
            else:
                image.write(at, dice.choice([b"a", b"b"]) * length)

    def open(self) -> Image:
        if self.snapshots and self.dice.random() < 0.3:
            return lamina.open(self.dice.choice(self.snapshots))
        path, format = self.dice.choice(self.made)
        return lamina.open(path, format=format)


@settings(max_examples=25)
@given(st.integers(0, 1 << 60))
def test_the_ranges_are_those_of_the_bytes(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chains = Chains(tmp_path_factory.mktemp("diff"), seed)
    for _ in range(4):
        chains.image()
    for _ in range(6):
        with chains.open() as first, chains.open() as second:
            before, after = content(first), content(second)
            for unit in (1, chains.dice.choice(GRANULARITIES)):
                wanted = model(before, after, unit)
                assert list(diff(first, second, granularity=unit)) == wanted
                loose = list(diff(first, second, granularity=unit, content=False))
                assert all(any(lo <= one.offset and sum(one) <= lo + size for lo, size in loose) for one in wanted)
                ends = [sum(one) for one in loose]
                assert all(end < one.offset for end, one in zip(ends, loose[1:], strict=False))
                assert all(at % unit == 0 and ((at + n) % unit == 0 or at + n == len(after)) for at, n in loose)


class Watched(MemoryStorage):
    """A disk in memory that remembers what is read of it."""

    def __init__(self, disk: bytes, *, broken: int = -1) -> None:
        super().__init__(len(disk))
        for at in range(0, len(disk), 4 * KIB):
            if disk[at : at + 4 * KIB].strip(b"\0"):
                super().write(at, memoryview(disk[at : at + 4 * KIB]))
        self.read: list[tuple[int, int]] = []
        self.broken = broken

    def read_into(self, offset: int, view: memoryview) -> None:
        if offset <= self.broken < offset + len(view):
            raise BlockIOError("broken", errno=5)
        self.read.append((offset, len(view)))
        super().read_into(offset, view)


@given(
    st.lists(st.sampled_from([b"\0", b"\0", b"a", b"b"]), min_size=1, max_size=40),
    st.integers(0, 1 << 40),
    st.integers(1, 4),
)
def test_pieces_and_lanes_make_no_difference(pages: list[bytes], seed: int, lanes: int) -> None:
    dice = random.Random(seed)
    before = bytearray(b"".join(page * 4 * KIB for page in pages))
    after = bytearray(before)
    for _ in range(dice.randrange(4)):
        after[dice.randrange(len(after))] ^= 1
    del after[len(after) - dice.choice([0, 0, 1, 4097]) :]
    with Image(Watched(before)) as first, Image(Watched(after)) as second, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", 16 * KIB)
        patch.setattr(module, "_FAR_PIECE", 8 * KIB)
        for unit in (1, 512, 32 * KIB):
            assert list(diff(first, second, granularity=unit, parallel=lanes)) == model(before, after, unit)


def test_zeros_are_read_of_neither_and_data_only_where_the_other_may_differ() -> None:
    """(A disk in memory has pages of 64 KiB.)"""
    before, after = bytearray(64 * MIB), bytearray(64 * MIB)
    after[0:4096] = before[40 * MIB : 40 * MIB + 4096] = b"x" * 4096
    with Image(first := Watched(before)) as one, Image(second := Watched(after)) as other:
        assert list(diff(one, other, content=False)) == [(0, 64 * KIB), (40 * MIB, 64 * KIB)]
        assert not first.read
        assert not second.read
        assert list(diff(one, other)) == [(0, 4096), (40 * MIB, 4096)]
        assert (first.read, second.read) == ([(40 * MIB, 64 * KIB)], [(0, 64 * KIB)])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is read of files after the images were opened: (name, bytes); call `clear` then."""
    from lamina.storage.file import FileStorage

    seen: list[tuple[str, int]] = []
    before: Callable[..., None] = FileStorage.read_into

    @plain
    def watched(self: FileStorage, offset: int, view: memoryview) -> None:
        seen.append((Path(self.filename).name, len(view)))
        before(self, offset, view)

    monkeypatch.setattr(FileStorage, "read_into", watched)
    return seen


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Callable[[str], Image]]:
    """base <- mid <- one and two, with 16 MiB of data in base and mid, and 64 KiB in each of the others."""
    sizes = {"base": 0, "mid": 8 * MIB, "one": 0, "two": 64 * KIB}
    lengths = {"base": 8 * MIB, "mid": 8 * MIB, "one": 64 * KIB, "two": 64 * KIB}
    below = {"mid": "base", "one": "mid", "two": "mid"}
    for number, (name, start) in enumerate(sizes.items()):
        options = {"backing_file": below[name], "backing_fmt": "qcow2"} if name in below else {}
        lamina.create(tmp_path / name, "qcow2", 32 * MIB, **options)
        with lamina.open(tmp_path / name, format="qcow2", read_only=False) as image:
            image.write(start, bytes([number + 1]) * lengths[name])
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(lamina.open(tmp_path / name, format="qcow2"))


def test_of_shared_layers_nothing_is_read(tree: Callable[[str], Image], read: list[tuple[str, int]]) -> None:
    one, two, mid, base = map(tree, ("one", "two", "mid", "base"))
    for first, second, wanted in (
        (one, two, [(0, 128 * KIB)]),
        (mid, one, [(0, 64 * KIB)]),
        (one, mid, [(0, 64 * KIB)]),
        (base, mid, [(8 * MIB, 8 * MIB)]),
        (mid, mid, []),
    ):
        assert list(diff(first, second, granularity=64 * KIB)) == wanted
        read.clear()
        changed = sum(length for _, length in wanted)
        assert list(diff(first, second, granularity=64 * KIB)) == wanted
        assert sum(length for _, length in read) <= 2 * changed + 2 * MIB  # and some tables


def test_clusters_that_snapshots_share_are_not_read(tmp_path: Path, read: list[tuple[str, int]]) -> None:
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", 32 * MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"x" * 16 * MIB)
        id = image.create_snapshot("then").id
        image.write(5 * MIB, b"y")
        image.write(6 * MIB, b"x")
    file = {"driver": "file", "filename": str(path)}
    with (
        lamina.open({"driver": "qcow2", "file": file, "snapshot-id": id}) as then,
        lamina.open(path, format="qcow2") as now,
    ):
        read.clear()
        assert list(diff(then, now, granularity=1)) == [(5 * MIB, 1)]
        assert list(diff(now, then)) == [(5 * MIB, 4096)]
        assert list(diff(then, now, content=False)) == [(5 * MIB, 64 * KIB), (6 * MIB, 64 * KIB)]
        assert sum(length for _, length in read) < MIB


def test_a_filter_that_changes_reads_hides_the_location(tmp_path: Path) -> None:
    """Two nodes over one file, one of which flips a bit."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * MIB)
    straight: dict[str, Any] = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}
    flips = {"driver": "faults", "image": straight, "rules": [{"kind": "read", "flip": 3}], "seed": 1}
    with lamina.open(straight) as first, lamina.open(flips) as second:
        assert list(diff(first, first)) == []
        assert list(diff(first, second)) != []


def test_dirty_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", MIB + 512)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.add_bitmap("b", 4 * KIB)
        for at in (0, 4 * KIB, 100 * KIB, MIB + 500):
            image.write(at, b"z")
        assert list(changed_since(image, "b")) == [(0, 8 * KIB), (100 * KIB, 4 * KIB), (MIB, 512)]
        assert list(changed_since(image, "b", granularity=64 * KIB)) == [(0, 128 * KIB), (MIB, 512)]
        with pytest.raises(OptionError, match="bitmap"):
            changed_since(image, "other")


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 500)), max_size=20), st.sampled_from([1, 8, 512, 4096]))
def test_rounding_of_a_bitmap_only_adds_what_its_blocks_need(writes: list[tuple[int, int]], unit: int) -> None:
    class Marked(MemoryStorage):
        bitmaps = {"b": MemoryBitmap(16)}

    Marked.bitmaps["b"].clear()
    for at, length in writes:
        Marked.bitmaps["b"].mark(at, length)
    with Image(Marked(9500)) as image:
        exact, rounded = list(changed_since(image, "b")), list(changed_since(image, "b", granularity=unit))
    blocks = {at // unit for lo, n in exact for at in range(lo, lo + n)}
    assert {at // unit for lo, n in rounded for at in range(lo, lo + n)} == blocks
    assert sum(n for _, n in rounded) == sum(min(unit, 9500 - block * unit) for block in blocks)


@pytest.mark.parametrize("granularity", [0, -1, 3, 4095, 2 * MAX_GRANULARITY])
def test_a_granularity_is_a_power_of_two(granularity: int) -> None:
    with Image(MemoryStorage(512)) as image:
        with pytest.raises(OptionError, match="power of two"):
            diff(image, image, granularity=granularity)
        with pytest.raises(OptionError, match="power of two"):
            changed_since(image, "b", granularity=granularity)


@pytest.mark.parametrize("broken", [0, 3 * MIB])
def test_an_error_of_reading_is_raised_behind_what_was_found(broken: int) -> None:
    data = b"\1" * 4 * MIB
    with Image(Watched(b"\2" * MIB)) as first, Image(Watched(data, broken=broken)) as second:
        found = []
        with pytest.raises(BlockIOError, match="broken"):
            found.extend(diff(first, second))
        assert second.read(MIB, 1) == b"\1"  # still open


def test_it_can_be_stopped() -> None:
    monitor = Monitor()
    with Image(Watched(bytes(8 * MIB))) as first, Image(Watched(b"\1" * 8 * MIB)) as second:
        ranges = diff(first, second, monitor=monitor)
        monitor.cancel()
        with pytest.raises(Cancelled):
            next(ranges)


def test_progress_goes_to_the_end() -> None:
    told: list[tuple[int, int]] = []
    with Image(Watched(bytes(MIB))) as first, Image(Watched(b"\1" * 2 * MIB)) as second:
        assert list(diff(first, second, monitor=Monitor(lambda done, total: told.append((done, total))))) == [
            (0, 2 * MIB)
        ]
    assert told[-1] == (2 * MIB, 2 * MIB)
    assert told == sorted(told)


def test_a_diff_that_is_abandoned_leaves_nothing_open() -> None:
    with Image(Watched(bytes(8 * MIB))) as first, Image(Watched(b"\1" * 8 * MIB + b"\1")) as second:
        ranges = diff(first, second, granularity=1, parallel=4)
        ranges.close()  # type: ignore[attr-defined]
        ranges = diff(first, second, granularity=1, parallel=4)
        assert next(ranges)
        ranges.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    while workers.names and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not workers.names


def test_of_no_bytes() -> None:
    with Image(MemoryStorage(0)) as nothing, Image(Watched(b"x" * 512)) as some:
        assert list(diff(some, nothing)) == []
        assert list(diff(nothing, some)) == [(0, 512)]
        assert list(diff(nothing, nothing)) == []

"""Block status of chains: the transcript that it is specified by, to the number, and random chains against a model.

All of it on real files. The model knows nothing of extents: it keeps, for every single byte of a layer, who owns it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lamina
from lamina.extents import Extents
from lamina.limits import MIB, align_up
from lamina.options import parse_keyval

pytest.register_assert_rewrite("lamina.testing")

from lamina.testing.model import check_status  # noqa: E402 - rewritten as it is imported

SIZE = 100 * MIB

# ---- the transcript


@pytest.fixture
def transcript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """back.qcow2 with two clusters of 512 bytes, and top.qcow2 over it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    lamina.create("back.qcow2", "qcow2", SIZE, cluster_size=512)
    with lamina.open("back.qcow2", format="qcow2", read_only=False) as image:
        image.write(0, b"\1" * 512)
        image.write(1024, b"\1" * 512)
    lamina.create("top.qcow2", "qcow2", backing_file="back.qcow2", backing_fmt="qcow2", cluster_size=MIB)
    return tmp_path


BEHIND = "driver=blkdebug,image.driver=qcow2,image.file.driver=file,image.file.filename={},align=4k"


def rows(extents: Extents) -> list[tuple[Any, ...]]:
    """(start, length, depth, zero, data, offset, name of the file)"""
    return [
        (r.start, r.length, r.depth, r.zero, r.data, r.offset, r.file and os.path.basename(r.file.filename))
        for r in extents
    ]


def exact(depth: int) -> list[tuple[Any, ...]]:
    return [
        (0, 512, depth, False, True, 27648, "back.qcow2"),
        (512, 512, depth, True, False, None, None),
        (1024, 512, depth, False, True, 28160, "back.qcow2"),
        (1536, 104856064, depth, True, False, None, None),
    ]


def rounded(depth: int) -> list[tuple[Any, ...]]:
    return [(0, 4096, depth, False, True, None, None), (4096, SIZE - 4096, depth, True, False, None, None)]


@pytest.mark.parametrize(("name", "depth"), [("top.qcow2", 1), ("back.qcow2", 0)])
def test_the_transcript(transcript: Path, name: str, depth: int) -> None:
    with lamina.open(name, format="qcow2") as image:
        assert (image.size, image.alignment) == (SIZE, 1)
        assert rows(image.extents()) == exact(depth)
        assert rows(image.extents().align(image.alignment)) == exact(depth)
        assert rows(image.extents().align(4096)) == rounded(depth)
        content = image.read(0, 8192)
    assert content == b"\1" * 512 + bytes(512) + b"\1" * 512 + bytes(8192 - 1536)
    with lamina.open(parse_keyval(BEHIND.format(name))) as image:
        assert (image.size, image.alignment) == (SIZE, 4096)
        assert rows(image.extents()) == exact(depth)
        assert rows(image.extents().align(image.alignment)) == rounded(depth)
        assert [row.present for row in image.extents()] == [True, False, True, False]
        assert [row.present for row in image.extents().align(4096)] == [True, False]
        assert image.read(0, 8192) == content


def test_a_file_of_1000_bytes_behind_a_filter(tmp_path: Path) -> None:
    """What the NBD server will export, rounded: nothing finer than its blocks, and no invented zeros."""
    path = tmp_path / "small"
    path.write_bytes(b"x" * 1000)
    options = {"driver": "blkdebug", "align": 512, "image": {"driver": "raw", "file": {"filename": str(path)}}}
    with lamina.open(options) as image:
        assert (image.size, image.alignment) == (1000, 512)
        assert rows(image.extents()) == [(0, 1000, 0, False, True, 0, "small")]
        assert rows(image.extents().align(512)) == [(0, 1000, 0, False, True, 0, "small")]
        assert rows(image.extents().align(512, 1024)) == [
            (0, 512, 0, False, True, 0, "small"),
            (512, 512, 0, False, True, None, None),
        ]
        assert image.read(0, 1000) == b"x" * 1000


def test_clusters_of_the_overlay_do_not_set_the_granularity(tmp_path: Path) -> None:
    """A 4k overlay over a base that changes every 512 bytes: the exact view does, the rounded one keeps to its blocks."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    lamina.create(base, "qcow2", 64 << 10, cluster_size=512)
    with lamina.open(base, format="qcow2", read_only=False) as image:
        for at in range(0, 16 << 10, 1024):
            image.write(at, b"b" * 512)
    lamina.create(top, "qcow2", backing_file="base.qcow2", backing_fmt="qcow2", cluster_size=4096)
    with lamina.open(top, format="qcow2") as image:
        assert [r.length for r in image.extents()][:32] == [512] * 31 + [(48 << 10) + 512]
        for block in (1024, 4096):
            assert rows(image.extents().align(block)) == [
                (0, 16 << 10, 1, False, True, None, None),
                (16 << 10, 48 << 10, 1, True, False, None, None),
            ]


@pytest.mark.peers
def test_the_exact_view_is_what_qemu_measures(transcript: Path, qemu: Any) -> None:
    for name in ("top.qcow2", "back.qcow2"):
        with lamina.open(parse_keyval(BEHIND.format(name))) as image:
            ours = [row[:6] for row in rows(image.extents())]
        for theirs in (qemu.map(transcript / name, "qcow2"), qemu.map(BEHIND.format(transcript / name), None)):
            keys = ("start", "length", "depth", "zero", "data", "offset")
            assert [tuple(row.get(key) for key in keys) for row in theirs] == ours


# ---- random chains

BELOW, ZERO, DATA = 0, 1, 2


@dataclass
class Expected:
    """What a reader of a chain sees, one cell per byte."""

    data: Any
    zero: Any
    present: Any
    depth: Any
    content: Any

    def __len__(self) -> int:
        return len(self.content)

    def window(self, offset: int, size: int) -> Expected:
        return Expected(*(getattr(self, name)[offset : offset + size] for name in VIEW))


VIEW = ("data", "zero", "present", "depth", "content")


@dataclass
class Layer:
    """One layer: for every byte its state, and what it holds where it owns the byte."""

    state: Any
    content: Any
    below: Expected | None = None

    def view(self) -> Expected:
        """The first layer from the top that owns a byte decides; past the end of the layer below it is zero, and that one's;
        where nobody owns it, it is zero, at the depth of the bottom."""
        size = len(self.state)
        seen = Expected(
            data=self.state == DATA,
            zero=self.state == ZERO,
            present=self.state != BELOW,
            depth=np.zeros(size, np.int64),
            content=np.where(self.state == DATA, self.content, 0).astype(np.uint8),
        )
        open_ = self.state == BELOW
        if self.below is None:
            seen.zero |= open_
            return seen
        inside = min(size, len(self.below))
        past = open_.copy()
        past[:inside] = False
        seen.zero |= past
        seen.present |= past
        seen.depth[past] = 1
        part = np.flatnonzero(open_[:inside])
        for name in VIEW:
            getattr(seen, name)[part] = getattr(self.below, name)[part]
        seen.depth[part] += 1
        return seen


@dataclass
class Chain:
    """The chain as it grows: how it is opened, with filters and without, and what a reader must see."""

    rng: random.Random
    folder: Path
    spec: dict[str, Any] = field(default_factory=dict)
    bare: dict[str, Any] = field(default_factory=dict)
    view: Expected | None = None
    layers: int = 0
    log: list[str] = field(default_factory=list)

    # -- layers

    def add_raw(self) -> None:
        """A file with holes, where the file system says they are."""
        size = self.draw_size()
        path = self.new_path("raw")
        content = np.zeros(size, np.uint8)
        with path.open("wb") as file:
            for _ in range(self.rng.randrange(4)):
                offset, length = self.span(size, 4096)
                content[offset : offset + length] = self.bytes_for(length)
                file.seek(offset)
                file.write(content[offset : offset + length].tobytes())
            file.truncate(size)
        state = np.full(size, ZERO)
        fd = os.open(path, os.O_RDONLY)
        try:
            for lo, hi in stored(fd, size):
                state[lo:hi] = DATA
        finally:
            os.close(fd)
        storage = {"driver": "file", "filename": str(path)}
        self.top({"driver": "raw", "file": self.filtered(storage)}, {"driver": "raw", "file": storage})
        self.view = Layer(state, content).view()
        self.log.append(f"raw of {size}")

    def add_qcow2(self) -> None:
        size, path = self.draw_size(), self.new_path("qcow2")
        cluster = 1 << self.rng.choice((9, 9, 10, 12, 12, 14, 16))
        compat = self.rng.choice(("0.10", "1.1", "1.1"))
        bits = 16 if compat == "0.10" else 1 << self.rng.randrange(7)
        lamina.create(path, "qcow2", size, cluster_size=cluster, compat=compat, refcount_bits=bits)
        with path.open("r+b") as file:  # new images are whole sectors; others exist
            file.seek(24)
            file.write(size.to_bytes(8, "big"))
        storage = {"driver": "file", "filename": str(path)}
        below = {"backing": self.spec} if self.layers else {}
        below_bare = {"backing": self.bare} if self.layers else {}
        self.top(
            {"driver": "qcow2", "file": self.filtered(storage), **below},
            {"driver": "qcow2", "file": storage, **below_bare},
        )
        self.log.append(f"qcow2 {compat} of {size}, clusters of {cluster}")
        layer = Layer(np.full(size, BELOW), np.zeros(size, np.uint8), self.view)
        with lamina.open(self.spec, read_only=False) as image:
            for _ in range(self.rng.randrange(7)):
                self.change(image, layer, cluster, version_3=compat == "1.1")
        self.view = layer.view()

    def change(self, image: lamina.Image, layer: Layer, cluster: int, *, version_3: bool) -> None:
        """One random request, to the image and to the model of its layer."""
        size = len(layer.state)
        name = self.rng.choice(("write", "write", "write", "zero", "unmap", "discard"))
        offset, length = self.span(size, cluster)
        end = offset + length
        lo, hi = offset - offset % cluster, min(align_up(end, cluster), size)
        if not length:
            return
        before = layer.view().content
        if name == "write":
            data = self.bytes_for(length)
            layer.content[lo:hi] = before[lo:hi]
            layer.content[offset:end] = data
            layer.state[lo:hi] = DATA
            image.write(offset, data.tobytes())
        elif name == "discard":
            image.discard(offset, length)
            # Whole clusters only; a version that cannot say zero keeps them over a backing file.
            lo = min(align_up(offset, cluster), size)
            hi = end if end == size else end - end % cluster
            if lo >= hi:
                return
            part = layer.state[lo:hi]
            if version_3:
                part[:] = np.where((part == BELOW) & (layer.below is None), BELOW, ZERO)
            elif layer.below is None:
                part[:] = BELOW
        else:
            image.zero(lo, hi - lo, unmap=name == "unmap")
            layer.content[lo:hi] = 0
            layer.state[lo:hi] = ZERO if version_3 else BELOW if layer.below is None else DATA
        self.log.append(f"  {name} [{offset}, {end})")

    # -- what lies between layers

    def filtered(self, spec: dict[str, Any], most: int = 1) -> dict[str, Any]:
        """`spec` behind some filters with random limits, which are no layers."""
        for _ in range(self.rng.randrange(most + 1)):
            align = 1 << self.rng.randrange(17)
            unit = 1 << 16  # a multiple of the alignment of every filter, also of those below
            limits = {"align": align, "max-transfer": unit << self.rng.randrange(4)}
            limits["opt-write-zero"] = unit * self.rng.randrange(4)
            limits["opt-discard"] = unit * self.rng.randrange(4)
            spec = {"driver": "blkdebug", "image": spec, **limits}
            self.log.append(f"    behind blkdebug {limits}")
        return spec

    def filter_top(self) -> None:
        self.spec = self.filtered(self.spec, 3)

    def window_top(self) -> None:
        """Sometimes only a window of the chain so far: the answer shifts, and stays exact."""
        assert self.view is not None
        if self.rng.randrange(4):
            return
        offset = self.rng.randrange(len(self.view))
        size = self.rng.randrange(1, len(self.view) - offset + 1)
        window = {"driver": "raw", "offset": offset, "size": size}
        self.spec, self.bare = {**window, "file": self.spec}, {**window, "file": self.bare}
        self.view = self.view.window(offset, size)
        self.log.append(f"    window {offset}+{size}")

    # -- chance

    def top(self, spec: dict[str, Any], bare: dict[str, Any]) -> None:
        self.spec, self.bare = spec, bare
        self.layers += 1

    def new_path(self, suffix: str) -> Path:
        return self.folder / f"layer{self.layers}.{suffix}"

    def draw_size(self) -> int:
        """Near the size of the layer below, or anything; mostly no multiple of anything."""
        size = self.rng.randrange(1, 120_000)
        if self.view is not None and self.rng.randrange(2):
            size = max(len(self.view) + self.rng.choice((-5000, -512, -1, 0, 1, 512, 5000)), 1)
        return align_up(size, self.rng.choice((1, 1, 512, 4096)))

    def span(self, size: int, unit: int) -> tuple[int, int]:
        offset = self.rng.randrange(size)
        length = self.rng.choice((self.rng.randrange(1, 3 * unit), self.rng.randrange(1, size + 1)))
        if self.rng.randrange(2):
            offset, length = offset - offset % unit, align_up(length, unit)
        return offset, min(length, size - offset)

    def bytes_for(self, length: int) -> Any:
        return np.frombuffer(bytes([self.rng.randrange(1, 256)]) * length, np.uint8)


def stored(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The stretches of a file that are no holes, by asking for each page."""
    for at in range(0, size, 4096):
        try:
            if os.lseek(fd, at, os.SEEK_DATA) == at:
                yield at, min(at + 4096, size)
        except OSError:
            return


def in_holes(extents: Extents) -> Any:
    """For each byte whether it is data that lies in a hole of its file, or past its end, by asking for each page."""
    found = np.zeros(extents.end, np.bool_)
    for number, file in enumerate(extents.files):
        fd = os.open(file.filename, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            there = np.zeros(max(size, int((extents.offset + extents.length).max())), np.bool_)
            for lo, hi in stored(fd, size):
                there[lo:hi] = True
        finally:
            os.close(fd)
        for row, which in zip(extents, extents.file.tolist(), strict=True):
            if which == number and row.data and row.offset is not None:
                found[row.start : row.end] = ~there[row.offset : row.offset + row.length]
    return found


def by_byte(extents: Extents) -> Expected:
    columns = (extents.data, extents.zero, extents.present, extents.depth)
    spread = [np.repeat(column, extents.length) for column in columns]
    return Expected(*spread, content=np.zeros(extents.end, np.uint8))


def same(found: Expected, wanted: Expected, names: tuple[str, ...] = VIEW[:4]) -> None:
    for name in names:
        differs = np.flatnonzero(getattr(found, name) != getattr(wanted, name))
        if len(differs):
            at = int(differs[0])
            cells = [{key: getattr(view, key)[at] for key in VIEW[:4]} for view in (found, wanted)]
            pytest.fail(f"{name} of byte {at}: found {cells[0]}, the model says {cells[1]}")


def round_by_hand(extents: Extents, block: int) -> list[tuple[Any, ...]]:
    """(start, end, data, zero, present, depth, file, offset) for each block, by the rules, from what each byte says."""
    cells = by_byte(extents)
    number, place = np.full(extents.end, -1), np.full(extents.end, -1)
    for row in extents:
        if row.offset is not None:
            number[row.start : row.end] = extents.files.index(row.file)  # type: ignore[arg-type]
            place[row.start : row.end] = row.offset + np.arange(row.length)
    blocks = []
    for lo in range(0, extents.end, block):
        hi = min(lo + block, extents.end)
        data, zero, present = (getattr(cells, name)[lo:hi] for name in ("data", "zero", "present"))
        depth = cells.depth[lo:hi][present] if present.any() else cells.depth[lo:hi]
        follows = place[lo] >= 0 and (number[lo:hi] == number[lo]).all() and (np.diff(place[lo:hi]) == 1).all()
        where = (extents.files[number[lo]], place[lo]) if follows else (None, None)
        blocks.append((lo, hi, data.any(), zero.all(), present.any(), depth.min(), *where))
    return blocks


def blocks_of(extents: Extents, block: int) -> list[tuple[Any, ...]]:
    found = []
    for row in extents:
        assert row.start % block == 0
        assert row.end % block == 0 or row.end == extents.end
        for lo in range(row.start, row.end, block):
            offset = None if row.offset is None else row.offset + lo - row.start
            hi = min(lo + block, row.end)
            found.append((lo, hi, row.data, row.zero, row.present, row.depth, row.file, offset))
    return found


@contextmanager
def told(chain: Chain) -> Iterator[None]:
    try:
        yield
    except BaseException:
        print("\n".join(["the chain, from the bottom:", *chain.log, str(chain.spec)]))
        raise


@pytest.mark.parametrize("number", range(60))
def test_random_chains_against_the_model(number: int, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{seed}-{number}")
    chain = Chain(rng, tmp_path)
    with told(chain):
        for layer in range(rng.randrange(1, 7)):
            if layer == 0 and rng.randrange(2):
                chain.add_raw()
            else:
                chain.add_qcow2()
            chain.window_top()
            chain.filter_top()
        wanted = chain.view
        assert wanted is not None
        with lamina.open(chain.spec) as image:
            content = image.read(0, image.size)
            found = image.extents()
            exactly = rows(found)
            check_status(found, 0, content)
            wanted.zero |= in_holes(found)  # what a cluster holds where nothing was written to it, for one
            same(by_byte(found), wanted)
            assert content == wanted.content.tobytes()
            assert wanted.zero[np.flatnonzero(~wanted.data)].all()
            assert found.align(1) == found
            for block in {max(image.alignment, 128), 512, 1 << rng.randrange(7, 18)}:
                assert blocks_of(found.align(block), block) == round_by_hand(found, block)
                assert found.align(block).align(4 * block) == found.align(4 * block)
            lo = rng.randrange(image.size)
            hi = rng.randrange(lo, image.size + 1)
            middle = rng.randrange(lo, hi + 1)
            halves = [image.extents(lo, middle - lo), image.extents(middle, hi - middle)]
            assert Extents.concat(halves).coalesce() == image.extents(lo, hi - lo) == found.clip(lo, hi)
            if image.root.reads_zero(lo, hi - lo):
                assert not any(content[lo:hi])
        with lamina.open(chain.bare) as image:
            assert rows(image.extents()) == exactly
            assert image.read(0, image.size) == content

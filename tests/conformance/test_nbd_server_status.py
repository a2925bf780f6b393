"""Block status through the NBD server: exact inside, rounded to the advertised minimum block at the edge, and only there.

The rows about NBD of the specification of block status, its transcript behind a filter with an alignment, and the law that
they are examples of: no boundary of an extent or of a chunk of a READ is finer than the minimum block. QEMU 10 breaks it for
every one of these images that has a minimum block above 1.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lamina
from lamina.bitmap import MemoryBitmap
from lamina.extents import Extents
from lamina.image import Image
from lamina.limits import GIB, KIB, MIB, align_down, align_up
from lamina.nbd import Export, Server
from lamina.nbd import wire as w

from ..nbd_raw import Raw, dial

BASE, DEPTH, EXACT = "base:allocation", "qemu:allocation-depth", "lamina:exact"
HOLE, ZERO = w.STATE_HOLE, w.STATE_ZERO
ALL = (BASE, DEPTH, EXACT)
SIZE = 100 * MIB
Runs = list[tuple[int, int]]


@pytest.fixture(params=["structured", "extended"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def served(
    folder: Path, options: Mapping[str, Any], mode: str, contexts: tuple[str, ...] = ALL, **more: Any
) -> Iterator[tuple[Raw, Image]]:
    """An image, and a client of a server of it."""
    with lamina.open(options, read_only=False) as image:
        path = folder / "socket"
        with Server([Export(image, "", writable=True, **more)], unix=str(path)), dial(path) as raw:
            yield raw.begin("", mode, contexts), image


def raw_file(path: Path) -> dict[str, Any]:
    return {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}


def behind(align: int, image: Mapping[str, Any]) -> dict[str, Any]:
    return {"driver": "blkdebug", "align": align, "image": dict(image)}


def qcow2(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}


def all_status(raw: Raw) -> dict[str, Runs]:
    """The status of the whole export, asked for until it is all told, equal neighbours joined."""
    found: dict[str, Runs] = {}
    for name in raw.contexts:
        runs: Runs = []
        at = 0
        while at < raw.size:
            extents = raw.block_status(at, min(raw.size - at, align_down(0xFFFFFFFF, raw.minimum)))[name]
            for length, status in extents:
                if runs and runs[-1][1] == status:
                    runs[-1] = (runs[-1][0] + length, status)
                else:
                    runs.append((length, status))
                at += length
        found[name] = runs
    return found


# -- a file of 1000 bytes


def test_1000_bytes_behind_a_filter(tmp_path: Path, mode: str) -> None:
    """Size 1024, minimum 512, one extent, one chunk. QEMU: (1000, data) (24, hole and zero), and chunks like that."""
    file = tmp_path / "small"
    file.write_bytes(b"x" * 1000)
    with served(tmp_path, behind(512, raw_file(file)), mode) as (raw, _):
        assert (raw.size, raw.minimum) == (1024, 512)
        status = raw.block_status(0, 1024)
        assert status[BASE] == [(1024, 0)]
        assert status[DEPTH] == [(1024, 1)]
        assert status[EXACT] == [(1000, w.EXACT_PRESENT), (24, HOLE | ZERO)]
        assert raw.block_status(512, 512)[BASE] == [(512, 0)]
        reply = raw.ask(w.CMD_READ, 0, 1024)
        assert [(chunk.type, len(chunk.payload)) for chunk in reply.chunks] == [(w.REPLY_TYPE_OFFSET_DATA, 8 + 1024)]
        assert reply.data == b"x" * 1000 + bytes(24)


def test_1000_bytes_without_one(tmp_path: Path, mode: str) -> None:
    """Size exactly the image's, minimum 1. QEMU exports 1024 bytes."""
    file = tmp_path / "small"
    file.write_bytes(b"x" * 1000)
    with served(tmp_path, raw_file(file), mode) as (raw, _):
        assert (raw.size, raw.minimum) == (1000, 1)
        assert raw.block_status(0, 1000)[BASE] == [(1000, 0)]
        assert raw.block_status(1, 998)[EXACT] == [(998, w.EXACT_PRESENT)]
        assert raw.read(0, 1000) == b"x" * 1000


def test_a_whole_block_of_padding(tmp_path: Path, mode: str) -> None:
    """The padding is zero and no data; where the last block is a hole, it stays one."""
    file = tmp_path / "small"
    file.write_bytes(b"x" * 4096)
    with file.open("r+b") as sparse:
        sparse.truncate(64 * KIB + 1)
    with served(tmp_path, behind(32 * KIB, raw_file(file)), mode) as (raw, _):
        assert (raw.size, raw.minimum) == (96 * KIB, 32 * KIB)
        assert raw.block_status(0, 96 * KIB)[BASE] == [(32 * KIB, 0), (64 * KIB, HOLE | ZERO)]
        assert raw.read(0, 96 * KIB) == b"x" * 4096 + bytes(92 * KIB)


# -- the transcript


@pytest.fixture
def transcript(tmp_path: Path) -> Path:
    """back.qcow2 with two clusters of 512 bytes, and over.qcow2 over it."""
    lamina.create(tmp_path / "back.qcow2", "qcow2", SIZE, cluster_size=512)
    with lamina.open(tmp_path / "back.qcow2", format="qcow2", read_only=False) as image:
        image.write(0, b"\1" * 512)
        image.write(1024, b"\1" * 512)
    backing = {"backing_file": "back.qcow2", "backing_fmt": "qcow2"}
    lamina.create(tmp_path / "over.qcow2", "qcow2", cluster_size=MIB, **backing)
    return tmp_path


PRESENT = w.EXACT_PRESENT


@pytest.mark.parametrize(("name", "depth"), [("over.qcow2", 1), ("back.qcow2", 0)])
def test_the_transcript_exactly(transcript: Path, mode: str, name: str, depth: int) -> None:
    with served(transcript, qcow2(transcript / name), mode) as (raw, _):
        assert (raw.size, raw.minimum) == (SIZE, 1)
        status = all_status(raw)
    rest = SIZE - 1536
    below = depth << w.EXACT_DEPTH_SHIFT
    assert status[BASE] == [(512, 0), (512, HOLE | ZERO), (512, 0), (rest, HOLE | ZERO)]
    assert status[DEPTH] == [(512, depth + 1), (512, 0), (512, depth + 1), (rest, 0)]
    assert status[EXACT] == [
        (512, PRESENT | below),
        (512, HOLE | ZERO | below),
        (512, PRESENT | below),
        (rest, HOLE | ZERO | below),
    ]


@pytest.mark.parametrize(("name", "depth"), [("over.qcow2", 1), ("back.qcow2", 0)])
def test_the_transcript_rounded(transcript: Path, mode: str, name: str, depth: int) -> None:
    """Behind a filter that asks for 4096. (QEMU 3.0 hid the chain; 7.2 and 10.0 tell extents of 512.)"""
    with served(transcript, behind(4096, qcow2(transcript / name)), mode) as (raw, _):
        assert (raw.size, raw.minimum) == (SIZE, 4096)
        status = all_status(raw)
        content = raw.read(0, 8192)
    assert status[BASE] == [(4096, 0), (SIZE - 4096, HOLE | ZERO)]
    assert status[DEPTH] == [(4096, depth + 1), (SIZE - 4096, 0)]
    assert [length for length, _ in status[EXACT]] == [512, 512, 512, SIZE - 1536]
    assert content == b"\1" * 512 + bytes(512) + b"\1" * 512 + bytes(8192 - 1536)


@pytest.mark.parametrize("align", [1, 1024, 4096, 64 * KIB])
def test_clusters_of_the_overlay_do_not_set_the_granularity(tmp_path: Path, mode: str, align: int) -> None:
    """A 4k overlay over a base that changes every 512 bytes, and one with 512-byte clusters over a 4k one."""
    lamina.create(tmp_path / "base.qcow2", "qcow2", 64 * KIB, cluster_size=512)
    with lamina.open(tmp_path / "base.qcow2", format="qcow2", read_only=False) as image:
        for at in range(0, 16 * KIB, 1024):
            image.write(at, b"b" * 512)
    chain = {"backing_fmt": "qcow2"}
    lamina.create(tmp_path / "middle.qcow2", "qcow2", backing_file="base.qcow2", cluster_size=4096, **chain)
    lamina.create(tmp_path / "top.qcow2", "qcow2", backing_file="middle.qcow2", cluster_size=512, **chain)
    with lamina.open(tmp_path / "top.qcow2", format="qcow2", read_only=False) as image:
        image.write(32 * KIB + 512, b"t" * 512)
        expected = image.read(0, 64 * KIB)
    options = qcow2(tmp_path / "top.qcow2")
    with served(tmp_path, options if align == 1 else behind(align, options), mode) as (raw, image):
        assert raw.minimum == align
        status = all_status(raw)
        assert raw.read(0, 64 * KIB) == expected
        assert status[BASE] == runs_of(image.extents(), align, raw.size, BASE)
        assert status[DEPTH] == runs_of(image.extents(), align, raw.size, DEPTH)
    if align == 1024:
        assert status[BASE] == [(16 * KIB, 0), (16 * KIB, 3), (1024, 0), (31 * KIB, 3)]
        assert status[DEPTH] == [(16 * KIB, 3), (16 * KIB, 0), (1024, 1), (31 * KIB, 0)]


def test_an_edit_keeps_what_was_promised(tmp_path: Path, mode: str) -> None:
    """The alignment of the graph changes while a connection is open: it keeps the minimum block that it negotiated."""
    file = tmp_path / "disk"
    file.write_bytes(b"e" * 64 * KIB)
    with served(tmp_path, raw_file(file), mode) as (raw, image):
        with image.edit() as edit:
            edit.insert("blkdebug", {"align": 4096})
        assert raw.minimum == 1
        assert raw.read(511, 1026) == b"e" * 1026
        assert not raw.write(777, b"odd").error
        assert raw.read(770, 16) == b"e" * 7 + b"odd" + b"e" * 6


# -- bitmaps


def test_bitmaps(tmp_path: Path, mode: str) -> None:
    """Dirty if any part of a block is; several bitmaps; what QEMU's clients know as qemu:dirty-bitmap:NAME."""
    fine, coarse = MemoryBitmap(512), MemoryBitmap(1 << 16)
    for bitmap in (fine, coarse):
        bitmap.mark(5000, 1)
        bitmap.mark(300_000, 70_000)
    names = tuple(w.DIRTY_BITMAP + name for name in ("fine", "coarse", "none"))
    bitmaps = {"fine": fine, "coarse": coarse, "none": MemoryBitmap()}
    options = behind(4096, {"driver": "memory", "size": MIB})
    with served(tmp_path, options, mode, (BASE, *names), bitmaps=bitmaps) as (raw, _):
        status = all_status(raw)
        assert status[names[0]] == [(4096, 0), (4096, 1), (290_816, 0), (73_728, 1), (675_840, 0)]
        assert status[names[1]] == [(65536, 1), (196_608, 0), (131_072, 1), (655_360, 0)]
        assert status[names[2]] == [(MIB, 0)]
        fine.clear()
        assert all_status(raw)[names[0]] == [(MIB, 0)]
        fine.mark(MIB - 1, 1)
        assert raw.block_status(MIB - 8192, 8192)[names[0]] == [(4096, 0), (4096, 1)]


def test_contexts_keep_their_order(tmp_path: Path, mode: str) -> None:
    """One chunk for each context that was selected, by its id, of whatever lengths."""
    with served(tmp_path, {"driver": "memory", "size": MIB}, mode, (EXACT, BASE, DEPTH)) as (raw, _):
        assert raw.contexts == {EXACT: 1, BASE: 2, DEPTH: 3}
        reply = raw.ask(w.CMD_BLOCK_STATUS, 0, MIB)
        assert list(reply.status) == [1, 2, 3]
        assert all(sum(length for length, _ in extents) == MIB for extents in reply.status.values())


# -- large disks


def test_a_large_hole(tmp_path: Path, mode: str) -> None:
    """32 bits of length where that is all there is, and one extent of 64 with extended headers. Never past the request."""
    with served(tmp_path, {"driver": "memory", "size": 64 * GIB}, mode) as (raw, _):
        most = 64 * GIB if mode == "extended" else 0xFFFFFFFF
        assert raw.block_status(0, most)[BASE] == [(most, HOLE | ZERO)]
        assert all_status(raw)[BASE] == [(64 * GIB, HOLE | ZERO)]
        (one,) = raw.block_status(GIB, GIB, w.CMD_FLAG_REQ_ONE)[BASE]
        assert one[1] == HOLE | ZERO


def test_an_answer_has_an_end(tmp_path: Path, mode: str) -> None:
    """1c: at most 2^17 extents in an answer (the specification: 2^20), and the client asks again for the rest."""
    lamina.create(tmp_path / "many.qcow2", "qcow2", 98 * MIB, cluster_size=512)
    with lamina.open(tmp_path / "many.qcow2", format="qcow2", read_only=False) as image:
        for at in range(0, 66 * MIB, 1 * MIB):
            for part in range(0, 2048, 2):
                image.write(at + part * 512, b"m")
    with served(tmp_path, qcow2(tmp_path / "many.qcow2"), mode, (BASE,)) as (raw, _):
        extents = raw.block_status(0, 98 * MIB)[BASE]
        assert 0 < len(extents) <= 1 << 17 < 66 * 2048
        assert all_status(raw)[BASE] == [(512, 0), (512, 3)] * (66 * 1024 - 1) + [(512, 0), (32 * MIB + 512, 3)]


# -- the law


def runs_of(exact: Extents, minimum: int, size: int, context: str) -> Runs:
    """What a context must say, by bytes: the rule of the specification, applied block by block in plain Python."""
    rows = list(exact)
    runs: Runs = []
    at = first = 0
    while at < size:
        end = at + minimum
        parts = []
        while first < len(rows) and rows[first].end <= at:
            first += 1
        for row in rows[first:]:
            if row.start >= end:
                break
            parts.append(row)
        padded = rows[-1].end < end
        if context == BASE:
            data = any(row.data for row in parts)
            zero = all(row.zero for row in parts)
            status = (0 if data else HOLE) | (ZERO if zero else 0)
        else:
            status = min((row.depth + 1 for row in parts if row.present), default=0)
        assert parts or padded
        if runs and runs[-1][1] == status:
            runs[-1] = (runs[-1][0] + minimum, status)
        else:
            runs.append((minimum, status))
        at = end
    return runs


@st.composite
def disks(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int, bool]]]:
    """A minimum block, a size, and what was written (True) or zeroed, as (start, length)."""
    minimum = 1 << draw(st.integers(9, 16))
    size = draw(st.integers(1, 40)) * 4096 + draw(st.sampled_from([0, 1, 511, 512, 1000]))
    span = st.tuples(st.integers(0, size - 1), st.integers(1, 20_000), st.booleans())
    changes = [(start, min(length, size - start), data) for start, length, data in draw(st.lists(span, max_size=8))]
    return minimum, size, changes


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(disk=disks(), where=st.randoms(use_true_random=False), mode=st.sampled_from(["structured", "extended"]))
def test_nothing_is_finer_than_the_minimum_block(
    tmp_path: Path, disk: tuple[int, int, list[tuple[int, int, bool]]], where: random.Random, mode: str
) -> None:
    """Every extent and every chunk is a multiple of the minimum block, and says what `extents.align` says of the exact view.

    (`Raw` holds the boundaries of every reply against the minimum; `runs_of` is the rule in plain Python.)"""
    minimum, size, changes = disk
    file = tmp_path / "disk"
    file.write_bytes(b"")
    with file.open("r+b") as sparse:
        sparse.truncate(size)
    options = {"driver": "raw", "file": {"driver": "file", "filename": str(file)}}
    cow = {"driver": "cow", "image": options}
    with lamina.open(behind(minimum, cow if where.random() < 0.5 else options), read_only=False) as image:
        for start, length, data in changes:
            if data:
                image.write(start, where.randbytes(length))
            else:
                image.zero(start, length, unmap=True)
        bitmap = MemoryBitmap(512)
        for start, length, _ in changes[:3]:
            bitmap.mark(start, length)
        export = Export(image, "", bitmaps={"b": bitmap})
        contexts = (*ALL, w.DIRTY_BITMAP + "b")
        with Server([export], unix=str(tmp_path / "socket")), dial(tmp_path / "socket") as raw:
            raw.begin("", mode, contexts)
            assert (raw.minimum, raw.size) == (minimum, align_up(size, minimum))
            exact = image.extents()
            status = all_status(raw)
            for context in (BASE, DEPTH):
                assert status[context] == runs_of(exact, minimum, raw.size, context)
            assert status[BASE] == [
                (row.length, (0 if row.data else HOLE) | (ZERO if row.zero else 0))
                for row in _joined(exact.align(minimum, raw.size))
            ]
            dirty = {
                number
                for start, stop in bitmap.dirty(0, size)
                for number in range(start // minimum, -(-stop // minimum))
            }
            told = [
                number
                for number in range(raw.size // minimum)
                if raw.block_status(number * minimum, minimum)[w.DIRTY_BITMAP + "b"] == [(minimum, 1)]
            ]
            assert told == sorted(dirty)
            first = where.randrange(raw.size // minimum) * minimum
            length = where.randrange(1, (raw.size - first) // minimum + 1) * minimum
            content = image.read(0, size) + bytes(raw.size - size)
            assert raw.read(first, length) == content[first : first + length]
            parts = raw.block_status(first, length)
            assert all(sum(length for length, _ in parts[name]) == length for name in parts)


def _joined(rounded: Extents) -> Iterator[Any]:
    """Rounded extents, joined where data and zero are all that is asked for."""
    last = None
    for row in rounded:
        if last is not None and (last.data, last.zero) == (row.data, row.zero):
            last = last._replace(length=last.length + row.length)
            continue
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last

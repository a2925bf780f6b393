"""The rows of a picture: exact, coarser where there are too many, and with counts that stay exact."""

from __future__ import annotations

import random
import zlib
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import pytest

import lamina
from lamina.extents import Extents
from lamina.file_map import KINDS, NUMBER, FileMap
from lamina.jobs.progress import Monitor
from lamina.numeric import np
from lamina.viewer.document import document
from lamina.viewer.encode import text_of, varints, zigzag
from lamina.viewer.rows import Ranges, Rows, coarsened, coarser_file, ranges_of, rows_of
from tests.view.models import content_of, model_of, random_extents

ROUNDS = 60


def check_coarse(rows: Rows, exact: Extents) -> None:
    """Coarse rows are the rounded ones, cut, and count what is in them."""
    assert rows.extents.coalesce() == exact.align(rows.grain)
    assert rows.totals() == content_of(exact)
    assert rows.begins is not None
    for number in range(len(rows.extents)):
        start = int(rows.extents.start[number])
        inside = exact.clip(start, start + int(rows.extents.length[number]))
        assert rows.begins[number] == np.count_nonzero((exact.start >= start) & (exact.start < inside.end))
        assert [int(column[number]) for column in rows.counts] == content_of(inside)


def test_coarse_rows_are_rounded_and_count(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        exact = random_extents(rng, rng.randrange(2, 60), rng.choice((1, 3, 512)))
        rows, grain = Rows(exact), 1
        for _ in range(3):
            grain <<= rng.randrange(1, 5)
            rows = coarsened(rows, grain)
            check_coarse(rows, exact)


def test_an_image_with_too_many_extents_becomes_coarse(
    tmp_path: Path, seed: int, few_rows: Callable[[int], None]
) -> None:
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 1 << 20, cluster_size=512)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for _ in range(150):
            image.write(rng.randrange(2000) * 512, b"x" * 512 * rng.randrange(1, 4))
    few_rows(7)
    with lamina.open(path, format="qcow2") as image:
        exact = image.extents()
        whole, owned = rows_of(image, Monitor())
        assert whole.extents == exact
        for most in range(20, 90, 7):
            rows, again = rows_of(image, Monitor(), most)
            assert owned == again == {0: int(exact.where(data=True).length.sum())}
            assert 1 < len(rows.extents) <= most
            assert rows.grain > 1
            check_coarse(rows, exact)


def test_ranges_are_rounded_outwards_and_keep_their_total(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        edges = sorted(rng.sample(range(5000), 2 * rng.randrange(1, 200)))
        pairs = [(lo, hi - lo) for lo, hi in zip(edges[::2], edges[1::2], strict=True)]
        found = ranges_of(pairs, most=20)
        assert found.total == sum(length for _, length in pairs)
        assert len(found.start) <= 20
        blocks = {at // found.grain for lo, length in pairs for at in range(lo, lo + length)}
        held = {
            at
            for lo, length in zip(found.start.tolist(), found.length.tolist(), strict=True)
            for at in range(lo // found.grain, -(-(lo + length) // found.grain))
        }
        assert held == blocks
    assert ranges_of([]).total == 0
    assert Ranges(np.array([5]), np.array([2]), 2).coarser(4).start.tolist() == [4]


def test_a_coarse_map_of_a_file_hides_no_damage(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        size = rng.randrange(2, 3000)
        start = np.array([0, *sorted(rng.sample(range(1, size), rng.randrange(min(size - 1, 80))))], np.int64)
        kind = np.array([rng.randrange(len(KINDS)) for _ in start], np.uint8)
        whole = FileMap(size, start, kind, np.ones(len(start), np.int64))
        coarse = coarser_file(whole, 64)
        byte = np.repeat(kind, whole.length)
        shown = np.repeat(coarse.kind, coarse.length)
        assert len(shown) == size
        for block in range(0, size, 64):
            inside = set(byte[block : block + 64].tolist())
            told = set(shown[block : block + 64].tolist())
            assert len(told) == 1
            assert told <= inside
            for worst in ("leaked", "in conflict"):
                if NUMBER[worst] in inside and (worst == "in conflict" or NUMBER["in conflict"] not in inside):
                    assert told == {NUMBER[worst]}


def test_numbers_of_any_size() -> None:
    values = [0, 1, 127, 128, 16383, 16384, (1 << 53) - 1, (1 << 63) - 1]
    raw = zlib.decompress(b64decode(text_of(np.array(values[:3]), np.array(values[3:]))), -15)
    found, value, shift = [], 0, 0
    for byte in raw:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value)
            value = shift = 0
    assert found == values
    assert zigzag(np.array([0, -1, 1, -2, 2])).tolist() == [0, 1, 2, 3, 4]
    assert varints(np.zeros(0, np.int64)) == b""
    with pytest.raises(ValueError, match="negative"):
        varints(np.array([1, -1]))


def test_a_document_becomes_coarser_until_it_fits() -> None:
    exact = random_extents(random.Random(5), 120_000, 512)
    whole = document(model_of(exact), 8_000_000)["disks"][0]["status"]
    assert whole["grain"] == 1
    assert whole["rows"] == len(exact)
    small = document(model_of(exact), 500_000)["disks"][0]["status"]
    assert len(small["columns"]) <= 200_000
    assert small["grain"] > 512
    assert small["totals"] == whole["totals"] == Rows(exact).totals()

"""`explain` of damaged and hostile qcow2 images: it says what can be said, within bounds of time and memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import FormatError, LaminaError
from lamina.explanation import LEAKED, UNKNOWN
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.explain import Qcow2Explainer
from lamina.request import Child

from .images import KIB, MIB, U64, Victim, overlay, sparse, victim
from .layout_images import originals, storage_of
from .oracle import MAX_MEMORY, MAX_SECONDS, measure, opened_files, strangers
from .test_rows import shared_tables


def parts(found: Victim, offset: int) -> list[str]:
    """The structures that `offset` of this file belongs to."""
    (one,) = lamina.explain(found.save(), offset, format="qcow2")
    return [part.structure for part in one.parts]


def test_overlapping_structures_are_all_told(tmp_path: Path) -> None:
    found = victim(tmp_path)
    data = found.host(0)
    assert parts(found, data) == ["guest data"]
    found.put(found.l1(), (found.entry(found.l1()) & ~q.OFFSET_MASK) | data)  # the L2 table is where the data is
    assert parts(found, data) == ["L2 table"]
    found = victim(tmp_path)
    found.put(found.l2(1), found.entry(found.l2(0)))
    (one,) = lamina.explain(found.save(), data, format="qcow2")
    assert [guest.offset for guest in one.parts[0].guest] == [0, 4096]
    found.put(found.l2(2), found.l2())
    assert parts(found, found.l2()) == ["L2 table", "guest data"]
    found.put(found.l2(3), found.header.l1_table_offset | q.COPIED)
    assert parts(found, found.header.l1_table_offset) == ["L1 table", "guest data"]
    found.put(found.l2(3), 0 | q.COPIED | found.reftable())
    assert parts(found, found.reftable()) == ["refcount table", "guest data"]


def test_leaks_and_free_space(tmp_path: Path) -> None:
    found = victim(tmp_path)
    end = len(found.bytes)
    found.bytes += bytes(2 * 4096)
    found.put(found.refblock(end // 4096), 1, 2)
    (leaked, free) = lamina.explain(found.save(), end + 100, end + 4096, format="qcow2")
    assert (leaked.parts[0].structure, leaked.refcount) == (LEAKED, 1)
    assert (free.parts[0].structure, free.refcount) == ("free", 0)
    found.put(found.reftable(), 0xFF00)  # no cluster boundary
    assert parts(found, end) == [UNKNOWN]


def test_misaligned_entries(tmp_path: Path) -> None:
    found = victim(tmp_path)
    data = found.host(0)
    found.put(found.l2(0), (data + 512) | q.COPIED)
    (before, inside, after) = lamina.explain(found.save(), data, data + 600, data + 4096 + 100, format="qcow2")
    assert before.parts[0].structure == "unreferenced"
    assert [part.structure for part in inside.parts] == ["guest data"]
    assert "invalid" in inside.parts[0].guest[0].status
    assert len(after.parts) == 2
    (step,) = lamina.explain_guest(found.path, 0, format="qcow2")
    assert step.status.startswith("invalid: an L2 entry points to")
    found.put(found.l1(), found.entry(found.l1()) | 512)
    (step,) = lamina.explain_guest(found.save(), 0, format="qcow2")
    assert step.status.startswith("invalid: the L2 table is misaligned")


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"cluster_bits": 99}, "cluster_bits is 99"), ({"l1_size": 0}, "l1_size is 0"), ({"version": 9}, "version 9")],
)
def test_a_header_that_cannot_be_used(tmp_path: Path, fields: dict[str, int], word: str) -> None:
    path = victim(tmp_path).set(**fields).save()
    (name, rest) = lamina.explain(path, 24, 5000, format="qcow2")
    assert (name.parts[0].field, name.parts[0].value) == ("size", MIB)
    assert rest.parts[0].structure == UNKNOWN
    assert word in rest.problems[0]
    assert word in lamina.structures(path, format="qcow2").problems[0]
    with pytest.raises(FormatError, match=word):
        lamina.explain_guest(path, 0, format="qcow2")
    path.write_bytes(b"something else" * 100)
    with pytest.raises(FormatError, match="magic"):
        lamina.explain(path, 0, format="qcow2")


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    """The storage fails for one L2 table: what it maps is unknown, everything else is explained."""
    found = victim(tmp_path, size=8 * MIB)
    path = found.save()
    sector = found.l2() // 512
    rule = {"event": "none", "errno": 5, "sector": sector}
    file = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)}, "inject-error": [rule]}
    spec: Any = {"driver": "qcow2", "file": file}
    (data, l1) = lamina.explain(spec, found.host(0), found.l1())
    assert data.parts[0].structure == LEAKED
    assert any("L2 table" in problem for problem in data.problems)
    assert l1.parts[0].structure == "L1 table"
    (step,) = lamina.explain_guest(spec, 0)
    assert step.status.startswith("unreadable")
    assert lamina.explain_guest(spec, 4 * MIB)[-1].status == "unallocated"


def test_truncated_files(tmp_path: Path) -> None:
    found = victim(tmp_path)
    for length in range(120, len(found.bytes), 1000):
        cut = Victim.of(bytes(found.bytes[:length]))
        path = cut.save(tmp_path / "cut.qcow2")
        (one,) = lamina.explain(path, length - 1, format="qcow2")
        assert one.parts
    with pytest.raises(lamina.OptionError, match="the file ends at"):
        lamina.explain(found.save(), len(found.bytes), format="qcow2")


def test_images_with_every_field_changed(seed: int) -> None:
    """Each field of each structure at the edges of intervals: an explanation, and no other exception than ours."""
    rng = random.Random(seed)
    for original in originals():
        for _ in range(10):
            content, done = original.changed(rng)
            try:
                found = Qcow2Explainer(Child(storage_of(content), "file"), {})
            except LaminaError:
                continue
            found.overview().to_json()
            places = [rng.randrange(len(content)) for _ in range(4)]
            for offset in (*places, *(one for one in original.places[:6] if one < len(content))):
                explained = found.at(offset)
                assert explained.parts, f"{done}: {offset:#x}"
                for part in explained.parts:
                    assert part.offset <= offset < part.offset + part.length, f"{done}: {part}"
                explained.to_json()
            for _ in range(4):
                try:
                    found.guest(rng.choice((0, rng.randrange(original.cluster_size * 8)))).to_json()
                except LaminaError:
                    continue


def test_many_entries_for_one_table_cost_little(tmp_path: Path) -> None:
    path = shared_tables(tmp_path / "shared.qcow2")
    found = Victim(path)
    table = found.entry(found.l1())

    def ask() -> None:
        (one,) = lamina.explain(path, table + 8, format="qcow2")
        assert one.parts[0].structure == "L2 table"
        assert len(one.parts[0].guest) == 64
        assert one.parts[0].more
        assert any("so many entries" in problem for problem in one.problems)
        lamina.explain(path, len(found.bytes) - 1, format="qcow2")
        lamina.explain_guest(path, 1 << 44, format="qcow2")
        lamina.structures(path, format="qcow2")

    cost = measure(ask)
    assert cost.seconds < MAX_SECONDS
    assert cost.memory < MAX_MEMORY


def test_many_entries_for_one_cluster_cost_little(tmp_path: Path) -> None:
    found = victim(tmp_path, size=256 * MIB, cluster_size=64 * KIB)
    data = found.host(0)
    for index in range(8192):
        found.put(found.l2(index), data | q.COPIED)
    path = found.save()
    cost = measure(lambda: lamina.explain(path, data, format="qcow2"))
    assert cost.seconds < MAX_SECONDS
    assert cost.memory < MAX_MEMORY
    (one,) = lamina.explain(path, data, format="qcow2")
    assert len(one.parts[0].guest) + one.parts[0].more == 8192
    assert one.problems == ()


def test_a_sparse_file_of_a_pebibyte(tmp_path: Path) -> None:
    path = sparse(victim(tmp_path).put(0, int.from_bytes(q.MAGIC), 4).save(), 1 << 40)

    def ask() -> None:
        (one,) = lamina.explain(path, (1 << 40) - 5, format="qcow2")
        assert one.parts[0].structure == "free"

    cost = measure(ask)
    assert cost.seconds < MAX_SECONDS
    assert cost.memory < MAX_MEMORY


def test_nothing_else_is_opened_and_nothing_changes(tmp_path: Path) -> None:
    path = overlay(tmp_path, "/etc/passwd")
    before = path.read_bytes(), path.stat().st_mtime_ns
    with opened_files() as opened:
        lamina.explain(path, *range(0, len(before[0]), 777), format="qcow2")
        lamina.structures(path, format="qcow2")
        with pytest.raises(lamina.PolicyError):
            lamina.explain_guest(path, 512 * KIB, format="qcow2")
    assert not strangers(opened, [path])
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_offsets_that_no_table_can_hold(tmp_path: Path) -> None:
    found = victim(tmp_path)
    for value in (U64, U64 & ~q.COMPRESSED, q.COMPRESSED | (1 << 62) - 1, q.OFFSET_MASK):
        found.put(found.l2(0), value)
        path = found.save()
        lamina.explain(path, found.l2(0), 0, len(found.bytes) - 1, format="qcow2")
        (step,) = lamina.explain_guest(path, 0, format="qcow2")
        assert step.parts[-1].value == value

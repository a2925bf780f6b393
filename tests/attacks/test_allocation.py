"""What an image may make us allocate: in proportion to the bytes that its file really has, and never more than its tables."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina
from lamina import Budget, CorruptImage, LimitExceeded, OptionError
from lamina.formats.qcow2 import layout as q

from .images import KIB, MIB, U32, Victim, sparse, victim
from .oracle import ask, inspect, look, measure, survives

SMALL = 4 * MIB


@pytest.mark.parametrize("bits", [9, 12, 16, 21])
@pytest.mark.parametrize(
    "fields",
    [
        {"l1_size": 4 << 20},
        {"l1_size": U32},
        {"refcount_table_clusters": 2048},
        {"refcount_table_clusters": U32},
        {"nb_snapshots": 65536, "snapshots_offset": 512},
        {"size": 1 << 60},
        {"header_length": 1 << 20},
        {"backing_file_offset": 512, "backing_file_size": 1023},
        {},
    ],
)
def test_a_file_of_1_kib_costs_less_than_4_mib(tmp_path: Path, bits: int, fields: dict[str, int]) -> None:
    found = victim(tmp_path, cluster_size=512, size=64 * KIB).truncate(1024)
    path = found.set(cluster_bits=bits, **fields).save()
    actions = (
        lambda: ask(lambda: inspect(path)),
        lambda: ask(lambda: lamina.open(path, format="qcow2").close()),
        lambda: ask(lambda: lamina.open(path, format="qcow2", read_only=False).close()),
        lambda: ask(lambda: lamina.detect(path).format),
    )
    for action in actions:
        assert measure(action).memory < SMALL
    survives(path, costs=False)


def test_row_41_cve_2015_5162_small_files_are_cheap_to_look_at(tmp_path: Path) -> None:
    """Each table at its largest, in a file with a hole instead of content: quick, and no dearer than the tables."""
    found = victim(tmp_path, cluster_size=64 * KIB)
    found.set(
        l1_size=4 << 20, l1_table_offset=MIB, size=1 << 50, refcount_table_offset=64 * MIB, refcount_table_clusters=128
    )
    path = sparse(found.save(), 80 * MIB)
    cost = measure(lambda: lamina.open(path, format="qcow2").close())
    assert cost.seconds < 1
    assert cost.memory < 33 * MIB
    survives(path, costs=False)


def test_open_of_2_pib_allocates_the_l1_table_only(tmp_path: Path) -> None:
    """Section 2: less than 50 ms for each MiB of L1 table, and no more memory than it."""
    path = tmp_path / "huge.qcow2"
    lamina.create(path, "qcow2", 1 << 51)
    table = Victim(path).header.l1_size * 8
    assert table == 32 * MIB

    def visit() -> None:
        with lamina.open(path, format="qcow2") as image:
            assert image.size == 1 << 51
            assert image.read(image.size - 512, 512) == bytes(512)

    cost = measure(visit)
    assert cost.memory < table + MIB
    assert cost.seconds < table / MIB * 0.05
    with lamina.open(path, format="qcow2") as image:
        assert len(image.extents()) == 1


def test_refcount_blocks_that_are_all_the_same_one(tmp_path: Path) -> None:
    """A table of 8192 entries for one block without a free count: 512 MiB of blocks in a file of 400 KiB."""
    found = victim(tmp_path, cluster_size=64 * KIB)
    block = found.entry(found.reftable())
    found.bytes[block : block + 64 * KIB] = b"\xff" * (64 * KIB)
    for index in range(8192):
        found.put(found.reftable(index), block)
    path = found.save()
    with (
        lamina.open(path, format="qcow2", read_only=False) as image,
        pytest.raises(CorruptImage, match="overlap"),
    ):
        image.write(8 * 64 * KIB, b"x")
    survives(found.save())


def test_refcount_blocks_without_a_free_count(tmp_path: Path) -> None:
    """As many different blocks as fit, all full: searched one after the other, and not all kept."""
    found = victim(tmp_path, cluster_size=64 * KIB)
    start = len(found.bytes) // (64 * KIB) + 1
    for index in range(500):
        found.put(found.reftable(1 + index), (start + index) * 64 * KIB)
    block = found.entry(found.reftable())
    found.bytes[block : block + 64 * KIB] = b"\xff" * (64 * KIB)
    path = found.save()
    with path.open("r+b") as file:
        file.seek(start * 64 * KIB)
        for _ in range(500):
            file.write(b"\xff" * (64 * KIB))

    def write() -> None:
        image = lamina.open(path, format="qcow2", read_only=False)
        ask(lambda: image.write(8 * 64 * KIB, b"x"))
        ask(image.close)

    cost = measure(write)
    assert cost.memory < 24 * MIB
    assert cost.seconds < 2


def test_l1_entries_that_all_name_one_table(tmp_path: Path) -> None:
    """Half a million tables of 64 KiB in a file of 5 MiB: what is not asked for is not read."""
    found = victim(tmp_path, cluster_size=64 * KIB)
    table = found.entry(found.l1())
    entries = 512 * KIB
    at = len(found.bytes) // (64 * KIB) * 64 * KIB + 64 * KIB
    found.put(at + 8 * entries - 8, 0)
    found.bytes[at : at + 8 * entries] = table.to_bytes(8, "big") * entries
    found.set(l1_table_offset=at, l1_size=entries, size=entries << 29)
    survives(found.save())


def test_reads_of_one_table_again_and_again_stay_in_the_cache(tmp_path: Path) -> None:
    found = victim(tmp_path, cluster_size=2 * MIB, size=64 * MIB)
    entries = 64
    for index in range(1, entries):
        found.put(found.l1(index), found.entry(found.l1()) & ~q.COPIED)
    path = found.set(l1_size=entries, size=entries << 39).save()

    def visit() -> None:
        with lamina.open(path, format="qcow2") as image:
            for index in range(entries):
                assert image.read(index << 39, 1) == b"\1"

    assert measure(visit).memory < 20 * MIB


def test_check_of_tables_that_lie_over_one_another(tmp_path: Path) -> None:
    """Every entry of the L1 table names another sector of the same megabyte: a report, at a price."""
    found = victim(tmp_path, cluster_size=64 * KIB)
    start = len(found.bytes)
    found.bytes += b"\x80\0\0\0\0\5\0\0" * (MIB // 8)
    for index in range(2000):
        found.put(found.l1(index), q.COPIED | (start // 512 + index) * 512)
    found.set(l1_size=2000)
    with lamina.open(found.save(), format="qcow2") as image:
        cost = measure(lambda: ask(image.node.check))  # type: ignore[attr-defined]
    assert cost.seconds < 5
    assert cost.memory < 256 * MIB


def test_sparse_file_of_a_tebibyte(tmp_path: Path) -> None:
    path = sparse(victim(tmp_path).path, 1 << 40)
    cost = measure(lambda: look(path))
    assert cost.memory < 300 * MIB
    assert path.stat().st_blocks * 512 < MIB


def test_row_23_a_deep_chain_that_was_asked_for(tmp_path: Path) -> None:
    """Whoever raises `chain_depth` gets 150 files, and beyond that an error of ours rather than one of Python's stack."""
    (tmp_path / "0").write_bytes(b"\x42" * 512)
    for index in range(1, 400):
        fmt = "raw" if index == 1 else "qcow2"
        options = {"backing_file": str(index - 1), "backing_fmt": fmt, "backing_unchecked": True}
        lamina.create(tmp_path / str(index), "qcow2", 64 * KIB, cluster_size=512, **options)
    with pytest.raises(OptionError, match="the deepest possible chain has 150"):
        Budget(chain_depth=151)
    with pytest.raises(OptionError, match="the deepest possible chain has 150"):
        Budget()._replace(chain_depth=500)
    budget = Budget(chain_depth=150)
    with lamina.open(tmp_path / "150", format="qcow2", budget=budget) as image:
        assert image.read(0, 1) == b"\x42"
        assert image.extents()[0].depth == 150
    for top in (151, 399):
        with pytest.raises(LimitExceeded, match="deeper than the limit of 150"):
            lamina.open(tmp_path / str(top), format="qcow2", budget=budget)

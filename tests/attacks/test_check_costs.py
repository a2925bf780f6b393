"""What `check` costs follows from what an image stores: neither from the length of its file nor from what its tables name."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from lamina.formats.qcow2 import check as module
from lamina.formats.qcow2 import layout as q
from lamina.report import NOTE, UNREADABLE, CheckReport

from .images import GIB, KIB, MIB, Victim
from .oracle import measure

TIB = 1 << 40


def check(path: Path) -> CheckReport:
    with lamina.open(path, format="qcow2") as image:
        return image.node.check()  # type: ignore[attr-defined, no-any-return]


def bounded(path: Path, *, seconds: float = 8, memory: int = 400 * MIB) -> CheckReport:
    reports: list[CheckReport] = []
    cost = measure(lambda: reports.append(check(path)))
    assert cost.seconds < seconds
    assert cost.memory < memory
    return reports[0]


def image(path: Path, l1_bytes: int, cluster: int) -> tuple[Victim, int]:
    """An image with an L1 table of `l1_bytes` at the end of the file; and where the file ends then."""
    lamina.create(path, "qcow2", MIB, cluster_size=cluster)
    found = Victim(path)
    at = -(-len(found.bytes) // cluster) * cluster
    found.set(l1_table_offset=at, l1_size=l1_bytes // 8, size=l1_bytes // 8 * cluster**2 // 8)
    found.bytes.extend(bytes(at + l1_bytes - len(found.bytes)))
    return found, at + l1_bytes


def entries(found: Victim, at: int, values: list[int]) -> None:
    data = b"".join(value.to_bytes(8, "big") for value in values)
    found.bytes.extend(bytes(max(at + len(data) - len(found.bytes), 0)))
    found.bytes[at : at + len(data)] = data


def test_tables_that_lie_across_clusters(tmp_path: Path) -> None:
    """Thousands of L2 tables of 2 MiB over the same 4 MiB, each 512 bytes further than the one before."""
    path = tmp_path / "damaged"
    found, end = image(path, 64 * KIB, 2 * MIB)
    end = -(-end // (2 * MIB)) * 2 * MIB
    entries(found, found.l1(), [end + 512 * (index + 1) for index in range(4095)])
    entries(found, end, list(range(2 * MIB, 2 * MIB + 8 * 512 * KIB, 8)))
    os.truncate(found.save(), 64 * GIB)
    report = bounded(path)
    assert report.corruptions >= 4095


@pytest.mark.parametrize("cluster", [512, 64 * KIB])
def test_tables_in_holes_of_a_long_file(tmp_path: Path, cluster: int) -> None:
    path = tmp_path / "holes"
    found, end = image(path, 2 * MIB, cluster)
    tables = [end + cluster * 16 * (index + 1) for index in range(256 * KIB)]
    entries(found, found.l1(), [at | q.COPIED for at in tables])
    os.truncate(found.save(), tables[-1] + 64 * GIB)
    report = bounded(path, memory=64 * MIB)  # the L1 table has 2, the window of counts that are compared about 40
    assert report.corruptions >= 256 * KIB  # each is referred to, and none is counted


def test_references_spread_over_a_long_file(tmp_path: Path) -> None:
    """Each entry names a cluster in another corner of 8 TiB."""
    path = tmp_path / "spread"
    found, end = image(path, 512 * KIB, 64 * KIB)
    end = -(-end // (64 * KIB)) * 64 * KIB
    dice = random.Random(1)
    for table in range(4):
        found.put(found.l1(table), end + table * 64 * KIB)
        entries(found, end + table * 64 * KIB, [dice.randrange(TIB // (8 * KIB)) << 16 for _ in range(8 * KIB)])
    os.truncate(found.save(), 8 * TIB)
    report = bounded(path)
    assert report.corruptions > 30_000


def test_refcount_blocks_that_are_named_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "again"
    found, end = image(path, 64 * KIB, 64 * KIB)
    end = -(-end // (64 * KIB)) * 64 * KIB
    block = found.entry(found.reftable())
    found.set(refcount_table_offset=end, refcount_table_clusters=128)
    entries(found, end, [block] * (MIB - 1))
    os.truncate(found.save(), 8 * TIB)
    report = bounded(path)
    assert report.corruptions
    assert any(
        "point to the same refcount blocks" in finding.message
        for finding in report.findings
        if finding.kind == UNREADABLE
    )


def test_l1_tables_of_snapshots_in_holes(tmp_path: Path) -> None:
    path = tmp_path / "snapshots"
    found, end = image(path, 4 * KIB, 64 * KIB)
    end = -(-end // (64 * KIB)) * 64 * KIB
    header = found.header
    found.set(snapshots_offset=end, nb_snapshots=4096)
    raw = b"".join(
        (end + 64 * MIB + 64 * MIB * (index % 64)).to_bytes(8, "big")
        + (4 * MIB - 512 - index).to_bytes(4, "big")
        + bytes(24)
        + (16).to_bytes(4, "big")
        + bytes(16)
        for index in range(4096)
    )
    found.bytes[end:] = raw
    assert header.nb_snapshots == 0
    found.save()
    os.truncate(path, 64 * GIB)
    reports: list[object] = []
    from lamina.formats.qcow2.check import check as run
    from lamina.formats.qcow2.header import Header
    from lamina.graph import Opener
    from lamina.request import Child

    storage = Child(Opener().open({"driver": "file", "filename": str(path)}, storage=True), "file")
    try:
        cost = measure(lambda: reports.append(run(storage, Header.read(storage))))
    finally:
        storage.close()
    assert cost.seconds < 8
    assert cost.memory < 400 * MIB


@pytest.mark.parametrize("window", [1 << 8, 1 << 12])
def test_windows_of_any_size_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Counts that are stored, counts that are not, and references to both: as one window finds them."""
    path = tmp_path / "mixed"
    lamina.create(path, "qcow2", 32 * MIB, cluster_size=512)
    with lamina.open(path, format="qcow2", read_only=False) as disk:
        for at in range(0, 32 * MIB, 128 * KIB):
            disk.write(at, b"x" * 1024)
    found = Victim(path)
    dice = random.Random(window)
    for _ in range(40):
        found.put(found.refblock(dice.randrange(200)), dice.randrange(3), 2)
    for table in range(0, 256, 5):
        found.put(found.l2(dice.randrange(4), table * 4), dice.randrange(1 << 14) * 512 | dice.choice([0, q.COPIED]))
    found.put(found.reftable(1), 0)
    found.save()
    os.truncate(path, 16 * MIB)

    def told() -> tuple[int, ...]:
        report = check(path)
        return report.corruptions, report.leaks, report.check_errors, report.image_end_offset, report.allocated_clusters

    whole = told()
    assert whole[0]
    monkeypatch.setattr(module, "_WINDOW", window)
    assert told() == whole


def test_a_size_that_is_no_whole_sectors_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd"
    lamina.create(path, "qcow2", 1024)
    Victim(path).set(size=1000).save()
    report = check(path)
    assert report.clean
    assert [(finding.kind, "QEMU shows 512" in finding.message) for finding in report.findings] == [(NOTE, True)]
    assert main(["check", "-f", "qcow2", str(path)]) == 0
    told = capsys.readouterr()
    assert told.err.startswith("note: the disk has 1000 bytes")
    assert "No errors were found" in told.out

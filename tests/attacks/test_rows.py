"""Small images that say endlessly much: what an answer about extents takes is bounded, whatever the tables say."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

import lamina
from lamina import LimitExceeded, limits
from lamina.formats.qcow2 import layout as q
from lamina.image import Image
from lamina.jobs.compare import compare
from lamina.jobs.windows import windows
from lamina.nbd import wire
from lamina.nbd.server.export import Export

from .images import GIB, KIB, MIB, Victim
from .oracle import MAX_MEMORY, MAX_SECONDS, measure


def shared_tables(
    path: Path, *, tables: int = 96 * KIB, cluster: int = 64 * KIB, every: int = 1, zero: bool = False
) -> Path:
    """An image whose L1 entries name one L2 table: `every`th, the others nothing. Its clusters are alternately zeros and
    nothing, or with `zero` all zeros."""
    per_table = cluster // 8
    lamina.create(path, "qcow2", tables * per_table * cluster, cluster_size=cluster)
    found = Victim(path)
    table = -(-len(found.bytes) // cluster) * cluster
    for index in range(per_table):
        found.put(table + 8 * index, q.ZERO if zero or index % 2 else 0)
    for index in range(0, tables, every):
        found.put(found.l1(index), table)
    return found.save()


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Image]:
    path = shared_tables(tmp_path / "shared.qcow2")
    assert path.stat().st_size <= MIB
    with lamina.open(path, format="qcow2") as image:
        assert image.size == 48 * (1 << 40)
        yield image


def within_budget(action: object) -> None:
    cost = measure(action)  # type: ignore[arg-type]
    assert cost.memory < MAX_MEMORY
    assert cost.seconds < MAX_SECONDS


def test_an_answer_has_a_bounded_number_of_rows(shared: Image) -> None:
    def ask() -> None:
        at = 0
        for _ in range(4):
            found = shared.root.extents(at, shared.size - at)
            assert limits.MAX_ROWS // 2 <= len(found) <= limits.MAX_ROWS
            at = found.end

    within_budget(ask)


def test_all_of_it_at_once_is_refused(shared: Image) -> None:
    with pytest.raises(LimitExceeded, match="extents"):
        shared.extents()


def test_one_status_of_a_server(shared: Image) -> None:
    export = Export(shared, "")
    within_budget(lambda: export.status([wire.BASE_ALLOCATION, wire.EXACT], 0, (1 << 32) - 512))
    within_budget(lambda: export.status([wire.BASE_ALLOCATION], 0, shared.size, wide=True))
    within_budget(lambda: export.status([wire.BASE_ALLOCATION], 0, shared.size, one=True))


def test_windows_are_bounded_however_they_grow(shared: Image) -> None:
    """The status was told in windows whose length followed from the rows of those before: a stretch without rows made one
    window of terabytes."""
    within_budget(lambda: list(islice(windows(shared, 0, shared.size), 4)))
    within_budget(lambda: list(islice(windows(shared, 0, shared.size, grid=2 * MIB), 4)))


def test_comparing_with_an_empty_disk(shared: Image, tmp_path: Path) -> None:
    """Until something must be read there is nothing but rows: the first stored byte of the other disk ends it."""
    lamina.create(tmp_path / "other.qcow2", "qcow2", shared.size)
    with lamina.open(tmp_path / "other.qcow2", format="qcow2", read_only=False) as image:
        image.write(64 * GIB, b"x")
    with lamina.open(tmp_path / "other.qcow2", format="qcow2") as other:
        within_budget(lambda: compare(shared, other))


@pytest.mark.parametrize(("every", "cluster"), [(2, 64 * KIB), (3, 512)])
def test_tables_that_come_and_go(tmp_path: Path, every: int, cluster: int) -> None:
    tables = 64 * KIB
    with lamina.open(
        shared_tables(tmp_path / "gaps", tables=tables, every=every, cluster=cluster), format="qcow2"
    ) as image:
        within_budget(lambda: image.root.extents(0, image.size))


def test_tables_that_say_one_thing_for_long(tmp_path: Path) -> None:
    """Tens of thousands of times the same table of zeros is one row; looking for its end is bounded, too."""
    path = shared_tables(tmp_path / "zeros", tables=64 * KIB, zero=True)
    with lamina.open(path, format="qcow2") as image:
        seen = []
        within_budget(lambda: seen.append(image.root.extents(0, image.size)))
        assert {len(found) for found in seen} == {1}


def test_a_chain_of_such_images(tmp_path: Path) -> None:
    previous = None
    for level in range(8):
        options = {} if previous is None else {"backing_file": previous, "backing_fmt": "qcow2"}
        previous = f"{level}.qcow2"
        path = tmp_path / previous
        lamina.create(path, "qcow2", 12 * GIB * KIB, cluster_size=64 * KIB, **options)
        found = Victim(path)
        table = -(-len(found.bytes) // (64 * KIB)) * 64 * KIB
        for index in range(8 * KIB):
            found.put(table + 8 * index, q.ZERO if (index >> level) % 2 else 0)
        for index in range(24 * KIB):
            found.put(found.l1(index), table)
        found.save()
    with lamina.open(path, format="qcow2") as image:
        within_budget(lambda: image.root.extents(0, image.size))
        assert len(image.root.extents(0, image.size)) <= limits.MAX_ROWS


def test_map_prints_as_it_goes(tmp_path: Path) -> None:
    """The command in a process that may not have more than a little memory, until somebody has seen enough."""
    path = shared_tables(tmp_path / "shared.qcow2")

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (256 * MIB, 256 * MIB))

    with subprocess.Popen(
        [sys.executable, "-m", "lamina", "map", "--output=json", "-f", "qcow2", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=bound,
        env={"OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert len(process.stdout.read(50 * MIB)) == 50 * MIB
            process.stdout.close()
            assert b"Traceback" not in process.stderr.read()
        finally:
            process.kill()

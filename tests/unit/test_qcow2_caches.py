"""The options for the caches of tables: what follows from each, what is refused, and that the caches keep to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.formats.qcow2.caches import Caches

MIB = 1 << 20
CLUSTER = 512
DEFAULT = Caches.of(16 * MIB)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, DEFAULT),
        ({"cache-size": 5 * MIB}, Caches(4 * MIB, MIB)),
        ({"cache-size": 5 * MIB, "l2-cache-size": MIB}, Caches(MIB, 4 * MIB)),
        ({"cache-size": 5 * MIB, "refcount-cache-size": MIB // 2}, Caches(9 * MIB // 2, MIB // 2)),
        ({"cache-size": MIB, "l2-cache-size": MIB}, Caches(MIB, 0)),
        ({"l2-cache-size": 3 * MIB}, Caches(3 * MIB, DEFAULT.refcounts)),
        ({"refcount-cache-size": 3 * MIB}, Caches(DEFAULT.l2, 3 * MIB)),
        ({"l2-cache-size": 0, "refcount-cache-size": 7}, Caches(0, 7)),
    ],
)
def test_what_is_not_given_follows(options: dict[str, int], expected: Caches) -> None:
    assert Caches.given(options, DEFAULT) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"cache-size": 3 * MIB, "l2-cache-size": MIB, "refcount-cache-size": MIB},
        {"cache-size": MIB, "l2-cache-size": MIB + 1},
        {"cache-size": MIB, "refcount-cache-size": MIB + 1},
    ],
)
def test_contradictions_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(lamina.OptionError, match="cache-size"):
        Caches.given(options, DEFAULT)


def spec(path: Path, **options: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **options}


@pytest.mark.parametrize("tables", [4, 9])
def test_no_more_tables_are_cached(tmp_path: Path, tables: int) -> None:
    size = 80 * (CLUSTER // 8) * CLUSTER
    lamina.create(tmp_path / "disk", "qcow2", size, cluster_size=CLUSTER, refcount_bits=64)
    options = {"l2-cache-size": tables * CLUSTER, "refcount-cache-size": "1K"}
    most = {"tables": 0, "blocks": 0}
    with lamina.open(spec(tmp_path / "disk", **options), read_only=False) as image:
        node: Any = image.node
        for at in range(0, size, CLUSTER * CLUSTER // 8):
            image.write(at, b"x" * CLUSTER)
            image.flush()
            most["tables"] = max(most["tables"], len(node.tables.mappings._tables))
            most["blocks"] = max(most["blocks"], len(node.tables.refcounts._blocks))
    assert most["tables"] == tables
    assert most["blocks"] == 2
    assert lamina.check(tmp_path / "disk", format="qcow2").clean


def test_a_large_cache_is_booked(tmp_path: Path) -> None:
    """The names inside an image could ask for any cache: the memory of the budget bounds it."""
    lamina.create(tmp_path / "disk", "qcow2", MIB)
    with lamina.open(spec(tmp_path / "disk", **{"cache-size": "100M"})) as image:
        assert image.node.kept_bytes > 80 * MIB
    with pytest.raises(lamina.LimitExceeded, match="cache"):
        lamina.open(spec(tmp_path / "disk", **{"l2-cache-size": "1T"}))

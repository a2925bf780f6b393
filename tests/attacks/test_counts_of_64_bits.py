"""Counts near the end of 64 bits are neither rounded nor start again from 0."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina
from lamina.formats.qcow2 import layout as q


@pytest.mark.parametrize("count", [(1 << 53) + 1, (1 << 64) - 512, (1 << 64) - 1])
def test_a_snapshot_counts_on(tmp_path: Path, count: int) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 1 << 20, cluster_size=512, refcount_bits=64)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"data" * 128)
        host = image.extents(0, 512).offset[0]
    raw = bytearray(path.read_bytes())
    table = q.HEADER_V3.unpack(raw).refcount_table_offset
    block, index = divmod(int(host) // 512, 64)
    at = (int.from_bytes(raw[table + 8 * block : table + 8 * block + 8], "big") & q.REFBLOCK_MASK) + 8 * index
    assert int.from_bytes(raw[at : at + 8], "big") == 1
    raw[at : at + 8] = count.to_bytes(8, "big")
    path.write_bytes(raw)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        if count + 1 == 1 << 64:
            with pytest.raises(lamina.LimitExceeded):
                image.create_snapshot("one")
        else:
            image.create_snapshot("one")
            node = image.node
            assert node.tables.refcounts.get(int(host) // 512) == count + 1  # type: ignore[attr-defined]
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 512) == b"data" * 128

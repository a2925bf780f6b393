"""An error of the driver itself, a field that the version of the header lacks, does not keep later changes from the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lamina


@pytest.mark.parametrize("change", ["store", "switch"])
def test_a_field_that_the_version_lacks(change: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 1 << 20, compat="0.10")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"before")
        node: Any = image.node
        with pytest.raises(KeyError, match="compatible_features"):
            node.tables.changing(getattr(node.tables, change), {"compatible_features": 1})
        image.write(512, b"after")
        image.flush()
    with lamina.open(path, format="qcow2") as image:
        assert (image.read(0, 6), image.read(512, 5)) == (b"before", b"after")

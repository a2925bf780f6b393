"""What becomes zero or is discarded in an external data file: it is recorded in bitmaps, and zero under encryption too."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina

SIZE = 1 << 20


@pytest.mark.parametrize("raw", [False, True])
def test_a_bitmap_records_what_becomes_zero_or_is_discarded(tmp_path: Path, raw: bool) -> None:
    """A backup that copies what the bitmap says must not keep the old bytes."""
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, data_file="data", data_file_raw=raw)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"a" * SIZE)
        image.add_bitmap("backup", 65_536)
        image.zero(0, 65_536, unmap=True)
        image.zero(131_072, 65_536)
        image.discard(262_144, 65_536)
        dirty = list(image.bitmaps["backup"].dirty(0, SIZE))
    assert dirty == [(0, 65_536), (131_072, 196_608), (262_144, 327_680)]

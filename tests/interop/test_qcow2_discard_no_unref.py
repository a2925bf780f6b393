"""Clusters that stay allocated when they are discarded or zeroed (`discard-no-unref`)."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina
from lamina.errors import OptionError
from tests.conftest import Qemu

SIZE = 1 << 20


@pytest.mark.peers
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("backing", [False, True])
def test_clusters_stay_where_they_are(tmp_path: Path, qemu: Qemu, extended: bool, backing: bool) -> None:
    path = tmp_path / "disk.qcow2"
    below = {"backing_file": "base", "backing_fmt": "raw"} if backing else {}
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    lamina.create(path, "qcow2", SIZE, cluster_size=16_384, extended_l2=extended, **below)
    spec = {"driver": "qcow2", "file": {"filename": str(path)}, "discard-no-unref": True}
    with lamina.open(spec, read_only=False) as image:
        image.write(0, b"x" * SIZE)
        image.flush()
        places = [row.offset for row in image.extents()]
        image.discard(0, 1 << 19)
        image.zero(1 << 19, 1 << 18, unmap=True)
        image.flush()
        assert image.read(0, SIZE) == bytes(3 << 18) + b"x" * (1 << 18)
        assert image.node.check().allocated_clusters == SIZE // 16_384  # type: ignore[attr-defined]
        image.write(100_000, b"new")
        image.write(0, b"y" * (1 << 19))
        assert [row.offset for row in image.extents()][:1] == places[:1]
        assert image.read(1 << 19, 1 << 18) == bytes(1 << 18)
    qemu.img("check", "-f", "qcow2", path)
    qemu.img("convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"y" * (1 << 19) + bytes(1 << 18) + b"x" * (1 << 18)


def test_version_2_has_no_flag_for_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, compat="0.10")
    with pytest.raises(OptionError, match="version 2"):
        lamina.open({"driver": "qcow2", "file": {"filename": str(path)}, "discard-no-unref": True}, read_only=False)

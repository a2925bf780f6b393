"""New images whose clusters exist from the beginning, judged by QEMU, and in size like those that QEMU makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.crypto.secret import Secret
from lamina.errors import OptionError
from tests.conftest import Qemu

SIZE = (9 << 20) + 512


@pytest.mark.peers
@pytest.mark.parametrize("how", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(("compat", "cluster"), [("1.1", 512), ("0.10", 4096), ("1.1", 65_536), ("1.1", 2 << 20)])
def test_every_cluster_exists(tmp_path: Path, qemu: Qemu, how: str, compat: str, cluster: int) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    lamina.create(ours, "qcow2", SIZE, compat=compat, cluster_size=cluster, preallocation=how)
    options = f"compat={compat},cluster_size={cluster},preallocation={how}"
    qemu.img("create", "-f", "qcow2", "-o", options, theirs, str(SIZE))
    qemu.img("check", ours)
    report, other = lamina.check(ours, format="qcow2"), lamina.check(theirs, format="qcow2")
    assert report.clean
    assert report.allocated_clusters == other.allocated_clusters == report.total_clusters
    with lamina.open(ours, format="qcow2", read_only=False) as image:
        assert image.read(0, SIZE) == bytes(SIZE)
        assert all(row.present and row.offset is not None for row in image.extents())
        before = ours.stat().st_size
        image.write(1_000_000, b"x" * 300_000)
        image.flush()
        assert ours.stat().st_size == before, "a write allocated something"
    qemu.img("compare", "-f", "qcow2", "-F", "qcow2", theirs, ours, check=False)
    stored = ours.stat().st_blocks * 512
    assert stored < SIZE // 2 + 3 * cluster if how == "metadata" else stored >= SIZE
    qemu.img("check", ours)


@pytest.mark.peers
@pytest.mark.parametrize("how", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("backed", [False, True])
def test_clusters_without_allocated_subclusters(tmp_path: Path, qemu: Qemu, how: str, backed: bool) -> None:
    ours, theirs, base, raw = (tmp_path / name for name in ("ours", "theirs", "base", "raw"))
    base.write_bytes(b"b" * SIZE)
    named = {"backing_file": str(base), "backing_fmt": "raw"} if backed else {}
    lamina.create(ours, "qcow2", SIZE, extended_l2=True, cluster_size=16_384, preallocation=how, **named)
    options = f"extended_l2=on,cluster_size=16k,preallocation={how}"
    words = ["-b", str(base), "-F", "raw"] if backed else []
    qemu.img("create", "-q", "-f", "qcow2", *words, "-o", options, theirs, str(SIZE))
    disk = bytearray(base.read_bytes() if backed else bytes(SIZE))
    reports = [lamina.check(path, format="qcow2") for path in (ours, theirs)]
    assert all(report.clean and report.allocated_clusters == report.total_clusters for report in reports)
    with lamina.open(theirs, format="qcow2") as image:
        rows = [(row.start, row.length, row.depth, row.data) for row in image.extents()]
    with lamina.open(ours, format="qcow2", read_only=False) as image:
        assert [(row.start, row.length, row.depth, row.data) for row in image.extents()] == rows
        before = ours.stat().st_size
        image.write(1_000_000, b"x" * 300_000)
        disk[1_000_000:1_300_000] = b"x" * 300_000
        image.flush()
        assert ours.stat().st_size == before, "a write allocated something"
    qemu.img("check", ours)
    qemu.img("convert", "-f", "qcow2", "-O", "raw", ours, raw)
    assert raw.read_bytes() == disk


@pytest.mark.peers
@pytest.mark.parametrize("cluster", [512, 4096, 65_536])
def test_a_disk_that_shrinks_gives_its_storage_back(tmp_path: Path, qemu: Qemu, cluster: int) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 24 << 20, cluster_size=cluster, preallocation="full")
    assert path.stat().st_size > 24 << 20
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"kept" * 100)
        image.truncate(1 << 20)
        assert path.stat().st_size < 4 << 20
        image.truncate(2 << 20)
        image.write((2 << 20) - 5, b"added")
    qemu.img("check", path)
    assert lamina.check(path, format="qcow2").clean
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 400) == b"kept" * 100
        assert image.read(1 << 20, (1 << 20) - 5) == bytes((1 << 20) - 5)


def test_what_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(4096))
    secret = lamina.Secret(b"x")
    for options, match in (
        ({"backing_file": "base", "backing_fmt": "raw"}, "backing file"),
        ({"encrypt": {"format": "luks", "key-secret": secret}}, "encryption"),
    ):
        with pytest.raises(lamina.OptionError, match=match):
            lamina.create(tmp_path / "new.qcow2", "qcow2", SIZE, preallocation="metadata", **options)
    with pytest.raises(lamina.OptionError, match="lazy"):
        lamina.create(tmp_path / "new.qcow2", "qcow2", SIZE, compat="0.10", lazy_refcounts=True)
    assert not (tmp_path / "new.qcow2").exists()
    lamina.create(tmp_path / "new.qcow2", "qcow2", SIZE, lazy_refcounts=True)
    data = lamina.info(tmp_path / "new.qcow2", format="qcow2").to_json()["format-specific"]["data"]
    assert data["lazy-refcounts"] is True


@pytest.mark.peers
@pytest.mark.parametrize("how", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "options", [{"cluster_size": 4096}, {"cluster_size": 16_384, "extended_l2": True}, {"data_file": "data"}], ids=str
)
@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.usefixtures("granted")
def test_what_a_larger_size_adds_is_allocated(
    tmp_path: Path, qemu: Qemu, how: str, options: dict[str, Any], backing: bool
) -> None:
    """It reads as zeros, though clusters are used again, and a longer backing file lies below."""
    path, old, new = tmp_path / "disk.qcow2", (1 << 20) + 512, (3 << 20) + 512
    options = dict(options)
    if "data_file" in options:
        options["data_file"] = str(tmp_path / "data")
    if backing:
        (tmp_path / "base").write_bytes(b"base" * (1 << 20))
        options |= {"backing_file": "base", "backing_fmt": "raw"}
    lamina.create(path, "qcow2", old, **options)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"old" * 300_000)
        image.discard(0, 1 << 19)
        image.flush()
        image.flush()
        before = image.read(0, old)
        image.truncate(new, preallocation=how)
        assert image.read(0, old) == before
        assert image.read(old, new - old) == bytes(new - old)
        assert all(row.present and row.offset is not None for row in image.extents(2 << 20, 1 << 20))
        with pytest.raises(OptionError, match="it is one of off"):
            image.truncate(new, preallocation="some")
    qemu.img("check", "-f", "qcow2", path)
    qemu.img("convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == before + bytes(new - old)
    if how != "metadata":
        stored = (tmp_path / "data" if "data_file" in options else path).stat().st_blocks * 512
        assert stored >= new - old


@pytest.mark.parametrize("how", ["falloc", "full"])
def test_what_a_larger_size_adds_to_a_raw_disk_is_allocated(tmp_path: Path, how: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 1000)
    with lamina.open(path, format="raw", read_only=False) as image:
        with pytest.raises(OptionError, match="no metadata"):
            image.truncate(3 << 20, preallocation="metadata")
        assert image.size == 1000
        image.truncate(3 << 20, preallocation=how)
        assert image.read(0, 3 << 20) == b"x" * 1000 + bytes((3 << 20) - 1000)
        image.flush()
    assert path.stat().st_blocks * 512 >= (3 << 20) - 4096


def test_an_encrypted_disk_grows_without_preallocation(tmp_path: Path) -> None:
    secret = Secret(b"word")
    path, encrypt = tmp_path / "disk.qcow2", {"format": "luks", "key-secret": secret, "iter-time": 1}
    lamina.create(path, "qcow2", 1 << 20, encrypt=encrypt)
    spec = {"driver": "qcow2", "file": {"filename": str(path)}, "encrypt": {"key-secret": secret}}
    with lamina.open(spec, read_only=False) as image:
        with pytest.raises(OptionError, match="encryption"):
            image.truncate(2 << 20, preallocation="full")
        assert image.size == 1 << 20

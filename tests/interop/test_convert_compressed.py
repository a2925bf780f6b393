"""`lamina convert -c`: smaller, equal, clean to every peer, never a cluster in two halves; refused where it cannot be."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main

from .test_compressed_peers import content, whole

KIB, MIB = 1024, 1 << 20


@pytest.fixture
def source(tmp_path: Path, seed: int) -> Path:
    """A disk with holes that begin and end anywhere."""
    path = tmp_path / "source.raw"
    rng = random.Random(seed)
    with path.open("wb") as file:
        for _ in range(6):
            file.seek(rng.randrange(8 * MIB) // 4096 * 4096)
            file.write(content(rng, rng.randrange(100 * KIB, MIB)))
        file.truncate(9 * MIB + 512 * 3)
    return path


@pytest.mark.parametrize(
    "options", ["cluster_size=64k", "cluster_size=4k,compat=0.10", "cluster_size=2M,compression_type=zstd"]
)
def test_the_copy_is_small_and_the_same(qemu7: Any, qemu10: Any, source: Path, tmp_path: Path, options: str) -> None:
    path = tmp_path / "packed.qcow2"
    assert not main(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, str(source), str(path)])
    disk = source.read_bytes()
    whole(path, disk, [qemu7, qemu10])
    plain = tmp_path / "peer.qcow2"
    qemu10.img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, plain)
    # Ours packs a little less tightly, and never a cluster twice, which would leave the first one's room behind.
    assert path.stat().st_size < plain.stat().st_size * 1.15 + 128 * KIB
    with lamina.open(path, format="qcow2") as image:
        node: Any = image.node
        assert node.check().compressed_clusters
    back = tmp_path / "back.raw"
    assert not main(["convert", "-O", "raw", str(path), str(back)])
    assert back.read_bytes() == disk
    again = tmp_path / "again.qcow2"
    assert not main(["convert", "-c", "-O", "qcow2", "-o", "cluster_size=32k", str(path), str(again)])
    whole(again, disk, [qemu10])


def test_an_overlay_and_a_target_that_is_there(qemu10: Any, source: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    changed = tmp_path / "changed.raw"
    disk = bytearray(source.read_bytes())
    disk[3 * MIB : 3 * MIB + 200_000] = b"changed " * 25_000
    disk[5 * MIB : 5 * MIB + 100_000] = rng.randbytes(100_000)
    changed.write_bytes(disk)
    over = tmp_path / "over.qcow2"
    words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-B", str(source), "-F", "raw", str(changed), str(over)]
    assert not main(words)
    status, said = qemu10.check(over)
    assert (status, said.get("compressed-clusters", 0) > 0) == (0, True)
    out = tmp_path / "out.raw"
    qemu10.img("convert", "-f", "qcow2", "-O", "raw", over, out)
    assert out.read_bytes() == disk

    there = tmp_path / "there.qcow2"
    lamina.create(there, "qcow2", size=len(disk))
    with lamina.open(there, format="qcow2", read_only=False) as image:
        image.write(0, b"old" * MIB)
    assert not main(["convert", "-n", "-c", "-f", "raw", "-O", "qcow2", str(changed), str(there)])
    whole(there, disk, [qemu10])


def test_where_it_cannot_be(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    for words in (["-O", "raw"], ["-O", "qcow2", "-o", "refcount_bits=1"]):
        assert main(["convert", "-c", "-f", "raw", *words, str(source), str(target)]) == 1
        assert "does not support compression" in capsys.readouterr().err
        assert not target.exists()
    assert os.listdir(tmp_path) == [source.name]
    assert main(["convert", "-c", "-C", "-f", "raw", "-O", "qcow2", str(source), str(target)]) != 0
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_level_makes_smaller_images(qemu10: Any, tmp_path: Path, kind: str) -> None:
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))[: 4 * MIB]
    (tmp_path / "text.raw").write_bytes(text)
    sizes: dict[str, int] = {}
    for level in "1", "", "9":
        path = tmp_path / f"packed-{level}.qcow2"
        words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}"]
        words += ["--compression-level", level] if level else []
        assert not main([*words, str(tmp_path / "text.raw"), str(path)])
        whole(path, text, [qemu10])
        sizes[level] = path.stat().st_size
    assert sizes["9"] < sizes[""] < sizes["1"]


def test_levels_that_do_not_exist(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["convert", "-f", "raw", "-O", "qcow2", str(source), str(tmp_path / "out.qcow2")]
    for words, said in (
        (["-c", "--compression-level", "10"], "no compression level 10"),
        (["-c", "--compression-level", "0"], "invalid choice"),
        (["--compression-level", "5"], "requires -c"),
        (["-n", "-c", "--compression-level", "5"], "requires a new target"),
    ):
        assert main([*start, *words]) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out.qcow2").exists()
    lamina.create(tmp_path / "disk", "qcow2", MIB)
    with pytest.raises(lamina.OptionError, match="no compression level 10"):
        lamina.open({"driver": "qcow2", "file": str(tmp_path / "disk"), "compression-level": 10})

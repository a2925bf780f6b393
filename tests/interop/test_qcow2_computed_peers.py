"""qcow2 images that are written in one pass, before qemu-img: clean by its check, equal by its comparison, writable."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from lamina.jobs.convert_streams import convert_to_pipe
from tests.conftest import Qemu

MIB = 1 << 20


def sparse(path: Path, dice: random.Random, cluster: int) -> None:
    """A file with data and holes around the borders of clusters and of what an L2 table covers."""
    covered = cluster * cluster // 8
    size = min(dice.choice([cluster, 7 * cluster, covered + cluster, 3 * covered]), 40 * MIB) // 512 * 512
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(dice.randrange(30)):
            unit = dice.choice([512, cluster, min(covered, MIB)])
            file.seek(min(dice.randrange(size) // unit * unit, size - 512))
            file.write(dice.randbytes(min(dice.choice([512, 5000, cluster, 300_000]), size - file.tell())))


@pytest.mark.parametrize("bits", range(9, 22))
def test_every_cluster_size(qemu: Qemu, tmp_path: Path, seed: int, bits: int) -> None:
    dice = random.Random(seed + bits)
    source, target, copy = (tmp_path / name for name in ("source", "target", "copy"))
    for _ in range(1 + (bits == 16)):
        options: dict[str, object] = {"cluster_size": 1 << bits, "refcount_bits": 1 << dice.randrange(7)}
        if bits >= 14:
            options["extended_l2"] = dice.random() < 0.5
        sparse(source, dice, 1 << bits)
        with lamina.open(source, format="raw") as disk, target.open("wb") as file:
            convert_to_pipe(disk, file.fileno(), "qcow2", options)
            stored = disk.extents().align(1 << bits).totals().data
        status, report = qemu.check(target)
        assert (status, report.get("leaks", 0), report.get("corruptions", 0)) == (0, 0, 0), (options, report)
        assert main(["check", "-q", str(target)]) == 0
        qemu.img("compare", "-f", "raw", "-F", "qcow2", source, target)
        # As many clusters as data, and none without.
        assert report.get("allocated-clusters", 0) <= -(-stored // (1 << bits)) + 1
        # It takes writes as any other image does.
        where = dice.randrange(source.stat().st_size // 512) * 512
        qemu.io("-f", "qcow2", "-c", f"write -q -P 7 {where} 512", target)
        assert qemu.check(target)[0] == 0
        qemu.img("convert", "-f", "qcow2", "-O", "raw", target, copy)
        expected = bytearray(source.read_bytes())
        expected[where : where + 512] = b"\x07" * 512
        assert copy.read_bytes() == expected

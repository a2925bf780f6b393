"""Damaged images are compacted, flattened and compared: the jobs end, with an error of Lamina at most, and no byte that could
be read before is another one afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import pytest

import lamina
from lamina.errors import LaminaError
from lamina.image import Image
from lamina.jobs.compact import compact
from lamina.jobs.flatten import flatten

KIB = 1 << 10
#: A damaged header may claim any size.
LARGEST = 1024 * KIB


def image(folder: Path, dice: random.Random) -> Path:
    path, base = folder / "disk", folder / "base"
    cluster, size = dice.choice([512, 4 * KIB, 64 * KIB]), dice.choice([64, 300]) * KIB
    options = {"cluster_size": cluster, "extended_l2": dice.random() < 0.2 and cluster == 64 * KIB}
    base.write_bytes(dice.randbytes(1) * size)
    backing = {"backing_file": "base", "backing_fmt": "raw"} if dice.random() < 0.5 else {}
    lamina.create(path, "qcow2", size, **options, **backing)
    with lamina.open(path, format="qcow2", read_only=False) as disk:
        for _ in range(dice.randrange(10)):
            at = dice.randrange(size)
            length = min(dice.choice([1, 4 * KIB, 70_000]), size - at)
            disk.write(at, bytes(length) if dice.random() < 0.5 else dice.randbytes(1) * length)
        if dice.random() < 0.3:
            disk.create_snapshot("then")
    damaged = bytearray(path.read_bytes())
    for _ in range(dice.choice([1, 1, 2, 4])):
        at = dice.randrange(min(len(damaged), dice.choice([104, 5 * cluster, len(damaged)]))) // 8 * 8
        pointer = dice.randrange(len(damaged) // cluster + 3) * cluster | dice.choice([0, 1 << 63, 1, 1 << 62])
        damaged[at : at + 8] = dice.choice([dice.randbytes(8), pointer.to_bytes(8, "big"), bytes(8)])
    path.write_bytes(damaged)
    return path


def sectors(path: Path) -> list[bytes | None]:
    """What can be read of the disk, sector by sector."""
    found: list[bytes | None] = []
    try:
        with lamina.open(path, format="qcow2") as disk:
            for at in range(0, min(disk.size, LARGEST), 512):
                try:
                    found.append(disk.read(at, min(512, disk.size - at)))
                except LaminaError:
                    found.append(None)
    except LaminaError:
        return []
    return found


def flattened(disk: Image) -> None:
    flatten(disk)


def compacted(disk: Image) -> None:
    compact(disk)


def compared(disk: Image) -> None:
    list(lamina.diff(disk, disk))


@pytest.mark.parametrize("job", [compacted, flattened, compared])
def test_no_readable_byte_changes(tmp_path: Path, seed: int, job: Callable[[Image], None]) -> None:
    dice = random.Random(seed)
    done = 0
    for _ in range(60):
        path = image(tmp_path, dice)
        before = sectors(path)
        try:
            with lamina.open(path, format="qcow2", read_only=job is compared) as disk:
                if disk.size <= LARGEST:
                    job(disk)
                    done += 1
        except LaminaError:
            pass
        for old, new in zip_longest(before, sectors(path)):
            assert old is None or old == new, path.rename(tmp_path / "failed")
    assert done

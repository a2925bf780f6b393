"""The scan before clusters are reused, on images that QEMU made, and against the references that the check finds.

What QEMU itself does with counts that are too low is shown first: it overwrites guest data, and exits with 0.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import CorruptImage
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.header import Header
from lamina.formats.qcow2.references import References
from lamina.graph import Opener
from lamina.limits import KIB
from lamina.numeric import np
from lamina.request import Child
from tests.attacks.images import Victim
from tests.conftest import Qemu

SIZE = 1 << 20
ROUNDS = 12


def made_by_qemu(qemu: Qemu, path: Path, rng: random.Random, cluster: int, extended: bool) -> None:
    """An image with data, holes in its file, compressed clusters, a bitmap and snapshots."""
    options = f"cluster_size={cluster}" + (",extended_l2=on" if extended else "")
    qemu.img("create", "-f", "qcow2", "-o", options, path, str(SIZE))
    for name in ("one", "two"):
        commands: list[str] = []
        for _ in range(rng.randrange(1, 12)):
            at = rng.randrange(SIZE // 512 - 128) * 512
            commands += ["-c", f"write -P {rng.randrange(1, 256)} {at} {rng.randrange(1, 128) * 512}"]
        at = rng.randrange(SIZE // cluster - 8) * cluster
        commands += ["-c", f"discard {at} {4 * cluster}", "-c", f"write -c -P 7 {at} {cluster}"]
        qemu.io("-f", "qcow2", "-d", "unmap", *commands, path)
        if rng.randrange(3):
            qemu.img("snapshot", "-c", name, path)
    if rng.randrange(2):
        qemu.img("bitmap", "--add", path, "b")
        qemu.io("-f", "qcow2", "-c", "write 0 64k", path)


def missing(found: Victim, path: Path) -> set[int]:
    """The clusters with more references than their count says, as the walk of the check finds the references."""
    storage = Child(Opener().open({"driver": "file", "filename": str(path)}, storage=True), "file")
    try:
        references = References(storage, Header.read(storage))
        references.walk()
    finally:
        storage.close()
    total = np.zeros(references.clusters + 1, np.int64)
    for use, parts in references.uses.items():
        for part in parts:
            np.add.at(total, part, use.weight)
    return {at for at in np.flatnonzero(total).tolist() if total[at] > stored(found, at)}


def count_at(found: Victim, cluster: int) -> int:
    """Where the count (of 16 bits) of this cluster lies; 0: it has none."""
    which, index = divmod(cluster, found.cluster_size // 2)
    block = found.entry(found.reftable(which)) if 8 * which < found.cluster_size else 0
    return block and block + 2 * index


def stored(found: Victim, cluster: int) -> int:
    at = count_at(found, cluster)
    return int.from_bytes(found.bytes[at : at + 2], "big") if at else 0


def scanned(path: Path) -> CorruptImage | None:
    """What the scan finds."""
    with lamina.open(path, format="qcow2", read_only=False) as image:
        tables: Any = image.node.tables  # type: ignore[attr-defined]
        try:
            tables.changing(lambda: tables.refcounts.scan())
        except CorruptImage as error:
            return error
    return None


@pytest.mark.peers
@pytest.mark.parametrize(("cluster", "extended"), [(512, False), (4 * KIB, False), (64 * KIB, False), (16 * KIB, True)])
def test_the_scan_finds_what_the_check_finds(
    tmp_path: Path, qemu: Qemu, seed: int, cluster: int, extended: bool
) -> None:
    path = tmp_path / "disk.qcow2"
    low = 0
    for number in range(ROUNDS):
        rng = random.Random(f"{seed} {cluster} {number}")
        made_by_qemu(qemu, path, rng, cluster, extended)
        found = Victim(path)
        assert not missing(found, path)
        assert scanned(path) is None, "an image of QEMU has nothing wrong"
        found = Victim(path)
        clusters = range(-(-len(found.bytes) // cluster))
        for at in rng.sample(clusters, 1):
            place = count_at(found, at)
            found.put(place, rng.randrange(stored(found, at) + 2), 2)
        found.save()
        wanted, error = missing(found, path), scanned(path)
        assert (error is not None) == bool(wanted)
        if error is not None and error.offset is not None:
            assert error.offset // cluster in wanted
            low += 1
    assert low


@pytest.mark.peers
def test_qemu_overwrites_what_is_counted_too_low(tmp_path: Path, qemu: Qemu) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-f", "qcow2", "-o", "cluster_size=4096", path, "1M")
    qemu.io("-f", "qcow2", "-c", "write -P 1 0 4k", "-c", "write -P 2 4k 4k", path)
    found = Victim(path)
    host = found.entry(found.l2(1)) & q.OFFSET_MASK
    found.put(count_at(found, host // 4096), 0, 2).save()
    before = path.read_bytes()
    qemu.io("-f", "qcow2", "-c", "write -P 3 512k 4k", path)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(4096, 4096) == b"\3" * 4096
    path.write_bytes(before)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        with pytest.raises(CorruptImage):
            image.write(512 * KIB, b"\3" * 4096)
        assert image.read(4096, 4096) == b"\2" * 4096
    assert qemu.img("check", "-r", "all", path, check=False).returncode == 0
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(512 * KIB, b"\3" * 4096)
        assert image.read(4096, 4096) == b"\2" * 4096

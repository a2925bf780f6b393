"""Images whose header names a refcount table that is not there: they are read, never written, and repaired."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.formats.qcow2 import layout as q
from lamina.testing.persistence import Bounds, CrashState, Persistence
from lamina.testing.power_loss import record
from lamina.testing.recorder import Marks, Recorder
from tests.conftest import Qemu
from tests.crash.workloads import open_on

SIZE = 1 << 20
#: Fields of the header, as a function of the length of the file and of the size of a cluster.
LOSSES: dict[str, Any] = {
    "far away": lambda _length, _cluster: {"refcount_table_offset": 1 << 40},
    "at the end": lambda length, cluster: {"refcount_table_offset": -(-length // cluster) * cluster},
    "half outside": lambda length, cluster: {
        "refcount_table_offset": (-(-length // cluster) - 1) * cluster,
        "refcount_table_clusters": 2,
    },
    "no offset": lambda _length, _cluster: {"refcount_table_offset": 0},
    "no clusters": lambda _length, _cluster: {"refcount_table_clusters": 0},
}
GEOMETRIES: list[dict[str, Any]] = [
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 1024, "compat": "0.10"},
    {"cluster_size": 4096},
    {"cluster_size": 65_536, "extended_l2": True},
]


def made(path: Path, rng: random.Random, options: dict[str, Any]) -> bytes:
    """An image with a snapshot and compressed clusters. Returns the disk."""
    lamina.create(path, "qcow2", SIZE, **options)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for number in range(12):
            offset = rng.randrange(SIZE // 2)
            image.write(offset, rng.randbytes(rng.choice((1, 5000, 60_000))))
            if number == 6:
                image.node.create_snapshot("early")  # type: ignore[attr-defined]
        image.write(SIZE * 3 // 4, b"packed" * 20_000, compress=True)
        return image.read(0, SIZE)


def lose(path: Path, loss: str) -> None:
    whole = bytearray(path.read_bytes())
    header = q.HEADER_V2.unpack(whole)
    for name, value in LOSSES[loss](len(whole), 1 << header.cluster_bits).items():
        field = next(field for field in q.HEADER_V2.fields if field.name == name)
        at, length = field.offset, field.size
        whole[at : at + length] = value.to_bytes(length, "big")
    path.write_bytes(whole)


@pytest.mark.peers
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", GEOMETRIES, ids=lambda options: str(options["cluster_size"]))
def test_it_is_read_and_repaired(
    tmp_path: Path, seed: int, qemu7: Qemu, qemu10: Qemu, options: dict[str, Any], loss: str
) -> None:
    path = tmp_path / "disk.qcow2"
    disk = made(path, random.Random(seed), options)
    lose(path, loss)
    before = path.read_bytes()
    with pytest.raises(lamina.CorruptImage, match=r"refcount table.*can only be read.*repair"):
        lamina.open(path, format="qcow2", read_only=False)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, SIZE) == disk
        with pytest.raises(lamina.CorruptImage, match="refcount table"):
            image.reopen(read_only=False)
        assert image.read(0, SIZE) == disk
    found = lamina.check(path, format="qcow2")
    assert found.corruptions
    assert lamina.check(path, format="qcow2", repair="leaks").corruptions == found.corruptions
    assert path.read_bytes() == before
    assert lamina.info(path, format="qcow2").virtual_size == SIZE
    assert lamina.check(path, format="qcow2", repair="all").clean
    for peer in (qemu7, qemu10):
        peer.img("check", path)
        peer.img("convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "raw")
        assert (tmp_path / "raw").read_bytes() == disk
        peer.img("convert", "-f", "qcow2", "-O", "raw", "-l", "early", path, tmp_path / "raw")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"again" * 30_000)
        assert image.read(0, SIZE) == (b"again" * 30_000 + disk[150_000:])
    qemu10.img("check", path)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_power_cut_in_the_middle_of_the_repair(tmp_path: Path, seed: int, loss: str) -> None:
    """Each state is the repaired image or one to be repaired, whose disk reads the same."""
    path = tmp_path / "disk.qcow2"
    disk = made(path, random.Random(seed), {"cluster_size": 512, "refcount_bits": 64})
    lose(path, loss)
    outcomes = set()

    def repair(storage: Recorder, marks: Marks) -> None:
        with open_on(storage, read_only=False, repair=True) as image:
            image.node.repair("all")  # type: ignore[attr-defined]

    def verify(content: bytes, state: CrashState) -> None:
        storage = Recorder(content)
        with open_on(storage, read_only=False, repair=True) as image:
            assert image.read(0, SIZE) == disk
            node: Any = image.node
            report = node.check()
            outcomes.add(bool(report.corruptions))
            assert not report.corruptions or node.repair("all").corruptions
            assert node.check().clean
            assert image.read(0, SIZE) == disk

    record(repair, start=path.read_bytes(), model=Persistence.P4, seed=seed, bounds=Bounds(at_cut=40)).examine(verify)
    assert outcomes == {True, False}


def test_without_all_references_there_is_no_repair(tmp_path: Path) -> None:
    """A table that cannot be read may name any cluster that seems to be free."""
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=4096)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"old" * 5000)
        image.create_snapshot("early")
        image.write(0, b"new" * 5000)
    lose(path, "no offset")
    start = path.read_bytes()
    with lamina.open(path, format="qcow2") as image:
        snapshot = image.snapshots()[0]
    at = q.HEADER_V2.unpack(start).snapshots_offset
    entry = q.SNAPSHOT.unpack(start[at : at + q.SNAPSHOT.size])
    table = int.from_bytes(start[entry.l1_table_offset : entry.l1_table_offset + 8], "big") & q.OFFSET_MASK
    rules = [{"kind": "read", "start": table, "length": 4096}]
    file = {"driver": "faults", "image": {"driver": "file", "filename": str(path)}, "rules": rules}
    with pytest.raises(lamina.CorruptImage, match="cannot be made anew"):
        lamina.check({"driver": "qcow2", "file": file}, repair="all")
    assert path.read_bytes()[80:] == start[80:]  # before that, it is marked corrupt now
    assert lamina.check(path, format="qcow2", repair="all").clean
    with lamina.open({"driver": "qcow2", "file": str(path), "snapshot-id": snapshot.id}) as image:
        assert image.read(0, 15_000) == b"old" * 5000

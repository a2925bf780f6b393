"""`explain` beside the reference tools: offsets as `qemu-img map` reports them, and leaks as `qemu-img check` counts them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import lamina
from lamina.explanation import LEAKED
from tests.conftest import Qemu

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
OPTIONS = [
    "cluster_size=4k",
    "cluster_size=16k,extended_l2=on",
    "compat=0.10,cluster_size=512",
    "refcount_bits=1,cluster_size=2k",
]


def filled(qemu: Qemu, path: Path, options: str, rng: random.Random) -> None:
    """An image of the peer after random commands."""
    qemu.img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
    commands: list[str] = []
    for _ in range(25):
        verb = rng.choice(
            ["write -P 7", "write -z", "write -P 1", "discard"] + ["write -z -u"] * ("compat" not in options)
        )
        length = rng.choice([512, 4096, 65536, 200 * KIB])
        commands += ["-c", f"{verb} {rng.randrange(SIZE - length) & -512} {length}"]
    qemu.io("-f", "qcow2", *commands, path)


@pytest.mark.parametrize("options", OPTIONS)
def test_offsets_are_those_of_the_map(qemu: Qemu, tmp_path: Path, options: str, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    filled(qemu, path, options, rng)
    rows = qemu.map(path, "qcow2")
    for row in rows:
        for at in {row["start"], row["start"] + row["length"] - 1, row["start"] + rng.randrange(row["length"])}:
            (step,) = lamina.explain_guest(path, at, format="qcow2")
            if row["data"]:
                assert (step.status, step.host) == ("data", row["offset"] + at - row["start"])
                (back,) = lamina.explain(path, step.host or 0, format="qcow2")
                assert [one.exact for part in back.parts for one in part.guest] == [at]
            else:
                assert step.status in ("zero", "unallocated")
    assert any(row["data"] for row in rows)


def test_compressed_and_shared_clusters(qemu: Qemu, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    source, path = tmp_path / "source.qcow2", tmp_path / "disk.qcow2"
    filled(qemu, source, OPTIONS[0], rng)
    qemu.img("convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", source, path)
    qemu.img("snapshot", "-c", "one", path)
    qemu.io("-f", "qcow2", "-c", "write -P 9 0 1M", path)
    compressed = [row for row in qemu.map(path, "qcow2") if row["data"] and "offset" not in row]
    assert compressed
    for row in compressed:
        (step,) = lamina.explain_guest(path, row["start"], format="qcow2")
        assert step.status == "compressed"
        assert step.stored is not None
        (back,) = lamina.explain(path, step.stored[0], format="qcow2")
        served = {(one.snapshot, one.offset) for one in back.parts[0].guest}
        assert served == {(None, row["start"]), ("1", row["start"])}


def test_leaks_are_those_of_the_check(qemu: Qemu, tmp_path: Path, seed: int) -> None:
    path = tmp_path / "disk.qcow2"
    filled(qemu, path, OPTIONS[0], random.Random(seed))
    content = bytearray(path.read_bytes())
    content += bytes(-len(content) % 4096 + 5 * 4096)
    clusters = len(content) // 4096
    block = int.from_bytes(content[int.from_bytes(content[48:56]) :][:8])
    for number in (1, 2, 4):
        at = block + 2 * (clusters - number)
        content[at : at + 2] = b"\0\2"
    path.write_bytes(content)
    status, report = qemu.check(path)
    found = lamina.explain(path, *range(0, len(content), 4096), format="qcow2")
    leaked = [one.cluster for one in found if one.parts[0].structure == LEAKED]
    assert (status, report["leaks"]) == (3, 3)
    assert leaked == [clusters - 4, clusters - 2, clusters - 1]
    assert {one.refcount for one in found if one.cluster in leaked} == {2}

"""The power is cut in the middle of snapshots that are made, applied and deleted: no state is corrupt, not for a moment.

Each state holds the snapshots of one moment, whole, and a disk whose sectors are flushed or newer. (Other programs change
counts and flags in place, one after the other, and pass through states that their own checks call corrupt.)
`LAMINA_CRASH_STATES` says how many states there are, as in `test_qcow2_power_loss`.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lamina.errors import LimitExceeded
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.image import Image
from lamina.request import Child
from lamina.testing.image_checks import Verdict, check_agrees, check_recovers, check_whole
from lamina.testing.persistence import SECTOR, Bounds, CrashState, Persistence
from lamina.testing.power_loss import record
from lamina.testing.recorder import Marks, Recorder
from tests import evidence

from .workloads import fresh, open_on

STATES = int(os.environ.get("LAMINA_CRASH_STATES", "36000")) // 60
PEERS_EVERY = 50
RECOVERED_EVERY = 20
SIZE = 48 << 10
GEOMETRIES: list[dict[str, Any]] = [
    {"cluster_size": 512, "refcount_bits": 16},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 512, "refcount_bits": 2},
    {"cluster_size": 1024, "compat": "0.10"},
    {"cluster_size": 4096, "refcount_bits": 16},
    {"cluster_size": 16384, "extended_l2": True},
]


class Moment(NamedTuple):
    disk: bytes
    snapshots: dict[str, bytes]


class Work:
    """Random writes and snapshots. Call it with a storage that holds `start`; `verify` judges what a power cut left."""

    def __init__(self, rng: random.Random, options: dict[str, Any], operations: int) -> None:
        self.rng, self.operations = rng, operations
        self.start = fresh(options, SIZE)
        self.moments = [Moment(bytes(SIZE), {})]

    def __call__(self, storage: Recorder, marks: Marks) -> None:
        rng = self.rng
        with open_on(storage, read_only=False) as image:
            node: Any = image.node
            for number in range(self.operations):
                disk, snapshots = bytearray(self.moments[-1].disk), dict(self.moments[-1].snapshots)
                kind = rng.choice(["write", "write", "write", "zero", "create", "create", "apply", "delete"])
                marks.begin(len(self.moments))
                offset = rng.randrange(SIZE // SECTOR) * SECTOR
                length = min(rng.choice([1, 2, 9, 30]) * SECTOR, SIZE - offset)
                if kind == "write":
                    data = bytes([number % 255 + 1]) * length
                    image.write(offset, data)
                    disk[offset : offset + length] = data
                elif kind == "zero":
                    image.zero(offset, length)
                    disk[offset : offset + length] = bytes(length)
                elif kind == "create":
                    try:
                        made = node.create_snapshot(f"at {number}")
                    except LimitExceeded:  # counts of 2 bits
                        continue
                    snapshots[made.id] = bytes(disk)
                elif not snapshots:
                    continue
                else:
                    chosen = rng.choice(sorted(snapshots))
                    if kind == "apply":
                        try:
                            node.apply_snapshot(chosen)
                        except LimitExceeded:
                            continue
                        disk[:] = snapshots[chosen]
                    else:
                        node.delete_snapshot(chosen)
                        del snapshots[chosen]
                self.moments.append(Moment(bytes(disk), snapshots))
                assert image.read(0, SIZE) == disk
                if kind in ("create", "apply", "delete"):
                    marks.durable(len(self.moments) - 1)

    def verify(self, content: bytes, state: CrashState) -> None:
        low = state.durable[-1] if state.durable else 0
        high = state.begun[-1] if state.begun else 0
        possible = self.moments[low : high + 1]
        with open_on(Recorder(content), read_only=True) as image:
            check_whole(image)
            disk = image.read(0, SIZE)
            node: Any = image.node
            kept = {one.id: snapshot_in(content, one.id) for one in node.snapshots()}
        assert any(kept == moment.snapshots for moment in possible), "the snapshots are those of no moment"
        for at in range(0, SIZE, SECTOR):
            sector = disk[at : at + SECTOR]
            assert any(sector == moment.disk[at : at + SECTOR] for moment in possible), f"the sector at {at}"


def snapshot_in(content: bytes, id: str) -> bytes:
    spec = Qcow2.schema.parse({"file": Child(Recorder(content), "file", grows=True), "snapshot-id": id})
    with Image(Qcow2.open(spec, Opener(read_only=True))) as image:
        return image.read(0, image.size)


@pytest.mark.parametrize("options", GEOMETRIES, ids=lambda options: ",".join(map(str, options.values())))
def test_any_power_cut_leaves_the_snapshots_of_one_moment(
    options: dict[str, Any], seed: int, tmp_path: Path, qemu7: Any, qemu10: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    states = workloads = asked = 0

    def examine(content: bytes, state: CrashState) -> None:
        nonlocal states, asked
        work.verify(content, state)
        states += 1
        if states % RECOVERED_EVERY == 0:
            node = Recorder(content)
            check_recovers(lambda *, read_only: open_on(node, read_only=read_only))
        if states % PEERS_EVERY == 0:
            with open_on(Recorder(content), read_only=True) as image:
                report = check_whole(image)
            path = tmp_path / "state.qcow2"
            path.write_bytes(content)
            for peer in (qemu7, qemu10):
                status, said = peer.check(path)
                assert status in (0, 3), f"{peer}: {said}"
                check_agrees(report, Verdict(said.get("corruptions", 0), said.get("leaks", 0)))
                asked += 1

    while states < STATES:
        work = Work(random.Random(f"{seed}/{options}/{workloads}"), options, 14)
        print(f"workload {workloads} of LAMINA_SEED={seed}")
        recording = record(work, start=work.start, model=Persistence.P4, seed=seed, bounds=Bounds(at_cut=30))
        recording.examine(examine)
        workloads += 1
    evidence.count("crash states", states)
    evidence.count("crash states that QEMU checked as well", asked)
    with capsys.disabled():
        print(f"\n{options}: {states} states of {workloads} workloads, 0 corruptions; {asked} checks by QEMU agree")

"""The power is cut while bitmaps are added, recorded, stored and removed: each is right, in use, or gone, and never wrong.

Right means that it knows every write of the bytes that the disk has: it may say more. `LAMINA_CRASH_STATES` says how many
states there are, as in `test_qcow2_power_loss`.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from lamina.formats.qcow2.bitmap_directory import IN_USE
from lamina.formats.qcow2.bitmap_directory import read as read_directory
from lamina.testing.image_checks import Verdict, check_agrees, check_recovers, check_whole
from lamina.testing.persistence import SECTOR, Bounds, CrashState, Persistence
from lamina.testing.power_loss import record
from lamina.testing.recorder import Marks, Recorder
from tests import evidence

from .workloads import fresh, open_on

STATES = int(os.environ.get("LAMINA_CRASH_STATES", "36000")) // 90
PEERS_EVERY = 50
RECOVERED_EVERY = 20
SIZE = 48 << 10
GEOMETRIES: list[dict[str, Any]] = [
    {"cluster_size": 512, "refcount_bits": 16},
    {"cluster_size": 1024, "refcount_bits": 64},
    {"cluster_size": 4096, "refcount_bits": 16},
]


class Work:
    """Random writes and changes of bitmaps in several openings. `disks`: what the disk reads as after each operation;
    `base`: of each bitmap, the disk when it began to record."""

    def __init__(self, rng: random.Random, options: dict[str, Any], operations: int) -> None:
        self.rng, self.operations = rng, operations
        self.start = fresh(options, SIZE)
        self.disks = [bytes(SIZE)]
        self.base: dict[str, bytes] = {}

    def __call__(self, storage: Recorder, marks: Marks) -> None:
        rng = self.rng
        for opening in range(3):
            with open_on(storage, read_only=False) as image:
                node: Any = image.node
                for number in range(self.operations):
                    kind = rng.choice(["write", "write", "write", "zero", "flush", "add", "remove"])
                    offset = rng.randrange(SIZE // SECTOR) * SECTOR
                    length = min(rng.choice([1, 2, 9, 30]) * SECTOR, SIZE - offset)
                    if kind == "flush":
                        image.flush()
                        marks.durable(len(self.disks) - 1)
                    elif kind == "add":
                        name = f"{opening}.{number}"
                        self.base[name] = self.disks[-1]
                        node.add_bitmap(name, rng.choice((512, 1024, 4096)))
                    elif kind == "remove" and node.bitmaps:
                        node.remove_bitmap(rng.choice(sorted(node.bitmaps)))
                    elif kind in ("write", "zero"):
                        disk = bytearray(self.disks[-1])
                        data = bytes([len(self.disks) % 255 + 1]) * length if kind == "write" else bytes(length)
                        marks.begin(len(self.disks))
                        if kind == "write":
                            image.write(offset, data)
                        else:
                            image.zero(offset, length)
                        disk[offset : offset + length] = data
                        self.disks.append(bytes(disk))
                if opening % 2:  # a close alone promises no stable storage
                    image.flush()
                    marks.durable(len(self.disks) - 1)

    def verify(self, content: bytes, state: CrashState) -> None:
        low = state.durable[-1] if state.durable else 0
        high = state.begun[-1] if state.begun else 0
        possible = self.disks[low : high + 1]
        with open_on(Recorder(content), read_only=True) as image:
            check_whole(image)
            disk = image.read(0, SIZE)
            node: Any = image.node
            entries = read_directory(node.file, node.header)
            trusted = {name: list(found.dirty(0, SIZE)) for name, found in node.bitmaps.items()}
        assert set(trusted) == {entry.name for entry in entries if not entry.flags & IN_USE}
        for at in range(0, SIZE, SECTOR):
            sector = disk[at : at + SECTOR]
            assert any(sector == one[at : at + SECTOR] for one in possible), f"the sector at {at}"
        for name, ranges in trusted.items():
            known = bytearray(SIZE)
            for begin, end in ranges:
                known[begin:end] = b"\1" * (end - begin)
            for at in range(0, SIZE, SECTOR):
                changed = disk[at : at + SECTOR] != self.base[name][at : at + SECTOR]
                assert known[at] or not changed, f"bitmap {name} does not know of the sector at {at}"


@pytest.mark.parametrize("options", GEOMETRIES, ids=lambda options: ",".join(map(str, options.values())))
def test_no_power_cut_leaves_a_bitmap_that_is_wrong(
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
        work = Work(random.Random(f"{seed}/{options}/{workloads}"), options, 9)
        print(f"workload {workloads} of LAMINA_SEED={seed}")
        recording = record(work, start=work.start, model=Persistence.P4, seed=seed, bounds=Bounds(at_cut=30))
        recording.examine(examine)
        workloads += 1
    evidence.count("crash states", states)
    evidence.count("crash states that QEMU checked as well", asked)
    with capsys.disabled():
        print(f"\n{options}: {states} states of {workloads} workloads, 0 corruptions; {asked} checks by QEMU agree")

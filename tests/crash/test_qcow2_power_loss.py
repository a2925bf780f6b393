"""The power is cut at every moment of random work: qcow2 images stay whole, and what was flushed is there.

Each state of each model of `lamina.testing.persistence` is judged: our check finds no corruption (leaks are allowed), every
sector holds what was flushed or something written after. Every 10th (in a soak every 100th) goes through the check of one of
both QEMUs, which must count the same; every 20th is opened for writing and used. In the environment, `LAMINA_CRASH_STATES`
says how many states there are at least, `LAMINA_SEED` repeats a run: `LAMINA_CRASH_STATES=1000000 pytest tests/crash -s` is a
soak.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from lamina.testing.persistence import Bounds, CrashState, Persistence
from lamina.testing.power_loss import cut_power, record
from lamina.testing.recorder import Marks, Recorder
from tests import evidence

from .workloads import GEOMETRIES, Examination, Geometry, Work, fresh, open_on

STATES = int(os.environ.get("LAMINA_CRASH_STATES", "26000"))
#: States of the geometry whose image is large are few: each takes twenty times as long.
LARGE = 30
#: One state of so many is checked by QEMU as well: in CI 2,000 (the images with a data file are left out).
PEERS_EVERY = 10 if STATES <= 50_000 else 100


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_any_power_cut_leaves_a_whole_image(
    geometry: Geometry, seed: int, tmp_path: Path, qemu7: Any, qemu10: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    quota = STATES // (len(GEOMETRIES) - 1)
    if geometry.filled:
        quota //= LARGE
    began = time.monotonic()
    states = workloads = asked = 0
    while states < quota:
        unaligned = workloads % 3 == 2  # a file that ended inside a sector could lose one when its length is lost
        rng = random.Random(f"{seed}/{geometry}/{workloads}")
        work = Work(rng, geometry, rng.randrange(8, 40), unaligned=unaligned)
        recording = record(work, start=work.start, model=Persistence.P4, seed=seed, bounds=Bounds(at_cut=60))
        peers = [qemu10 if workloads % 2 else qemu7]
        examine = Examination(work, tmp_path, peers, peers_every=PEERS_EVERY, before=states)
        print(f"workload {workloads} of LAMINA_SEED={seed}")
        recording.examine(examine)
        states, workloads, asked = examine.count, workloads + 1, asked + examine.asked
    evidence.count("crash states", states)
    evidence.count("crash states that QEMU checked as well", asked)
    with capsys.disabled():
        print(
            f"\n{geometry}: {states} states of {workloads} workloads, 0 corruptions; {asked} checks by QEMU agree; "
            f"{time.monotonic() - began:.1f} s"
        )


@pytest.mark.parametrize(
    "offset", [4096, 4196, 3996], ids=["at a cluster", "in a cluster", "over data of the layer below"]
)
def test_a_sector_at_the_end_of_the_file_is_not_torn(offset: int) -> None:
    """Only a part of a cluster is written, behind which all reads as zero: the rest need not be in the file. Then that sector
    is written whole, and the power goes: its bytes may be there while the file is as short as before."""
    start, below, unit = fresh({"cluster_size": 512}, 64 << 10), b"b" * 4096, slice(4096, 4608)

    def workload(storage: Recorder, marks: Marks) -> None:
        with open_on(storage, read_only=False, backing=below) as image:
            image.write(offset, b"1" * 300)
            image.flush()
            marks.durable(1)
            image.write(unit.start, b"2" * 512)

    def verify(content: bytes, state: CrashState) -> bool:
        with open_on(Recorder(content), read_only=True, backing=below) as image:
            got = image.read(unit.start, 512)
        first = bytearray(512)
        lies = offset - unit.start
        first[max(lies, 0) : lies + 300] = b"1" * (300 + min(lies, 0))
        return got in (b"2" * 512, first) or not state.durable

    assert cut_power(workload, verify, start=start) > 10

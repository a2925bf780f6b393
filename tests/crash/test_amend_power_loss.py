"""The power is cut while requests, resizes, snapshots, bitmaps and changes of options follow one another in any order.

Each state has the header and the snapshots of one moment, a disk whose sectors are flushed or newer, and bitmaps that are
right, or in use; the check finds no corruption (see `amend_workload`). `LAMINA_CRASH_STATES` says how many states there are,
as in `test_qcow2_power_loss`.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lamina.testing.image_checks import Verdict, check_agrees, check_recovers, check_whole
from lamina.testing.persistence import Bounds, CrashState, Persistence
from lamina.testing.power_loss import record
from tests import evidence

from .amend_workload import AmendWork

STATES = int(os.environ.get("LAMINA_CRASH_STATES", "36000")) // 60
PEERS_EVERY = 100
RECOVERED_EVERY = 20
OVER_BACKING = {"cluster_size": 4096, "backing": True}
GEOMETRIES: list[dict[str, Any]] = [
    {"cluster_size": 512, "refcount_bits": 16},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 1024, "compat": "0.10"},
    {"cluster_size": 4096},
    {"cluster_size": 16384, "extended_l2": True},
    OVER_BACKING,
    {"cluster_size": 65536},
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=lambda options: ",".join(map(str, options.values())))
def test_any_power_cut_leaves_the_metadata_of_one_moment(
    options: dict[str, Any], seed: int, tmp_path: Path, qemu7: Any, qemu10: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    states = workloads = asked = 0
    began, done = time.monotonic(), Counter[str]()
    path = tmp_path / "state.qcow2"

    def examine(content: bytes, state: CrashState) -> None:
        nonlocal states, asked
        work.verify(content, state)
        states += 1
        if states % RECOVERED_EVERY == 0:
            check_recovers(work.opened(content))
        if states % PEERS_EVERY == 0:
            with work.opened(content)(read_only=True) as image:
                report = check_whole(image)
            path.write_bytes(content)
            (tmp_path / "base").write_bytes(work.backing or b"")
            for peer in (qemu7, qemu10):
                status, said = peer.check(path)
                assert status in (0, 3), f"{peer}: {said}"
                check_agrees(report, Verdict(said.get("corruptions", 0), said.get("leaks", 0)))
                asked += 1

    plain = {name: value for name, value in options.items() if name != "backing"}
    while states < STATES:
        rng = random.Random(f"{seed}/{options}/{workloads}")
        work = AmendWork(rng, plain, rng.randrange(4, 9), backing="backing" in options)
        print(f"workload {workloads} of LAMINA_SEED={seed}")
        recording = record(work, start=work.start, model=Persistence.P4, seed=seed, bounds=Bounds(at_cut=8))
        recording.examine(examine)
        workloads += 1
        done.update(work.done)
    evidence.count("crash states", states)
    evidence.count("crash states that QEMU checked as well", asked)
    with capsys.disabled():
        print(
            f"\n{options}: {states} states of {workloads} workloads, 0 corruptions; {asked} checks by QEMU agree; "
            f"{done['amend']} amends; {time.monotonic() - began:.1f} s"
        )

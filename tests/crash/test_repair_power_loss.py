"""The power is cut while an image is repaired: each state is the damaged image or the repaired one.

The disk and the snapshots of each state read as before the repair; one more repair makes it clean, and the one after that
changes no byte of the file. Half of the images are repaired because they are opened for writing with the dirty bit.
`LAMINA_CRASH_STATES` says how many states there are, as in `test_qcow2_power_loss`.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.qcow2.header import Header
from lamina.formats.qcow2.references import DATA, References
from lamina.graph import Opener
from lamina.image import Image
from lamina.request import Child
from lamina.testing.image_checks import check_recovers
from lamina.testing.persistence import Bounds, CrashState, Persistence
from lamina.testing.power_loss import record
from lamina.testing.recorder import Marks, Recorder
from tests import evidence
from tests.damaged_counts import EXTENDED, damaged, made, put, word

from .workloads import open_on

STATES = int(os.environ.get("LAMINA_CRASH_STATES", "36000")) // 60
PEERS_EVERY = 50
RECOVERED_EVERY = 20
SIZE = 160 << 10
GEOMETRIES = [(512, 16), (512, 64), (512, 2), (4096, 8), (4096, 16), (EXTENDED, 16)]
AT = q.HEADER_V3["incompatible_features"].offset


def contents(content: bytes) -> dict[str, bytes]:
    """What the disk, and each snapshot by its name, reads as."""
    found = {}
    with open_on(Recorder(content), read_only=True) as image:
        found["disk"] = image.read(0, image.size)
        names = [one.id for one in image.snapshots()]
    for id in names:
        spec = Qcow2.schema.parse({"file": Child(Recorder(content), "file", grows=True), "snapshot-id": id})
        with Image(Qcow2.open(spec, Opener(read_only=True))) as image:
            found[f"snapshot {id}"] = image.read(0, image.size)
    return found


class RepairWork:
    """A repair of an image with new damage. Call it with a storage that holds `start`; `verify` judges what a power cut
    left."""

    #: There is only one moment: no byte of the guest changes.
    moment = 0

    def __init__(self, rng: random.Random, path: Path, cluster: int, bits: int) -> None:
        path.unlink(missing_ok=True)
        disk = made(path, rng, cluster, bits, SIZE)
        content = bytearray(path.read_bytes())
        if rng.random() < 0.3:
            content = without_end(content, rng, cluster)
        else:
            assert contents(content)["disk"] == disk
        self.contents = contents(content)
        content = bytearray(damaged(content, rng, cluster))
        # All clusters of such a block seem to be in use: with larger ones the file grows by many megabytes.
        if cluster == 512 and rng.random() < 0.3:
            misplace_block(content, rng, cluster)
        #: "dirty": the image is repaired when it is opened.
        self.how: Literal["dirty", "leaks", "all"] = rng.choice(("dirty", "dirty", "leaks", "all"))
        mark = q.DIRTY if self.how == "dirty" else rng.choice((0, q.CORRUPT))
        put(content, AT, word(content, AT) | mark)
        self.start = bytes(content)
        assert contents(self.start) == self.contents, "the damage changes no byte of the guest"

    def __call__(self, storage: Recorder, marks: Marks) -> None:
        with open_on(storage, read_only=False, repair=self.how != "dirty") as image:
            node: Any = image.node
            if self.how != "dirty":
                node.repair(self.how)

    def opened(self, content: bytes) -> Any:
        node = Recorder(content)
        return lambda *, read_only: open_on(node, read_only=read_only)

    def verify(self, content: bytes, state: CrashState) -> bytes:
        """The file after the next repair."""
        assert contents(content) == self.contents, "a byte of the guest changed"
        storage = Recorder(content)
        repaired(storage, repair=not word(content, AT) & q.DIRTY)
        once = bytes(storage.content)
        assert contents(once) == self.contents, "the next repair changed a byte of the guest"
        with open_on(storage, read_only=False, repair=True) as image:
            node: Any = image.node
            node.repair("all")
        assert storage.content == once, "one more repair changed the file"
        return once


def misplace_block(content: bytearray, rng: random.Random, cluster: int) -> None:
    """The first refcount block is said to be where something else is."""
    at = q.HEADER_V3.unpack(content).refcount_table_offset
    put(content, at, rng.randrange(len(content) // cluster) * cluster)


def without_end(content: bytearray, rng: random.Random, cluster: int) -> bytearray:
    """The same without clusters at its end to which L2 entries point: the disk reads as zero there."""
    file = Child(Recorder(content), "file")
    found = References(file, Header.read(file))
    found.walk()
    last = max(int(part.max()) for use, parts in found.uses.items() if use.kind != DATA for part in parts if len(part))
    return content[: rng.randrange(last + 1, -(-len(content) // cluster) + 1) * cluster]


def repaired(storage: Recorder, *, repair: bool) -> None:
    """Repair what `storage` holds; by `repair`, or because it is opened for writing. It is clean then."""
    with open_on(storage, read_only=False, repair=repair) as image:
        node: Any = image.node
        node.repair("all")
        report = node.check()
        assert report.clean, [finding.message for finding in report.findings[:3]]


@pytest.mark.peers
@pytest.mark.parametrize(("cluster", "bits"), GEOMETRIES)
def test_any_power_cut_leaves_an_image_that_repair_mends(
    cluster: int, bits: int, seed: int, tmp_path: Path, qemu7: Any, qemu10: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    states = workloads = asked = 0
    began, path = time.monotonic(), tmp_path / "state.qcow2"

    def examine(content: bytes, state: CrashState) -> None:
        nonlocal states, asked
        once = work.verify(content, state)
        states += 1
        if states % RECOVERED_EVERY == 0:
            check_recovers(work.opened(once))
        if states % PEERS_EVERY == 0:
            path.write_bytes(once)
            for peer in (qemu7, qemu10):
                status, said = peer.check(path)
                assert status == 0, f"{peer}: {said}"
                asked += 1

    while states < STATES:
        rng = random.Random(f"{seed}/{cluster}/{bits}/{workloads}")
        print(f"workload {workloads} of LAMINA_SEED={seed}")
        work = RepairWork(rng, tmp_path / "made.qcow2", cluster, bits)
        recording = record(work, start=work.start, model=Persistence.P4, seed=seed, bounds=Bounds(at_cut=20))
        recording.examine(examine)
        workloads += 1
    evidence.count("crash states", states)
    evidence.count("crash states that QEMU checked as well", asked)
    with capsys.disabled():
        print(
            f"\nrepair, {cluster}, {bits} bits: {states} states of {workloads} workloads, no byte of the guest changed; "
            f"{asked} checks by QEMU agree; {time.monotonic() - began:.1f} s"
        )

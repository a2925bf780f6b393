"""The power is cut at every moment of random work that packs clusters, writes over packed ones, and gives them up.

As `test_qcow2_power_loss`: the check finds no corruption, each sector holds what was flushed or something newer, and every
50th state goes through both QEMUs. `LAMINA_CRASH_STATES` and `LAMINA_SEED` as there.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import LaminaError
from lamina.format_node import Reservation
from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.qcow2.l2_entry import compressed_range
from lamina.formats.qcow2.tables import Tables
from lamina.image import Image
from lamina.node import COMPRESS
from lamina.testing.persistence import Bounds, Persistence
from lamina.testing.power_loss import record
from lamina.testing.recorder import Marks
from tests import evidence

from .workloads import Examination, Geometry, Work

STATES = int(os.environ.get("LAMINA_CRASH_STATES", "36000")) // 6
PEERS_EVERY = 50

GEOMETRIES = [
    Geometry({"cluster_size": 512, "refcount_bits": 64}),
    Geometry({"cluster_size": 1024, "compat": "0.10"}),
    Geometry({"cluster_size": 4096, "refcount_bits": 2}, (64 << 10, 130 << 10), backing=True),
    Geometry({"cluster_size": 4096, "compression_type": "zstd"}, (64 << 10, 130 << 10), grow=True),
    Geometry({"cluster_size": 16384, "extended_l2": True}, (64 << 10, 130 << 10), backing=True),
]


class Packing(Work):
    """Half of the operations write whole clusters packed: some shrink to little, some to half, some not at all."""

    packed = 0

    def _one(self, image: Image, marks: Marks, number: int) -> None:
        rng, history = self.rng, self.history
        if rng.random() < 0.5:
            super()._one(image, marks, number)
            return
        size = self.geometry.options["cluster_size"]
        offset = rng.randrange(0, max(history.size // size, 1)) * size
        length = min(rng.choice([1, 2, 5, 12]) * size, history.size - offset)
        noise = rng.choice([0, length // 3, length // 2, length])
        data = rng.randbytes(noise) + bytes([number % 255 + 1]) * (length - noise)
        marks.begin(history.moment + 1)
        image.root.write(offset, memoryview(data), COMPRESS)
        history.write(offset, data)
        self.packed += 1


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_any_power_cut_leaves_a_whole_image(
    geometry: Geometry, seed: int, tmp_path: Path, qemu7: Any, qemu10: Any
) -> None:
    states = workloads = compressed = packed = asked = 0
    while states < STATES // len(GEOMETRIES):
        rng = random.Random(f"{seed}/{geometry}/{workloads}")
        work = Packing(rng, geometry, rng.randrange(8, 40), unaligned=workloads % 3 == 2)
        recording = record(work, start=work.start, model=Persistence.P4, seed=seed, bounds=Bounds(at_cut=60))
        examine = Examination(work, tmp_path, [qemu7, qemu10], peers_every=PEERS_EVERY)
        print(f"workload {workloads} of LAMINA_SEED={seed}")
        recording.examine(examine)
        packed += work.packed  # of eight operations perhaps none
        states, workloads, compressed = states + examine.count, workloads + 1, compressed + examine.compressed
        asked += examine.asked
    evidence.count("crash states", states)
    evidence.count("crash states that QEMU checked as well", asked)
    assert packed
    assert compressed


# The harness has teeth: three wrong orders are noticed.


def published_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping is on disk before the compressed bytes are."""
    real = Qcow2.store

    def store(self: Qcow2, room: Reservation, offset: int, view: memoryview, event: str = "write_aio") -> None:
        if event == "write_compressed":
            late.append((self, room, offset, bytes(view)))
        else:
            real(self, room, offset, view, event)

    late: list[tuple[Qcow2, Reservation, int, bytes]] = []
    write_out = Tables.write_out

    def writing_out(self: Tables) -> bool:
        done = write_out(self)
        while late:
            node, room, offset, part = late.pop(0)
            real(node, room, offset, memoryview(part))
        return done

    monkeypatch.setattr(Qcow2, "store", store)
    monkeypatch.setattr(Tables, "write_out", writing_out)


def counted_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second piece in a cluster is not counted."""
    from lamina.formats.qcow2.refcounts import Refcounts

    monkeypatch.setattr(Refcounts, "share", lambda self, cluster: True)


def room_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed goes where the last piece was given up, though the disk may still refer to that."""
    real = Tables.give_up

    def give_up(self: Tables, entry: int) -> None:
        real(self, entry)
        self._compressed_end = compressed_range(entry, self.cluster_bits)[0]

    monkeypatch.setattr(Tables, "give_up", give_up)


def examine_work(seed: int) -> None:
    for number in range(60):
        work = Packing(random.Random(f"{seed}/{number}"), GEOMETRIES[number % 2], 30)
        recording = record(work, start=work.start, model=Persistence.P4, seed=seed, bounds=Bounds(at_cut=20))
        recording.examine(lambda content, state, work=work: work.verify(content, state))


@pytest.mark.parametrize("mistake", [published_first, counted_late, room_used_again])
def test_mistakes_are_noticed(mistake: Any, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """By a judgement, or because the image cannot be read."""
    mistake(monkeypatch)
    with pytest.raises((AssertionError, LaminaError)):
        examine_work(seed)

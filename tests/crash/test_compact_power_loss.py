"""The power is cut while an image is compacted: at any moment the disk and its snapshots read as before, and no structure is
damaged.

`LAMINA_CRASH_STATES` says how many states there are, as in `test_qcow2_power_loss`.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from lamina.formats.qcow2 import packing
from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.qcow2.packing import Packing
from lamina.graph import Opener
from lamina.image import Image
from lamina.jobs import in_place
from lamina.jobs.compact import compact
from lamina.request import Child
from lamina.testing.image_checks import check_whole
from lamina.testing.persistence import CrashState
from lamina.testing.recorder import Marks, Recorder

from .workloads import examine_workloads, fresh, is_noticed_without_flushes, open_on

STATES = int(os.environ.get("LAMINA_CRASH_STATES", "36000")) // 120
GEOMETRIES: list[dict[str, Any]] = [
    {"cluster_size": 512, "refcount_bits": 16},
    {"cluster_size": 1024, "compat": "0.10"},
    {"cluster_size": 4096, "refcount_bits": 64},
    {"cluster_size": 4096, "backing": True},
    {"cluster_size": 512, "preallocation": "metadata"},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 65536},
]


class CompactWork:
    """An image with zeros that are stored, free space and leaks, perhaps with a snapshot, that is compacted and then used."""

    def __init__(self, rng: random.Random, options: dict[str, Any]) -> None:
        size = rng.choice([24 << 10, 66 << 10, 130 << 10])
        backed = options.get("backing", False)
        options = {name: value for name, value in options.items() if name != "backing"}
        self.backing = rng.randbytes(size // 2 & -512) if backed else None
        node = Recorder(fresh(options, size))
        with open_on(node, read_only=False, backing=self.backing) as image:
            if rng.random() < 0.5:  # free space before data, which is moved there
                image.write(0, rng.randbytes(size))
                image.discard(0, size // 2 & -options.get("cluster_size", 65536))
                image.flush()
            snapshot = rng.random() < 0.3
            for number in range(rng.randrange(3, 12)):
                at = rng.randrange(size // 512) * 512
                length = min(rng.choice([512, 4096, 20000 & -512, 64 << 10]), size - at)
                what = rng.randrange(4)
                if what == 0:
                    image.discard(at, length)
                else:
                    image.write(at, bytes(length) if what == 1 else rng.randbytes(1) * length)
                if snapshot and number == 2:
                    image.create_snapshot("then")
                if number % 4 == 3:
                    image.flush()
        if rng.random() < 0.5:
            node.write(len(node.content), b"rest" * 2048)
        self.disk, self.kept = self.states(bytes(node.content))
        self.start = bytes(node.content)
        self.rng = rng

    def __call__(self, storage: Recorder, marks: Marks) -> None:
        with open_on(storage, read_only=False, backing=self.backing) as image:
            compact(image, parallel=1)
            assert image.read(0, image.size) == self.disk
            # What was freed is used again.
            image.write(0, self.disk[:512])
            if self.rng.random() < 0.5:
                image.write(len(self.disk) // 2 & -512, self.disk[len(self.disk) // 2 & -512 :])
            image.flush()

    def states(self, content: bytes) -> tuple[bytes, dict[str, bytes]]:
        """The disk of the image in `content`, and those of its snapshots."""
        with open_on(Recorder(content), read_only=True, backing=self.backing) as image:
            check_whole(image)
            disk = image.read(0, image.size)
            ids = [one.id for one in image.snapshots()]
        return disk, {id: self._snapshot(content, id) for id in ids}

    def _snapshot(self, content: bytes, id: str) -> bytes:
        spec: dict[str, Any] = {"file": Child(Recorder(content), "file", grows=True), "snapshot-id": id}
        if self.backing is not None:
            spec["backing"] = Child(Recorder(self.backing), "backing")
        with Image(Qcow2.open(Qcow2.schema.parse(spec), Opener(read_only=True))) as image:
            return image.read(0, image.size)

    def opened(self, content: bytes) -> Any:
        node = Recorder(content)
        return lambda *, read_only: open_on(node, read_only=read_only, backing=self.backing)

    def verify(self, content: bytes, state: CrashState) -> None:
        assert self.states(content) == (self.disk, self.kept)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "STEP", 16 << 10)
    monkeypatch.setattr(packing, "_COPY", 4 << 10)
    monkeypatch.setattr(in_place, "PART", 64 << 10)


@pytest.mark.parametrize("options", GEOMETRIES, ids=lambda options: ",".join(map(str, options.values())))
def test_no_power_cut_changes_a_byte_of_the_guest(
    options: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = 0
    real = Packing.step

    def step(self: Packing) -> int:
        nonlocal moved
        done = real(self)
        moved += done
        return done

    monkeypatch.setattr(Packing, "step", step)

    examine_workloads(lambda rng: CompactWork(rng, options), STATES, name=options, seed=seed)
    assert moved, "no workload has free space before data"


def test_storage_must_not_become_a_hole_before_its_entry_is_gone() -> None:
    """Over storage whose flushes do nothing the harness finds states in which structures are damaged or bytes differ."""

    works = (CompactWork(random.Random(number), {"cluster_size": 512}) for number in range(8))
    assert any(map(is_noticed_without_flushes, works))

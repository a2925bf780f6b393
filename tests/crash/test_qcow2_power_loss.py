"""The power is cut at every moment of random workloads: qcow2 images stay whole, and what was flushed is there.

For each state: our check finds no corruption (leaks are allowed), every sector holds what was flushed or something written
after, never anything else, and now and then QEMU's check agrees. `LAMINA_CRASHES` sets how many workloads run.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.creation import create_driver
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.image import Image
from lamina.request import Child

from .recorder import SECTOR, Recorder, crash_states

WORKLOADS = int(os.environ.get("LAMINA_CRASHES", "30"))
GEOMETRIES = [
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 512, "refcount_bits": 16},
    {"cluster_size": 512, "refcount_bits": 1},
    {"cluster_size": 4096, "refcount_bits": 16},
    {"cluster_size": 4096, "refcount_bits": 64, "compat": "1.1"},
    {"cluster_size": 1024, "compat": "0.10"},
]


def fresh(options: dict[str, Any], size: int) -> bytes:
    kind: Any = create_driver("qcow2")
    values = kind.create_schema.parse({**options, "size": size})
    node = Recorder()
    kind.create(Child(node, "file", grows=True), size, values)
    return bytes(node.content)


def open_on(node: Recorder, *, read_only: bool, backing: Any = None) -> Image:
    spec: dict[str, Any] = {"file": Child(node, "file", grows=True)}
    if backing is not None:
        spec["backing"] = backing
    return Image(Qcow2.open(Qcow2.schema.parse(spec), Opener(read_only=read_only)))


class Workload:
    """Random operations on one image, and which values each sector may have after each of them."""

    def __init__(self, rng: random.Random, options: dict[str, Any], size: int, grow: bool) -> None:
        self.rng = rng
        self.size = size
        self.start = fresh(options, size)
        self.node = Recorder(self.start)
        self.model = bytearray(size)
        #: After operation k: the whole disk. Values in between are those of its sectors.
        self.after: list[bytes] = [bytes(size)]
        self.maybe_zero: list[tuple[int, int, int]] = []  # operation, start, end: discarded, so old or zero
        self.grow = grow

    def run(self, count: int) -> None:
        with open_on(self.node, read_only=False) as image:
            for number in range(count):
                self.node.mark("operation", number)
                self._one(image, number)
                self.after.append(bytes(self.model))

    def _one(self, image: Image, number: int) -> None:
        rng = self.rng
        name = rng.choices(["write", "zero", "unmap", "discard", "flush", "truncate"], [8, 2, 2, 4, 3, int(self.grow)])[
            0
        ]
        offset = rng.randrange(0, len(self.model) // SECTOR) * SECTOR
        length = min(rng.choice([SECTOR, 2 * SECTOR, 8 * SECTOR, 40 * SECTOR]), len(self.model) - offset)
        if name == "write":
            data = bytes([number % 255 + 1]) * length
            image.write(offset, data)
            self.model[offset : offset + length] = data
        elif name in ("zero", "unmap"):
            image.zero(offset, length, unmap=name == "unmap")
            self.model[offset : offset + length] = bytes(length)
        elif name == "discard":
            image.discard(offset, length)
            self.maybe_zero.append((number, offset, offset + length))
            self.model[:] = image.read(0, len(self.model))
        elif name == "truncate":
            image.truncate(len(self.model) + 16 * SECTOR)
            self.model.extend(bytes(16 * SECTOR))
        else:
            image.flush()
            self.node.mark("synced", number)

    def legal(self, sector: int, value: bytes, begun: int, synced: int) -> bool:
        at = sector * SECTOR
        for state in range(synced + 1, min(begun + 2, len(self.after))):
            known = self.after[state]
            if known[at : at + SECTOR] == value or (at >= len(known) and not any(value)):
                return True
        return not any(value) and any(
            synced <= number <= begun and low <= at < high for number, low, high in self.maybe_zero
        )


@pytest.mark.parametrize("number", range(WORKLOADS))
def test_any_power_cut_leaves_a_whole_image(number: int, seed: int, tmp_path: Path, qemu10: Any) -> None:
    rng = random.Random(f"{seed}/{number}")
    options = GEOMETRIES[number % len(GEOMETRIES)]
    work = Workload(rng, options, rng.choice([24, 64, 130, 520]) * 1024, grow=rng.random() < 0.3)
    work.run(rng.randrange(8, 40))
    seen: set[int] = set()
    for content, begun, synced in crash_states(work.start, work.node.log, rng):
        key = hash((content, begun, synced))
        if key in seen:
            continue
        seen.add(key)
        examine(work, content, begun, synced)
        if len(seen) % 150 == 0:
            path = tmp_path / "state.qcow2"
            path.write_bytes(content)
            status, report = qemu10.check(path)
            assert status in (0, 3), f"{report} in state {len(seen)}"
            path.unlink()
    print(f"workload {number}: {options}, {len(seen)} states")


def examine_all(work: Workload, rng: random.Random) -> None:
    for content, begun, synced in crash_states(work.start, work.node.log, rng):
        examine(work, content, begun, synced)


def examine(work: Workload, content: bytes, begun: int, synced: int) -> None:
    where = f"after operation {begun}, flushed up to {synced}"
    with open_on(Recorder(content), read_only=True) as image:
        report = image.node.check()  # type: ignore[attr-defined]
        assert not report.corruptions, f"{report.findings[:5]} {where}"
        assert not report.check_errors, f"{report.findings[:5]} {where}"
        disk = image.read(0, image.size)
    for sector in range(len(disk) // SECTOR):
        value = disk[sector * SECTOR : (sector + 1) * SECTOR]
        assert work.legal(sector, value, begun, synced), f"sector {sector} is {value[:4]!r} {where}"


def test_the_harness_notices_a_mapping_published_too_early(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teeth of this harness: an image that writes its mappings before anything else is caught."""

    def write_out(self: Any) -> bool:
        if not self._mappings.dirty:
            return False
        self._mappings.write_tables()
        self._mappings.write_links()
        self._refcounts.write_counts()
        self._refcounts.write_links()
        self.file.flush()
        self._mappings.written()
        return True

    rng = random.Random(seed)
    work = Workload(rng, {"cluster_size": 512, "refcount_bits": 16}, 64 * 1024, grow=False)
    monkeypatch.setattr(Qcow2, "_write_out", write_out)
    work.run(30)
    with pytest.raises(AssertionError):
        examine_all(work, rng)


def test_create_over_the_recorder_is_clean() -> None:
    with open_on(Recorder(fresh({"cluster_size": 512, "refcount_bits": 64}, 1 << 20)), read_only=True) as image:
        assert image.node.check().clean  # type: ignore[attr-defined]
        assert image.size == 1 << 20
        assert isinstance(image, lamina.Image)

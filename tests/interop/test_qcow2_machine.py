"""Everything that an image can have, in drawn combinations, through drawn sequences of all changes, against a model.

The bytes, the extents, the snapshots, the bitmaps and the check are compared every few steps, and QEMU judges the result of
one sequence in 20. `LAMINA_QCOW2_MACHINE` is the number of sequences.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from lamina.errors import ReadOnly
from tests import evidence
from tests.conftest import Qemu

from .qcow2_model import SECTOR, Modelled

SEQUENCES = int(os.environ.get("LAMINA_QCOW2_MACHINE", "1000"))
STEPS = 20
#: Steps after which the image is compared with the model.
COMPARED_EVERY = 4
PEERS_EVERY = 20
MIB = 1 << 20
KIB = 1 << 10
#: Images have no more than so many snapshots, and bitmaps.
_MOST = 4

widths = st.sampled_from([16, 16, 1, 2, 4, 8, 32, 64])
anywhere = st.integers(0, (1 << 32) - 1)
which = st.integers(0, 63)


@st.composite
def images(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of `Modelled`."""
    cluster = draw(st.sampled_from([512, 512, 512, 1024, 4096, 4096, 4096, 16 * KIB, 64 * KIB, 64 * KIB, 2 * MIB]))
    old = draw(st.integers(0, 5)) == 0
    # Sizes around what one L2 table maps, and a few clusters.
    clusters = draw(st.sampled_from([1, 2, 5, 17, 64, 65, 130]))
    size = min(clusters * cluster, 5 * MIB if cluster > 64 * KIB else 768 * KIB)
    if draw(st.booleans()):
        size = max(size - SECTOR * draw(st.integers(1, 5)), SECTOR)
    backing = None
    if draw(st.integers(0, 2)) == 0:
        backing = draw(st.sampled_from([size, max(size // 2, SECTOR), size + 3 * SECTOR, SECTOR, 1000]))
    encrypted = draw(st.integers(0, 24)) == 0
    extended = not old and cluster >= 16 * KIB and draw(st.booleans())
    hides = (backing is not None or encrypted) and not extended
    options = {
        "cluster_size": cluster,
        "compat": "0.10" if old else "1.1",
        "extended_l2": extended,
        "refcount_bits": 16 if old else draw(widths),
        "compression_type": "zlib" if old else draw(st.sampled_from(["zlib", "zstd"])),
        "lazy_refcounts": not old and draw(st.booleans()),
        "preallocation": "off" if hides else draw(st.sampled_from(["off", "off", "off", "metadata", "falloc", "full"])),
    }
    return {"size": size, "options": options, "backing": backing, "encrypted": encrypted}


class Machine(RuleBasedStateMachine):
    """One image. One of `peers` judges about every 20th."""

    peers: ClassVar[list[Qemu]] = []
    counts: ClassVar[Counter[str]] = Counter()
    model: Modelled

    @initialize(made=images(), judged=st.integers(0, PEERS_EVERY - 1), peer=st.integers(0, 1))
    def create(self, made: dict[str, Any], judged: int, peer: int) -> None:
        self.judge = self.peers[peer] if judged == 1 else None
        self.steps = 0
        self.model = Modelled(**made)

    def _done(self, name: str) -> None:
        self.counts[name] += 1
        self.steps += 1
        if self.steps % COMPARED_EVERY == 0:
            self.model.compare()

    def _range(self, at: int, length: int, step: int) -> tuple[int, int]:
        """The offset and the length of a request in the disk: multiples of `step`, or where that is 0 of the cluster size, or
        where it is -1 of sectors, and a byte more."""
        size, cluster = len(self.model.disk), self.model.cluster
        unit = {0: cluster, -1: SECTOR}.get(step, step)
        offset = at % size // unit * unit
        length = max(length % (3 * cluster) // unit * unit, unit) + (step == -1)
        return offset, min(length, size - offset)

    steps_of = st.sampled_from([0, 0, 1, SECTOR, SECTOR, -1])

    @rule(at=anywhere, length=anywhere, step=steps_of, byte=st.integers(1, 255), noise=st.booleans())
    def write(self, at: int, length: int, step: int, byte: int, noise: bool) -> None:
        offset, length = self._range(at, length, step)
        self.model.write(offset, random.Random(byte).randbytes(length) if noise else bytes([byte]) * length)
        self._done("write")

    @rule(at=anywhere, length=anywhere, step=st.sampled_from([0, 0, 0, SECTOR]), byte=st.integers(0, 255))
    def write_compressed(self, at: int, length: int, step: int, byte: int) -> None:
        offset, length = self._range(at, length, step)
        self.model.write(offset, (bytes([byte]) * 50 + b"text").ljust(length, b".")[:length], compress=True)
        self._done("write compressed")

    @rule(at=anywhere, length=anywhere, step=steps_of, how=st.sampled_from(["zero", "unmap", "discard"]))
    def clear(self, at: int, length: int, step: int, how: str) -> None:
        offset, length = self._range(at, length, step)
        if how == "discard":
            self.model.discard(offset, length)
        else:
            self.model.zero(offset, length, unmap=how == "unmap")
        self._done(how)

    @rule(change=st.integers(-40, 40), clusters=st.booleans(), amend=st.booleans())
    def resize(self, change: int, clusters: bool, amend: bool) -> None:
        by = change * (min(self.model.cluster, 64 * KIB) if clusters else SECTOR)
        size = min(max(len(self.model.disk) // SECTOR * SECTOR + by, SECTOR), 6 * MIB)
        self.model.resize(size, amend=amend)
        self._done("resize")

    @rule(number=which, how=st.sampled_from(["create", "create", "apply", "delete", "compare"]))
    def change_snapshots(self, number: int, how: str) -> None:
        ids = sorted(self.model.snapshots)
        if how == "create" and len(ids) < _MOST:
            self.model.create_snapshot()
        elif how == "compare":
            self.model.compare_snapshots()
        elif ids:
            id = ids[number % len(ids)]
            (self.model.apply_snapshot if how == "apply" else self.model.delete_snapshot)(id)
        self._done(f"{how} snapshot" if ids else "first snapshot")

    @rule(
        number=which,
        other=which,
        granularity=st.sampled_from([512, 4096, 64 * KIB, MIB]),
        how=st.sampled_from(["add", "add", "remove", "clear", "enable", "disable", "merge", "merge"]),
    )
    def change_bitmaps(self, number: int, other: int, granularity: int, how: str) -> None:
        model, names = self.model, sorted(self.model.bitmaps)
        name = names[number % len(names)] if names else ""
        if (how == "add" and len(names) < _MOST) or not names:
            model.add_bitmap(granularity, enabled=bool(number % 4))
        elif how == "remove":
            model.remove_bitmap(name)
        elif how == "clear":
            model.clear_bitmap(name)
        elif how == "merge":
            model.merge_bitmaps(name, {names[other % len(names)], names[0]})
        else:
            model.enable_bitmap(name, how == "enable")
        self._done(f"{how} bitmap" if names else "first bitmap")

    @rule(bits=widths, lazy=st.sampled_from([None, None, True, False]))
    def amend(self, bits: int, lazy: bool | None) -> None:
        if lazy is None:
            self.model.amend_width(bits)
        else:
            self.model.amend_lazy(lazy)
        self._done("amend refcount_bits" if lazy is None else "amend lazy_refcounts")

    @rule(how=st.sampled_from(["flush", "reopen", "reopen", "read-only", "power cut"]))
    def keep(self, how: str) -> None:
        if how == "flush":
            self.model.image.flush()
        elif how == "reopen":
            self.model.reopen()
        elif how == "power cut":
            self.model.cut_power()
        else:
            self.model.image.reopen(read_only=True)
            self.model.compare()
            with pytest.raises(ReadOnly):
                self.model.image.write(0, b"refused")
            self.model.image.reopen(read_only=False)
        self._done(how)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        self.model.close()
        self.counts["sequences"] += 1
        if self.judge is not None:
            with tempfile.TemporaryDirectory() as folder:
                self.model.judge(self.judge, Path(folder), random.Random(self.steps))
            self.counts["judged by QEMU"] += 1


def test_all_features_agree_with_a_model(qemu7: Qemu, qemu10: Qemu, capsys: pytest.CaptureFixture[str]) -> None:
    class Judged(Machine):
        peers: ClassVar[list[Qemu]] = [qemu7, qemu10]
        counts: ClassVar[Counter[str]] = Counter()

    chosen = settings(
        max_examples=SEQUENCES,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(Judged, settings=chosen)
    with capsys.disabled():
        print(f"\n{dict(Judged.counts)}")
    assert Judged.counts["sequences"] >= SEQUENCES
    evidence.count("sequences of all changes, compared with a model", Judged.counts["sequences"])
    evidence.count("of these judged by QEMU", Judged.counts["judged by QEMU"])
    assert Judged.counts["judged by QEMU"] >= SEQUENCES // (10 * PEERS_EVERY)

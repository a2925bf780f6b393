"""The power is cut in the middle of commit and rebase: the overlay reads the same at any moment, and no check finds a
corruption. `LAMINA_CRASH_STATES` says how many states there are, as in `test_qcow2_power_loss`."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.qcow2.header import Header
from lamina.graph import Opener
from lamina.image import Image
from lamina.jobs.commit import commit
from lamina.jobs.rebase import rebase
from lamina.request import Child
from lamina.testing.image_checks import check_recovers, check_whole
from lamina.testing.persistence import Bounds, CrashState, Persistence
from lamina.testing.power_loss import Recording, record
from lamina.testing.recorder import Marks, Recorder
from tests import evidence
from tests.unit.test_convert_backing import fill

from .workloads import fresh

STATES = int(os.environ.get("LAMINA_CRASH_STATES", "36000")) // 60
KIB = 1 << 10
GEOMETRIES: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 512, "compat": "0.10"},
    {"cluster_size": 4096},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 65536},
]
geometries = pytest.mark.parametrize("options", GEOMETRIES, ids=lambda options: ",".join(map(str, options.values())))


def overlay(top: Recorder, base: Recorder | None, *, read_only: bool) -> Image:
    """The image in `top` over that in `base`."""
    below = None
    if base is not None:
        spec = {"file": Child(base, "file", grows=True)}
        below = Child(Qcow2.open(Qcow2.schema.parse(spec), Opener(read_only=True)), "backing")
    spec = {"file": Child(top, "file", grows=True), "backing": below}
    return Image(Qcow2.open(Qcow2.schema.parse(spec), Opener(read_only=read_only)))


def content_of(image: Image) -> bytes:
    return image.read(0, image.size)


def require_recovery(top: bytes, base: bytes | None) -> None:
    storage, below = Recorder(top), None if base is None else Recorder(base)
    check_recovers(lambda read_only: overlay(storage, below, read_only=read_only))


class Files:
    """A random overlay over a random base, as the bytes of two files."""

    def __init__(self, dice: random.Random, options: dict[str, Any]) -> None:
        base = Recorder(fresh({"cluster_size": dice.choice([512, 4096])}, dice.choice([40, 70]) * KIB))
        with overlay(base, None, read_only=False) as image:
            fill(image, dice, 6)
        top = Recorder(fresh(options, dice.choice([40, 60, 70, 90]) * KIB))
        with overlay(top, base, read_only=False) as image:
            image.amend(backing_file="base", backing_fmt="qcow2")
            fill(image, dice, 6)
            self.disk = content_of(image)
        self.base, self.top = bytes(base.content), bytes(top.content)

    def require_same(self, top: bytes, base: bytes | None) -> None:
        below = None if base is None else Recorder(base)
        with overlay(Recorder(top), below, read_only=True) as image:
            assert content_of(image) == self.disk
            check_whole(image)


@geometries
def test_no_power_cut_in_a_commit_changes_the_overlay(options: dict[str, Any], seed: int) -> None:
    states = number = 0
    while states < STATES:
        dice = random.Random(f"{seed}/{options}/{number}")
        print(f"workload {number} of LAMINA_SEED={seed}")
        number += 1
        files = Files(dice, options)
        base = Recorder(files.base)

        class Top(Recorder):
            """The overlay changes when its new base is on stable storage, and not before."""

            def write(self, offset: int, view: bytes | bytearray | memoryview, flags: int = 0) -> None:
                assert base.log[-1].kind == "flush_done"  # noqa: B023 - of this round
                super().write(offset, view, flags)

        top = Top(files.top)
        with overlay(top, base, read_only=False) as image:
            commit(image)
        below = Recording(base.start, tuple(base.log), Persistence.P4, seed, Bounds(at_cut=8))
        states += below.examine(lambda content, state: files.require_same(files.top, content))  # noqa: B023
        above = Recording(top.start, tuple(top.log), Persistence.P4, seed, Bounds(at_cut=8))
        done = bytes(base.content)

        def examine(content: bytes, state: CrashState) -> None:
            files.require_same(content, done)  # noqa: B023
            if state.number % 20 == 0:
                require_recovery(content, done)  # noqa: B023

        states += above.examine(examine)
    evidence.count("crash states", states)


@geometries
def test_no_power_cut_in_a_rebase_changes_the_overlay(options: dict[str, Any], seed: int, tmp_path: Path) -> None:
    states = number = 0
    path = tmp_path / "new"
    while states < STATES:
        dice = random.Random(f"{seed}/{options}/{number}")
        print(f"workload {number} of LAMINA_SEED={seed}")
        number += 1
        files = Files(dice, options)
        new: Recorder | None = None
        if dice.random() < 0.8:  # another state of the same base
            new = Recorder(files.base)
            with overlay(new, None, read_only=False) as image:
                fill(image, dice, 6)
            path.write_bytes(new.content)

        def work(storage: Recorder, marks: Marks) -> None:
            with overlay(storage, Recorder(files.base), read_only=False) as image:  # noqa: B023
                rebase(image, str(path) if new is not None else None, "qcow2" if new is not None else None)  # noqa: B023

        def examine(content: bytes, state: CrashState) -> None:
            header = Header.read(Child(Recorder(content), "file"))
            base = {"base": files.base, str(path): new and bytes(new.content), None: None}[header.backing_file]  # noqa: B023
            files.require_same(content, base)  # noqa: B023
            if state.number % 20 == 0:
                require_recovery(content, base)

        recording = record(work, start=files.top, model=Persistence.P4, seed=seed, bounds=Bounds(at_cut=8))
        states += recording.examine(examine)
    evidence.count("crash states", states)

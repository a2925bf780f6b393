"""An interrupt at any opcode of commit and rebase: the overlay reads the same, at once and from its files, and is its user's
again; both can be started again."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lamina
from lamina.creation import create
from lamina.image import Image
from lamina.jobs.commit import commit
from lamina.jobs.rebase import rebase
from lamina.testing.interrupts import in_another_thread, interrupted_at_opcode
from tests import evidence

from .test_interrupts_jobs import PATIENCE, counting, threads

KIB, MIB = 1 << 10, 1 << 20
#: How many places of each job are tried in one run of the test; `make soak` sets more.
PLACES = int(os.environ.get("LAMINA_SOAK_JOBS", "40"))
#: The functions in which a job begins and ends: all places of them are tried.
ENDS = {"commit", "rebase", "as_sole_writer", "_claim", "_release", "writing_beneath", "_empty", "work"}

JOBS: dict[str, Callable[[Image], object]] = {
    "commit": commit,
    "commit-to-base": lambda image: commit(image, "base"),
    "rebase": lambda image: rebase(image, "new", "raw"),
    "rebase-to-base": lambda image: rebase(image, "base", "qcow2"),
    "rebase-to-none": lambda image: rebase(image, None),
}


@pytest.fixture
def content(tmp_path: Path) -> dict[str, bytes]:
    """The files of a chain, and of another base."""
    dice = random.Random(5)
    create(tmp_path / "base", "qcow2", 2 * MIB)
    create(tmp_path / "mid", "qcow2", backing_file="base", backing_fmt="qcow2")
    create(tmp_path / "top", "qcow2", 2 * MIB + 4096, backing_file="mid", backing_fmt="qcow2")
    for name in "base", "mid", "top":
        with lamina.open(tmp_path / name, format="qcow2", read_only=False) as image:
            for _ in range(4):
                image.write(dice.randrange(30) * 64 * KIB + 5, dice.randbytes(100 * KIB))
            image.zero(dice.randrange(20) * 64 * KIB, 100 * KIB)
    (tmp_path / "new").write_bytes((tmp_path / "base").read_bytes() * 8)
    return {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def run_once(folder: Path, content: dict[str, bytes], job: Callable[[Image], object], number: int, ends: bool) -> int:
    """Do the job on new files, interrupted at that opcode (-1: not), and return how many it has. `ends`: those of `ENDS`."""
    for name, data in content.items():
        (folder / name).write_bytes(data)
    with lamina.open(folder / "top", format="qcow2") as image:
        expected = image.read(0, image.size)
    with lamina.open(folder / "top", format="qcow2", read_only=False) as image:
        try:
            with interrupted_at_opcode(number, counting(ENDS if ends else None, False)) as seen:
                job(image)
        except KeyboardInterrupt:
            assert number >= 0
        assert image.read(0, image.size) == expected
        assert not image.read_only
        deadline = time.monotonic() + PATIENCE
        while threads() and time.monotonic() < deadline:
            time.sleep(0.001)  # one that was never handed its work is just being started
        assert not threads()
        if number % 2:
            image.write(100, b"")
            job(image)
            assert image.read(0, image.size) == expected
    for name in "base", "mid", "top":
        assert not lamina.check(folder / name, format="qcow2").corruptions
    with lamina.open(folder / "top", format="qcow2") as image:
        assert image.read(0, image.size) == expected
    return seen[0]


# An interrupt between an open and its `with` leaves an image to its finalizer, which closes it and says so.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("ends", [False, True], ids=["anywhere", "ends"])
@pytest.mark.parametrize("name", JOBS)
def test_an_interrupt_anywhere_keeps_the_overlay(
    tmp_path: Path, content: dict[str, bytes], seed: int, name: str, ends: bool
) -> None:
    total: list[int] = []
    in_another_thread(lambda: total.append(run_once(tmp_path, content, JOBS[name], -1, ends)))
    places = range(1, total[0] + 1)
    dice = random.Random(seed)
    for number in places if len(places) <= PLACES else dice.sample(places, PLACES):
        print(f"opcode {number} of {total[0]}")
        in_another_thread(lambda: run_once(tmp_path, content, JOBS[name], number, ends))  # noqa: B023
        evidence.count("interrupts")

"""Commands that are killed at random moments: a conversion leaves the finished target or none, in place nothing that opens as
an image, and a change in place leaves a disk that reads the same. `LAMINA_KILLS` is the number of moments of each."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lamina
from lamina.creation import create
from lamina.errors import LaminaError
from tests import evidence

MIB = 1 << 20
KILLS = int(os.environ.get("LAMINA_KILLS", "8"))


def run(folder: Path, words: list[str], after: float | None) -> bool:
    """Run the command, and kill it after so many seconds; whether it ended by itself."""
    child = subprocess.Popen(
        [sys.executable, "-m", "lamina", *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _, errors = child.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        evidence.count("commands killed at a random moment")
        return False
    assert not child.returncode, errors.decode()
    return True


def moments(seed: int, folder: Path, words: list[str]) -> list[float]:
    """Random moments of the time that the command takes, more of them in its second half, where it writes."""
    began = time.monotonic()
    assert run(folder, words, None)
    took = time.monotonic() - began
    dice = random.Random(seed)
    return [took * dice.uniform(0.3 if number % 2 else 0.0, 1.1) for number in range(KILLS)]


def content(path: Path) -> bytes:
    with lamina.open(path, format="qcow2") as image:
        return image.read(0, image.size)


@pytest.fixture
def disk(tmp_path: Path) -> bytes:
    data = random.Random(1).randbytes(24 * MIB) + bytes(8 * MIB)
    (tmp_path / "disk.raw").write_bytes(data)
    return data


@pytest.mark.parametrize("options", [[], ["-c"], ["-W", "-m", "4"]], ids=["plain", "packed", "unordered"])
def test_a_killed_conversion_leaves_the_finished_target_or_none(
    tmp_path: Path, disk: bytes, seed: int, options: list[str]
) -> None:
    words = ["convert", "-f", "raw", "-O", "qcow2", *options, "disk.raw", "out.qcow2"]
    target = tmp_path / "out.qcow2"
    finished = 0
    for after in moments(seed, tmp_path, words):
        target.unlink(missing_ok=True)
        run(tmp_path, words, after)
        if target.exists():
            finished += 1
            assert content(target) == disk
    print(f"{finished} of {KILLS} finished")
    assert {path.name for path in tmp_path.iterdir()} <= {"disk.raw", "out.qcow2"}


def test_a_killed_conversion_in_place_leaves_nothing_that_opens(tmp_path: Path, disk: bytes, seed: int) -> None:
    """A file with two names is not replaced; it is written in place."""
    target, other = tmp_path / "out.qcow2", tmp_path / "other.qcow2"
    words = ["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "out.qcow2"]

    def prepare() -> bytes:
        target.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
        create(target, "qcow2", MIB)
        os.link(target, other)
        return target.read_bytes()

    prepare()
    for after in moments(seed, tmp_path, words):
        before = prepare()
        run(tmp_path, words, after)
        if target.read_bytes() == before:
            continue  # it had not begun
        try:
            found = content(target)
        except LaminaError:
            continue
        assert found == disk


def chain(folder: Path) -> None:
    dice = random.Random(2)
    create(folder / "base", "qcow2", 16 * MIB)
    create(folder / "new", "qcow2", 16 * MIB)
    create(folder / "top", "qcow2", backing_file="base", backing_fmt="qcow2")
    for name in "base", "new", "top":
        with lamina.open(folder / name, format="qcow2", read_only=False) as image:
            for _ in range(40):
                image.write(dice.randrange(255) * 65536, dice.randbytes(65536))
            image.zero(3 * MIB, MIB)


@pytest.mark.parametrize(
    "line",
    [
        "commit -q -f qcow2 top",
        "rebase -q -f qcow2 -b new -F qcow2 top",
        "flatten -q -f qcow2 top",
        "compact -q -f qcow2 top",
        "amend -q -f qcow2 -o refcount_bits=32 top",
        "snapshot -f qcow2 -c now top",
        "resize -q -f qcow2 top 16M",
    ],
)
def test_a_killed_change_keeps_the_disk(tmp_path: Path, seed: int, line: str) -> None:
    before, folder = tmp_path / "before", tmp_path / "work"
    before.mkdir()
    chain(before)
    expected = content(before / "top")
    shutil.copytree(before, folder)
    for after in moments(seed, folder, line.split()):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        run(folder, line.split(), after)
        assert content(folder / "top") == expected
        for name in "base", "top":
            assert not lamina.check(folder / name, format="qcow2").corruptions
        assert {path.name for path in folder.iterdir()} == {"base", "new", "top"}

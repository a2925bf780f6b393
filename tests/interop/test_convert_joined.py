"""Several sources of `convert` beside qemu-img: equal disks, and the same options refused."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from lamina.cli.main import main
from tests.conftest import Qemu

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu: Qemu, seed: int) -> Path:
    """a and c are raw, with holes, b is qcow2, over is an overlay of base; `whole` is a, b, c and over, joined by hand."""
    monkeypatch.chdir(tmp_path)
    dice = random.Random(seed)
    whole = b""
    for name, size in (("a", 3 * MIB + 512), ("b.raw", MIB), ("c", 512), ("base", 2 * MIB)):
        with Path(name).open("wb") as file:
            file.truncate(size)
            for _ in range(4):
                file.seek(dice.randrange(size // 512) * 512)
                file.write(dice.randbytes(min(dice.choice([512, 70_000]), size - file.tell())))
        whole += Path(name).read_bytes()
    Path("whole").write_bytes(whole)
    qemu.img("convert", "-q", "-f", "raw", "-O", "qcow2", "b.raw", "b")
    qemu.img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "over")
    return tmp_path


NAMES = ["a", "b", "c", "over"]


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("raw", []),
        ("qcow2", []),
        ("qcow2", ["-c"]),
        ("raw", ["-C"]),
        ("raw", ["-S", "0"]),
        ("qcow2", ["-S", "64k", "-m", "4", "-W"]),
        ("qcow2", ["-o", "cluster_size=2M,compat=0.10"]),
        ("qcow2", ["--salvage", "-r", "1G", "-p"]),
    ],
)
def test_equal_disks(qemu: Qemu, folder: Path, format: str, options: list[str]) -> None:
    # QEMU detects the format of each; so does Lamina, which opens the base of a detected overlay only if told so.
    qemu.img("convert", "-O", format, *options, *NAMES, "theirs")
    assert main(["convert", "-O", format, *options, "--references", "same-dir", *NAMES, "ours"]) == 0
    qemu.img("compare", "-f", format, "-F", format, "ours", "theirs")
    qemu.img("compare", "-f", format, "-F", "raw", "ours", "whole")
    if format == "qcow2":
        assert qemu.check("ours")[0] == 0


def test_into_an_existing_target(qemu: Qemu, folder: Path) -> None:
    for name in ("ours", "theirs"):
        Path(name).write_bytes(os.urandom(Path("whole").stat().st_size))
    qemu.img("convert", "-n", "-O", "raw", *NAMES, "theirs")
    assert main(["convert", "-n", "-O", "raw", "--references", "same-dir", *NAMES, "ours"]) == 0
    assert Path("ours").read_bytes() == Path("theirs").read_bytes() == Path("whole").read_bytes()


def test_one_image_twice(qemu: Qemu, folder: Path) -> None:
    qemu.img("convert", "-O", "raw", "b", "b", "theirs")
    assert main(["convert", "-O", "raw", "b", "b", "ours"]) == 0
    assert Path("ours").read_bytes() == Path("theirs").read_bytes() == Path("b.raw").read_bytes() * 2


@pytest.mark.parametrize(
    "options",
    [
        ["-l", "first"],
        ["--bitmaps"],
        ["-B", "base", "-F", "raw"],
        ["-o", "backing_file=base,backing_fmt=raw"],
        ["-f", "qcow2"],  # a is none
    ],
    ids=" ".join,
)
def test_what_both_refuse(qemu: Qemu, folder: Path, options: list[str]) -> None:
    command = ["convert", *options, "-O", "qcow2", "a", "b"]
    assert qemu.img(*command, "theirs", check=False).returncode == 1
    assert main([*command, "ours"]) == 1
    assert not Path("ours").exists()


def test_a_source_is_not_the_target(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("c").read_bytes()
    assert main(["convert", "-f", "raw", "-O", "raw", "a", "c", "c"]) == 1
    assert "this is the source itself" in capsys.readouterr().err
    assert Path("c").read_bytes() == before


def test_sizes_are_exact(folder: Path) -> None:
    """QEMU fills each source up to whole sectors."""
    for name, size in (("x", 1000), ("y", 1), ("z", 0)):
        Path(name).write_bytes(os.urandom(size))
    assert main(["convert", "-f", "raw", "-O", "raw", "x", "z", "y", "ours"]) == 0
    assert Path("ours").read_bytes() == Path("x").read_bytes() + Path("y").read_bytes()

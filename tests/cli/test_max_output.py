"""A limit for what is written: a small image may read as terabytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from lamina.errors import LimitExceeded
from lamina.jobs.convert import convert_to_file
from lamina.limits import Budget

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bomb(path: Path) -> None:
    """An image of 384 KiB that reads as 4 TiB of data: all its L1 entries name one table, all entries of that one cluster."""
    lamina.create(path, "qcow2", 4 * TIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"x" * 64 * KIB)
    with path.open("r+b") as file:
        header = file.read(104)
        l1_size, l1_offset = int.from_bytes(header[36:40], "big"), int.from_bytes(header[40:48], "big")
        file.seek(l1_offset)
        entry = file.read(8)
        table = int.from_bytes(entry, "big") & 0x00FFFFFFFFFFFE00
        file.seek(l1_offset)
        file.write(entry * l1_size)
        file.seek(table)
        data = file.read(8)
        file.seek(table)
        file.write(data * 8192)


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "-f", "qcow2", "-O", "raw", "bomb.qcow2", "out"],
        ["convert", "-f", "qcow2", "-O", "qcow2", "-c", "bomb.qcow2", "out"],
        ["convert", "-f", "qcow2", "-O", "qcow2", "-m", "4", "-W", "bomb.qcow2", "out"],
        ["convert", "-f", "qcow2", "-O", "raw", "-C", "bomb.qcow2", "out"],
        ["convert", "-f", "qcow2", "-O", "qcow2", "-B", "base.raw", "-F", "raw", "bomb.qcow2", "out"],
        ["copy", 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "bomb.qcow2"}}', "out"],
        ["copy", 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "bomb.qcow2"}}', "-"],
    ],
    ids=" ".join,
)
def test_an_image_that_reads_as_terabytes(folder: Path, command: list[str]) -> None:
    bomb(folder / "bomb.qcow2")
    assert os.path.getsize("bomb.qcow2") <= 384 * KIB
    (folder / "base.raw").write_bytes(b"base")
    before = sorted(os.listdir())
    arguments = [command[0], "--max-output", "70M", *command[1:]]
    done = subprocess.run([sys.executable, "-m", "lamina", *arguments], capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"73400320 bytes of data that may be written" in done.stderr
    assert sorted(os.listdir()) == before
    assert len(done.stdout) <= 70 * MIB


def test_zeros_do_not_count_and_the_limit_is_exact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.raw").write_bytes(bytes(8 * MIB) + b"x" * 3 * MIB + bytes(MIB))
    base = ["-O", "qcow2", "-B", "a.raw", "-F", "raw"]
    for command in (
        ["convert", "-f", "raw", "-O", "raw"],
        ["convert", "-f", "raw", "-O", "qcow2"],
        ["copy"],
    ):
        assert main([*command, "--max-output", "3M", "a.raw", "out"]) == 0
        assert main([*command, "--max-output", "3145727", "a.raw", "out"]) == 1
        assert "--max-output" in capsys.readouterr().err
    assert main(["convert", "-f", "raw", *base, "--max-output", "0", "a.raw", "out"]) == 0  # nothing differs
    assert main(["copy", "-S", "0", "--no-extents", "--max-output", "4M", "a.raw", "out"]) == 1
    assert main(["convert", "-f", "raw", "-O", "raw", "-S", "0", "--max-output", "4M", "a.raw", "out"]) == 1


def test_a_budget_holds_for_jobs(folder: Path) -> None:
    Path("a.raw").write_bytes(b"x" * 5 * MIB)
    with lamina.open("a.raw", format="raw", budget=Budget(max_output=4 * MIB)) as source:
        with pytest.raises(LimitExceeded, match="may be written"):
            convert_to_file(source, "out", "raw", {})
        assert not os.path.exists("out")
        how: dict[str, Any] = {"max_output": 5 * MIB}  # the job's own word wins
        assert convert_to_file(source, "out", "raw", {}, **how).written == 5 * MIB

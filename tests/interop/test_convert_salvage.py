"""`convert --salvage` beside qemu-img: equal bytes, exit codes, and ranges told of, over reads that fail by blkdebug."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from lamina.cli.main import main
from tests.conftest import Qemu

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def damage(seed: int, sectors: int) -> list[int]:
    """Writes the rules of blkdebug, and returns the sectors whose reads fail."""
    dice = random.Random(seed)
    bad = {dice.randrange(sectors) for _ in range(8)}
    start = dice.randrange(sectors - 20)
    bad.update(range(start, start + dice.randrange(1, 20)))
    rules = "".join(f'[inject-error]\nevent = "read_aio"\nerrno = "5"\nsector = "{at}"\n' for at in bad)
    Path("rules").write_text(rules)
    return sorted(bad)


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_equal_bytes(qemu: Qemu, folder: Path, capfd: pytest.CaptureFixture[str], seed: int, target: str) -> None:
    content = os.urandom(3 * MIB)
    Path("a").write_bytes(content)
    bad = damage(seed, 3 * MIB // 512)
    assert qemu.img("convert", "-O", target, "blkdebug:rules:a", "theirs", check=False).returncode == 1
    assert main(["convert", "-O", target, "blkdebug:rules:a", "ours"]) == 1
    assert not Path("ours").exists()
    done = qemu.img("convert", "--salvage", "-O", target, "blkdebug:rules:a", "theirs")
    capfd.readouterr()
    assert main(["convert", "--salvage", "-O", target, "blkdebug:rules:a", "ours"]) == 0
    told = capfd.readouterr().err
    qemu.img("compare", "-s", "-f", target, "-F", target, "ours", "theirs")
    theirs = sorted(int(at) // 512 for at in re.findall(r"reading offset (\d+)", done.stderr))  # several at once
    ours: list[int] = []
    for length, offset in re.findall(r": (\d+) bytes at offset (\d+) could not be read", told):
        ours += range(int(offset) // 512, (int(offset) + int(length)) // 512)
    assert ours == theirs == bad
    assert f"{len(bad) * 512} bytes of blkdebug:rules:a could not be read" in told


@pytest.mark.parametrize("cluster", [512, 65536])
def test_below_a_format(qemu: Qemu, folder: Path, seed: int, cluster: int) -> None:
    """Data of a qcow2 image in a damaged file."""
    Path("raw").write_bytes(os.urandom(2 * MIB))
    qemu.img("convert", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cluster}", "raw", "a")
    rows = [row for row in qemu.map("a", "qcow2") if row["data"]]
    dice = random.Random(seed)
    sectors = set()
    for _ in range(6):
        row = dice.choice(rows)
        sectors.add((row["offset"] + dice.randrange(row["length"])) // 512)
    rules = "".join(f'[inject-error]\nevent = "read_aio"\nerrno = "5"\nsector = "{at}"\n' for at in sectors)
    Path("rules").write_text(rules)
    source = "driver=qcow2,file.driver=blkdebug,file.config=rules,file.image.driver=file,file.image.filename=a"
    command = ["convert", "--salvage", "-O", "raw", "--image-opts", source]
    qemu.img(*command, "theirs")
    assert main([*command, "ours"]) == 0
    assert Path("ours").read_bytes() == Path("theirs").read_bytes() != Path("raw").read_bytes()


def test_an_overlay_of_what_was_salvaged(qemu: Qemu, folder: Path, seed: int) -> None:
    """What cannot be read is hidden in the base, too."""
    content = os.urandom(MIB)
    Path("base").write_bytes(content)
    Path("a").write_bytes(content)
    bad = damage(seed, MIB // 512)
    command = ["convert", "--salvage", "-O", "qcow2", "-B", "base", "-F", "raw", "blkdebug:rules:a"]
    qemu.img(*command, "theirs")
    assert main([*command, "ours"]) == 0
    qemu.img("compare", "-f", "qcow2", "-F", "qcow2", "ours", "theirs")
    expected = bytearray(content)
    for number in bad:
        expected[number * 512 : (number + 1) * 512] = bytes(512)
    qemu.img("convert", "-f", "qcow2", "-O", "raw", "ours", "read")
    assert Path("read").read_bytes() == expected


def test_quiet(qemu: Qemu, folder: Path, capfd: pytest.CaptureFixture[str], seed: int) -> None:
    Path("a").write_bytes(os.urandom(MIB))
    damage(seed, MIB // 512)
    done = qemu.img("convert", "-q", "--salvage", "-O", "raw", "blkdebug:rules:a", "theirs")
    assert not done.stderr
    assert main(["convert", "-q", "--salvage", "-O", "raw", "blkdebug:rules:a", "ours"]) == 0
    assert not capfd.readouterr().err
    assert Path("ours").read_bytes() == Path("theirs").read_bytes()


def test_where_the_status_fails(qemu: Qemu, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("a").write_bytes(os.urandom(MIB // 8))
    source = "driver=blkdebug,inject-error.0.event=none,inject-error.0.iotype=block-status,"
    source += "image.driver=file,image.filename=a"
    for command in (["-O", "raw", "--image-opts", source], ["--salvage", "-O", "raw", "--image-opts", source]):
        status = int("--salvage" not in command)
        assert qemu.img("convert", *command, "theirs", check=False).returncode == status
        assert main(["convert", *command, "ours"]) == status
    assert Path("ours").read_bytes() == Path("theirs").read_bytes() == Path("a").read_bytes()
    assert "131072 bytes at offset 0 have an unknown status" in capfd.readouterr().err


def test_not_with_offloaded_copies(qemu: Qemu, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("a").write_bytes(bytes(512))
    assert qemu.img("convert", "--salvage", "-C", "-f", "raw", "-O", "raw", "a", "b", check=False).returncode == 1
    for word in ("-C", "--reflink"):
        assert main(["convert", "--salvage", word, "-f", "raw", "-O", "raw", "a", "c"]) == 1
    assert not Path("c").exists()

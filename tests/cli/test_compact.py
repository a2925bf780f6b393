"""`lamina compact`: images of QEMU become smaller, stay clean and read the same; what is wrong changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamina.cli.main import main
from tests.conftest import Qemu

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(qemu: Qemu, *options: str) -> None:
    """disk.qcow2 with data, zeros that are stored, and space that QEMU has freed and not made holes; flat.raw reads as it."""
    qemu.img("create", "-q", "-f", "qcow2", *options, "disk.qcow2", "16M")
    commands = ["write -P 1 0 2M", "write -P 0 2M 4M", "write -P 2 6M 2M", "write -z -u 6M 1M", "write -P 3 10M 10k"]
    qemu.io("-f", "qcow2", "-d", "unmap", *[word for one in commands for word in ("-c", one)], "disk.qcow2")
    qemu.img("snapshot", "-c", "gone", "disk.qcow2")
    qemu.io("-f", "qcow2", "-c", "write -P 4 0 1M", "disk.qcow2")
    qemu.img("snapshot", "-d", "gone", "disk.qcow2")
    qemu.img("convert", "-f", "qcow2", "-O", "raw", "disk.qcow2", "flat.raw")


@pytest.mark.peers
@pytest.mark.parametrize(
    "options",
    [[], ["-o", "cluster_size=4k"], ["-o", "extended_l2=on"], ["-o", "compat=0.10"], ["-o", "lazy_refcounts=on"]],
)
def test_images_of_qemu(folder: Path, qemu: Qemu, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    make(qemu, *options)
    before = Path("disk.qcow2").stat()
    assert main(["compact", "--output", "json", "-f", "qcow2", "disk.qcow2"]) == 0
    told = json.loads(capsys.readouterr().out)
    after = Path("disk.qcow2").stat()
    assert told["allocated"] == {"before": before.st_blocks * 512, "after": after.st_blocks * 512}
    assert told["length"] == {"before": before.st_size, "after": after.st_size}
    assert told["given-back"] == (before.st_blocks - after.st_blocks) * 512 >= 4 * MIB
    assert told["freed-zeros"] >= 4 * MIB
    assert told["freed-leaks"] == 0
    assert qemu.check("disk.qcow2")[0] == 0
    qemu.img("compare", "-f", "qcow2", "-F", "raw", "disk.qcow2", "flat.raw")
    assert main(["compact", "-f", "qcow2", "disk.qcow2"]) == 0
    assert capsys.readouterr().out.startswith("Nothing could be given back; the file is ")


@pytest.mark.peers
def test_over_a_backing_file_zeros_stay_zeros(folder: Path, qemu: Qemu, capsys: pytest.CaptureFixture[str]) -> None:
    Path("base.raw").write_bytes(b"b" * 16 * MIB)
    make(qemu, "-b", "base.raw", "-F", "raw")
    assert main(["compact", "-f", "qcow2", "disk.qcow2"]) == 0
    assert " given back; the file is " in capsys.readouterr().out
    assert qemu.check("disk.qcow2")[0] == 0
    qemu.img("compare", "-f", "qcow2", "-F", "raw", "disk.qcow2", "flat.raw")


def test_a_raw_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = b"a" * MIB + bytes(3 * MIB) + b"b"
    Path("disk.raw").write_bytes(content)
    assert main(["compact", "disk.raw"]) == 1  # the format is not detected of what is written to
    assert main(["compact", "-f", "raw", "disk.raw"]) == 0
    assert "3 MiB given back; the file is 4 MiB long" in capsys.readouterr().out
    assert Path("disk.raw").read_bytes() == content
    assert Path("disk.raw").stat().st_blocks * 512 < 2 * MIB
    assert main(["compact", "-q", "-f", "raw", "disk.raw"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "line", ["", "none", "-U -f raw disk.raw", "-f qcow2 disk.raw", "-m 17 -f raw disk.raw", "-f raw a b"]
)
def test_what_is_refused_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    Path("disk.raw").write_bytes(bytes(MIB))
    blocks = Path("disk.raw").stat().st_blocks
    assert main(["compact", *line.split()]) == 1
    assert capsys.readouterr().err.startswith("lamina: ")
    assert Path("disk.raw").stat().st_blocks == blocks

"""`lamina flatten`: the image stands alone for QEMU too, and errors leave it as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.cli.main import main
from tests.conftest import Qemu

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu7: Qemu) -> Path:
    """base.qcow2, below mid.qcow2, which is longer, below top.qcow2, all made by QEMU; flat.raw reads as the top."""
    monkeypatch.chdir(tmp_path)
    qemu7.img("create", "-q", "-f", "qcow2", "base.qcow2", "1M")
    qemu7.io("-f", "qcow2", "-c", "write -P 1 0 1M", "base.qcow2")
    qemu7.img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2", "4M")
    qemu7.io("-f", "qcow2", "-c", "write -P 2 64k 1M", "-c", "write -c -P 4 3M 64k", "mid.qcow2")
    qemu7.img("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "3584k")
    qemu7.io("-f", "qcow2", "-c", "write -P 3 100k 1k", "-c", "write -z 256k 64k", "top.qcow2")
    qemu7.img("convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "flat.raw")
    return tmp_path


@pytest.mark.peers
def test_the_image_stands_alone(folder: Path, qemu: Qemu, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flatten", "-f", "qcow2", "top.qcow2"]) == 0
    assert capsys.readouterr().out.startswith("Image flattened: ")
    for name in "base.qcow2", "mid.qcow2":
        (folder / name).unlink()
    assert qemu.check("top.qcow2")[0] == 0
    qemu.img("compare", "-f", "qcow2", "-F", "raw", "top.qcow2", "flat.raw")
    assert all(row["depth"] == 0 for row in qemu.map("top.qcow2", "qcow2"))
    assert main(["flatten", "-f", "qcow2", "top.qcow2"]) == 0
    assert capsys.readouterr().out == "The image has no backing file.\n"


@pytest.mark.peers
@pytest.mark.parametrize(
    "line",
    [
        "top.qcow2",  # the format was detected: the backing file is not opened
        "-f qcow2 --references none top.qcow2",
        "-f raw top.qcow2",
        "-U -f qcow2 top.qcow2",
        "-f qcow2 --max-output x top.qcow2",
        "-f qcow2",
        "-f qcow2 none.qcow2",
        "-f qcow2 top.qcow2 mid.qcow2",
    ],
)
def test_what_is_refused_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["flatten", *line.split()]) == 1
    assert capsys.readouterr().err.startswith("lamina: ")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

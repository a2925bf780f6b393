"""The target is a file that the source lies in: said as such, whatever name it has, and nothing is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from lamina.nbd import Export, Server

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base.qcow2 <- top.qcow2; hard, soft and far are other names of the base."""
    monkeypatch.chdir(tmp_path)
    lamina.create("base.qcow2", "qcow2", MIB)
    with lamina.open("base.qcow2", format="qcow2", read_only=False) as image:
        image.write(0, b"base" * 1000)
    lamina.create("top.qcow2", "qcow2", backing_file="base.qcow2", backing_fmt="qcow2")
    os.link("base.qcow2", "hard")
    os.symlink("base.qcow2", "soft")
    (tmp_path / "sub").mkdir()
    os.symlink("../base.qcow2", "sub/far")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


NAMES = ["base.qcow2", "hard", "soft", "sub/far", "file:base.qcow2", "./sub/../hard"]


@pytest.mark.parametrize("share", [[], ["-U"]])
@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["convert", "-f", "qcow2", "-O", "qcow2", "base.qcow2"], "the source itself"),
        (["convert", "-f", "qcow2", "-O", "raw", "top.qcow2"], "this is a backing file of the source"),
        (["convert", "-n", "-f", "qcow2", "-O", "raw", "base.qcow2"], "the source itself"),
        (["convert", "-n", "-f", "qcow2", "-O", "qcow2", "top.qcow2"], "this is a backing file of the source"),
        (["convert", "-f", "raw", "-O", "qcow2", "-B", "top.qcow2", "-F", "qcow2", "other.raw"], "backing file"),
        (["copy", "base.qcow2"], "the source itself"),
        (["copy", "--resume-file", "journal", "base.qcow2"], "the source itself"),
    ],
)
def test_a_target_that_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], share: list[str], target: str, command: list[str], words: str
) -> None:
    Path("other.raw").write_bytes(b"o" * MIB)
    before = contents(folder)
    assert main([command[0], *share, *command[1:], target]) == 1
    assert words in capsys.readouterr().err
    assert contents(folder) == before


def test_options_name_the_same_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "driver=qcow2,file.driver=blkdebug,file.image.driver=file,file.image.filename=hard"
    command = ["convert", "-n", "-f", "qcow2", "--target-image-opts", "top.qcow2", options]
    for share in ([], ["-U"]):
        assert main([*command[:1], *share, *command[1:]]) == 1
        assert "this is a backing file of the source" in capsys.readouterr().err


def test_what_only_looks_the_same_is_not_refused(folder: Path) -> None:
    """A backing file of the target may well be the source, and images may be compared with themselves."""
    assert main(["convert", "-n", "-f", "qcow2", "-O", "qcow2", "base.qcow2", "top.qcow2"]) == 0
    assert main(["compare", "-q", "base.qcow2", "hard"]) == 0
    assert main(["convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "base.qcow2", "new.qcow2"]) == 0
    assert main(["copy", "base.qcow2", "top.qcow2"]) == 0


@pytest.mark.parametrize("journal", ["new.raw", "new.raw.partial", "./x/../new.raw", "base.qcow2", "hard"])
def test_a_journal_is_another_file(folder: Path, capsys: pytest.CaptureFixture[str], journal: str) -> None:
    (folder / "x").mkdir()
    before = contents(folder)
    assert main(["copy", "--resume-file", journal, "base.qcow2", "new.raw"]) == 1
    said = capsys.readouterr().err
    assert "one file" in said or "itself" in said or "no journal" in said
    assert contents(folder) == before


def test_standard_output_that_is_the_source(folder: Path) -> None:
    Path("a.raw").write_bytes(b"a" * MIB)
    with open("a.raw", "ab") as out:
        done = subprocess.run(
            [sys.executable, "-m", "lamina", "copy", "a.raw", "-"], stdout=out, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert b"the source itself" in done.stderr
    assert os.path.getsize("a.raw") == MIB


def test_an_export_onto_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = lamina.open({"driver": "memory", "size": MIB}, read_only=False)
    with image, Server([Export(image, "disk", writable=True)], unix="socket"):
        name = "nbd+unix:///disk?socket=socket"
        for command in (["copy", name], ["convert", "-n", "-f", "raw", "-O", "raw", name]):
            assert main([*command, name]) == 1
            assert "the source itself" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "map", "copy to", "copy from", "convert", "io"])
def test_a_file_where_a_socket_should_be(folder: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    Path("other.raw").write_bytes(b"o" * MIB)
    os.mkfifo("fifo")
    for path in ("base.qcow2", "soft", "sub", "fifo"):
        name = f"nbd+unix:///?socket={path}"
        words = {
            "copy to": ["copy", "--reconnect", "0", "other.raw", name],
            "copy from": ["copy", name, "new.raw"],
            "convert": ["convert", "-O", "raw", name, "new.raw"],
            "io": ["io", "-f", "raw", "-c", "r 0 512", name],
        }
        assert main(words.get(command, [command, name])) != 0
        assert "no socket" in capsys.readouterr().err
    assert not Path("new.raw").exists()

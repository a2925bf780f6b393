"""-U beside a program that has the image open for writing: the answer may be torn, and that is said; only then."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from lamina.storage.locks import in_use_for_writing
from tests.conftest import Qemu

MIB = 1 << 20
WORDS = "another program has it open for writing"
COMMANDS = {
    "convert": ["convert", "-O", "raw", "-f", "qcow2", "top.qcow2", "out.raw"],
    "copy": ["copy", "FILE", "out.raw"],
    "compare": ["compare", "-f", "qcow2", "-F", "qcow2", "top.qcow2", "top.qcow2"],
    "map": ["map", "-f", "qcow2", "top.qcow2"],
    "check": ["check", "-f", "qcow2", "FILE"],
    "info": ["info", "--backing-chain", "-f", "qcow2", "top.qcow2"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lamina.create("base.qcow2", "qcow2", MIB)
    lamina.create("top.qcow2", "qcow2", backing_file="base.qcow2", backing_fmt="qcow2")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], command: str, file: str, *flags: str) -> str:
    words = [file if word == "FILE" else word for word in COMMANDS[command]]
    capsys.readouterr()
    assert main([words[0], *flags, *words[1:]]) == 0
    return capsys.readouterr().err


@pytest.mark.parametrize("written", ["base.qcow2", "top.qcow2"])
@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_said_beside_a_writer(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, written: str
) -> None:
    with lamina.open(written, format="qcow2", read_only=False):
        told = said(capsys, command, written, "-U")
        assert told.count(WORDS) == (2 if command == "compare" else 1)
        assert written in told
    with lamina.open(written, format="qcow2"):
        assert said(capsys, command, written, "-U") == ""  # a reader tears nothing
    assert said(capsys, command, written, "-U") == ""
    assert said(capsys, command, written) == ""


def test_beside_qemu(folder: Path, capsys: pytest.CaptureFixture[str], qemu7: Qemu) -> None:
    command = [qemu7.peer.qemu_io, "-f", "qcow2", "top.qcow2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as writer:
        try:
            deadline = time.monotonic() + 20
            with open("top.qcow2", "rb") as file:
                while not in_use_for_writing(file.fileno()):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            assert WORDS in said(capsys, "map", "top.qcow2", "-U")
        finally:
            writer.kill()

"""The option -r of `convert` and `copy`: its spellings, and Ctrl-C while the command waits."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from lamina.cli.main import main
from tests.cli.test_signals import LAMINA, ended, started, until


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "-r", "1G", "-O", "raw", "a.raw", "b.raw"],
        ["convert", "--rate=1G", "-O", "raw", "a.raw", "b.raw"],
        ["convert", "--rate-limit", "1G", "-O", "raw", "a.raw", "b.raw"],
        ["convert", "-r", "0", "-O", "raw", "a.raw", "b.raw"],
        ["copy", "-r", "1G", "a.raw", "b.raw"],
    ],
    ids=" ".join,
)
def test_both_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    content = os.urandom(300_000)
    Path("a.raw").write_bytes(content)
    assert main(words) == 0
    assert Path("b.raw").read_bytes() == content


@pytest.mark.parametrize("word", ["-1", "fast", "1Q"])
def test_what_is_no_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    (tmp_path / "a").write_bytes(bytes(512))
    assert main(["convert", f"--rate={word}", "-f", "raw", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "-r/--rate/--rate-limit" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("command", [["convert", "-f", "raw", "-O", "qcow2"], ["convert", "-C", "-f", "raw"], ["copy"]])
def test_ctrl_c_does_not_wait_for_the_rate(tmp_path: Path, command: list[str]) -> None:
    """With one byte per second the command takes weeks."""
    source, folder = tmp_path / "a", tmp_path / "to"
    source.write_bytes(os.urandom(4 << 20))
    folder.mkdir()
    with started(*LAMINA, *command, "-r", "1", str(source), str(folder / "b")) as process:
        until(lambda: _writes_in(process.pid, folder))
        process.send_signal(signal.SIGINT)
        status, _, err = ended(process)
    assert status == 128 + signal.SIGINT, err
    assert os.listdir(folder) == []


def _writes_in(pid: int, folder: Path) -> bool:
    """Whether the process has a file below `folder` open."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(f"/proc/{pid}/fd/{fd}").startswith(str(folder)):
                return True
    return False

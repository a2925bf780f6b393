"""`lamina inspect`: the exit status, the output for people and programs, and standard input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from tests.attacks.images import overlay, victim

LAMINA = [sys.executable, "-m", "lamina", "inspect"]


def test_safe_and_not_safe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = victim(tmp_path, "a.qcow2").save()
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out == (
        f"{path}: safe\n"
        "  format:       qcow2\n"
        "  matches:      qcow2\n"
        "  virtual size: 1 MiB (1048576 bytes)\n"
        "  features:     version 3\n"
    )
    above = overlay(tmp_path, "/etc/\x1b]0;x\x07")
    assert main(["inspect", "--output=json", str(above)]) == 1
    told = capsys.readouterr()
    assert told.err == ""
    assert json.loads(told.out) == lamina.inspect(above).to_json()
    assert main(["inspect", str(above)]) == 1
    told = capsys.readouterr()
    assert told.out.isascii()
    assert "\x1b" not in told.out
    assert f"{above}: not safe\n" in told.out
    assert "names:        backing file '/etc/\\x1b]0;x\\x07'" in told.out


def test_the_declared_format_and_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(victim(tmp_path).save())
    assert main(["inspect", "-f", "qcow2", path]) == 0
    assert main(["inspect", "-f", "raw", path]) == 1
    assert "declared as raw, and is qcow2" in capsys.readouterr().out
    assert main(["inspect", "--max-size", "512k", path]) == 1
    assert "exceeds:" in capsys.readouterr().out
    assert main(["inspect", "--limits", "memory=4k", path]) == 1
    assert "exceeds:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing"], "missing: "),
        (["-f", "qcow3", "x"], "qcow3"),
        ([], "FILE"),
        (["."], "folder"),
        (["/dev/zero"], "not a file"),
        (["--limits", "speed=1", "x"], "unknown limit"),
    ],
)
def test_errors_have_a_status_of_their_own(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_bytes(b"")
    assert main(["inspect", *words]) == 2
    assert told in capsys.readouterr().err


def test_standard_input(tmp_path: Path) -> None:
    path = victim(tmp_path).save()
    whole = subprocess.run([*LAMINA, "--output=json", str(path)], capture_output=True, check=True, text=True).stdout
    for source in (path.open("rb"), None):  # a file, and a pipe
        given = {"stdin": source} if source else {"input": path.read_bytes()}
        done = subprocess.run([*LAMINA, "--output=json", "-"], capture_output=True, check=True, **given)  # type: ignore[call-overload]
        assert done.stdout.decode() == whole
        if source:
            source.close()
    closed = subprocess.run(["sh", "-c", f"exec {' '.join(LAMINA)} - <&-"], capture_output=True, text=True, check=False)
    assert closed.returncode == 2
    assert closed.stderr.count("\n") == 1


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    path = victim(tmp_path).save()
    lines = (
        "import sys; from lamina.cli.main import main; status = main(sys.argv[1:])\n"
        "sys.exit(status or bool({'asyncio', 'cryptography', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", lines, "inspect", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

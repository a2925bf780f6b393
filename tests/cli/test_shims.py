"""`lamina shims`: programs with the names of the reference tools, which work in any environment and replace nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lamina
from lamina.cli import shims
from lamina.cli.main import main


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "made" / "bin"
    assert main(["shims", str(folder)]) == 0
    return folder


def run(program: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in an environment that knows nothing of Lamina or of its Python."""
    return subprocess.run(
        [program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_each_program_is_its_tool(programs: Path, tmp_path: Path) -> None:
    for name in ("qemu-img", "qemu-io", "qemu-nbd"):
        done = run(programs / name, "--version", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{name} version 7.2.")
        newer = run(programs / name, "--version", cwd=tmp_path, LAMINA_COMPAT="10.0")
        assert newer.stdout.startswith(f"{name} version 10.0.")
        other = run(programs / name, "--version", cwd=tmp_path, LAMINA_COMPAT="3.1")
        assert other.returncode == 1
        assert other.stderr.startswith("lamina: LAMINA_COMPAT is 3.1")


def test_they_work_in_any_environment(programs: Path, tmp_path: Path) -> None:
    # A file beside the program, or in the current folder, replaces no module.
    for folder in (programs, tmp_path):
        (folder / "argparse.py").write_text("raise SystemExit('the wrong module')")
    made = run(programs / "qemu-img", "create", "-f", "qcow2", "disk", "1000", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("Formatting 'disk', fmt=qcow2 cluster_size=65536 ")
    with lamina.open(tmp_path / "disk", format="qcow2") as image:
        assert image.size == 1024
    refused = run(programs / "qemu-img", "info", "none", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith("qemu-img: ")


def test_what_is_not_theirs_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qemu-io").write_text("mine")
    assert main(["shims", str(tmp_path)]) == 1
    assert "--force" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["qemu-io"]
    assert (tmp_path / "qemu-io").read_text() == "mine"
    assert main(["shims", "--force", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qemu-img", "qemu-io", "qemu-nbd"]
    assert main(["shims", "-q", str(tmp_path)]) == 0  # its own ones are replaced


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "qemu-img").symlink_to(other)
    assert main(["shims", str(folder)]) == 1
    assert main(["shims", "--force", str(folder)]) == 0
    assert other.read_text() == "mine"
    assert not (folder / "qemu-img").is_symlink()


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["shims", str(tmp_path / "file" / "bin")]) == 1
    assert "cannot write the programs" in capsys.readouterr().err


def test_a_python_that_the_system_does_not_start_by_the_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = tmp_path / "a 'folder'"
    spaced.mkdir()
    python = spaced / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    program = tmp_path / "qemu-img"
    program.write_text(shims.program_text("qemu-img"))
    program.chmod(0o755)
    done = run(program, "--version", cwd=tmp_path, PATH=os.defpath)
    assert done.stdout.startswith("qemu-img version 7.2."), done.stderr

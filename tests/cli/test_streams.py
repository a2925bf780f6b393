"""Standard streams that are closed, full, or left by whoever read them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LAMINA = f"{sys.executable} -m lamina"


def shell(line: str, folder: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """What a shell says of a line in which `lamina` is a program."""
    line = line.replace("lamina ", f"{LAMINA} ")
    return subprocess.run(
        ["sh", "-c", line], cwd=folder, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with disk.raw, all ones, and disk.qcow2, which holds the same."""
    (tmp_path / "disk.raw").write_bytes(b"\1" * (1 << 20))
    assert shell("lamina convert -O qcow2 -f raw disk.raw disk.qcow2", tmp_path).returncode == 0
    return tmp_path


CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
def test_no_image_is_opened_as_a_closed_stream(folder: Path, closed: str) -> None:
    """The image would get the descriptor's number, and what is said would be written into it."""
    done = shell(f"lamina create -f raw new.raw 1M {closed}", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "new.raw").read_bytes() == bytes(1 << 20)
    # The second command of the two fails, and says so.
    done = shell(f"lamina io -f raw -c 'write -P 1 0 1M' -c 'read -P 2 0 4k' -c 'bogus' disk.raw {closed}", folder)
    assert done.returncode == 1
    assert (folder / "disk.raw").read_bytes() == b"\1" * (1 << 20)
    done = shell(f"lamina convert -p -f raw -O raw disk.raw copy.raw {closed}", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "copy.raw").read_bytes() == (folder / "disk.raw").read_bytes()
    done = shell(f"lamina convert -f raw -O raw missing.raw copy.raw {closed}", folder)
    assert done.returncode == 1
    assert done.stderr.count("\n") == ("2>&-" not in closed)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("compare -f raw -F qcow2 disk.raw disk.qcow2", 0),
        ("compare -f raw -F raw disk.raw /dev/null", 2),
        ("info disk.qcow2", 0),
        ("map --output=json disk.qcow2", 0),
        ("check disk.qcow2", 0),
        ("check -f raw disk.raw", 63),
        ("create -f qcow2 new.qcow2 1M", 0),
        ("copy --output=json disk.raw copy.raw", 0),
        ("io -c 'read 0 4k' disk.qcow2", 0),
        ("--help", 0),
        ("info --help", 0),
    ],
)
def test_the_status_of_a_command_is_the_same_when_nobody_listens(
    folder: Path, command: str, status: int, closed: str
) -> None:
    done = shell(f"lamina {command} {closed}", folder)
    assert done.returncode == status, done.stderr
    if status == 0:
        assert done.stderr == ""


def test_a_copy_through_a_stream_that_is_closed_fails(folder: Path) -> None:
    for line in ("lamina copy disk.raw - >&-", "lamina copy - copy.raw <&-"):
        done = shell(line, folder)
        assert done.returncode == 1
        assert "Bad file descriptor" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (folder / "copy.raw").exists()


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("compare -f raw -F qcow2 disk.raw disk.qcow2", 2),
        ("info disk.qcow2", 1),
        ("map --output=json disk.qcow2", 1),
        ("map --exact --output=json -f raw holes.raw", 1),
        ("check disk.qcow2", 1),
        ("create -f qcow2 new.qcow2 1M", 1),
        ("copy --output=json disk.raw copy.raw", 1),
        ("copy disk.raw -", 1),
        ("io -c 'read 0 4k' disk.qcow2", 1),
        ("--help", 1),
        ("info --help", 1),
        ("convert -f raw -O raw disk.raw copy.raw", 0),
    ],
)
def test_output_that_does_not_fit_is_an_error(folder: Path, command: str, status: int) -> None:
    with (folder / "holes.raw").open("wb") as file:
        for at in range(0, 16 << 20, 8192):
            file.seek(at)
            file.write(b"x")
    done = shell(f"lamina {command} >/dev/full", folder)
    assert done.returncode == status, done.stderr
    if status:
        assert "standard output: " in done.stderr
        assert os.strerror(28) in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_full_standard_error_changes_no_status(folder: Path) -> None:
    assert shell("lamina info missing.img 2>/dev/full", folder).returncode == 1
    assert shell("lamina info disk.qcow2 2>/dev/full", folder).returncode == 0
    assert shell("lamina compare missing.img disk.raw 2>/dev/full", folder).returncode == 2


@pytest.mark.parametrize("command", ["--help", "info disk.qcow2", "io -c help", "map --output=json disk.qcow2"])
def test_a_reader_that_is_gone_is_no_error(folder: Path, command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            ["sh", "-c", f"exec {LAMINA} {command}"], cwd=folder, stdout=writer, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")

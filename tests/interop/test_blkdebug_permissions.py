"""blkdebug's `take-child-perms` and `unshare-child-perms`: what they add to the locks of a file, beside QEMU's, and whom they
keep out.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import lamina
from lamina.errors import OptionError
from tests.conftest import Qemu

LOCKS = Path("/proc/locks")


def held(path: Path) -> set[int]:
    """The bytes of `path` that any open file description holds locks on."""
    inode = f":{path.stat().st_ino}"
    rows = [line.split() for line in LOCKS.read_text().splitlines() if "OFDLCK" in line]
    return {
        byte
        for row in rows
        if row[5].endswith(inode)
        for byte in range(int(row[6]), int(row[7] if row[7] != "EOF" else row[6]) + 1)
    }


@contextmanager
def theirs(qemu: Qemu, options: str) -> Iterator[None]:
    """QEMU has it open."""
    program = [str(qemu.peer.qemu_io), "-r", "--image-opts", options]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        while "MiB" not in (line := process.stdout.readline()):
            assert line, "it could not be opened"
        yield
        process.stdin.close()


CASES = [
    ("unshare-child-perms", ["consistent-read"], {200}),
    ("take-child-perms", ["resize"], {103}),
    ("unshare-child-perms", ["write", "resize"], {201, 203}),
    ("unshare-child-perms", ["write-unchanged"], {202}),
]


@pytest.mark.parametrize(("key", "names", "added"), CASES)
def test_locks_as_the_peer_takes_them(tmp_path: Path, qemu: Qemu, key: str, names: list[str], added: set[int]) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    listed = "".join(f"{key}.{number}={name}," for number, name in enumerate(names))
    with theirs(qemu, f"driver=blkdebug,image.driver=file,image.locking=on,image.filename={path}"):
        before = held(path)
    with theirs(qemu, f"driver=blkdebug,{listed}image.driver=file,image.locking=on,image.filename={path}"):
        assert held(path) == before | added
    below = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}
    with lamina.open({"driver": "blkdebug", "image": below}):
        before = held(path)
    with lamina.open({"driver": "blkdebug", key: names, "image": below}):
        assert held(path) == before | added
    assert not held(path)


def test_who_is_kept_out(tmp_path: Path, qemu: Qemu) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    below = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}
    with lamina.open({"driver": "blkdebug", "image": below}):
        assert qemu.io("-r", "-f", "raw", "-c", "read 0 512", path, check=False).returncode == 0
    with lamina.open({"driver": "blkdebug", "unshare-child-perms": ["consistent-read"], "image": below}):
        assert qemu.io("-r", "-f", "raw", "-c", "read 0 512", path, check=False).returncode == 1
        assert qemu.img("info", "-f", "raw", path, check=False).returncode == 0  # that reads nothing of the disk


def test_backing_files_are_not_meant(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    lamina.create(str(base), "qcow2", 1 << 20)
    lamina.create(str(top), "qcow2", 1 << 20, backing_file="base.qcow2", backing_fmt="qcow2")
    image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(top)}}
    with lamina.open({"driver": "blkdebug", "unshare-child-perms": ["consistent-read"], "image": image}):
        assert 200 in held(top)
        assert 200 not in held(base)


def test_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    below = {"driver": "raw", "file": {"driver": "file", "filename": os.fspath(path)}}
    for names in (["bogus"], ["write"], ["write-unchanged"]):
        with pytest.raises(OptionError):
            lamina.open({"driver": "blkdebug", "take-child-perms": names, "image": below})

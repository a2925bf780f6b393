"""Image locks: among opens of this library, and side by side with QEMU."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import BlockIOError, Locked, NotSupported
from lamina.graph import Opener
from lamina.storage import locks
from lamina.storage.file import FileStorage


def opened(path: Path, *, read_only: bool = False, force_share: bool = False, locking: str = "auto") -> FileStorage:
    values = FileStorage.schema.parse({"filename": path, "locking": locking})
    return FileStorage.open(values, Opener(read_only=read_only, force_share=force_share))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.parametrize("held_read_only", [True, False])
@pytest.mark.parametrize("second_read_only", [True, False])
def test_readers_share_and_writers_exclude(disk: Path, held_read_only: bool, second_read_only: bool) -> None:
    held = opened(disk, read_only=held_read_only)
    if held_read_only and second_read_only:
        opened(disk, read_only=True).close()
    else:
        with pytest.raises(Locked) as caught:
            opened(disk, read_only=second_read_only)
        assert caught.value.path == str(disk)
        assert ("force_share=True" in str(caught.value)) == second_read_only
        assert ("-U" in caught.value.command_text()) == second_read_only
    opened(disk, read_only=True, force_share=True).close()
    opened(disk, locking="off").close()
    held.close()
    opened(disk).close()


def test_a_child_process_keeps_the_lock(disk: Path) -> None:
    held = opened(disk)
    go_read, go_write = os.pipe()
    child = os.fork()
    if not child:
        os.close(go_write)
        os.read(go_read, 1)
        os._exit(0)
    os.close(go_read)
    held.close()
    try:
        with pytest.raises(Locked):
            opened(disk)
    finally:
        os.close(go_write)
        os.waitpid(child, 0)
    opened(disk).close()


def test_a_file_system_without_locks(
    disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> bytes:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with caplog.at_level(logging.WARNING, "lamina"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "set_blocking", lambda *_: None)
        opened(disk).close()
        assert str(disk) in caplog.text
        caplog.clear()
        with pytest.raises(BlockIOError) as caught:
            opened(disk, locking="on")
        assert caught.value.errno == errno.ENOLCK
        assert not isinstance(caught.value, NotSupported)
        opened(disk, read_only=True, force_share=True).close()
        opened(disk, locking="off").close()
        assert not caplog.text


def test_an_exclusive_lock_of_another_program(disk: Path) -> None:
    with disk.open("r+b") as other:
        command = locks._FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, command)
        with pytest.raises(Locked):
            opened(disk, read_only=True)


def held_bytes(path: Path) -> set[int]:
    """The bytes of the file that are locked, by the system's own account."""
    found = set()
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if "OFDLCK" in words and words[-3].rpartition(":")[2] == str(path.stat().st_ino):
            found |= set(range(int(words[-2]), int(words[-1]) + 1))
    return found


@contextmanager
def qemu_io(qemu: Any, *args: str | Path) -> Iterator[None]:
    """qemu-io that holds an image open."""
    held = subprocess.Popen([qemu.peer.qemu_io, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert held.stdin
    assert held.stdout
    try:
        held.stdin.write("length\n")
        held.stdin.flush()
        while "MiB" not in held.stdout.readline():
            assert held.poll() is None, "qemu-io could not open the image"
        yield
    finally:
        held.stdin.close()
        held.stdout.close()
        held.wait()


@pytest.mark.peers
def test_the_table_of_what_programs_take(qemu: Any, tmp_path: Path) -> None:
    base, top, raw = tmp_path / "base", tmp_path / "top", tmp_path / "raw"
    qemu.img("create", "-f", "qcow2", base, "1M")
    qemu.img("create", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
    raw.write_bytes(bytes(1 << 20))
    with qemu_io(qemu, "-f", "qcow2", top):
        assert held_bytes(top) == {100, 101, 103, 201, 203}
        assert held_bytes(base) == {100, 201, 203}
    with qemu_io(qemu, "-r", "-f", "qcow2", base):
        assert held_bytes(base) == {100, 201, 203}
    with qemu_io(qemu, "-f", "raw", raw):
        assert held_bytes(raw) == {100, 101}
    writer = opened(raw)
    assert held_bytes(raw) == {100, 101, 103, 201, 203}
    writer.close()
    reader = opened(raw, read_only=True)
    assert held_bytes(raw) == {100, 201, 203}
    reader.close()
    shared = opened(raw, read_only=True, force_share=True)
    assert not held_bytes(raw)
    shared.close()


@pytest.mark.peers
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_side_by_side(qemu: Any, tmp_path: Path, form: str) -> None:
    path = tmp_path / "disk"
    qemu.img("create", "-f", form, path, "1M")
    with qemu_io(qemu, "-f", form, path):
        for read_only in (True, False):
            with pytest.raises(Locked):
                opened(path, read_only=read_only)
        opened(path, read_only=True, force_share=True).close()
    with qemu_io(qemu, "-r", "-f", form, path):
        opened(path, read_only=True).close()
        if form == "qcow2":
            with pytest.raises(Locked):
                opened(path)
    writer = opened(path)
    assert qemu.io("-f", form, "-c", "length", path, check=False).returncode
    assert qemu.img("convert", "-f", form, "-O", "raw", path, tmp_path / "copy", check=False).returncode
    assert qemu.img("resize", "-f", form, path, "2M", check=False).returncode
    assert qemu.io("-U", "-r", "-f", form, "-c", "length", path).returncode == 0
    writer.close()
    reader = opened(path, read_only=True)
    assert qemu.io("-f", form, "-c", "length", path, check=False).returncode
    assert qemu.io("-r", "-f", form, "-c", "length", path).returncode == 0
    reader.close()

"""Files that a user names for a command to read: FIFOs are read to their end, and never waited for without end."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

import lamina
from lamina import named_file
from lamina.cli.main import main
from lamina.errors import BlockIOError, LaminaError, NotFound, OptionError
from lamina.named_file import read_named

RULE = '[inject-error]\nevent = "read_aio"\n'


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def feed(path: Path, *pieces: bytes, pause: float = 0.0) -> threading.Thread:
    """A thread that writes into a FIFO."""

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for piece in pieces:
                time.sleep(pause)
                file.write(piece)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def read(path: Path | str, most: int = 1 << 20, patience: float | None = None) -> bytes:
    return read_named(os.fspath(path), most, failure="it cannot be read", patience=patience)[0]


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert read(path) == b"0123456789"
    assert read(path, 4) == b"0123"
    assert read(path, 0) == b""
    path.write_bytes(b"")
    assert read(path) == b""


def test_a_fifo_is_read_to_its_end(fifo: Path) -> None:
    writer = feed(fifo, b"a" * 100_000, b"b" * 100_000, b"c", pause=0.02)
    assert read(fifo) == b"a" * 100_000 + b"b" * 100_000 + b"c"
    writer.join()


def test_a_writer_that_comes_late_is_waited_for(fifo: Path) -> None:
    late = threading.Timer(0.2, lambda: feed(fifo, b"late").join())
    late.start()
    assert read(fifo) == b"late"
    late.join()


def test_a_fifo_without_a_writer_is_an_error(fifo: Path) -> None:
    with pytest.raises(BlockIOError, match=r"no process has written to it for 0\.05 s") as caught:
        read(fifo, patience=0.05)
    assert caught.value.errno == errno.ETIMEDOUT
    assert caught.value.path == str(fifo)


def test_a_writer_that_stops_is_an_error(fifo: Path) -> None:
    number = os.open(fifo, os.O_RDWR)
    try:
        os.write(number, b"half")
        with pytest.raises(BlockIOError, match="no process has written"):
            read(fifo, patience=0.05)
    finally:
        os.close(number)


def test_what_has_no_end_is_cut() -> None:
    assert read("/dev/zero", 100_000) == bytes(100_000)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="it cannot be read: "):
        read(tmp_path / "missing")
    with pytest.raises(BlockIOError, match="it cannot be read: Is a directory"):
        read(tmp_path)
    with pytest.raises(OptionError, match="it cannot be read: "):
        read("a\0b")
    with pytest.raises(OptionError, match="it cannot be read: "):
        read("\ud800")


def test_rules_of_blkdebug_come_from_a_fifo(fifo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = feed(fifo, RULE.encode())
    rules = {"driver": "blkdebug", "config": str(fifo), "image": {"driver": "memory", "size": 4096}}
    options = {"driver": "raw", "file": rules}
    with lamina.open(options) as image, pytest.raises(LaminaError):
        image.read(0, 512)
    writer.join()
    monkeypatch.setattr(named_file, "PATIENCE", 0.05)
    with pytest.raises(BlockIOError, match="the rules of blkdebug cannot be read: no process has written"):
        lamina.open(options).close()


def test_a_pattern_of_io_comes_from_a_fifo(
    fifo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    writer = feed(fifo, b"ab")
    assert main(["io", "-f", "raw", "-c", f"write -s {fifo} 0 4k", str(disk)]) == 0
    writer.join()
    assert disk.read_bytes() == b"ab" * 2048
    monkeypatch.setattr(named_file, "PATIENCE", 0.05)
    assert main(["io", "-f", "raw", "-c", f"write -s {fifo} 0 4k", str(disk)]) == 1
    assert "no process has written to it" in capsys.readouterr().err

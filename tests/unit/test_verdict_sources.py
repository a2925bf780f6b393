"""What `lamina.inspect` reads: files, FIFOs, descriptors; and what it keeps of a pipe."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

import lamina
from lamina import BlockIOError, NotFound, OptionError
from lamina.verdict.content import HEAD, NotKept, Passed
from tests.attacks.images import victim


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        lamina.inspect(tmp_path / "missing")
    with pytest.raises(BlockIOError, match="folder"):
        lamina.inspect(tmp_path)
    with pytest.raises(OptionError, match="not a file, block device or pipe"):
        lamina.inspect("/dev/zero")
    with pytest.raises(OptionError, match="no name"):
        lamina.inspect("a\0b")


def test_a_fifo_is_read_to_its_end(tmp_path: Path) -> None:
    content = bytes(victim(tmp_path).bytes)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    thread = threading.Thread(target=path.write_bytes, args=(content,))
    thread.start()
    found = lamina.inspect(path)
    thread.join()
    assert (found.format, found.safe) == ("qcow2", True)


def test_a_fifo_without_a_writer_is_no_empty_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.verdict.content.PATIENCE", 0.05)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BlockIOError, match="no process has written"):
        lamina.inspect(tmp_path / "fifo")


@pytest.mark.parametrize("length", [0, 1, HEAD - 1, HEAD, HEAD + 1, HEAD + 5000, 2 * HEAD + 77])
def test_what_a_pipe_keeps(length: int) -> None:
    content = os.urandom(length)
    wanted = [(HEAD + 100, 1000), (HEAD - 10, 20), (100, 10), (1 << 60, 1 << 60)]
    reader, writer = os.pipe()

    def feed() -> None:
        with open(writer, "wb") as pipe:
            pipe.write(content)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        passed = Passed("-", reader, lambda head: wanted)
    finally:
        os.close(reader)
        thread.join()
    assert passed.size == length
    places = [
        (0, HEAD),
        (HEAD - 10, 20),
        (HEAD + 100, 1000),
        (max(length - 4096, 0), 4096),
        (length - 1, 9),
        (length, 1),
    ]
    for offset, size in places:
        if offset >= 0:
            assert passed.read(offset, size) == content[offset : offset + size]
    if length > 2 * HEAD:
        with pytest.raises(NotKept):
            passed.read(HEAD + 5000, 10)


def test_a_file_is_only_read_and_its_position_stays(tmp_path: Path) -> None:
    path = victim(tmp_path).save()
    before = path.read_bytes(), path.stat().st_mtime_ns
    with path.open("rb") as file:
        file.seek(77)
        assert lamina.inspect(file.fileno()).safe
        assert file.tell() == 77
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before

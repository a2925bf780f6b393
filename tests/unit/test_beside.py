"""`open_beside`: a new file next to another, for its owner alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.beside import open_beside


@pytest.fixture
def no_mask() -> Iterator[None]:
    """No right is masked: what a file lacks, whoever made it held back."""
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_new_file_lies_beside_and_is_private(tmp_path: Path, no_mask: None) -> None:
    target = tmp_path / "disk.raw"
    made = [open_beside(str(target)) for _ in range(3)]
    try:
        for fd, path in made:
            assert os.path.dirname(path) == str(tmp_path)
            assert os.path.basename(path).startswith(".lamina-")
            status = os.fstat(fd)
            assert os.path.samestat(status, os.lstat(path))
            assert stat.S_IMODE(status.st_mode) == 0o600
            assert not os.get_inheritable(fd)
            assert os.write(fd, b"abc") == os.pwrite(fd, b"abc", 0) == len(os.pread(fd, 9, 0))
    finally:
        for fd, _ in made:
            os.close(fd)
    assert sorted(os.listdir(tmp_path)) == sorted({os.path.basename(path) for _, path in made})
    assert len(os.listdir(tmp_path)) == 3


def test_a_name_without_a_folder_means_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fd, path = open_beside("journal")
    os.close(fd)
    assert os.path.dirname(path) == str(tmp_path)  # absolute: it is found after the directory is changed


def test_a_name_that_is_taken_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a file nor a dangling link is followed or emptied."""
    monkeypatch.setattr(os, "urandom", bytes)
    taken = tmp_path / ".lamina-0000000000000000"
    taken.symlink_to("elsewhere")
    with pytest.raises(FileExistsError):
        open_beside(str(tmp_path / "x"))
    taken.unlink()
    taken.write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        open_beside(str(tmp_path / "x"))
    assert taken.read_bytes() == b"kept"
    assert os.listdir(tmp_path) == [taken.name]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_beside(str(tmp_path / "none" / "x"))

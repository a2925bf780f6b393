"""Fixtures of several unit tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.storage.file import FileStorage

from .copying import DATA, OLD, file
from .reference_folders import Folders
from .replacing import no_tmpfile


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Folders]:
    before = sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []
    yield Folders(Path(os.path.realpath(tmp_path)))
    if before:
        assert sorted(os.listdir("/proc/self/fd")) == before, "a descriptor was left open"


@pytest.fixture(params=["without a name", "with a temporary name"])
def tmpfile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of making a new file: with O_TMPFILE, and on a file system without it."""
    if request.param == "with a temporary name":
        no_tmpfile(monkeypatch)
    chosen: str = request.param
    return chosen


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[FileStorage, FileStorage]]:
    """A source of DATA and a target of OLD."""
    source, target = file(tmp_path / "source", DATA), file(tmp_path / "target", OLD)
    yield source, target
    source.close()
    target.close()

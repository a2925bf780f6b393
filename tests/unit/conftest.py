"""Fixtures of several unit tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .reference_folders import Folders


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Folders]:
    before = sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []
    yield Folders(Path(os.path.realpath(tmp_path)))
    if before:
        assert sorted(os.listdir("/proc/self/fd")) == before, "a descriptor was left open"

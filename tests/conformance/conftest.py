"""Fixtures of several conformance tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..nbd_rules import rule_servers


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The sockets of the two servers for rules of the protocol."""
    with rule_servers(tmp_path_factory.mktemp("nbd")) as paths:
        yield paths


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are not forced to the disk: for tests that make many images, and are not about power cuts."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)

"""Fixtures of several conformance tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..nbd_rules import rule_servers


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The sockets of the two servers for rules of the protocol."""
    with rule_servers(tmp_path_factory.mktemp("nbd")) as paths:
        yield paths

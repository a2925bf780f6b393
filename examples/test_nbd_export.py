"""A pytest fixture that serves a fresh disk over NBD to the code under test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import lamina


@pytest.fixture
def export(tmp_path: Path) -> Iterator[str]:
    lamina.create(tmp_path / "disk.qcow2", "qcow2", 1 << 30)
    with lamina.serve(tmp_path / "disk.qcow2", format="qcow2", writable=True, socket=tmp_path / "nbd.sock") as server:
        yield server.uri


def test_a_client(export: str) -> None:
    with lamina.connect(export) as client:
        client.write(4096, b"hello")
        assert client.read(4096, 5) == b"hello"

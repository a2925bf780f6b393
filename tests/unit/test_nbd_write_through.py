"""An export with `write_through`: what a client wrote is on stable storage before the reply, whatever the request."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina
from lamina.image import Image
from lamina.limits import MIB
from lamina.nbd import Client, Export, Server
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.recorder import Recorder

SIZE = 4 * MIB


@pytest.mark.parametrize("write_through", [True, False])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_each_change_is_flushed_before_its_reply(tmp_path: Path, format: str, write_through: bool) -> None:
    path = tmp_path / "disk"
    lamina.create(path, format, size=SIZE)
    recorder = Recorder(path.read_bytes())
    with lamina.open({"driver": format, "file": Child(recorder, "file", grows=True)}, read_only=False) as image:
        export = Export(image, writable=True, write_through=write_through)
        with Server([export], unix=str(tmp_path / "s")), Client.connect(f"nbd+unix:///?socket={tmp_path}/s") as client:
            for work in (
                lambda: client.write(0, b"a" * 512),
                lambda: client.write(65536, b"b" * 300_000),  # in parts
                lambda: client.write(MIB, b"c" * (2 * MIB)),
                lambda: client.zero(0, 65536),
                lambda: client.zero(0, 3 * MIB),  # in steps
                lambda: client.trim(65536, 65536),
            ):
                work()
                assert is_flushed(recorder) or not write_through
                client.flush()
                assert is_flushed(recorder)


def is_flushed(recorder: Recorder) -> bool:
    """Whether everything is on stable storage: what came after the last flush was written through. (Clusters that the flush
    has freed are discarded after it.)"""
    for record in reversed(recorder.log):
        if record.kind == "flush_done":
            return True
        if record.kind in ("write", "zero", "truncate") and not record.fua:
            return False
    return True


def test_without_it_a_write_is_not_flushed() -> None:
    recorder = Recorder(bytes(SIZE))
    with Image(recorder) as image:
        Export(image, writable=True).write(0, memoryview(b"a" * 512))
        assert not is_flushed(recorder)


def test_an_export_without_it_pays_nothing() -> None:
    with Image(MemoryStorage(4096)) as image:
        straight = Export(image, writable=True)
        assert straight.write.__func__ is Export._write_straight  # type: ignore[attr-defined]

"""The memory of `lamina.inspect` is bounded, whatever a file says, and also of a pipe."""

from __future__ import annotations

import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

import lamina
from tests.foreign_images import encrypted, vhdx, vmdk

from .images import MIB, victim


def _hostile() -> dict[str, Callable[[Path], bytes]]:
    def long_extensions(folder: Path) -> bytes:
        made = victim(folder, cluster_size=2 * MIB, size=32 * MIB)
        made.put(112, 0x12345678, 4).put(116, 2 * MIB - 4096, 4)
        return bytes(made.bytes)

    def many_extensions(folder: Path) -> bytes:
        made = victim(folder, cluster_size=2 * MIB, size=32 * MIB)
        for at in range(112, 2 * MIB - 16, 16):
            made.put(at, 0x12345678, 4).put(at + 4, 8, 4)
        return bytes(made.bytes)

    return {
        "long extension": long_extensions,
        "many extensions": many_extensions,
        "qcow2 of large clusters": lambda folder: bytes(victim(folder, cluster_size=2 * MIB, size=32 * MIB).bytes),
        "descriptor of empty lines": lambda folder: vmdk(b"\n" * 10000),
        "text": lambda folder: b'createType="custom"\n' + b'RW 1 FLAT "x"\n' * 200000,
        "vhdx": lambda folder: vhdx(parent=True, metadata_at=3 * MIB),
        "noise": lambda folder: os.urandom(6 * MIB),
        "encrypted": lambda folder: bytes(encrypted(folder / "e", 2 * MIB)),
    }


@pytest.mark.parametrize("name", _hostile())
@pytest.mark.parametrize("piped", [False, True])
def test_the_memory_is_bounded(tmp_path: Path, name: str, piped: bool) -> None:
    content = _hostile()[name](tmp_path)
    path = tmp_path / "image"
    path.write_bytes(content)
    lamina.inspect(path)  # imports
    reader, writer = os.pipe()
    os.set_blocking(writer, True)

    def feed() -> None:
        with open(writer, "wb", buffering=0) as pipe:
            view = memoryview(content)
            while view:
                view = view[os.write(pipe.fileno(), view[:65536]) :]

    thread = threading.Thread(target=feed)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        if piped:
            thread.start()
            lamina.inspect(reader)
        else:
            os.close(writer)
            lamina.inspect(path)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
        os.close(reader)
        if piped:
            thread.join()
    assert peak < 5 * MIB, f"{peak / MIB:.1f} MiB"

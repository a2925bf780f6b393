"""The drivers and the job that CONTRIBUTING.md shows are complete: their text is taken from there, and run."""

from __future__ import annotations

import hashlib
import re
import sys
import types
from pathlib import Path

import pytest

import lamina
from lamina import registry
from lamina.errors import Cancelled
from lamina.jobs.progress import Monitor
from lamina.limits import MIB
from lamina.node import Node
from lamina.request import Child
from lamina.testing import FilterConformance, StorageConformance

PAGE = Path(__file__).resolve().parent.parent.parent / "CONTRIBUTING.md"


def example(name: str, defines: str) -> types.ModuleType:
    """The module `name` whose text on the page contains `defines`."""
    (text,) = [text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if defines in text]
    module = types.ModuleType(name)
    exec(compile(text, str(PAGE), "exec"), module.__dict__)
    return module


SLOW = example("slow_example", "class Slow(")
BUFFER = example("buffer_example", "class Buffer(")
DIGEST = example("digest_example", "def digest(")


class TestSlow(FilterConformance):
    def make(self, image: Child) -> Node:
        node: Node = SLOW.Slow(image, milliseconds=0)
        return node


class TestBuffer(StorageConformance):
    resizes = False

    def make(self, size: int) -> Node:
        node: Node = BUFFER.Buffer(size)
        return node


@pytest.fixture
def registered(own_drivers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (SLOW, BUFFER):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    registry.register("slow", "filter", "slow_example:Slow", "delays every read")
    registry.register("buffer", "storage", "buffer_example:Buffer", "a disk in one bytearray")


@pytest.mark.usefixtures("registered")
def test_the_filter_and_the_storage_open_by_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", MIB)
    spec = {"driver": "slow", "milliseconds": 1, "image": {"driver": "qcow2", "file": {"filename": str(path)}}}
    with lamina.open(spec, read_only=False) as image:
        image.write(1000, b"seen through it")
        assert image.read(1000, 15) == b"seen through it"
        assert image.extents().totals().data == 65536
    with lamina.open({"driver": "raw", "file": {"driver": "buffer", "size": "1M"}}, read_only=False) as image:
        image.write(1000, b"kept")
        image.zero(0, 1001)
        assert image.read(1000, 4) == b"\0ept"


@pytest.mark.parametrize("parallel", [None, 4])
def test_the_job_reads_an_image(tmp_path: Path, parallel: int | None) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 5 * MIB)
    told: list[tuple[int, int]] = []
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(2 * MIB - 5, b"across two pieces")
        found = DIGEST.digest(image, parallel=parallel, monitor=Monitor(lambda done, total: told.append((done, total))))
        assert found == hashlib.sha256(image.read(0, image.size)).hexdigest()
        assert told[-1] == (5 * MIB, 5 * MIB)
        stopped = Monitor()
        stopped.cancel()
        with pytest.raises(Cancelled):
            DIGEST.digest(image, parallel=parallel, monitor=stopped)


def test_the_page_of_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("disk", "base", "top"):
        lamina.create(f"{name}.qcow2", "qcow2", MIB)
    page = PAGE.parent / "docs" / "graphs.md"
    for text in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(text, str(page), "exec"), {"lamina": lamina})
    with lamina.open("disk.qcow2", format="qcow2") as image:
        assert image.read(0, 10) == b"still open"
    with lamina.open("base.qcow2", format="qcow2") as image:
        assert image.read(0, 15) == bytes(15)

"""The filter `stats`: figures are exact, from any number of threads, and say the same as JSON and as a table."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from pathlib import Path

import pytest

import lamina
from lamina.errors import BlockIOError, LaminaError, OptionError
from lamina.filters.stats import Stats
from lamina.graph import Opener
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


class Clock:
    """Each request takes `takes` nanoseconds: the filter looks at the start and at the end."""

    def __init__(self, takes: int) -> None:
        self.now, self.takes = 0, takes

    def perf_counter_ns(self) -> int:
        self.now += self.takes
        return self.now


class Failing(MemoryStorage):
    """Reads fail."""

    def read_into(self, offset: int, view: memoryview) -> None:
        raise BlockIOError("gone")


def over(storage: MemoryStorage, takes: int = 1000) -> tuple[Stats, Image]:
    node = Stats(Child(storage, "image", grows=True), clock=Clock(takes))
    return node, Image(node)


def test_what_is_counted() -> None:
    node, image = over(MemoryStorage(1 << 20))
    image.write(4096, b"x" * 4096)
    image.write(0, b"x" * 4095)
    image.write(512, b"x" * 4097)
    image.read(1, 1)
    image.flush()
    image.truncate(4096)
    found = node.snapshot()["operations"]
    assert list(found) == ["read", "write", "flush", "truncate"]
    assert found["write"] == {
        "done": 3,
        "failed": 0,
        "bytes": 3 * 4096,
        "total_ns": 3000,
        "latency_ns": {"512": 3},
        "size": {"2048": 1, "4096": 2},
        "alignment": {"1": 2, "4096": 1},
    }
    assert found["read"]["alignment"] == {"1": 1}
    assert found["flush"] == {
        "done": 1,
        "failed": 0,
        "bytes": 0,
        "total_ns": 1000,
        "latency_ns": {"512": 1},
        "size": {},
        "alignment": {},
    }


def test_classes_agree_with_their_definition() -> None:
    rng = random.Random(7)
    node, image = over(MemoryStorage(1 << 20))
    sizes: Counter[str] = Counter()
    alignments: Counter[str] = Counter()
    for _ in range(300):
        length = rng.choice([1, 2, 3, 511, 512, 513, rng.randrange(1, 1 << 16), 1 << rng.randrange(16)])
        offset = rng.choice([0, rng.randrange(1 << 19), rng.randrange(1 << 10) << 9])
        image.zero(offset, length)
        sizes[str(max(n for n in (1 << bit for bit in range(20)) if n <= length))] += 1
        powers = (1 << bit for bit in range(20))
        alignments[str(max(n for n in powers if offset % n == 0 and length % n == 0))] += 1
    found = node.snapshot()["operations"]["zero"]
    assert found["size"] == sizes
    assert found["alignment"] == alignments
    assert list(map(int, found["size"])) == sorted(map(int, found["size"]))


@pytest.mark.parametrize(
    ("takes", "where"), [(0, "0"), (1, "1"), (1023, "512"), (1024, "1024"), (1 << 40, f"{1 << 40}")]
)
def test_latency(takes: int, where: str) -> None:
    node, image = over(MemoryStorage(4096), takes)
    image.read(0, 1)
    assert node.snapshot()["operations"]["read"]["latency_ns"] == {where: 1}


def test_failures_are_counted_as_such_and_raised() -> None:
    node, image = over(Failing(4096))
    for _ in range(3):
        with pytest.raises(BlockIOError):
            image.read(0, 512)
    found = node.snapshot()["operations"]["read"]
    assert (found["done"], found["failed"], found["bytes"], found["size"]) == (0, 3, 0, {})
    assert "read" in node.table()


def test_threads_lose_nothing_even_after_they_end() -> None:
    node = Stats(Child(MemoryStorage(1 << 20), "image"))
    image = Image(node)

    def work() -> None:
        for number in range(100):
            image.write(number * 512, b"x" * 512)

    for _ in range(12):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for one in threads:
            one.start()
        node.snapshot()  # may come at any time
        for one in threads:
            one.join()
    assert len(node._counting) <= 6, "the columns of threads that ended are kept apart for ever"
    found = node.snapshot()["operations"]["write"]
    assert found["done"] == 3600
    assert found["bytes"] == 3600 * 512
    assert found["size"] == {"512": 3600}
    assert sum(found["latency_ns"].values()) == sum(found["alignment"].values()) == 3600


def test_the_table_says_the_same() -> None:
    node, image = over(MemoryStorage(1 << 20), 3000)
    for _ in range(5):
        image.write(4096, b"x" * 8192)
    lines = node.table().splitlines()
    (row,) = [line.split() for line in lines if line.startswith("write ")]
    assert row == ["write", "5", "0", "40960", "3.0", "4.1", "4.1"]  # 3000 ns are below 4096
    at = lines.index("write, size from")
    assert lines[at + 1].split() == ["8192", "5"]


@pytest.mark.parametrize("name", ["report.json", "report.txt"])
def test_the_report_is_written_at_the_end(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    spec = {"driver": "stats", "report": str(path), "image": {"driver": "memory", "size": "1M"}}
    with Image(Opener(read_only=False).open(spec)) as image:
        image.read(0, 4096)
        assert path.read_text() == ""
        snapshot = image.node.snapshot()
    text = path.read_text()
    if name.endswith(".json"):
        assert json.loads(text)["operations"] == snapshot["operations"]
    else:
        assert "read, size from" in text
    assert snapshot == json.loads(json.dumps(snapshot))


def test_a_report_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    spec = {"driver": "stats", "report": str(tmp_path / "missing" / "x"), "image": {"driver": "memory"}}
    with pytest.raises(LaminaError) as caught:
        Opener(read_only=False).open(spec)
    assert caught.value.path == spec["report"]


def test_a_report_does_not_overwrite_the_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"the disk")
    spec = {"driver": "stats", "report": str(path), "image": {"driver": "raw", "file": {"filename": str(path)}}}
    with pytest.raises(OptionError, match="which would be overwritten"):
        lamina.open(spec)
    assert path.read_bytes() == b"the disk"


def test_the_child_is_closed_even_if_the_report_fails(tmp_path: Path) -> None:
    storage = MemoryStorage(4096)
    folder = tmp_path / "folder"
    folder.mkdir()
    node = Stats(Child(storage, "image"), str(folder / "report"))
    (folder / "report").unlink()
    folder.rmdir()
    with pytest.raises(BlockIOError):
        node.close()
    assert storage._pages is None

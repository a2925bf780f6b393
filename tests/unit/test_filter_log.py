"""The filter `log`: what a line says, that each request has one, and that lines of threads come whole."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest

from lamina.errors import BlockIOError, NotSupported
from lamina.filters.log import Log
from lamina.graph import Opener
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) (?P<operation>\w+)(?: offset=(?P<offset>\d+) length=(?P<length>\d+))?"
    r"(?: size=(?P<size>\d+))?(?: flags=(?P<flags>\S+))? result=(?P<result>\w+) us=(?P<us>\d+\.\d)(?: error=(?P<error>.*))?"
)


class Clock:
    """A second passes with every look at the counter."""

    def __init__(self) -> None:
        self.ticks = 0

    def perf_counter(self) -> float:
        self.ticks += 1
        return float(self.ticks)

    def time(self) -> float:
        return 1_769_947_200.25


class Failing(MemoryStorage):
    """Every read fails; nothing can be zeroed quickly."""

    def read_into(self, offset: int, view: memoryview) -> None:
        raise BlockIOError("gone\nfor good", errno=5, path="disk\n.raw")

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        raise NotSupported("not here")


def lines(path: Path) -> list[str]:
    text = path.read_text()
    assert text.endswith("\n")
    return text.splitlines()


def test_what_each_operation_says(tmp_path: Path) -> None:
    path = tmp_path / "log"
    image = Image(Log(Child(MemoryStorage(1 << 20), "image", grows=True), str(path), clock=Clock()))
    image.write(512, b"x" * 100, fua=True)
    image.write(512, b"x" * 100)
    image.read(500, 200)
    image.zero(0, 4096, unmap=True, fast=True)
    image.discard(0, 65536)
    image.extents(3, 5)
    image.flush()
    image.truncate(4096)
    image.close()
    stamp, took = "2026-02-01T12:00:00.250000Z ", " result=ok us=1000000.0"
    assert lines(path) == [
        f"{stamp}{request}{took}"
        for request in (
            "write offset=512 length=100 flags=fua",
            "write offset=512 length=100",
            "read offset=500 length=200",
            "zero offset=0 length=4096 flags=may_unmap,no_fallback",
            "discard offset=0 length=65536",
            "extents offset=3 length=5",
            "flush",
            "truncate size=4096",
            "close",
        )
    ]


def test_a_failure_is_told_in_one_line_and_raised(tmp_path: Path) -> None:
    path = tmp_path / "log"
    image = Image(Log(Child(Failing(1 << 20), "image"), str(path)))
    with pytest.raises(BlockIOError, match="gone"):
        image.read(7, 3)
    with pytest.raises(NotSupported):
        image.zero(0, 4096, fast=True)
    image.zero(0, 4096)  # the edge below writes
    found = [LINE.fullmatch(line) for line in lines(path)]
    assert all(found)
    read, fast, slow = [match.groupdict() for match in found if match]
    assert (read["operation"], read["offset"], read["length"], read["result"]) == ("read", "7", "3", "EIO")
    assert "gone\nfor good" in json.loads(read["error"])
    assert fast["result"] in ("ENOTSUP", "EOPNOTSUPP")
    assert (slow["operation"], slow["result"]) == ("zero", "ok")
    image.close()


def test_it_appends(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    for _ in range(2):
        spec = {"driver": "log", "log": str(path), "image": {"driver": "memory", "size": "1M"}}
        with Image(Opener(read_only=False).open(spec)) as image:
            image.read(0, 1)
    first, *rest = lines(path)
    assert first == "before"
    assert [line.split()[1] for line in rest] == ["read", "close"] * 2


def test_standard_error_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with Image(Log(Child(MemoryStorage(4096), "image"))) as image:
        image.read(0, 1)
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split()[1] for line in said.err.splitlines()] == ["read", "close"]


def test_lines_of_threads_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    image = Image(Log(Child(MemoryStorage(1 << 20), "image"), str(path)))

    def work(thread: int) -> None:
        for number in range(200):
            image.write(thread * 1000 + number, b"x")

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    image.close()
    *requests, close = lines(path)
    matches = [LINE.fullmatch(line) for line in requests]
    offsets = [int(match["offset"]) for match in matches if match]
    assert sorted(offsets) == [thread * 1000 + number for thread in range(4) for number in range(200)]
    for thread in range(4):
        own = [offset for offset in offsets if offset // 1000 == thread]
        assert own == sorted(own)
    assert " close " in close


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    spec = {"driver": "log", "log": str(tmp_path / "missing" / "log"), "image": {"driver": "memory"}}
    with pytest.raises(BlockIOError) as caught:
        Opener(read_only=False).open(spec)
    assert caught.value.path == spec["log"]


def test_a_log_that_cannot_be_written_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    image = Image(Log(Child(MemoryStorage(4096), "image")))
    monkeypatch.setattr("sys.stderr", Full())
    with pytest.raises(BlockIOError) as caught:
        image.read(0, 1)
    assert caught.value.errno == 28


def test_a_full_disk_fails_requests_and_closing_with_an_error_of_ours() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    image = Image(Log(Child(MemoryStorage(4096), "image"), "/dev/full"))
    for operation in (lambda: image.write(0, b"x"), image.close):
        with pytest.raises(BlockIOError) as caught:
            operation()
        assert caught.value.errno == 28

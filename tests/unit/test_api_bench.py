"""`lamina.bench`: the job behind the command, with typed options and a result."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import lamina
from lamina.filters.stats import Stats

from .api_images import MIB, SIZE, WAYS, Counter, content, disk, given, printed


@pytest.mark.parametrize("way", WAYS)
def test_reads_are_measured(way: str, tmp_path: Path) -> None:
    path = disk(tmp_path / "disk.qcow2")
    before = path.read_bytes()
    with given(way, path, "qcow2") as (it, format):
        done = lamina.bench(it, count=300, depth=4, size="64k", offset="1M", step=8192, format=format)
    assert (done.image, done.operation, done.requests, done.depth) == (str(path), "read", 300, 4)
    assert (done.size, done.offset, done.step, done.flushes) == (65536, MIB, 8192, 0)
    assert 0 < done.shortest <= done.mean <= done.longest <= done.duration
    assert list(done.percentiles) == [50, 90, 95, 99, 99.9]
    assert sorted(done.percentiles.values()) == list(done.percentiles.values())
    assert done.percentiles[99.9] <= done.longest
    assert done.requests_per_second == pytest.approx(300e9 / done.duration)
    assert done.bytes_per_second == pytest.approx(65536 * done.requests_per_second)
    assert pickle.loads(pickle.dumps(done)) == done
    jsonschema.validate(done.to_json(), lamina.json_schema("BenchResult"))
    assert path.read_bytes() == before


def test_the_command_prints_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = disk(tmp_path / "disk.raw", "raw")
    told = printed(capsys, "bench", "-f", "raw", "-c", 10, "-d", 2, "-s", "4k", path)
    found = lamina.bench(path, count=10, depth=2, format="raw").to_json()
    measured = {"seconds", "requests-per-second", "bytes-per-second", "latency-ns"}
    assert {key: value for key, value in told.items() if key not in measured} == {
        key: value for key, value in found.items() if key not in measured
    }
    assert told.keys() == found.keys()
    assert told["latency-ns"].keys() == found["latency-ns"].keys()
    assert told["latency-ns"]["percentiles"].keys() == found["latency-ns"]["percentiles"].keys()


def test_writes_are_measured(tmp_path: Path) -> None:
    path = disk(tmp_path / "disk.qcow2")
    done = lamina.bench(
        path, count=8, depth=2, size=MIB, write=True, pattern=0xAB, flush_interval=4, stable=True, format="qcow2"
    )
    assert (done.operation, done.flushes) == ("write", 1)
    assert content(path, "qcow2") == b"\xab" * SIZE


def test_the_requests_are_those_that_were_asked_for(tmp_path: Path) -> None:
    path = disk(tmp_path / "disk.raw", "raw")
    inner = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}
    with lamina.open({"driver": "stats", "image": inner}) as image:
        lamina.bench(image, count=7, depth=1, size=512)
        found = image.find(Stats).snapshot()["operations"]["read"]
        assert (found["done"], found["bytes"]) == (7, 7 * 512)


def test_progress_is_told_in_requests(tmp_path: Path) -> None:
    progress = Counter()
    lamina.bench(disk(tmp_path / "disk.raw", "raw"), count=50, depth=1, format="raw", progress=progress)
    assert progress.calls[-1] == (50, 50)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"depth": 0}, lamina.OptionError, "0 requests cannot be in flight"),
        ({"depth": 1025}, lamina.OptionError, "1025 requests"),
        ({"count": -1}, lamina.OptionError, "out of range"),
        ({"size": "x"}, lamina.OptionError, "not a size"),
        ({"pattern": 256}, lamina.OptionError, "out of range"),
        ({"flush_interval": 5}, lamina.OptionError, "for writes"),
        ({"size": "1G"}, lamina.LimitExceeded, "bytes of memory"),
        ({"offset": SIZE, "depth": 1}, lamina.OutOfRange, "past the end|outside"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], text: str, tmp_path: Path) -> None:
    path = disk(tmp_path / "disk.raw", "raw")
    with pytest.raises(error, match=text):
        lamina.bench(path, format="raw", **options)


def test_an_image_that_is_read_only_is_not_written(tmp_path: Path) -> None:
    path = disk(tmp_path / "disk.raw", "raw")
    before = path.read_bytes()
    with lamina.open(path, format="raw") as image, pytest.raises(lamina.ReadOnly):
        lamina.bench(image, write=True, count=1)
    assert path.read_bytes() == before

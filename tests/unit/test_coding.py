"""Long reads of compressed data: several threads decode them, and data that lies end to end is read at once."""

from __future__ import annotations

import os
import random
import threading
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import coding
from lamina.codecs import deflate, zstd
from lamina.formats.qcow2 import compression
from lamina.formats.qcow2.l2_entry import compressed_range
from lamina.testing.interrupts import interrupts
from lamina.workers import Workers, names

CLUSTER = 4096
COUNT = 120


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads and runs for small images, on any machine."""
    monkeypatch.setattr(coding, "_SHARE", 4 * CLUSTER)
    monkeypatch.setattr(compression, "_RUN", 5 * CLUSTER)
    monkeypatch.setattr(compression, "_PART", 2 * CLUSTER)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)


def make(path: Path, seed: int, kind: str = "zlib") -> bytes:
    """An image whose clusters lie in random order, most of them compressed. Returns its content."""
    rng = random.Random(seed)
    size = COUNT * CLUSTER - rng.choice((0, 1536))  # the last cluster may be shorter
    content = bytearray(size)
    lamina.create(path, "qcow2", size, cluster_size=CLUSTER, compression_type=kind)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for _ in range(COUNT):
            at = rng.randrange(COUNT) * CLUSTER
            length = min(rng.choice((1, 1, 3, 20)) * CLUSTER, size - at)
            unit = rng.choice((CLUSTER // 8, CLUSTER // 2, CLUSTER))
            data = (rng.randbytes(unit) * (length // unit + 1))[:length]
            image.write(at, data, compress=rng.random() < 0.8)
            content[at : at + length] = data
        for number in rng.sample(range(COUNT - 1), COUNT // 3):  # so many are compressed, whatever came before
            at, data = number * CLUSTER, rng.randbytes(CLUSTER // 8) * 8
            image.write(at, data, compress=True)
            content[at : at + CLUSTER] = data
        image.zero(CLUSTER, 2 * CLUSTER)
        content[CLUSTER : 3 * CLUSTER] = bytes(2 * CLUSTER)
    return bytes(content)


def entries(image: lamina.Image) -> list[int]:
    """The L2 entries of the compressed clusters, in the order of the disk."""
    node: Any = image.node
    found = [node.map(at, 1) for at in range(0, image.size, CLUSTER)]
    return [mapping.token for mapping in found if mapping.token is not None]


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_any_range_is_what_was_written(tmp_path: Path, seed: int, kind: str) -> None:
    content = make(tmp_path / "disk", seed, kind)
    rng = random.Random(seed)
    with lamina.open(tmp_path / "disk", format="qcow2") as image:
        assert len(entries(image)) > COUNT // 4
        assert image.read(0, image.size) == content
        assert any(name.startswith("lamina-code") for name in names.values())
        for _ in range(60):
            start = rng.randrange(image.size)
            length = rng.randrange(image.size - start + 1)
            assert image.read(start, length) == content[start : start + length]


def test_data_that_lies_end_to_end_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lamina.create(tmp_path / "disk", "qcow2", COUNT * CLUSTER, cluster_size=CLUSTER)
    content = b"".join(random.Random(at).randbytes(CLUSTER // 4) * 4 for at in range(COUNT))
    with lamina.open(tmp_path / "disk", format="qcow2", read_only=False) as image:
        image.write(0, content, compress=True)
    reads: list[tuple[int, int]] = []
    read = compression.Compression._read
    monkeypatch.setattr(
        compression.Compression, "_read", lambda self, *place: (reads.append(place), read(self, *place))[1]
    )
    with lamina.open(tmp_path / "disk", format="qcow2") as image:
        places = [compressed_range(entry, 12) for entry in entries(image)]
        assert image.read(0, image.size) == content
    assert len(places) == COUNT
    stored = places[-1][0] + places[-1][1] - places[0][0]
    assert stored // (5 * CLUSTER) <= len(reads) <= stored // (4 * CLUSTER) + 3
    assert sum(length for _, length in reads) < stored + 1024 * len(reads)
    assert all(length <= 5 * CLUSTER for _, length in reads)


def test_the_first_error_is_raised_and_the_rest_is_read(tmp_path: Path, seed: int) -> None:
    content = make(tmp_path / "disk", seed)
    with lamina.open(tmp_path / "disk", format="qcow2") as image:
        found = entries(image)
        whole = [
            entry
            for entry in found
            if sum(compressed_range(entry, 12)[0] // 512 == compressed_range(other, 12)[0] // 512 for other in found)
            == 1
        ]
        broken = [compressed_range(whole[len(whole) // part], 12)[0] for part in (2, 3)]
    with (tmp_path / "disk").open("r+b") as file:
        for offset in broken:
            file.seek(offset)
            file.write(b"\xff" * 8)  # a block type that does not exist
    with lamina.open(tmp_path / "disk", format="qcow2") as image:
        for _ in range(5):
            with pytest.raises(lamina.CorruptImage, match="compressed data") as caught:
                image.read(0, image.size)
            assert caught.value.offset == broken[1]
        bad = 0
        for at in range(0, image.size, CLUSTER):
            try:
                assert image.read(at, min(CLUSTER, image.size - at)) == content[at : at + CLUSTER]
            except lamina.CorruptImage:
                bad += 1
        assert bad == 2


def test_an_interrupt_anywhere_leaves_no_thread_at_the_buffer(tmp_path: Path, seed: int) -> None:
    content = make(tmp_path / "disk", seed)
    with lamina.open(tmp_path / "disk", format="qcow2") as image:
        image.read(0, image.size)
        number = 0
        for interrupt in interrupts(step=7):
            buffer = bytearray(image.size)
            if interrupt.run(lambda buffer=buffer: image.read_into(0, buffer)):  # type: ignore[misc]
                left = bytes(buffer)
                assert image.read(0, image.size) == content  # it needs the same threads, and they are free
                assert buffer == left
            else:
                assert buffer == content
            number += 1
        assert number > 20


def test_a_forked_child_has_threads_of_its_own(tmp_path: Path, seed: int) -> None:
    content = make(tmp_path / "disk", seed)
    with lamina.open(tmp_path / "disk", format="qcow2") as image:
        assert image.read(0, image.size) == content
        if not (child := os.fork()):
            os._exit(0 if image.read(0, image.size) == content else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert image.read(0, image.size) == content


@pytest.mark.parametrize("length", [1, 511, 4096, 70_000])
@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_the_first_bytes_of_any_stream_are_read(length: int, level: int, seed: int) -> None:
    """Longer and damaged streams are decided by the same library as ever, whichever is faster for good ones."""
    rng = random.Random(seed)
    content = rng.randbytes(length // 3 + 1) * 3 + b"more"
    packing = zlib.compressobj(level, zlib.DEFLATED, -15)
    stream = packing.compress(content) + packing.flush()
    assert deflate.decompress(stream, len(content)) == content
    assert deflate.decompress(memoryview(bytearray(stream + b"\xff" * 300)), len(content)) == content
    assert deflate.decompress(stream, length) == content[:length]
    with pytest.raises(lamina.CorruptImage, match=f"after {len(content)} of {len(content) + 1} bytes"):
        deflate.decompress(stream, len(content) + 1)
    with pytest.raises(lamina.CorruptImage):
        deflate.decompress(stream[: len(stream) // 2], len(content))
    for invalid in (b"", b"\xff" * 20):
        with pytest.raises(lamina.CorruptImage):
            deflate.decompress(invalid, length)


@pytest.mark.parametrize("level", [1, 2, 19])
def test_a_compressor_makes_each_frame_as_a_new_one_does(level: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        content = rng.randbytes(rng.randrange(1, 300)) * rng.randrange(400)
        if rng.random() < 0.3:
            with pytest.raises(TypeError):
                zstd.compress("a text", level)  # type: ignore[arg-type]
        frame = zstd.compress(memoryview(content), level)
        assert frame == zstd.zstd.compress(content, level)
        if content:
            assert zstd.decompress(frame, len(content)) == content


def test_the_first_results_are_there_before_the_last_call_has_ended() -> None:
    made, may_end, ended = Workers(2, "results"), threading.Event(), threading.Event()

    def last() -> None:
        may_end.wait(60)
        ended.set()

    with closing(made.results(lambda call: call(), [str, str, last, str])) as found:
        assert [next(found), next(found)] == ["", ""]
        assert not ended.is_set()
        may_end.set()
    assert ended.is_set()  # closed, and no call is in progress
    made.close()

"""A pipe as a source: whatever the target has, and however it is written, the pipe is read once and in order."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.creation import create
from lamina.errors import BlockIOError, Cancelled, FormatError, OptionError
from lamina.image import Image
from lamina.jobs.convert import convert, convert_to_file
from lamina.jobs.copy_ends import PipeSource
from lamina.jobs.pipe_storage import PipeStorage, length_of
from lamina.jobs.progress import Monitor

KIB, MIB = 1 << 10, 1 << 20


@contextmanager
def pipe(content: bytes, size: int | None = None, **how: Any) -> Iterator[Image]:
    """The disk of `content` that a thread writes into a pipe, in pieces of all sizes."""
    reader, writer = os.pipe()

    def feed() -> None:
        dice = random.Random(len(content))
        view = memoryview(content)
        try:
            while len(view):
                view = view[os.write(writer, view[: dice.choice([1, 1000, 70_000, MIB])]) :]
        except BrokenPipeError:
            pass
        finally:
            os.close(writer)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        monitor = how.pop("monitor", None)
        storage = PipeStorage(PipeSource(reader, "pipe", monitor), len(content) if size is None else size, **how)
        with Image(storage) as image:
            yield image
    finally:
        os.close(reader)
        thread.join()


def patchy(dice: random.Random, size: int) -> bytes:
    content = bytearray(size)
    for _ in range(dice.randrange(8)):
        at = dice.randrange(size)
        count = min(dice.choice([1, 4096, 70_000, MIB]), size - at)
        content[at : at + count] = dice.choice([dice.randbytes(count), bytes(count)])
    return bytes(content)


@settings(max_examples=30)
@given(
    number=st.integers(0, 1 << 32),
    size=st.integers(1, 6 * MIB),
    hole=st.sampled_from([0, 512, 4096, 65536]),
    parallel=st.sampled_from([None, 1, 5]),
    filter=st.sampled_from([None, "nozero", "noextents", "stats"]),
)
def test_into_what_is_there(number: int, size: int, hole: int, parallel: int | None, filter: str | None) -> None:
    dice = random.Random(number)
    content, before = patchy(dice, size), patchy(dice, size + dice.randrange(5000))
    options = {"driver": "memory", "size": len(before)}
    with lamina.open(options, read_only=False) as target, pipe(content) as source:
        target.write(0, before)
        if filter is not None:
            with target.edit() as edit:
                edit.insert(filter)
        convert(source, target, smallest_hole=hole, parallel=parallel, in_order=parallel != 5)
        assert target.read(0, len(before)) == content + before[size:]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"compress": True},
        {"smallest_hole": 0},
        {"parallel": 8, "in_order": False},
        {"backing": "base", "backing_format": "raw"},
        {"backing": "base", "backing_format": "raw", "compress": True},
        {"offload": "copy"},
        {"rate": 1 << 40},
    ],
    ids=str,
)
@pytest.mark.parametrize("cluster", [4096, 65536, 2 * MIB])
def test_into_a_new_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, how: dict[str, Any], cluster: int
) -> None:
    monkeypatch.chdir(tmp_path)
    dice = random.Random(seed)
    content = patchy(dice, 5 * MIB)
    base = bytearray(content)
    base[MIB : MIB + 70_000] = bytes(70_000)
    Path("base").write_bytes(base + b"longer" * 1000)
    with pipe(content) as source:
        convert_to_file(source, "out", "qcow2", {"cluster_size": cluster}, **how)
    with lamina.open("out", format="qcow2") as image:
        assert image.node.check().clean  # type: ignore[attr-defined]
        assert image.read(0, image.size) == content


@pytest.mark.parametrize("size", [0, 1, MIB, 3 * MIB - 1])
def test_more_than_its_length(tmp_path: Path, size: int) -> None:
    with pytest.raises(BlockIOError, match=f"more than {size} bytes"), pipe(bytes(3 * MIB), size) as source:
        convert_to_file(source, tmp_path / "out", "raw", {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [1, MIB, 3 * MIB - 1])
def test_less_than_its_length(tmp_path: Path, size: int) -> None:
    with pytest.raises(BlockIOError, match=f"ended after {size} bytes"), pipe(bytes(size), 3 * MIB) as source:
        convert_to_file(source, tmp_path / "out", "raw", {})
    assert os.listdir(tmp_path) == []


def test_it_is_read_in_order_only() -> None:
    with pipe(b"content") as source:
        assert source.read(0, 3) == b"con"
        for offset in (0, 2, 4):
            with pytest.raises(BlockIOError, match="in order") as caught:
                source.read(offset, 1)
            assert caught.value.errno == errno.ESPIPE
        assert source.read(3, 4) == b"tent"


def test_the_format_is_not_guessed(tmp_path: Path) -> None:
    create(tmp_path / "image", "qcow2", MIB)
    content = (tmp_path / "image").read_bytes()
    with pipe(content, guess=True) as source, pytest.raises(FormatError, match="qcow2"):
        source.read(0, 4096)
    with pipe(content) as source:
        assert source.read(0, 4) == b"QFI\xfb"
        source.read(4, len(content) - 4)


def test_cancel_ends_the_wait(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    monitor = Monitor()
    timer = threading.Timer(0.05, monitor.cancel)
    timer.start()
    try:
        with Image(PipeStorage(PipeSource(reader, "pipe", monitor), MIB)) as source, pytest.raises(Cancelled):
            convert_to_file(source, tmp_path / "out", "raw", {}, monitor=monitor)
    finally:
        timer.join()
        os.close(reader)
        os.close(writer)
    assert os.listdir(tmp_path) == []


def test_it_cannot_be_salvaged() -> None:
    with (
        pipe(b"content") as source,
        lamina.open({"driver": "memory", "size": 7}, read_only=False) as target,
        pytest.raises(OptionError, match="pipe"),
    ):
        convert(source, target, salvage=True)


def test_lengths(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    with (tmp_path / "a").open("rb") as file:
        assert length_of(file.fileno(), "a") == 1000
        os.lseek(file.fileno(), 300, os.SEEK_SET)
        assert length_of(file.fileno(), "a") == 700
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 300
        os.lseek(file.fileno(), 2000, os.SEEK_SET)
        assert length_of(file.fileno(), "a") == 0
    reader, writer = os.pipe()
    try:
        with pytest.raises(OptionError, match="length of a pipe"):
            length_of(reader, "pipe")
    finally:
        os.close(reader)
        os.close(writer)

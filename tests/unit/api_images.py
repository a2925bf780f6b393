"""Images for the tests of the public functions: a disk with data and holes, an overlay over it, and how it is given."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main

MIB = 1 << 20
SIZE = 8 * MIB


def disk(path: Path, format: str = "qcow2", size: int | str = SIZE, *, seed: int = 1) -> Path:
    """An image with data in every second MiB."""
    lamina.create(path, format, size)
    with lamina.open(path, format=format, read_only=False) as image:
        for at in range(0, image.size, 2 * MIB):
            image.write(at, bytes([at // MIB + seed]) * MIB)
    return path


def overlay(path: Path, base: Path) -> Path:
    """An overlay over a qcow2 file in the same folder, with data of its own at 3 MiB."""
    lamina.create(path, "qcow2", backing_file=base.name, backing_fmt="qcow2")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(3 * MIB, b"o" * MIB)
    return path


def content(path: Path | str, format: str) -> bytes:
    with lamina.open(path, format=format) as image:
        return image.read(0, image.size)


@contextlib.contextmanager
def given(way: str, path: Path, format: str, *, read_only: bool = True) -> Iterator[tuple[Any, str | None]]:
    """A source in one of the ways that a caller gives it, and its format; an open image is still open at the end."""
    if way == "path":
        yield path, format
    elif way == "name":
        yield str(path), format
    elif way == "options":
        yield {"driver": format, "file": {"driver": "file", "filename": str(path)}}, None
    else:
        with lamina.open(path, format=format, read_only=read_only) as image:
            yield image, None
            assert image.size == lamina.info(path, format=format, force_share=True).virtual_size  # not closed


WAYS = ("path", "name", "options", "image")


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """What the command prints with --output json."""
    capsys.readouterr()
    assert main([*map(str, words), "--output", "json"]) == 0
    return json.loads(capsys.readouterr().out)


class Counter:
    """A progress callback that records its calls, and does something at the first one."""

    def __init__(self, first: Callable[[], object] = lambda: None) -> None:
        self.calls: list[tuple[int, int]] = []
        self._first = first

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))
        if len(self.calls) == 1:
            self._first()

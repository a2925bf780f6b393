"""References: what a name inside an image may become, by its role, its kind, its use, and what the user says of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import CorruptImage, FormatError, LimitExceeded, NotFound, OptionError, Policy, PolicyError
from lamina.graph import Opener
from lamina.node import StorageNode
from lamina.references import Reference, Trail, chain_depth
from lamina.request import Child

DATA = b"0123456789abcdef" * 64


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Child]:
    """The storage of an image, beside two other files."""
    (tmp_path / "image").write_bytes(b"x" * 512)
    (tmp_path / "base").write_bytes(DATA)
    (tmp_path / "data").write_bytes(DATA)
    child = Opener(read_only=False).child("file", str(tmp_path / "image"), grows=True)
    yield child
    child.close()


def opener(**options: Any) -> Opener:
    return Opener(**{"policy": Policy.beneath(), "read_only": False, **options})


BASE = Reference("base", "backing", "backing file", format="raw")
DATA_FILE = Reference("data", "data-file", "data file", kind="storage", writable=True)


def test_a_backing_file_is_an_image_that_is_only_read(image: Child) -> None:
    child = opener().reference(image, BASE, {})
    assert child is not None
    try:
        assert child.role == "backing"
        assert child.node.driver == "raw"
        assert child.node.read_only
        assert not child.grows
    finally:
        child.close()


@pytest.mark.parametrize("read_only", [True, False])
def test_a_data_file_is_storage_and_written_where_the_image_is(image: Child, read_only: bool) -> None:
    child = opener(read_only=read_only).reference(image, DATA_FILE, {})
    assert child is not None
    try:
        assert child.role == "data-file"
        assert isinstance(child.node, StorageNode)
        assert child.node.driver == "file"
        assert child.node.read_only is read_only
        assert child.grows
        if not read_only:
            child.write(len(DATA), memoryview(b"more"))
        buffer = bytearray(4)
        child.read_into(0, memoryview(buffer))
        assert buffer == DATA[:4]
    finally:
        child.close()


@pytest.mark.parametrize("reference", [BASE, DATA_FILE], ids=lambda one: one.role)
def test_names_of_every_role_are_judged(image: Child, reference: Reference) -> None:
    with pytest.raises(PolicyError, match=reference.what):
        opener(policy=Policy.none()).reference(image, reference, {})
    with pytest.raises(PolicyError, match=f'{reference.what} "../outside"'):
        opener().reference(image, reference._replace(name="../outside"), {})
    with pytest.raises(NotFound, match=reference.what):
        opener().reference(image, reference._replace(name="missing"), {})
    with pytest.raises(CorruptImage, match="contains itself"):
        opener().reference(image, reference._replace(name="image"), {})


def test_what_the_user_gives_wins(image: Child, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "other"
    other.parent.mkdir()
    other.write_bytes(b"other" * 100)
    strict = opener(policy=Policy.none())
    for reference, given in (
        (BASE, {"driver": "raw", "file": {"filename": str(other)}}),
        (BASE, f'json:{{"driver": "raw", "file": "{other}"}}'),
        (DATA_FILE, {"filename": str(other)}),
        (DATA_FILE, {"driver": "file", "filename": str(other)}),
        (DATA_FILE, str(other)),
        (BASE._replace(name=None), {"driver": "raw", "file": {"filename": str(other)}}),
    ):
        child = strict.reference(image, reference, given)
        assert child is not None
        try:
            assert child.node.filename == str(other)
            assert child.role == reference.role
            assert child.node.read_only is not reference.writable
        finally:
            child.close()
    assert strict.reference(image, BASE, None) is None
    assert strict.reference(image, BASE._replace(name=None), {}) is None
    assert opener(no_references=True).reference(image, BASE, {}) is None


def test_options_are_added_to_what_the_image_says(image: Child) -> None:
    child = opener().reference(image, BASE._replace(format="qcow2"), {"driver": "raw", "offset": 512, "size": 16})
    assert child is not None
    assert (child.node.driver, child.size) == ("raw", 16)
    child.close()
    child = opener().reference(image, DATA_FILE, {"locking": "off"})
    assert child is not None
    child.close()


def test_the_format_is_said_or_refused(image: Child) -> None:
    with pytest.raises(FormatError, match="never guessed") as caught:
        opener().reference(image, BASE._replace(format=None), {})
    assert "'backing': {'driver': 'raw'}" in str(caught.value)
    assert "backing.driver=raw" in caught.value.command_text()
    with pytest.raises(OptionError, match="a format is needed"):
        opener().reference(image, BASE._replace(format="blkdebug"), {})


def test_an_image_that_is_no_file_names_nothing(tmp_path: Path) -> None:
    storage = Opener(read_only=False).child("file", {"driver": "memory", "size": 512})
    with pytest.raises(PolicyError, match="not a file") as caught:
        opener(policy=Policy.any()).reference(storage, DATA_FILE, {})
    assert "data-file.file.filename" in (caught.value.hint or "")
    storage.close()


def test_descriptors_are_closed_when_opening_fails(image: Child) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for reference in (BASE._replace(format="qcow2"), BASE._replace(name="image")):
        with pytest.raises(FormatError):
            opener().reference(image, reference, {})
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_trail_finds_itself() -> None:
    trail = Trail(64).below((1, 10), "/top").below((1, 11), "/middle").below((2, 10), "/other-device")
    with pytest.raises(CorruptImage, match="contains itself") as caught:
        trail.require_new((1, 10), "/link-to-top\n")
    assert "3 levels above" in str(caught.value)
    assert "/top" in str(caught.value)
    assert str(caught.value).isprintable()
    with pytest.raises(CorruptImage, match="1 level above"):
        trail.require_new((2, 10), "/again")
    trail.require_new((2, 11), "/new")


def test_trails_are_immutable_and_share_parents() -> None:
    top = Trail(3).below((1, 1), "/top")
    left = top.below((1, 2), "/left")
    right = top.below((1, 3), "/right")
    assert left.below((1, 3), "/right") != right.below((1, 2), "/left")
    assert top == Trail(3).below((1, 1), "/top")


@pytest.mark.parametrize("limit", [0, 1, 64])
def test_a_trail_ends_at_its_limit(limit: int) -> None:
    trail = Trail(limit)
    for number in range(limit):
        trail = trail.below((1, number), f"/{number}")
    with pytest.raises(LimitExceeded, match=f"limit of {limit} files"):
        trail.below(None, "/below")


def test_the_depth_of_a_graph_counts_backing_images(tmp_path: Path) -> None:
    lamina.create(tmp_path / "a", "qcow2", 1 << 20)
    lamina.create(tmp_path / "b", "qcow2", backing_file="a", backing_fmt="qcow2")
    with lamina.open({"driver": "stats", "image": {"driver": "qcow2", "file": str(tmp_path / "b")}}) as image:
        assert chain_depth(image.node) == 1


def test_a_name_that_ends_in_a_nul(tmp_path: Path) -> None:
    """Some programs store the NUL of their string as well, and others stop there."""
    lamina.create(tmp_path / "base.raw", "raw", 4096)
    top = tmp_path / "top.qcow2"
    lamina.create(top, "qcow2", backing_file="base.raw", backing_fmt="raw")
    with top.open("r+b") as file:
        file.seek(16)
        size = int.from_bytes(file.read(4), "big")
        file.seek(16)
        file.write((size + 3).to_bytes(4, "big"))
    assert lamina.info(top, format="qcow2").backing_filename == "base.raw"
    with lamina.open(top, format="qcow2") as image:
        assert "backing" in image.node.children

"""commit and rebase: whatever the chain is, the overlay reads the same before, meanwhile and afterwards."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.creation import create
from lamina.image import Image
from lamina.jobs.commit import commit
from lamina.jobs.rebase import rebase

from .test_convert_backing import fill

KIB, MIB = 1 << 10, 1 << 20
#: How many random chains one run of a test tries; `make soak` sets more.
CHAINS = int(os.environ.get("LAMINA_SOAK_BACKING", "60"))

Layer = tuple[Path, str]


def content(layer: Layer) -> bytes:
    path, format = layer
    with lamina.open(path, format=format) as image:
        return image.read(0, image.size)


def padded(data: bytes, size: int) -> bytes:
    return data[:size].ljust(size, b"\0")


def require_clean(layer: Layer) -> None:
    path, format = layer
    if format == "qcow2":
        assert lamina.check(path, format=format).clean, path


class Chains:
    """Random files in a folder, each of which may be a backing file of others."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir()
        self.folder, self.dice, self.count = folder, random.Random(seed), 0

    def size(self) -> int:
        return self.dice.choice([0, 1, 60, 100, 128, 200, 300]) * KIB + self.dice.choice([0, 0, 512, 1536])

    def new(self, backing: Layer | None, *, format: str | None = None) -> Layer:
        dice = self.dice
        format = format or ("raw" if backing is None and dice.random() < 0.4 else "qcow2")
        options: dict[str, Any] = {}
        size = self.size()
        if format == "raw":
            size += dice.choice([0, 0, 1, 300])
        else:
            options["cluster_size"] = dice.choice([512, 4 * KIB, 64 * KIB])
            if dice.random() < 0.2:
                options["compat"] = "0.10"
            elif dice.random() < 0.3:
                options |= {"extended_l2": True, "cluster_size": dice.choice([16 * KIB, 64 * KIB])}
        if backing is not None:
            options |= {"backing_file": backing[0].name, "backing_fmt": backing[1]}
        path = self.folder / f"{self.count}.img"
        self.count += 1
        create(path, format, size, **options)
        with lamina.open(path, format=format, read_only=False) as disk:
            if disk.size:
                fill(disk, dice, dice.randrange(8))
            unit = options.get("cluster_size", 0)
            if unit and disk.size >= unit and dice.random() < 0.2:
                disk.write(dice.randrange(disk.size // unit) * unit, b"packed--" * (unit // 8), compress=True)
        return path, format

    def chain(self, depth: int) -> list[Layer]:
        """The layers of a chain, from the bottom up."""
        layers = [self.new(None)]
        while len(layers) < depth:
            layers.append(self.new(layers[-1]))
        return layers

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


@contextmanager
def opened(layer: Layer, **options: Any) -> Iterator[Image]:
    path, format = layer
    with lamina.open(path, format=format, read_only=False, **options) as image:
        yield image


def test_commit_moves_what_the_overlay_owns_into_any_base(tmp_path: Path, seed: int) -> None:
    deep = grown = 0
    for number in range(CHAINS):
        chains = Chains(tmp_path / str(number), seed + number)
        layers = chains.chain(chains.dice.randrange(2, 5))
        depth = chains.dice.randrange(1, len(layers))
        top, base = layers[-1], layers[-1 - depth]
        expected, before = content(top), content(base)
        with opened(top) as image:
            commit(image, None if depth == 1 and number % 2 else base[0], empty=None if number % 3 else False)
            assert image.read(0, image.size) == expected, number
            if number % 3 and depth == 1:
                assert not len(image.extents().where(present=True, depth=0)), number
        size = max(len(expected), len(before))
        assert content(base) == padded(expected + before[len(expected) :], size), number
        assert content(top) == expected, number
        for layer in layers:
            require_clean(layer)
        deep += depth > 1
        grown += len(expected) > len(before)
        chains.clear()
    assert deep
    assert grown


def test_rebase_keeps_every_byte_over_any_base(tmp_path: Path, seed: int) -> None:
    shared = none = 0
    for number in range(CHAINS):
        chains = Chains(tmp_path / str(number), seed + number)
        dice = chains.dice
        layers = chains.chain(dice.randrange(1, 5))
        top = layers[-1] if layers[-1][1] == "qcow2" else chains.new(layers[-1])
        kind = dice.randrange(4)
        new: Layer | None = None
        if kind == 0 and len(layers) > 1:
            new = dice.choice(layers[:-1])
            shared += 1
        elif kind < 3:
            new = chains.new(chains.new(None)) if dice.random() < 0.5 else chains.new(None)
        else:
            none += 1
        expected = content(top)
        with opened(top) as image:
            packs = image.node.limits.compress_alignment > 0 and dice.random() < 0.5
            rebase(image, new and new[0].name, new and new[1], compress=packs)
            assert image.read(0, image.size) == expected, number
            fill_nothing_but_what_is_written(image, dice, bytearray(expected))
        assert lamina.info(top[0], format="qcow2").backing_filename == (new and new[0].name)
        expected = content(top)
        with opened(top) as image:
            rebase(image, None)
        for path in chains.folder.iterdir():  # it needs no other file
            if path != top[0]:
                path.unlink()
        assert content(top) == expected, number
        require_clean(top)
        chains.clear()
    assert shared
    assert none


def fill_nothing_but_what_is_written(image: Image, dice: random.Random, model: bytearray) -> None:
    """A write to the rebased image changes those bytes alone: copy-on-write finds the same bytes as before."""
    if image.size:
        at = dice.randrange(image.size)
        data = bytes([dice.randrange(256)]) * min(700, image.size - at)
        image.write(at, data)
        model[at : at + len(data)] = data
        assert image.read(0, image.size) == model


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("detects", ["off", "unmap"])
def test_zeros_that_the_new_backing_file_would_hide(tmp_path: Path, compat: str, detects: str) -> None:
    """An image without a backing file reads as zeros; over a new one it must go on to do so."""
    create(tmp_path / "base", "raw", MIB)
    (tmp_path / "base").write_bytes(b"x" * MIB)
    create(tmp_path / "top", "qcow2", MIB, compat=compat)
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "top")}, "detect-zeroes": detects}
    with lamina.open(spec, read_only=False) as image:
        image.write(5000, b"y" * 5000)
        rebase(image, "base", "raw")
    assert content((tmp_path / "top", "qcow2")) == padded(bytes(5000) + b"y" * 5000, MIB)


def test_rebase_takes_over_only_what_differs(tmp_path: Path) -> None:
    for name in "old", "new":
        create(tmp_path / name, "raw", 4 * MIB)
        (tmp_path / name).write_bytes(bytes(range(1, 129)) * (4 * MIB // 128))
    create(tmp_path / "top", "qcow2", backing_file="old", backing_fmt="raw")
    with lamina.open(tmp_path / "new", format="raw", read_only=False) as image:
        image.write(MIB + 5, b"other")
    with lamina.open(tmp_path / "top", format="qcow2", read_only=False) as image:
        rebase(image, "new", "raw")
        own = image.extents().where(depth=0, present=True)
        assert [(one.start, one.length) for one in own] == [(MIB, 64 * KIB)]


def test_rebase_onto_a_layer_reads_only_what_lies_between(tmp_path: Path) -> None:
    create(tmp_path / "base", "raw", 64 * MIB)
    (tmp_path / "base").write_bytes(b"b" * (64 * MIB))
    create(tmp_path / "mid", "qcow2", backing_file="base", backing_fmt="raw")
    create(tmp_path / "top", "qcow2", backing_file="mid", backing_fmt="qcow2")
    with lamina.open(tmp_path / "mid", format="qcow2", read_only=False) as image:
        image.write(MIB, b"m" * MIB)
    with lamina.open(tmp_path / "top", format="qcow2", read_only=False) as image:
        result = rebase(image, "base", "raw")
    assert result.read == MIB
    assert result.written == MIB


def test_rebase_compresses_what_it_takes_over_and_nothing_else(tmp_path: Path) -> None:
    create(tmp_path / "base", "raw", MIB + 100)
    (tmp_path / "base").write_bytes(bytes(range(1, 129)) * (MIB // 128) + b"z" * 100)
    create(tmp_path / "top", "qcow2", backing_file="base", backing_fmt="raw")
    with lamina.open(tmp_path / "top", format="qcow2", read_only=False) as image:
        image.write(100 * KIB, b"own")
        expected, drivers = image.read(0, image.size), list(image.graph.nodes)
        rebase(image, None, compress=True)
        assert image.read(0, image.size) == expected
        assert [(one.start, one.length) for one in image.extents().where(compressed=False)] == [(64 * KIB, 64 * KIB)]
        assert set(image.graph.nodes) < set(drivers)  # nothing stays above the image
        image.write(0, b"x" * 64 * KIB)
        assert not image.extents(0, 64 * KIB)[0].compressed
    require_clean((tmp_path / "top", "qcow2"))


def test_rebase_that_compresses_and_fails_can_be_started_again(tmp_path: Path) -> None:
    content = bytes(range(1, 129)) * (MIB // 128)
    create(tmp_path / "base", "raw", MIB)
    (tmp_path / "base").write_bytes(content)
    create(tmp_path / "top", "qcow2", backing_file="base", backing_fmt="raw")
    with lamina.open(tmp_path / "top", format="qcow2", read_only=False) as image:
        with pytest.raises(lamina.LimitExceeded):
            rebase(image, None, compress=True, max_output=256 * KIB)
        names = [node.driver for node in image.graph.nodes.values()]
        assert "compress" not in names
        assert image.read(0, MIB) == content
        image.write(5, b"x")
        rebase(image, None, compress=True)
        assert image.read(6, MIB - 6) == content[6:]
    require_clean((tmp_path / "top", "qcow2"))


def test_an_image_that_cannot_compress_is_not_changed(tmp_path: Path) -> None:
    create(tmp_path / "base", "raw", MIB)
    (tmp_path / "base").write_bytes(b"b" * MIB)
    create(tmp_path / "top", "qcow2", backing_file="base", backing_fmt="raw", refcount_bits=1)
    before = (tmp_path / "top").read_bytes()
    with (
        lamina.open(tmp_path / "top", format="qcow2", read_only=False) as image,
        pytest.raises(lamina.UnsupportedFeature, match="compression"),
    ):
        rebase(image, None, compress=True)
    assert (tmp_path / "top").read_bytes() == before

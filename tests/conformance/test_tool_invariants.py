"""Laws of convert, compare and measure: over random disks (`random_disks`), for every pair of formats that Lamina creates.

The numbers are those of the invariants of the tools, 32 to 41. Those of the commands that change an image stand in
`test_tool_invariants_changes`, and what QEMU has a part in in `test_tool_invariants_peers`. Held elsewhere, and not repeated:

- 32, errors that end a salvage, formats between, and what is told: `tests/unit/test_jobs_salvage.py`; graphs with filters as
  sources: `tests/unit/test_convert_backing.py`.
- 33, over a backing file with all kinds of graphs between: `tests/unit/test_convert_backing.py`.
- 35, lines and exit status of the command beside those of QEMU: `tests/cli/test_compare.py`.
- 38, empty disks of all sizes: `tests/interop/test_measure.py`.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lamina
from lamina.cli.main import main
from lamina.errors import BlockIOError
from lamina.extents import Extents
from lamina.format import Format, lookup_format
from lamina.image import Image
from lamina.jobs.compare import Difference, compare
from lamina.jobs.convert import convert_to_file
from lamina.limits import KIB
from tests.unit.test_jobs_salvage import Damaged, sectors

from .random_disks import (
    FORMATS,
    OVERLAYS,
    PAIRS,
    ROUNDS,
    Disk,
    Disks,
    change,
    content_of,
    options_of,
    packs,
    padded,
    require_padded,
    rounds,
    spelt,
)

pytestmark = pytest.mark.usefixtures("unsynced")
pairs = pytest.mark.parametrize(("first", "second"), PAIRS)
formats = pytest.mark.parametrize("format", FORMATS)
overlays = pytest.mark.parametrize("format", OVERLAYS)


def units_that_are_not_zero(content: bytes, unit: int) -> int:
    return sum(any(content[at : at + unit]) for at in range(0, len(content), unit))


# -- convert


@pairs
def test_32_and_34_the_bytes_arrive_and_come_back(tmp_path: Path, seed: int, first: str, second: str) -> None:
    """32: the target reads as the source, padded to a size of its format. 34: there and back again it is the same disk."""
    for disks in rounds(tmp_path, seed, f"convert {first} {second}", ROUNDS):
        dice, source = disks.dice, disks.new(first)
        content, image = source.content, source
        for format in (second, first):
            options, target = options_of(format, dice), disks.path()
            how: dict[str, Any] = {
                "smallest_hole": dice.choice([0, 512, 4 * KIB, 4 * KIB, 64 * KIB]),
                "offload": dice.choice(["", "", "share", "copy"]),
                "compress": packs(format, options) and dice.random() < 0.3,
                "parallel": dice.choice([None, 1, 4]),
                "in_order": dice.choice([None, False]),
            }
            with image.opened() as opened:
                convert_to_file(opened, target, format, options, **how)
            found = content_of(target, format)
            require_padded(found, content, format, f"{image} to {format} {options}, {how}")
            image = Disk(target, format, found, options)
            content = found


@formats
def test_32_what_cannot_be_read_ends_the_job_or_becomes_zeros(tmp_path: Path, seed: int, format: str) -> None:
    """32: without salvage a sector that cannot be read leaves no target; with it exactly these sectors are zeros."""
    for disks in rounds(tmp_path, seed, f"salvage {format}", max(ROUNDS // 2, 1)):
        dice = disks.dice
        content = dice.randbytes(dice.randrange(1, 300) * KIB + dice.choice([0, 512, 77]))
        bad = {dice.randrange(-(-len(content) // 512)) for _ in range(dice.randrange(1, 6))}
        target = disks.path()
        options = options_of(format, dice)
        with Image(Damaged(content, bad)) as source:
            with pytest.raises(BlockIOError, match="the medium is damaged"):
                convert_to_file(source, target, format, options)
            assert not any(disks.folder.iterdir())
            done = convert_to_file(source, target, format, options, salvage=True)
        expected = sectors(content, bad, 512)
        require_padded(content_of(target, format), expected, format, (options, bad))
        assert done.unreadable == sum(len(content[at * 512 : at * 512 + 512]) for at in bad)


@pairs
def test_33_no_more_is_stored_than_what_is_not_zero(tmp_path: Path, seed: int, first: str, second: str) -> None:
    """33: a unit of the target (a cluster, and at least 4 KiB) holds data only if a byte of it is not zero; where no zeros
    are looked for, all of it is allocated."""
    for disks in rounds(tmp_path, seed, f"sparse {first} {second}", ROUNDS):
        source, target, full = disks.new(first), disks.path(), disks.path()
        options = options_of(second, disks.dice)
        options.pop("preallocation", None)  # it stores what is zero
        with source.opened() as opened:
            convert_to_file(opened, target, second, options, smallest_hole=disks.dice.choice([512, 4 * KIB]))
            convert_to_file(opened, full, second, options, smallest_hole=0)
        unit = max(options.get("cluster_size", 0), os.statvfs(disks.folder).f_bsize, 4 * KIB)
        with lamina.open(target, format=second) as image:
            owned = image.extents().totals().data
        assert owned <= units_that_are_not_zero(source.content, unit) * unit, f"{source} to {second} {options}"
        with lamina.open(full, format=second) as image:
            known = image.extents()
            assert known.data.all(), f"{source} to {second} {options}: {known}"


@overlays
def test_33_an_overlay_stores_what_differs(tmp_path: Path, seed: int, format: str) -> None:
    """33: over a backing file the target owns only clusters that differ from it; over a layer of the source, those that the
    layers above it own."""
    compared = layered = 0
    for disks in rounds(tmp_path, seed, f"over {format}", 2 * ROUNDS):
        dice = disks.dice
        source = disks.new(dice.choice([*FORMATS, *OVERLAYS, *OVERLAYS]), overlay=0.8)
        base = source.below
        if base is None or dice.random() < 0.5:
            base = changed_copy(disks, source)
            compared += 1
        else:
            layered += 1
        options, target, hole = options_of(format, dice), disks.path(), dice.choice([512, 4 * KIB])
        how: dict[str, Any] = {"backing": base.path.name, "backing_format": base.format, "smallest_hole": hole}
        with source.opened() as opened:
            own = opened.extents().where(depth=0, present=True)
            convert_to_file(opened, target, format, options, **how)
        require_padded(content_of(target, format), source.content, format, f"{source} over {base}")
        with lamina.open(target, format=format) as image:
            unit = max(image.node.limits.zero_alignment, hole)
            stored = image.extents().where(depth=0, present=True)
            size = image.size
        allowed = units(own, unit)
        if base is not source.below:
            allowed = differing(padded(source.content, size), padded(base.content, size), unit)
        elif base.content[len(source.content) :]:
            allowed |= set(range(len(source.content) // unit, -(-size // unit)))  # what the source is too short to show
        assert units(stored, unit) <= allowed, f"{source} over {base} in {options}, {hole}"
    assert compared
    assert layered


def changed_copy(disks: Disks, source: Disk) -> Disk:
    """An image of any format, in which little is different from `source`."""
    dice, path = disks.dice, disks.path()
    format = dice.choice(FORMATS)
    size = max(len(source.content) + dice.choice([0, 0, -512, 512, -64 * KIB]), 0)
    lamina.create(path, format, size)
    with lamina.open(path, format=format, read_only=False) as image:
        content = bytearray(padded(source.content, image.size))
        image.write(0, content)
        for _ in range(dice.randrange(4)):
            change(image, content, dice, 64 * KIB)
    return Disk(path, format, bytes(content), {})


def units(found: Extents, unit: int) -> set[int]:
    return {at for row in found for at in range(row.start // unit, -(-row.end // unit))}


def differing(one: bytes, other: bytes, unit: int) -> set[int]:
    return {at // unit for at in range(0, len(one), unit) if one[at : at + unit] != other[at : at + unit]}


# -- compare


@pairs
def test_35_compare_tells_what_the_bytes_tell(tmp_path: Path, seed: int, first: str, second: str) -> None:
    """35: the first byte that differs, whichever comes first in the command; the exit status says it; strict mode sees the
    size and, of each byte, whether it is stored."""
    verdicts = set()
    for disks in rounds(tmp_path, seed, f"compare {first} {second}", 2 * ROUNDS):
        one = disks.new(first)
        other = disks.new(second) if disks.dice.random() < 0.3 else same_bytes(disks, one, second)
        steady(one, disks.dice)
        steady(other, disks.dice)
        expected = first_difference(one.content, other.content)
        with one.opened() as mine, other.opened() as theirs:
            strictly = strict_difference(one, mine, other, theirs)
            for two in (mine, theirs), (theirs, mine):
                assert compare(*two) == expected, f"{one} and {other}"
                assert compare(*two, strict=True) == strictly, f"{one} and {other}"
            assert compare(mine, mine, strict="compression") is None
        words = ["compare", "-q", "-f", first, "-F", second, str(one.path), str(other.path)]
        granted = ["--references=same-dir", *words[1:]]
        assert main(["compare", *granted]) == (expected is not None)
        assert main(["compare", "-s", *granted]) == (strictly is not None)
        other.path.unlink()
        assert main(words) == 2
        verdicts.add(expected is None)
    assert verdicts == {True, False}


def first_difference(one: bytes, other: bytes) -> Difference | None:
    size = max(len(one), len(other))
    unlike = np.flatnonzero(np.frombuffer(padded(one, size), np.uint8) != np.frombuffer(padded(other, size), np.uint8))
    return Difference("content", int(unlike[0])) if len(unlike) else None


def steady(disk: Disk, dice: random.Random) -> None:
    """Make raw files consist of data and holes alone. Where blocks are allocated and not written, the file system says data
    once a page of them was read, and the status would change between two comparisons."""
    if disk.below is not None:
        steady(disk.below, dice)
    if disk.format == "raw":
        with disk.path.open("wb") as file:
            file.truncate(len(disk.content))
            for at in range(0, len(disk.content), 4 * KIB):
                page = disk.content[at : at + 4 * KIB]
                if any(page) or dice.random() < 0.3:
                    os.pwrite(file.fileno(), page, at)


def same_bytes(disks: Disks, source: Disk, format: str) -> Disk:
    """A disk with the bytes of `source` up to zeros at its end, in which one byte may be different."""
    dice, path = disks.dice, disks.path()
    options = options_of(format, dice)
    with source.opened() as opened:
        convert_to_file(opened, path, format, options)
    with lamina.open(path, format=format, read_only=False) as image:
        if dice.random() < 0.4:
            image.truncate(image.size + dice.choice([512, 4 * KIB, 100 * KIB]))
        content = bytearray(padded(source.content, image.size))
        if image.size and dice.random() < 0.5:
            at = dice.choice([0, image.size - 1, dice.randrange(image.size), max(len(source.content) - 1, 0)])
            content[at] ^= 5
            image.write(at, content[at : at + 1])
    return Disk(path, format, bytes(content), options)


def strict_difference(one: Disk, mine: Image, other: Disk, theirs: Image) -> Difference | None:
    """What a strict comparison says, byte by byte."""
    if len(one.content) != len(other.content):
        return Difference("size", min(len(one.content), len(other.content)))
    content = first_difference(one.content, other.content)
    unlike = np.flatnonzero(status_of(mine) != status_of(theirs))
    if len(unlike) and (content is None or unlike[0] <= content.offset):
        return Difference("status", int(unlike[0]))
    return content


def status_of(image: Image) -> Any:
    """Of each byte, whether it is stored, zero without being stored, and owned."""
    found = image.extents()
    return np.repeat(found.data * 4 + (found.zero & ~found.data) * 2 + found.present, found.length)


# -- measure


@pairs
def test_38_a_measure_is_enough(
    tmp_path: Path, seed: int, first: str, second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """38: the file of the copy is no longer than `measure` says, and that of a fully allocated one neither."""
    if "measure" not in {name for kind in lookup_format(second).__mro__ if kind is not Format for name in vars(kind)}:
        return  # the format does not support it, and refuses
    for disks in rounds(tmp_path, seed, f"measure {first} {second}", ROUNDS):
        source, options = disks.new(first), options_of(second, disks.dice)
        words = ["measure", "--output=json", "--references=same-dir", "-f", first, "-O", second]
        given = [word for name, value in options.items() for word in ("-o", f"{name}={spelt(value)}")]
        capsys.readouterr()
        assert main([*words, *given, str(source.path)]) == 0
        told = json.loads(capsys.readouterr().out)
        for hole, key in ((4 * KIB, "required"), (0, "fully-allocated")):
            target = disks.path()
            with source.opened() as opened:
                convert_to_file(opened, target, second, options, smallest_hole=hole)
            assert target.stat().st_size <= told[key], f"{source} to {second} {options}"
            if second == "raw":
                assert told["fully-allocated"] == told["required"] == target.stat().st_size == len(source.content)

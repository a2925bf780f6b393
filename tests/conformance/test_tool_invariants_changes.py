"""Laws of check, commit, rebase, flatten, resize, amend and bitmaps: over random disks, in all formats that Lamina creates.

The numbers are those of the invariants of the tools; see `test_tool_invariants`. Held elsewhere, and not repeated:

- 36, counts of whole and of damaged images: `tests/interop/test_qcow2_check_peers.py`; repair of random damage:
  `tests/interop/test_qcow2_repair.py` and `tests/attacks/test_qcow2_layout.py`.
- 37, deep chains, other users, errors and interrupts: `tests/unit/test_commit_rebase.py` and `test_jobs_flatten.py`; beside
  QEMU: `tests/interop/test_commit_rebase.py`.
- 39, resizes and amends among snapshots and bitmaps: `tests/interop/test_qcow2_machine.py`; every width of the reference
  counts, and passphrases: `tests/interop/test_qcow2_amend.py`.
- 41, recorded, merged and stored among all other features: `tests/interop/test_qcow2_machine.py`; with QEMU in turn:
  `tests/interop/test_qcow2_bitmaps.py`; copied by `convert`: `test_convert_bitmaps.py`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lamina
from lamina.cli.main import main
from lamina.creation import create_driver
from lamina.errors import LimitExceeded, OptionError, UnsupportedFeature
from lamina.format import lookup_format
from lamina.formats.qcow2 import layout as q
from lamina.jobs.commit import commit
from lamina.jobs.convert import convert_to_file
from lamina.jobs.flatten import flatten
from lamina.jobs.rebase import rebase
from lamina.limits import KIB, MIB
from tests.damaged_counts import damaged, made, word

from .random_disks import (
    FORMATS,
    OVERLAYS,
    PAIRS,
    ROUNDS,
    UNITS,
    Disk,
    Disks,
    change,
    content_of,
    options_of,
    padded,
    require_clean,
    rounds,
)

pytestmark = pytest.mark.usefixtures("unsynced")
pairs = pytest.mark.parametrize(("first", "second"), PAIRS)
formats = pytest.mark.parametrize("format", FORMATS)
overlays = pytest.mark.parametrize("format", OVERLAYS)


# -- check


@formats
def test_36_a_check_changes_nothing(tmp_path: Path, seed: int, format: str) -> None:
    """36: the file of a checked image has the same bytes and the same times."""
    for disks in rounds(tmp_path, seed, f"check {format}", ROUNDS):
        disk = disks.new(format)
        before = disk.path.read_bytes(), disk.path.stat().st_mtime_ns
        require_clean(disk.path, format)
        assert (disk.path.read_bytes(), disk.path.stat().st_mtime_ns) == before


def leaked_qcow2(path: Path, dice: random.Random) -> int:
    """Count free clusters of the image as used. Returns how many."""
    raw = bytearray(path.read_bytes())
    header = q.HEADER_V3.unpack(bytes(raw[:104]))
    cluster = 1 << header.cluster_bits
    bits = 16 if header.version == 2 else 1 << header.refcount_order
    block = word(raw, header.refcount_table_offset)
    used, count = -(-len(raw) // cluster), 0
    for index in range(min(used + 6, cluster * 8 // bits)):
        at, shift = block + index * bits // 8, index * bits % 8
        width, one = max(bits // 8, 1), 1 << shift if bits < 8 else 1
        value = int.from_bytes(raw[at : at + width], "big")
        if not value >> shift & ((1 << bits) - 1) and dice.random() < 0.7:
            raw[at : at + width] = (value | one).to_bytes(width, "big")
            raw += bytes(max((index + 1) * cluster - len(raw), 0))
            count += 1
    path.write_bytes(raw)
    return count


#: How the images of a format come to have leaks.
LEAKS = {"qcow2": leaked_qcow2}


@pytest.mark.parametrize("format", [format for format in FORMATS if format in LEAKS])
def test_36_a_repair_of_leaks_touches_nothing_else(tmp_path: Path, seed: int, format: str) -> None:
    """36: the leaks are found and freed in one pass; the guest reads the same, from the same places of the file."""
    leaked = 0
    for disks in rounds(tmp_path, seed, f"leaks {format}", ROUNDS):
        disk = disks.new(format)
        count, places = LEAKS[format](disk.path, disks.dice), places_of(disk)
        found = lamina.check(disk.path, format=format)
        assert (found.leaks, found.corruptions, found.check_errors) == (count, 0, 0), disk
        mended = lamina.check(disk.path, format=format, repair="leaks")
        assert mended.clean, disk
        assert mended.leaks_fixed == count
        assert content_of(disk.path, format) == disk.content
        assert np.array_equal(places_of(disk), places), disk
        after = disk.path.read_bytes()
        assert lamina.check(disk.path, format=format, repair="leaks").leaks_fixed == 0
        assert disk.path.read_bytes() == after, f"a second repair changes something: {disk}"
        leaked += count
    assert leaked


def places_of(disk: Disk) -> Any:
    """Of each byte, its place in the file less its own offset, or -1 << 62 where it has none of this file."""
    with disk.opened() as image:
        found = image.extents()
        places = np.where((found.depth == 0) & (found.offset >= 0), found.offset - found.start, -1 << 62)
        return np.repeat(places, found.length)


@pytest.mark.parametrize("format", [format for format in FORMATS if format in LEAKS])
def test_36_a_repair_of_leaks_leaves_contradictions(tmp_path: Path, seed: int, format: str) -> None:
    """36: beside other damage a repair of leaks mends none of it and makes none; no byte of the guest changes."""
    for disks in rounds(tmp_path, seed, f"damage {format}", ROUNDS):
        dice, path = disks.dice, disks.path()
        cluster, bits = dice.choice([512, 4 * KIB, 16 * KIB]), dice.choice([2, 8, 16, 64])
        disk = made(path, dice, cluster, bits)
        path.write_bytes(damaged(path.read_bytes(), dice, cluster))
        before = lamina.check(path, format=format)
        after = lamina.check(path, format=format, repair="leaks")
        assert after.corruptions <= before.corruptions
        with lamina.open(path, format=format) as image:
            assert image.read(0, image.size) == disk
        assert lamina.check(path, format=format, repair="all").clean


# -- commit, rebase, flatten


@pairs
def test_37_what_an_overlay_reads_as_stays(tmp_path: Path, seed: int, first: str, second: str) -> None:
    """37: after commit the base reads as the overlay did, and so does the overlay; rebase and flatten change no byte of it.
    `first` is the format of the backing file, and `second` that of the overlay."""
    if second not in OVERLAYS:
        with pytest.raises(OptionError):
            lamina.create(tmp_path / "overlay", second, MIB, backing_file="base", backing_fmt=first)
        return
    for disks in rounds(tmp_path, seed, f"commit {first} {second}", 2 * ROUNDS):
        base = disks.new(first)
        top = over(disks, base, second)
        with top.opened(read_only=False) as image:
            what = disks.dice.choice([0, 0, 1, 2])
            if what == 0:
                commit(image)
            elif what == 1:
                new = disks.new(disks.dice.choice(FORMATS))
                rebase(image, new.path.name, new.format)
            else:
                flatten(image)
            assert image.read(0, image.size) == top.content, (what, top)
        assert content_of(top.path, second) == top.content, (what, top)
        below = content_of(base.path, first)
        if what == 0:
            expected = top.content + base.content[len(top.content) :]
            assert below[: len(expected)] == expected, top
        else:
            assert below == base.content, top


def over(disks: Disks, base: Disk, format: str) -> Disk:
    """An overlay of `base`, in which something was written."""
    dice, path, options = disks.dice, disks.path(), options_of(format, disks.dice)
    named = {"backing_file": base.path.name, "backing_fmt": base.format}
    lamina.create(path, format, disks.size(), **options, **named)
    with lamina.open(path, format=format, read_only=False) as image:
        content = bytearray(padded(base.content, image.size))
        for _ in range(dice.randrange(9)):
            change(image, content, dice, options.get("cluster_size", 64 * KIB))
    return Disk(path, format, bytes(content), options, base)


@overlays
def test_37_an_unsafe_rebase_changes_the_header_alone(tmp_path: Path, seed: int, format: str) -> None:
    """37: with -u the file is the same behind its header, and its length too."""
    for disks in rounds(tmp_path, seed, f"rebase -u {format}", ROUNDS):
        top = over(disks, disks.new(disks.dice.choice(FORMATS)), format)
        other = disks.new(disks.dice.choice(FORMATS))
        header = lamina.info(top.path, format=format).cluster_size or 4 * KIB
        before = top.path.read_bytes()
        for words in ["-b", other.path.name, "-F", other.format], ["-b", ""]:
            assert main(["rebase", "-q", "-u", "-f", format, *words, str(top.path)]) == 0
            after = top.path.read_bytes()
            assert after[header:] == before[header:], top
            assert lamina.info(top.path, format=format).backing_filename == (words[1] or None)
            require_clean(top.path, format)


# -- resize and amend


@formats
def test_39_what_is_kept_of_a_resized_disk_stays(tmp_path: Path, seed: int, format: str) -> None:
    """39: a resize changes no byte that it keeps, and adds zeros, however these are allocated, over any backing file."""
    for disks in rounds(tmp_path, seed, f"resize {format}", ROUNDS):
        disk = disks.new(format, overlay=0.8)
        content = disk.content
        for _ in range(4):
            size, how = disks.size(), disks.dice.choice(["off", "off", "metadata", "falloc", "full"])
            with disk.opened(read_only=False) as image:
                try:
                    image.truncate(size, how)
                except (OptionError, UnsupportedFeature):
                    assert image.size == len(content)
                    assert how != "off" or size % UNITS.get(format, 512)
                else:
                    assert image.size == size
                    content = padded(content, size)
                assert image.read(0, image.size) == content, f"{disk} became {size} bytes long with {how}"
        assert content_of(disk.path, format) == content


@formats
def test_39_an_amended_option_changes_no_byte(tmp_path: Path, seed: int, format: str) -> None:
    """39: whatever can be amended is amended or refused, and the disk reads the same."""
    schema = lookup_format(format).amend_schema
    if schema is None:
        return
    amended = 0
    for disks in rounds(tmp_path, seed, f"amend {format}", ROUNDS):
        disk = disks.new(format)
        for _ in range(4):
            option = disks.dice.choice([one for one in schema.options if one.type in ("enum", "bool", "int")])
            values = option.choices or ([True, False] if option.type == "bool" else [1, 2, 4, 8, 16, 32, 64])
            with disk.opened(read_only=False) as image:
                try:
                    image.amend(**{option.name: disks.dice.choice(values)})
                    amended += 1
                except (OptionError, UnsupportedFeature, LimitExceeded):
                    pass
                assert image.read(0, image.size) == disk.content, (option.name, disk)
            assert content_of(disk.path, format) == disk.content, (option.name, disk)
    assert amended


# -- bitmaps


@pytest.mark.parametrize("format", [format for format in FORMATS if create_driver(format).keeps_bitmaps])
def test_41_an_incremental_backup_is_the_disk(tmp_path: Path, seed: int, format: str) -> None:
    """41: every write since a bitmap was added marks its granule, also after the image was opened again; a merge has the
    granules of both; what the bitmap says, over a backup from its start, reads as the disk does now."""
    for disks in rounds(tmp_path, seed, f"bitmap {format}", ROUNDS):
        dice = disks.dice
        options = {name: value for name, value in options_of(format, dice).items() if name != "compat"}
        disk = disks.new(format, size=dice.randrange(1, 600) * 512, options=options)
        (disks.folder / "backup").write_bytes(disk.content)
        content, written = bytearray(disk.content), np.zeros(len(disk.content), bool)
        early = written.copy()
        grains = {name: dice.choice([512, 4 * KIB, 64 * KIB]) for name in ("since", "early", "late", "merged")}
        with disk.opened(read_only=False) as image:
            for name in ("since", "early"):
                image.add_bitmap(name, grains[name])
        for session in range(3):
            with disk.opened(read_only=False) as image:
                for _ in range(dice.randrange(4)):
                    offset, length = change(image, content, dice, options.get("cluster_size", 64 * KIB))
                    written[offset : offset + length] = True
                if session == 1:
                    early = written.copy()
                    image.enable_bitmap("early", False)
                    image.add_bitmap("late", grains["late"])
                told = {name: list(one.dirty(0, image.size)) for name, one in image.bitmaps.items()}
            with disk.opened() as image:
                assert {name: list(one.dirty(0, image.size)) for name, one in image.bitmaps.items()} == told
        with disk.opened(read_only=False) as image:
            image.add_bitmap("merged", grains["merged"], enabled=False)
            image.merge_bitmaps("merged", [image.bitmaps["early"], image.bitmaps["late"]])
        with disk.opened() as image:
            marks = {name: marked(one, image.size) for name, one in image.bitmaps.items()}
            assert image.read(0, image.size) == content
            assert not (written & ~marks["since"]).any(), disk
            assert not (early & ~marks["early"]).any(), disk
            union = marks["early"] | marks["late"]
            assert (marks["merged"] == widened(union, grains["merged"])).all(), disk
            for name in ("since", "merged"):
                new = disks.folder / name
                kept: dict[str, Any] = {"backing": "backup", "backing_format": "raw", "changed": image.bitmaps[name]}
                convert_to_file(image, new, format, {}, **kept)
                assert content_of(new, format) == content, f"by {name}: {disk}"


def marked(bitmap: Any, size: int) -> Any:
    found = np.zeros(size, bool)
    for begin, end in bitmap.dirty(0, size):
        found[begin:end] = True
    return found


def widened(marks: Any, granularity: int) -> Any:
    """The same in whole granules, up to the end."""
    first = np.arange(0, len(marks), granularity)
    return np.repeat(np.logical_or.reduceat(marks, first), granularity)[: len(marks)]

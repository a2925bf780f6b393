"""Laws of the tools that QEMU has a part in, over random disks (see `random_disks`): the invariants 34, 36, 38 and 40.

`test_tool_invariants` and `test_tool_invariants_changes` hold those that Lamina keeps alone. Held elsewhere:

- 34 and 35, whole command lines: `tests/cli/test_convert.py`, `test_compare.py`, `tests/interop/test_command_lines.py`.
- 36, damaged images: `tests/interop/test_qcow2_check_peers.py`.
- 37: `tests/interop/test_commit_rebase.py`.
- 38, empty disks of all sizes, and bitmaps: `tests/interop/test_measure.py`.
- 40, the output of create, and file modes: `tests/cli/test_create.py`.
- 41: `tests/interop/test_qcow2_bitmaps.py` and `test_convert_bitmaps.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from lamina.errors import UnsupportedFeature
from lamina.jobs.convert import convert_to_file
from lamina.limits import align_up
from tests.conftest import Qemu

from .random_disks import FORMATS, PAIRS, ROUNDS, Disk, content_of, options_of, require_padded, rounds, spelt

#: How many random disks each version of QEMU gets for a pair of formats; `make soak` sets more.
SOME = max(ROUNDS // 4, 1)
#: What QEMU counts in a check: what is wrong, and how the image is laid out.
COUNTS = ("corruptions", "leaks", "check-errors", "total-clusters", "allocated-clusters", "compressed-clusters")
#: What `qemu-img info` says of the file, and not of the image.
OF_THE_FILE = ("filename", "actual-size", "children", "full-backing-filename")

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("unsynced")]
pairs = pytest.mark.parametrize(("first", "second"), PAIRS)
formats = pytest.mark.parametrize("format", FORMATS)


def words_of(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in ("-o", f"{name}={spelt(value)}")]


@pairs
def test_34_both_programs_copy_and_read_the_same(
    tmp_path: Path, qemu: Qemu, seed: int, first: str, second: str
) -> None:
    """34: what QEMU copies reads as the source for us, and is clean; what we copy does so for QEMU, and comes back."""
    for disks in rounds(tmp_path, seed, f"convert {first} {second}", SOME):
        source, options = disks.new(first), options_of(second, disks.dice)
        theirs, ours, back = disks.path(), disks.path(), disks.path()
        about = f"{source} to {second} {options}"
        qemu.img("convert", "-f", first, "-O", second, *words_of(options), source.path, theirs)
        found = content_of(theirs, second)
        assert found[: len(source.content)] == source.content, about
        assert not any(found[len(source.content) :]), about
        with source.opened() as opened:
            convert_to_file(opened, ours, second, options)
        qemu.img("compare", "-f", first, "-F", second, source.path, ours)
        status, report = qemu.check(ours, second)
        assert status == 0 or "does not support checks" in report["error"], (about, report)
        qemu.img("convert", "-f", second, "-O", first, ours, back)
        require_padded(content_of(back, first)[: len(found)], source.content, "", about)


@formats
def test_36_both_programs_count_the_same(tmp_path: Path, qemu: Qemu, seed: int, format: str) -> None:
    """36: a check of an image that either program wrote has the same counts in both."""
    for disks in rounds(tmp_path, seed, f"counts {format}", 2 * SOME):
        disk, copy = disks.new(format), disks.path()
        qemu.img("convert", "-f", format, "-O", format, *words_of(disk.options), disk.path, copy)
        for path in (disk.path, copy):
            _, theirs = qemu.check(path, format)
            try:
                ours = lamina.check(path, format=format).to_json()
            except UnsupportedFeature:
                assert "does not support checks" in theirs["error"]
                continue
            for name in COUNTS:
                assert ours.get(name, 0) == theirs.get(name, 0), (name, disk)


@pairs
def test_38_both_programs_measure_the_same(
    tmp_path: Path, qemu: Qemu, seed: int, first: str, second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """38: the figures of `measure` are those of QEMU where it knows all zeros, for any source and options."""
    for disks in rounds(tmp_path, seed, f"measure {first} {second}", 2 * SOME):
        source, options = disks.new(first), options_of(second, disks.dice)
        words = ["-f", first, "-O", second, *words_of(options), str(source.path)]
        theirs = qemu.img("measure", "--output=json", *words, check=False)
        capsys.readouterr()
        status = main(["measure", "--output=json", "--references=same-dir", *words])
        assert status == theirs.returncode, theirs.stderr
        if not status:
            # The size of a raw disk is exact for us; QEMU says whole sectors.
            ours = {name: align_up(size, 512) for name, size in json.loads(capsys.readouterr().out).items()}
            peers = json.loads(theirs.stdout)
            with source.opened() as opened:
                known = opened.extents()
            if (known.data & known.zero).any():  # clusters in a hole of the file: we know that they are zero
                assert ours["required"] <= peers["required"], f"{source} to {second} {options}"
                peers["required"] = ours["required"]
            assert ours == peers, f"{source} to {second} {options}"


@formats
def test_40_the_same_options_make_the_same_image(tmp_path: Path, qemu: Qemu, seed: int, format: str) -> None:
    """40: QEMU describes images of both programs alike, apart from the names of their files."""
    for disks in rounds(tmp_path, seed, f"create {format}", 4 * SOME):
        # The whole sectors that QEMU rounds a size up to are those of every format.
        size, options = disks.size() // 512 * 512, options_of(format, disks.dice)
        below: Disk | None = None
        if format == "qcow2" and disks.dice.random() < 0.4:
            below = disks.new(disks.dice.choice(FORMATS))
            options |= {"backing_file": below.path.name, "backing_fmt": below.format}
        ours, theirs = disks.path(), disks.path()
        assert main(["create", "-q", "-f", format, *words_of(options), str(ours), str(size)]) == 0
        qemu.img("create", "-q", "-f", format, *words_of(options), theirs, str(size))
        assert described(qemu, ours, format) == described(qemu, theirs, format), options


def described(qemu: Qemu, path: Path, format: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(qemu.img("info", "--output=json", "-f", format, path).stdout)
    return {name: value for name, value in told.items() if name not in OF_THE_FILE}

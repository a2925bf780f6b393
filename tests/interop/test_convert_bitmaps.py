"""`convert --bitmaps`: the target has the bitmaps of the source, as with QEMU; what cannot be copied is refused in time."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from lamina.jobs.convert import convert, convert_to_file
from lamina.jobs.progress import Monitor
from lamina.limits import Budget
from tests.conftest import Qemu

from .test_qcow2_bitmaps import dirty, known_to, told

SIZE = 3 << 20


def recorded(path: Path, qemu: Qemu, rng: random.Random) -> None:
    """An image with three bitmaps, one of which no longer records."""
    lamina.create(path, "qcow2", SIZE)
    for name, granularity in ("fine", "512"), ("coarse", "64k"), ("stopped", "4k"):
        qemu.img("bitmap", "--add", "-g", granularity, path, name)
    for turn in range(2):
        for _ in range(5):
            qemu.io(
                "-f",
                "qcow2",
                "-c",
                f"write -P {turn + 1} {rng.randrange(SIZE // 512 - 200) * 512} {rng.choice((512, 100_352))}",
                path,
            )
        if not turn:
            qemu.img("bitmap", "--disable", path, "stopped")


def spoilt(path: Path, qemu: Qemu) -> None:
    """The program dies while the image is open: the bitmaps that record stay marked as in use."""
    copy = path.with_suffix(".before")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"x")
        image.flush()
        copy.write_bytes(path.read_bytes())
    path.write_bytes(copy.read_bytes())
    qemu.img("check", "-r", "leaks", path)


@pytest.mark.peers
@pytest.mark.parametrize("words", [[], ["-c"], ["-n"], ["-o", "cluster_size=4k,extended_l2=off"]], ids=" ".join)
def test_it_makes_what_qemu_makes(tmp_path: Path, seed: int, qemu: Qemu, words: list[str]) -> None:
    source, ours, theirs = (tmp_path / f"{name}.qcow2" for name in ("source", "ours", "theirs"))
    recorded(source, qemu, random.Random(seed))
    for path in (ours, theirs) if "-n" in words else ():
        lamina.create(path, "qcow2", SIZE)
    qemu.img("convert", "--bitmaps", "-f", "qcow2", "-O", "qcow2", *words, source, theirs)
    assert main(["convert", "--bitmaps", "-f", "qcow2", "-O", "qcow2", *words, str(source), str(ours)]) == 0
    qemu.img("check", ours)
    assert lamina.check(ours, format="qcow2").clean
    qemu.img("compare", "-f", "qcow2", "-F", "qcow2", source, ours)
    assert sorted(map(str, told(qemu, ours))) == sorted(map(str, told(qemu, theirs)))
    for name in "fine", "coarse", "stopped":
        assert dirty(ours, name) == dirty(theirs, name) == dirty(source, name) == known_to(qemu, ours, name)
        assert dirty(ours, name)
    # They record from now on, but for the one that had stopped.
    before = {name: dirty(ours, name) for name in ("fine", "stopped")}
    with lamina.open(ours, format="qcow2", read_only=False) as image:
        image.write(0, bytes(SIZE))
    assert dirty(ours, "fine") == [(0, SIZE)]
    assert dirty(ours, "stopped") == before["stopped"]


@pytest.mark.peers
def test_what_cannot_be_copied_is_refused_before_the_target_changes(
    tmp_path: Path, seed: int, qemu10: Qemu, capsys: pytest.CaptureFixture[str]
) -> None:
    source, raw, there = tmp_path / "source.qcow2", tmp_path / "disk.raw", tmp_path / "there.qcow2"
    recorded(source, qemu10, random.Random(seed))
    raw.write_bytes(bytes(SIZE))
    lamina.create(there, "qcow2", SIZE)
    with lamina.open(there, format="qcow2", read_only=False) as image:
        image.write(0, b"kept" * 1000)
        image.add_bitmap("stopped", 4096)
    cases: list[tuple[list[str], str]] = [
        (["-f", "qcow2", "-O", "raw", str(source), "new"], "raw have no bitmaps"),
        (["-f", "raw", "-O", "qcow2", str(raw), "new"], "the source has no bitmaps"),
        (["-f", "qcow2", "-O", "qcow2", "-o", "compat=0.10", str(source), "new"], "version 2 has no bitmaps"),
        (["-n", "-f", "qcow2", "-O", "qcow2", str(source), str(there)], "'stopped' already"),
        (["-n", "-f", "qcow2", "-O", "raw", str(source), str(raw)], "the target has no bitmaps"),
    ]
    spoilt(source, qemu10)
    cases.append((["-f", "qcow2", "-O", "qcow2", str(source), "new"], "is inconsistent.*--skip-broken-bitmaps"))
    for number, (words, told_of) in enumerate(cases):
        last = number == len(cases) - 1
        option = ["--bitmaps"] if last else ["--bitmaps", "--skip-broken-bitmaps"]
        words = [str(tmp_path / word) if word == "new" else word for word in words]
        assert main(["convert", *option, *words]) == 1
        said = capsys.readouterr().err
        assert re.search(told_of, said), said
        assert not (tmp_path / "new").exists()
    assert raw.read_bytes() == bytes(SIZE)
    with lamina.open(there, format="qcow2") as image:
        assert image.read(0, 4000) == b"kept" * 1000
        assert list(image.bitmaps) == ["stopped"]
    words = ["convert", "--bitmaps", "--skip-broken-bitmaps", "-f", "qcow2", "-O", "qcow2", str(source)]
    assert main([*words, str(tmp_path / "new")]) == 0
    with lamina.open(tmp_path / "new", format="qcow2") as image:
        assert list(image.bitmaps) == ["stopped"]


def test_a_copy_that_fails_leaves_no_bitmap(tmp_path: Path) -> None:
    """An empty bitmap would say that nothing was written."""
    source, target = tmp_path / "source.qcow2", tmp_path / "target.qcow2"
    for path in (source, target):
        lamina.create(path, "qcow2", SIZE)
    with lamina.open(source, format="qcow2", read_only=False) as image:
        image.add_bitmap("one")
        image.write(0, b"data" * 100_000)
    with (
        lamina.open(source, format="qcow2", budget=Budget(max_output=1000)) as image,
        lamina.open(target, format="qcow2", read_only=False) as there,
    ):
        with pytest.raises(lamina.LimitExceeded):
            convert(image, there, bitmaps="all")
        assert not there.bitmaps
    assert "bitmaps" not in lamina.info(target, format="qcow2").to_json()["format-specific"]["data"]
    assert lamina.check(target, format="qcow2").clean
    options: dict[str, Any] = {"bitmaps": "all", "monitor": Monitor()}
    with lamina.open(source, format="qcow2") as image:
        convert_to_file(image, tmp_path / "new.qcow2", "qcow2", {}, **options)
    assert dirty(tmp_path / "new.qcow2", "one") == dirty(source, "one") == [(0, 7 * 65536)]


def test_skipping_needs_the_option_that_it_completes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--skip-broken-bitmaps", "-O", "qcow2", "a", "b"]) == 1
    assert "--skip-broken-bitmaps requires --bitmaps" in capsys.readouterr().err

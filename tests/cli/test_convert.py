"""`lamina convert`: both ways with the peer, and what it refuses."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from tests.conftest import Qemu

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Path:
    """a.raw: data and holes of all sizes, in blocks of 512 bytes."""
    monkeypatch.chdir(tmp_path)
    dice = random.Random(seed)
    with (tmp_path / "a.raw").open("wb") as file:
        file.truncate(8 * MIB)
        for _ in range(40):
            file.seek(dice.randrange(15 << 10) * 512)
            file.write(dice.randbytes(dice.choice([1, 8, 100, 500]) * 512))
            file.write(bytes(dice.choice([0, 9, 130]) * 512))
    return tmp_path


def same(qemu: Qemu, first: str, second: str) -> None:
    kinds = ["qcow2" if "qcow2" in name else "raw" for name in (first, second)]
    qemu.img("compare", "-f", kinds[0], "-F", kinds[1], first, second)


@pytest.mark.parametrize(
    "options", [[], ["-o", "cluster_size=512"], ["-o", "cluster_size=2M,compat=0.10"], ["-S", "64k"]]
)
def test_there_and_back_with_the_peer(qemu: Qemu, folder: Path, options: list[str]) -> None:
    assert main(["convert", "-f", "raw", "-O", "qcow2", *options, "a.raw", "ours.qcow2"]) == 0
    assert qemu.check("ours.qcow2")[0] == 0
    same(qemu, "a.raw", "ours.qcow2")
    qemu.img("convert", "-f", "raw", "-O", "qcow2", "a.raw", "peers.qcow2")
    for name in ("ours", "peers"):
        assert main(["convert", "-O", "raw", f"{name}.qcow2", f"{name}.raw"]) == 0
        assert (folder / f"{name}.raw").read_bytes() == (folder / "a.raw").read_bytes()
        blocks = (folder / f"{name}.raw").stat().st_blocks
        assert blocks <= (folder / "a.raw").stat().st_blocks


def test_as_few_clusters_as_the_peer(qemu: Qemu, folder: Path) -> None:
    assert main(["convert", "-O", "qcow2", "a.raw", "ours.qcow2"]) == 0
    qemu.img("convert", "-f", "raw", "-O", "qcow2", "a.raw", "peers.qcow2")
    counts = [qemu.check(name)[1].get("allocated-clusters", 0) for name in ("ours.qcow2", "peers.qcow2")]
    assert counts[0] <= counts[1]


def test_everything_is_stored_if_asked_for(qemu: Qemu, folder: Path) -> None:
    assert main(["convert", "-S", "0", "-O", "qcow2", "a.raw", "full.qcow2"]) == 0
    assert [(row["length"], row["data"]) for row in qemu.map("full.qcow2", "qcow2")] == [(8 * MIB, True)]
    same(qemu, "a.raw", "full.qcow2")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_into_what_is_there(qemu: Qemu, folder: Path, format: str) -> None:
    qemu.img("create", "-q", "-f", format, f"there.{format}", "8M")
    qemu.io("-f", format, "-c", "write -P 9 0 8M", f"there.{format}")
    inode = (folder / f"there.{format}").stat().st_ino
    assert main(["convert", "-n", "-f", "raw", "-O", format, "a.raw", f"there.{format}"]) == 0
    assert (folder / f"there.{format}").stat().st_ino == inode
    same(qemu, "a.raw", f"there.{format}")
    options = f"driver={format},file.driver=file,file.filename=there.{format}"
    qemu.io("-f", format, "-c", "write -P 8 1M 3M", f"there.{format}")
    assert main(["convert", "-n", "-f", "raw", "--target-image-opts", "a.raw", options]) == 0
    same(qemu, "a.raw", f"there.{format}")


def test_an_overlay_owns_what_differs(qemu: Qemu, folder: Path) -> None:
    qemu.img("convert", "-f", "raw", "-O", "qcow2", "a.raw", "base.qcow2")
    qemu.io("-f", "qcow2", "-c", "write -P 5 5M 64k", "base.qcow2")  # what the top layer then hides
    for below, name in (("base.qcow2", "middle.qcow2"), ("middle.qcow2", "top.qcow2")):
        qemu.img("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", name)
    qemu.io("-f", "qcow2", "-c", "write -P 1 1M 64k", "middle.qcow2")
    qemu.io("-f", "qcow2", "-c", "write -P 2 3M 64k", "-c", "write -z 5M 64k", "top.qcow2")
    for below, starts in (("middle.qcow2", [3, 5]), ("base.qcow2", [1, 3, 5])):
        assert (
            main(["convert", "-f", "qcow2", "-O", "qcow2", "-B", below, "-F", "qcow2", "top.qcow2", "out.qcow2"]) == 0
        )
        same(qemu, "top.qcow2", "out.qcow2")
        assert qemu.check("out.qcow2")[0] == 0
        rows = [row for row in qemu.map("out.qcow2", "qcow2") if row["depth"] == 0]
        assert [(row["start"], row["length"]) for row in rows] == [(at * MIB, 65536) for at in starts]


def test_through_a_filter(qemu: Qemu, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qemu.img("convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2")
    options = "driver=blkdebug,align=4k,image.driver=qcow2,image.file.filename=a.qcow2"
    assert main(["convert", "--image-opts", "-O", "raw", options, "out.raw"]) == 0
    assert (folder / "out.raw").read_bytes() == (folder / "a.raw").read_bytes()


def test_progress_is_told_in_lines_that_scripts_know(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["convert", "-p", "-O", "qcow2", "a.raw", "b.qcow2"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("    (0.00/100%)\r")
    assert told.endswith("    (100.00/100%)\r\n")
    assert main(["convert", "-p", "-q", "-O", "qcow2", "a.raw", "b.qcow2"]) == 0
    assert main(["convert", "-W", "-m", "4", "-O", "qcow2", "a.raw", "b.qcow2"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["compare", "a.raw", "b.qcow2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.raw"], "a source and a target"),
        (["a.raw", "a.raw", "a.raw"], "source itself"),
        (["-m", "0", "-O", "qcow2", "a.raw", "b.qcow2"], "1 to 16"),
        (["-m", "17", "-O", "qcow2", "a.raw", "b.qcow2"], "1 to 16"),
        (["-n", "a.raw", "b.raw"], "-O"),
        (["-n", "-O", "raw", "a.raw", "b.raw"], "b.raw"),
        (["-n", "-O", "raw", "-o", "size=1M", "a.raw", "b.raw"], "omit -n"),
        (["--target-image-opts", "a.raw", "driver=raw"], "add -n"),
        (["--target-is-zero", "a.raw", "b.raw"], "add -n"),
        (["-O", "qcow2", "-B", "a.raw", "a.raw", "b"], "-F"),
        (["-O", "qcow2", "-o", "size=1M", "a.raw", "b"], "1048576 bytes and the source 8388608"),
        (["-f", "qcow2", "a.raw", "b.raw"], "a.raw"),
        (["-O", "vmdk", "a.raw", "b"], "vmdk"),
        (["a.raw", "missing/b.raw"], "missing/b.raw"),
        (["a.raw", "a.raw"], "a.raw"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_makes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    before = (folder / "a.raw").read_bytes()
    assert main(["convert", *arguments]) == 1
    assert words in capsys.readouterr().err
    assert os.listdir(folder) == ["a.raw"]
    assert (folder / "a.raw").read_bytes() == before


def test_a_file_that_is_replaced_keeps_its_permissions(folder: Path) -> None:
    (folder / "b.qcow2").write_bytes(b"old")
    (folder / "b.qcow2").chmod(0o640)
    assert main(["convert", "-O", "qcow2", "a.raw", "b.qcow2"]) == 0
    assert (folder / "b.qcow2").stat().st_mode & 0o777 == 0o640
    assert main(["info", "--output=json", "b.qcow2"]) == 0


def test_options_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "-O", "qcow2", "-o", "help"]) == 0
    assert "cluster_size=" in capsys.readouterr().out


def test_a_new_qcow2_is_whole_sectors(
    qemu: Qemu, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "odd.raw").write_bytes(b"x" * 1001)
    capsys.readouterr()
    assert main(["convert", "-q", "-O", "qcow2", "odd.raw", "odd.qcow2"]) == 0
    assert caplog.messages == [
        "odd.qcow2: the size 1001 is rounded up to 1024, since a qcow2 disk consists of sectors of 512 bytes"
    ]
    assert main(["info", "--output=json", "odd.qcow2"]) == 0
    assert json.loads(capsys.readouterr().out)["virtual-size"] == 1024
    for command in (["convert", "-O", "raw", "odd.qcow2", "back.raw"], ["compare", "odd.raw", "odd.qcow2"]):
        assert main(command) == 0
    assert (folder / "back.raw").read_bytes() == b"x" * 1001 + bytes(23)
    assert main(["convert", "-O", "raw", "odd.raw", "exact.raw"]) == 0
    assert (folder / "exact.raw").read_bytes() == b"x" * 1001
    same(qemu, "odd.raw", "odd.qcow2")


@pytest.mark.parametrize("source", ["a.raw", "a.qcow2"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("how", ["-C", "--reflink"])
def test_copied_by_the_system(qemu: Qemu, folder: Path, source: str, format: str, there: bool, how: str) -> None:
    qemu.img("convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2")
    kind, name = source[2:], f"b.{format}"
    if there:
        qemu.img("create", "-q", "-f", format, name, "8M")
        qemu.io("-f", format, "-c", "write -P 9 0 8M", name)
    assert main(["convert", how, *(["-n"] if there else []), "-f", kind, "-O", format, source, name]) == 0
    same(qemu, source, name)
    if format == "qcow2":
        assert qemu.check(name)[0] == 0


def test_what_is_copied_unseen_is_not_searched_for_zeros(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-C", "-S", "0"], ["--reflink", "-S", "4k"], ["-C", "--reflink"]):
        assert main(["convert", *words, "a.raw", "b.raw"]) != 0
        assert words[0] in capsys.readouterr().err
    assert os.listdir(folder) == ["a.raw"]


def test_an_overlay_that_is_there_gets_what_differs(tmp_path: Path) -> None:
    """`convert -n -B`: what the overlay shows already is not written, whatever it owns."""
    disk = random.Random(4).randbytes(MIB) + bytes(MIB)
    base, source, over = (str(tmp_path / name) for name in ("base.raw", "source.raw", "over.qcow2"))
    Path(base).write_bytes(disk)
    changed = bytearray(disk)
    changed[64 * 1024 : 64 * 1024 + 5] = b"other"
    changed[512 * 1024 : 640 * 1024] = bytes(128 * 1024)
    Path(source).write_bytes(changed)
    lamina.create(over, "qcow2", 2 * MIB + 512, backing_file="base.raw", backing_fmt="raw")
    with lamina.open(over, format="qcow2", read_only=False) as image:
        image.write(MIB + 7, b"stale")  # the target may own what the source has not
        image.write(2 * MIB, b"kept")
    words = ["convert", "-n", "-B", base, "-F", "raw", "-f", "raw", "-O", "qcow2", source, over]
    assert main(words) == 0
    with lamina.open(over, format="qcow2") as image:
        assert image.read(0, 2 * MIB) == changed
        assert image.read(2 * MIB, 4) == b"kept"
        owned = sum(one.length for one in image.extents(0, MIB).where(depth=0, present=True))
        assert owned == 3 * 64 * 1024
    assert main([*words, "--target-is-zero"]) == 1

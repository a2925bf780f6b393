"""`lamina diff`: what the command prints, in each of its forms, and the overlay that it makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from lamina.jobs.diff import changed_since
from tests.conftest import Qemu

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """full.qcow2, and disk.qcow2 with two snapshots and a bitmap, which has changed since."""
    monkeypatch.chdir(tmp_path)
    for name in "full.qcow2", "disk.qcow2":
        lamina.create(name, "qcow2", MIB)
        with lamina.open(name, format="qcow2", read_only=False) as image:
            image.write(0, b"a" * 200 * KIB)
    with lamina.open("disk.qcow2", format="qcow2", read_only=False) as image:
        image.create_snapshot("one")
        image.write(5000, b"b" * 10)
        image.create_snapshot("two")
        image.add_bitmap("since", 4 * KIB)
        image.write(900 * KIB, b"c" * 8 * KIB)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["diff", "--output", "json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["block_metadata_type"] == "VARIABLE_LENGTH"
    assert found["volume_capacity_bytes"] == MIB
    return [(one["byte_offset"], one["size_bytes"]) for one in found["block_metadata"]]


CASES: list[tuple[str, list[tuple[int, int]]]] = [
    ("full.qcow2 disk.qcow2", [(4096, 4096), (900 * KIB, 8 * KIB)]),
    ("-f qcow2 -F qcow2 -g 1 full.qcow2 disk.qcow2", [(5000, 10), (900 * KIB, 8 * KIB)]),
    ("-g 64k full.qcow2 disk.qcow2", [(0, 64 * KIB), (896 * KIB, 64 * KIB)]),
    ("--allocation full.qcow2 disk.qcow2", [(0, 200 * KIB), (900 * KIB, 8 * KIB)]),
    ("full.qcow2 full.qcow2", []),
    ("-l one -l two disk.qcow2", [(4096, 4096)]),
    ("-l two -l one disk.qcow2", [(4096, 4096)]),
    ("-l two disk.qcow2", [(900 * KIB, 8 * KIB)]),
    ("-l snapshot.name=one -g 1 -f qcow2 disk.qcow2", [(5000, 10), (900 * KIB, 8 * KIB)]),
    ("--allocation -g 1 -l one -l two disk.qcow2", [(0, 64 * KIB)]),
    ("--bitmap since disk.qcow2", [(900 * KIB, 8 * KIB)]),
    ("--bitmap since -g 64k disk.qcow2", [(896 * KIB, 64 * KIB)]),
    ("--image-opts -g 1 driver=qcow2,file.filename=full.qcow2 driver=qcow2,file.filename=disk.qcow2",
     [(5000, 10), (900 * KIB, 8 * KIB)]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "wanted"), CASES)
def test_the_ranges_are_those_of_the_changes(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, wanted: list[tuple[int, int]]
) -> None:
    found = told(capsys, *line.split())
    if "--allocation" in line:  # holes of the files decide what is known of the rest of a cluster
        assert all(any(lo <= at and at + n <= lo + size for lo, size in found) for at, n in wanted[-1:])
        assert sum(size for _, size in found) <= 400 * KIB
    else:
        assert found == wanted


def test_a_person_reads_hexadecimal_numbers_and_a_sum(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "full.qcow2", "disk.qcow2"]) == 0
    assert capsys.readouterr().out == (
        "Offset          Length\n"
        "0x1000          0x1000\n"
        "0xe1000         0x2000\n"
        "12288 of 1048576 bytes differ, in 2 ranges\n"
    )
    assert main(["diff", "disk.qcow2", "disk.qcow2"]) == 0
    assert capsys.readouterr().out == "0 of 1048576 bytes differ, in 0 ranges\n"
    lamina.create("long.qcow2", "qcow2", 2 * MIB, backing_file="disk.qcow2", backing_fmt="qcow2")
    assert main(["diff", "-f", "qcow2", "-F", "qcow2", "disk.qcow2", "long.qcow2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "0 of 2097152 bytes differ, in 0 ranges",
        "The sizes differ: 1048576 and 2097152 bytes",
    ]
    assert main(["diff", "--bitmap", "since", "disk.qcow2"]) == 0
    assert "8192 of 1048576 bytes were written, in 1 range\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "full.qcow2",
        "a b c",
        "-l one full.qcow2 disk.qcow2",
        "-l one -l two -l one disk.qcow2",
        "-l one --bitmap since disk.qcow2",
        "-l none disk.qcow2",
        "--bitmap none disk.qcow2",
        "--bitmap since full.qcow2",
        "-g 3 full.qcow2 disk.qcow2",
        "-g 0x80000000 full.qcow2 disk.qcow2",
        "-o out.qcow2 full.qcow2 disk.qcow2",
        "-f qcow2 -g 4k -o out.qcow2 full.qcow2 disk.qcow2",
        "-f qcow2 -o out.qcow2 -l one disk.qcow2",
        "-f qcow2 -o out.qcow2 --bitmap since disk.qcow2",
        "-f qcow2 -o out.qcow2 --bitmap none full.qcow2 disk.qcow2",
        "-f qcow2 -o out.qcow2 --bitmap since full.qcow2 full.qcow2",
        "-f qcow2 -o full.qcow2 full.qcow2 disk.qcow2",
        "-f qcow2 -o disk.qcow2 full.qcow2 disk.qcow2",
        "none disk.qcow2",
    ],
)
def test_what_makes_no_sense_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["diff", *line.split()]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("lamina: ")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.peers
def test_the_overlay_holds_what_differs(folder: Path, qemu: Qemu) -> None:
    assert main(["diff", "-q", "-f", "qcow2", "-o", "inc.qcow2", "full.qcow2", "disk.qcow2"]) == 0
    qemu.img("compare", "-f", "qcow2", "-F", "qcow2", "inc.qcow2", "disk.qcow2")
    assert qemu.check("inc.qcow2")[0] == 0
    own = [row["start"] for row in qemu.map("inc.qcow2", "qcow2") if row["depth"] == 0 and row["data"]]
    assert own == [0, 896 * KIB]


@pytest.mark.peers
def test_the_overlay_of_a_bitmap_is_an_incremental_backup(folder: Path, qemu: Qemu) -> None:
    assert main(["convert", "-O", "qcow2", "-f", "qcow2", "disk.qcow2", "now.qcow2"]) == 0
    with lamina.open("disk.qcow2", format="qcow2", read_only=False) as image:
        image.clear_bitmap("since")
        image.write(100 * KIB, b"n" * 5000)
        image.zero(901 * KIB, 3 * KIB)
        image.write(902 * KIB, b"m")
        image.zero(0, 4 * KIB)
        wanted = [(at, at + n) for at, n in changed_since(image, "since")]
    line = "-q -f qcow2 -o inc.qcow2 --bitmap since now.qcow2 disk.qcow2"
    assert main(["diff", *line.split()]) == 0
    qemu.img("compare", "-f", "qcow2", "-F", "qcow2", "inc.qcow2", "disk.qcow2")
    assert qemu.check("inc.qcow2")[0] == 0
    with lamina.open("inc.qcow2", format="qcow2") as image:
        own = [(row.start, row.end) for row in image.extents() if row.depth == 0 and row.present]
    assert all(any(lo < stop and start < hi for start, stop in wanted) for lo, hi in own)
    assert sum(hi - lo for lo, hi in own) <= 4 * 64 * KIB


@pytest.mark.peers
def test_the_bitmap_of_a_peer_is_understood(tmp_path: Path, qemu: Qemu, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", path, "1M")
    qemu.img("bitmap", "--add", "-g", "32k", path, "b")
    qemu.io("-f", "qcow2", "-c", "write 40k 1k", "-c", "write -z 512k 64k", path)
    assert told(capsys, "--bitmap", "b", str(path)) == [(32 * KIB, 32 * KIB), (512 * KIB, 64 * KIB)]

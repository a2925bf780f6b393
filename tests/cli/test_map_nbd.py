"""`lamina map` of NBD exports: contexts one by one as nbdinfo shows them, and several in lock-step."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lamina
from lamina.bitmap import MemoryBitmap
from lamina.cli.main import main
from lamina.cli.map_nbd import joined, lockstep, meaning
from lamina.nbd import Export, Server
from tests.nbd_peers import nbdkit, program, qemu_nbd

MIB = 1 << 20
BITMAP = "qemu:dirty-bitmap:b0"


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """4 MiB in two layers: data at 1 MiB from below, zeros over it from 1.5 MiB; a bitmap dirty from 1.25 to 2 MiB."""
    base, top = str(tmp_path / "base.qcow2"), str(tmp_path / "top.qcow2")
    lamina.create(base, "qcow2", 4 * MIB)
    with lamina.open(base, format="qcow2", read_only=False) as image:
        image.write(MIB, b"x" * MIB)
    lamina.create(top, "qcow2", 4 * MIB, backing_file=base, backing_fmt="qcow2")
    with lamina.open(top, format="qcow2", read_only=False) as image:
        image.zero(3 * MIB // 2, MIB // 2)
    bitmap = MemoryBitmap()
    bitmap.mark(5 * MIB // 4, 3 * MIB // 4)
    socket = str(tmp_path / "s")
    with (
        lamina.open(top, format="qcow2") as image,
        Server([Export(image, bitmaps={"b0": bitmap})], unix=socket),
    ):
        yield f"nbd+unix:///?socket={socket}"


def mapped(capsysbinary: pytest.CaptureFixture[bytes], *arguments: str) -> str:
    capsysbinary.readouterr()
    assert main(["map", *arguments]) == 0
    return capsysbinary.readouterr().out.decode()


def rows(capsysbinary: pytest.CaptureFixture[bytes], *arguments: str) -> list[dict[str, Any]]:
    return list(json.loads(mapped(capsysbinary, "--output", "json", *arguments)))


def test_one_context(address: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert mapped(capsysbinary, "--context", "base:allocation", address).splitlines() == [
        "         0     1048576    3  hole,zero",
        "   1048576      524288    0  data",
        "   1572864     2621440    3  hole,zero",
    ]
    assert rows(capsysbinary, "--context", BITMAP, address) == [
        {"offset": 0, "length": 1310720, "type": 0, "description": "clean"},
        {"offset": 1310720, "length": 786432, "type": 1, "description": "dirty"},
        {"offset": 2097152, "length": 2097152, "type": 0, "description": "clean"},
    ]
    depth = rows(capsysbinary, "--context", "qemu:allocation-depth", address)
    assert [(row["offset"], row["description"]) for row in depth] == [
        (0, "absent"),
        (MIB, "backing depth 2"),
        (3 * MIB // 2, "local"),
        (2 * MIB, "absent"),
    ]


def test_several_go_in_lockstep(address: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    three = ["--context", "base:allocation", "--context", BITMAP, "--context", "lamina:exact"]
    found = rows(capsysbinary, *three, address)
    assert [(row["offset"], row["length"]) for row in found] == [
        (0, MIB),
        (MIB, MIB // 4),
        (5 * MIB // 4, MIB // 4),
        (3 * MIB // 2, MIB // 2),
        (2 * MIB, 2 * MIB),
    ]
    words = [[said["description"] for said in row["contexts"].values()] for row in found]
    assert list(found[0]["contexts"]) == ["base:allocation", BITMAP, "lamina:exact"]
    assert words[1] == ["data", "clean", "data,present,layer 1"]
    assert words[2] == ["data", "dirty", "data,present,layer 1"]
    assert words[3] == ["hole,zero", "dirty", "hole,zero,present,layer 0"]
    table = mapped(capsysbinary, *three, address).splitlines()
    assert table[0].split() == ["Offset", "Length", "base:allocation", BITMAP, "lamina:exact"]
    assert table[3].split() == ["1310720", "262144", "data", "dirty", "data,present,layer", "1"]
    every = rows(capsysbinary, "--context", "all", address)
    assert set(every[0]["contexts"]) == {"base:allocation", BITMAP, "lamina:exact", "qemu:allocation-depth"}


def test_a_window(address: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    window = ["-s", "1000k", "-l", "100k", "--context", "base:allocation"]
    found = rows(capsysbinary, *window, address)
    assert [(row["offset"], row["length"], row["type"]) for row in found] == [
        (1000 << 10, 24 << 10, 3),
        (MIB, 76 << 10, 0),
    ]
    assert rows(capsysbinary, "-s", "4M", "--context", "base:allocation", address) == []
    assert mapped(capsysbinary, "-l", "0", "--context", "base:allocation", address) == ""


def test_totals(address: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert rows(capsysbinary, "--totals", "--context", "base:allocation", address) == [
        {"size": MIB // 2, "percent": 12.5, "type": 0, "description": "data"},
        {"size": 7 * MIB // 2, "percent": 87.5, "type": 3, "description": "hole,zero"},
    ]
    two = mapped(capsysbinary, "--totals", "--context", "base:allocation", "--context", BITMAP, address)
    assert [line.split() for line in two.splitlines()[1:]] == [
        ["262144", "6.2%", "data", "clean"],
        ["262144", "6.2%", "data", "dirty"],
        ["3145728", "75.0%", "hole,zero", "clean"],
        ["524288", "12.5%", "hole,zero", "dirty"],
    ]


def test_without_a_context_it_is_an_image(address: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    found = rows(capsysbinary, "-f", "raw", address)
    assert [(row["start"], row["data"]) for row in found] == [(0, False), (MIB, True), (3 * MIB // 2, False)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", "no:such", "{}"], "no:such"),
        (["--context", "base:allocation", "-s", "5M", "{}"], "end of the export at 4194304"),
        (["--totals", "{}"], "needs a metadata context"),
        (["--exact", "--context", "base:allocation", "{}"], "--exact"),
        (["--context", "base:allocation", "disk.raw"], "only NBD exports"),
    ],
)
def test_refusals(address: str, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["map", *(word.format(address) for word in arguments)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert words in told.err


def test_a_server_without_contexts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nbdkit(tmp_path, "--no-sr", "memory", "1M") as address:
        for context in ("base:allocation", "all"):
            assert main(["map", "--context", context, address]) == 1
            assert "metadata context" in capsys.readouterr().err


@pytest.mark.parametrize("totals", [[], ["--totals"]])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_same_as_nbdinfo(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], totals: list[str], form: list[str]
) -> None:
    nbdinfo = program("nbdinfo", "libnbd-bin")
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
        for at in (0, 3, 9, 33):
            file.seek(at * MIB)
            file.write(b"x" * (at * 4096 + 4096))
    with qemu_nbd(tmp_path, "-r", "-f", "raw", str(disk)) as address:
        peers = subprocess.run([nbdinfo, "--map", *totals, *form, address], capture_output=True, check=True).stdout
        ours = mapped(
            capsysbinary, "--context", "base:allocation", *totals, *(["--output=json"] if form else []), address
        )
    if form:
        assert json.loads(ours) == json.loads(peers)
    else:
        # The widths of columns are not the same in each version of nbdinfo.
        assert [line.split() for line in ours.splitlines()] == [line.split() for line in peers.decode().splitlines()]


@pytest.mark.parametrize(
    ("context", "status", "words"),
    [
        ("base:allocation", 0, "data"),
        ("base:allocation", 1, "hole"),
        ("base:allocation", 2, "zero"),
        ("base:allocation", 3, "hole,zero"),
        ("base:allocation", 7, "hole,zero,unknown 0x4"),
        ("qemu:allocation-depth", 0, "absent"),
        ("qemu:allocation-depth", 1, "local"),
        ("qemu:allocation-depth", 5, "backing depth 5"),
        ("qemu:dirty-bitmap:x", 1, "dirty"),
        ("lamina:exact", 0, "data,layer 0"),
        ("lamina:exact", 12 | 3 << 8, "data,present,compressed,layer 3"),
        ("lamina:exact", 7 | 1 << 8, "hole,zero,present,layer 1"),
        ("example:unheard-of", 1, None),
    ],
)
def test_words(context: str, status: int, words: str | None) -> None:
    assert meaning(context, status) == words


@given(st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1), min_size=1, max_size=4))
def test_lockstep_says_of_each_byte_what_each_column_says(columns: list[list[tuple[int, int]]]) -> None:
    spelt = [[status for length, status in column for _ in range(length)] for column in columns]
    together = list(lockstep(columns))
    assert [values for length, values in together for _ in range(length)] == list(zip(*spelt, strict=False))
    shortest = list(joined(iter(together)))
    assert [values for length, values in shortest for _ in range(length)] == list(zip(*spelt, strict=False))
    assert all(first[1] != second[1] for first, second in itertools.pairwise(shortest))

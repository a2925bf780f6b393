"""`lamina map`: the tables of the specification, and the same answers as the peers, to the letter where both are exact."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.cli import map as command
from lamina.cli import map_json
from lamina.cli.main import main
from lamina.extents import Extents
from tests.conftest import Qemu

MIB = 1 << 20


def lamina_map(capsysbinary: pytest.CaptureFixture[bytes], *arguments: str) -> str:
    capsysbinary.readouterr()
    assert main(["map", *arguments]) == 0
    return capsysbinary.readouterr().out.decode()


@pytest.fixture
def transcript(qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Qemu:
    """back.qcow2 and top.qcow2, as in the specification of block status."""
    monkeypatch.chdir(tmp_path)
    assert main(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "back.qcow2", "100M"]) == 0
    qemu.io("-f", "qcow2", "-c", "w -P1 0 512", "-c", "w -P1 1k 512", "back.qcow2")
    create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "back.qcow2", "-o", "cluster_size=1M", "top.qcow2"]
    assert main(create) == 0
    return qemu


EXACT = [
    {"start": 0, "length": 512, "depth": 1, "zero": False, "data": True},
    {"start": 512, "length": 512, "depth": 1, "zero": True, "data": False},
    {"start": 1024, "length": 512, "depth": 1, "zero": False, "data": True},
    {"start": 1536, "length": 104856064, "depth": 1, "zero": True, "data": False},
]
ROUNDED = [
    {"start": 0, "length": 4096, "depth": 1, "zero": False, "data": True},
    {"start": 4096, "length": 100 * MIB - 4096, "depth": 1, "zero": True, "data": False},
]
FILTER = "driver=blkdebug,image.driver=qcow2,image.file.driver=file,image.file.filename={},align=4k"


def chosen(text: str) -> list[dict[str, Any]]:
    return [{key: row[key] for key in EXACT[0]} for row in json.loads(text)]


def test_the_transcript(transcript: Qemu, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    plain = lamina_map(capsysbinary, "--output=json", "-f", "qcow2", "top.qcow2")
    assert chosen(plain) == EXACT
    through = ["--output=json", "--image-opts", FILTER.format("top.qcow2")]
    rounded = lamina_map(capsysbinary, *through)
    assert chosen(rounded) == ROUNDED
    assert not any("offset" in row for row in json.loads(rounded))
    assert lamina_map(capsysbinary, "--exact", *through) == plain
    below = chosen(lamina_map(capsysbinary, "--output=json", "--image-opts", FILTER.format("back.qcow2")))
    assert below == [row | {"depth": 0} for row in ROUNDED]


def test_a_window_is_widened_to_whole_blocks(transcript: Qemu, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    window = ["-s", "600", "-l", "5000", "--output=json", "--image-opts", FILTER.format("top.qcow2")]
    rounded = chosen(lamina_map(capsysbinary, *window))
    assert [(row["start"], row["length"], row["data"]) for row in rounded] == [(0, 4096, True), (4096, 4096, False)]
    exact = chosen(lamina_map(capsysbinary, "--exact", *window))
    assert [(row["start"], row["length"]) for row in exact] == [(600, 424), (1024, 512), (1536, 4064)]


@pytest.mark.parametrize("window", [[], ["-s", "512", "-l", "600"], ["-s", "99M", "-l", "5M"]])
def test_the_same_bytes_as_the_peer(
    transcript: Qemu, capsysbinary: pytest.CaptureFixture[bytes], window: list[str]
) -> None:
    peer = transcript.img("map", "--output=json", *window, "-f", "qcow2", "top.qcow2").stdout
    ours = lamina_map(capsysbinary, "--output=json", *window, "-f", "qcow2", "top.qcow2")
    if '"compressed"' not in peer:  # QEMU before 8.2
        ours = ours.replace(', "compressed": false', "")
    assert ours == peer
    # Names that a layer below was found by are shown in full here.
    table = transcript.img("map", *window, "-f", "qcow2", "top.qcow2").stdout.splitlines()
    mine = lamina_map(capsysbinary, *window, "-f", "qcow2", "top.qcow2").splitlines()
    assert [line[:48] for line in mine] == [line[:48] for line in table]
    assert [Path(line[48:]).name for line in mine] == [line[48:] for line in table]


def test_random_images_map_as_the_peer_says(
    qemu10: Qemu, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], seed: int
) -> None:
    dice = random.Random(seed)
    for _ in range(6):
        disk = tmp_path / "disk.qcow2"
        bits = dice.choice([9, 12, 16])
        qemu10.img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={1 << bits}", disk, "8M")
        commands = []
        for _ in range(20):
            at, length = dice.randrange(8 * MIB) & -512, dice.choice([512, 4096, 65536])
            verb = dice.choice(["write -P 7", "write -z", "discard"])
            commands += ["-c", f"{verb} {at} {min(length, 8 * MIB - at)}"]
        qemu10.io("-f", "qcow2", *commands, disk)
        theirs = json.loads(qemu10.img("map", "--output=json", "-f", "qcow2", disk).stdout)
        ours = json.loads(lamina_map(capsysbinary, "--output=json", str(disk)))
        assert as_stored(ours) == as_stored(theirs)
        for row in theirs:
            assert not row["zero"] or all(
                mine["zero"] for mine in ours if meets(mine, row["start"], row["start"] + row["length"])
            )


def meets(row: dict[str, Any], start: int, end: int) -> bool:
    return bool(row["start"] < end and row["start"] + row["length"] > start)


def as_stored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the terms of the format: data that lies in a hole of the file is data. (We always say that it is zero too;
    QEMU says so where the file takes up much less space than the image counts.)"""
    joined: list[dict[str, Any]] = []
    for row in rows:
        told = {**row, "zero": row["zero"] and not row["data"]}
        if joined and follows(joined[-1], told):
            joined[-1]["length"] += told["length"]
        else:
            joined.append(told)
    return joined


def follows(last: dict[str, Any], row: dict[str, Any]) -> bool:
    offset = last["offset"] + last["length"] if "offset" in last else None
    kinds = ("depth", "present", "zero", "data", "compressed")
    return all(last[kind] == row[kind] for kind in kinds) and row.get("offset") == offset


def test_windows_do_not_show(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], few_rows: Callable[[int], None]
) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        for at in (3, 4, 5, 9, 40):
            file.seek(at * MIB)
            file.write(b"x" * MIB)
    whole = lamina_map(capsysbinary, "--output=json", "-f", "raw", str(disk))
    few_rows(2)
    assert lamina_map(capsysbinary, "--output=json", "-f", "raw", str(disk)) == whole
    assert len(json.loads(whole)) == 6


def test_an_empty_image_has_no_rows(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    disk = tmp_path / "empty.raw"
    disk.touch()
    assert lamina_map(capsysbinary, "--output=json", "-f", "raw", str(disk)) == "[]\n"
    assert lamina_map(capsysbinary, "-f", "raw", str(disk)).count("\n") == 1


def test_a_start_behind_the_end_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"123")
    assert main(["map", "-f", "raw", "-s", "4", str(disk)]) == 1
    assert "past the end of the image at 3" in capsys.readouterr().err


class _File:
    filename = "host\x1b[file"


@given(
    st.lists(
        st.tuples(
            st.integers(1, 1 << 50) | st.sampled_from([1, 9, 10, 9_999, 10_000, 100_000_000]),
            st.integers(0, 15),
            st.integers(0, 70),
            st.integers(-1, 1 << 60) | st.sampled_from([-1, 0, 9, 10_000, 10_010_000, 1 << 61]),
        ),
        max_size=20,
    ),
    st.sampled_from([1, 3, 4096]),
)
def test_every_kind_of_row_is_json_of_what_it_says(rows: list[tuple[int, int, int, int]], batch: int) -> None:
    lengths = [row[0] for row in rows]
    starts = [sum(lengths[:number]) for number in range(len(rows))]
    flags, depths, offsets = ([row[column] for row in rows] for column in (1, 2, 3))
    made = Extents.from_columns(
        np.array(starts, np.int64), lengths, flags, depth=depths, offset=np.array(offsets, np.int64), files=(_File(),)
    )

    def pieces() -> Iterator[Extents]:
        if len(made):
            yield made

    out = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(map_json, "_ROWS", batch)
        map_json.write(pieces(), out, compression=True)
    told = json.loads(out.getvalue())
    assert len(told) == len(made)
    for row, extent in zip(told, made, strict=True):
        assert row.pop("offset", None) == extent.offset
        assert row == {
            key: getattr(extent, key) for key in ("start", "length", "depth", "present", "zero", "data", "compressed")
        }
    table = io.BytesIO()
    command._write_table(pieces(), table)
    lines = table.getvalue().decode().splitlines()[1:]
    assert len(lines) == sum(extent.data and not extent.zero for extent in made)
    assert all(re.fullmatch(r"(0|0x\w+)\s+0x\w+\s+(-|compressed|(0|0x\w+)\s+host\\x1b\[file)", line) for line in lines)

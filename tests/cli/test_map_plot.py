"""`lamina map --plot`: pictures of the transcript of the specification, on each kind of terminal, and where there is none."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from lamina.nbd import Export, Server

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def transcript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """back.qcow2 and top.qcow2, as in the specification of block status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    lamina.create("back.qcow2", "qcow2", 100 * MIB, cluster_size=512)
    with lamina.open("back.qcow2", format="qcow2", read_only=False) as image:
        for at in (0, 1024):
            image.write(at, b"\x01" * 512)
    lamina.create("top.qcow2", "qcow2", backing_file="back.qcow2", backing_fmt="qcow2", cluster_size=MIB)
    return tmp_path


FILTER = "driver=blkdebug,image.driver=qcow2,image.file.driver=file,image.file.filename=top.qcow2,align=4k"

WHOLE = """\
    0 B +...............................................................
        1
 16 MiB ................................................................
 32 MiB ................................................................
 48 MiB ................................................................
 64 MiB ................................................................
 80 MiB ................................................................
 96 MiB ................

 cell: 256 KiB   end: 100 MiB   {}
 # data {}   . hole 100 MiB   + mixed, less than half stored
 layers:   1 back.qcow2
"""


def plotted(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["map", "--plot", *words]) == 0
    return capsys.readouterr().out


def test_the_transcript(transcript: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plotted(capsys, "-f", "qcow2", "top.qcow2") == WHOLE.format("exact", "1 KiB")
    rounded = WHOLE.format("rounded to blocks of 4 KiB", "4 KiB")
    assert plotted(capsys, "--image-opts", FILTER) == rounded
    assert plotted(capsys, "--exact", "--image-opts", FILTER) == WHOLE.format("exact", "1 KiB")


def test_the_first_bytes_of_the_transcript(transcript: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact = [
        " 0 B #.#.....",
        "     1 1",
        "",
        " cell: 512 B   end: 4 KiB   exact",
        " # data 1 KiB   . hole 3 KiB",
        " layers:   1 back.qcow2",
    ]
    assert plotted(capsys, "-l", "4k", "-f", "qcow2", "top.qcow2").splitlines() == exact
    assert plotted(capsys, "-l", "4k", "--exact", "--image-opts", FILTER).splitlines() == exact
    assert plotted(capsys, "-l", "4k", "--image-opts", FILTER).splitlines() == [
        " 0 B #",
        "     1",
        "",
        " cell: 4 KiB   end: 4 KiB   rounded to blocks of 4 KiB",
        " # data 4 KiB",
        " layers:   1 back.qcow2",
    ]
    # The window is widened to whole blocks, unless it is exact.
    assert plotted(capsys, "-s", "600", "-l", "5000", "--image-opts", FILTER).splitlines()[0] == " 0 B #."
    part = plotted(capsys, "-s", "600", "-l", "5000", "-f", "qcow2", "top.qcow2").splitlines()
    assert part[0] == " 600 B .#........"
    assert part[3] == " cell: 512 B   end: 5600 B   exact"


@pytest.mark.parametrize(
    ("columns", "cells"), [(None, 64), (30, 16), (60, 48), (132, 96), (220, 192), (0, 64), ("x", 64)]
)
def test_the_width(
    transcript: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    columns: int | str | None,
    cells: int,
) -> None:
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    lines = plotted(capsys, "-f", "qcow2", "top.qcow2").splitlines()
    assert lines[2].count(".") == cells
    if isinstance(columns, int) and columns:
        assert max(map(len, lines)) <= max(columns, 31)


def test_an_export_is_drawn_as_an_image_is(transcript: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        lamina.open("top.qcow2", format="qcow2") as image,
        Server([Export(image)], unix=str(transcript / "socket")),
    ):
        told = plotted(capsys, "nbd+unix:///?socket=socket").splitlines()
        assert main(["map", "--plot", "--context", "base:allocation", "nbd+unix:///?socket=socket"]) == 1
    assert told[0] == "    0 B +" + 63 * "0"
    assert "omit --context" in capsys.readouterr().err


def test_it_has_no_json(transcript: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", "--plot", "--output=json", "-f", "qcow2", "top.qcow2"]) == 1
    told = capsys.readouterr()
    assert not told.out
    assert "--plot is a picture for people" in told.err


def test_a_start_behind_the_end_is_refused(transcript: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", "--plot", "-s", "101M", "-f", "qcow2", "top.qcow2"]) == 1
    assert "past the end of the image" in capsys.readouterr().err


def test_an_empty_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.raw").touch()
    assert plotted(capsys, "-f", "raw", str(tmp_path / "a.raw")) == "no bytes\n"


def test_every_kind_that_an_image_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "28")
    lamina.create("a.qcow2", "qcow2", 16 * 512, cluster_size=512)
    with lamina.open("a.qcow2", format="qcow2", read_only=False) as image:
        image.write(0, b"x" * 1024)
        image.write(2048, b"x" * 1024, compress=True)
        image.zero(4096, 1024)
    assert plotted(capsys, "-f", "qcow2", "a.qcow2").splitlines()[0] == " 0 B ##..cc..00......"


def test_few_rows_in_a_window_change_nothing(
    transcript: Path, capsys: pytest.CaptureFixture[str], few_rows: object
) -> None:
    whole = plotted(capsys, "-f", "qcow2", "top.qcow2")
    few_rows(2)  # type: ignore[operator]
    assert plotted(capsys, "-f", "qcow2", "top.qcow2") == whole


# -- terminals


def on_a_terminal(folder: Path, **environment: str) -> str:
    """What the command prints on a terminal."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NO_COLOR", "COLORTERM", "COLORFGBG", "COLUMNS")
    }
    plain |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", "COLUMNS": "80", "PYTHONPATH": ":".join(sys.path)}
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-m", "lamina", "map", "--plot", "-f", "qcow2", "top.qcow2"]
        with subprocess.Popen(
            command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env={**plain, **environment}
        ) as process:
            os.close(theirs)
            told = b""
            try:
                while piece := os.read(ours, 65536):
                    told += piece
            except OSError:
                pass  # EIO: the other end is closed
        assert process.returncode == 0, told
    finally:
        os.close(ours)
    return told.decode().replace("\r\n", "\n")


PLAIN = WHOLE.format("exact", "1 KiB")
UNICODE = PLAIN.replace("+", "▒").replace(".", "·").replace("#", "█").replace("back·qcow2", "back.qcow2")


def test_a_terminal_has_colours_and_blocks(transcript: Path) -> None:
    told = on_a_terminal(transcript)
    assert "\x1b[38;5;" in told
    assert "\x1b[38;2;" not in told
    assert re.sub(r"\x1b\[[\d;]*m", "", told) == UNICODE
    assert "\x1b[38;2;" in on_a_terminal(transcript, COLORTERM="truecolor")
    assert on_a_terminal(transcript, TERM="dumb") == UNICODE


@pytest.mark.parametrize(
    "environment", [{"NO_COLOR": "1"}, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_plain_where_it_is_asked_for_or_nothing_else_can_be_shown(
    transcript: Path, environment: dict[str, str]
) -> None:
    assert on_a_terminal(transcript, **environment) == PLAIN


def test_plain_where_it_is_piped(transcript: Path) -> None:
    command = [sys.executable, "-m", "lamina", "map", "--plot", "-f", "qcow2", "top.qcow2"]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, cwd=transcript, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == PLAIN

"""`lamina compare`: lines and exit status that scripts know, and the peer's answer."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from lamina.cli.main import main
from tests.conftest import Qemu

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu: Qemu) -> Path:
    monkeypatch.chdir(tmp_path)
    content = random.Random(1).randbytes(MIB)
    (tmp_path / "one").write_bytes(content)
    (tmp_path / "same").write_bytes(content)
    (tmp_path / "longer").write_bytes(content + bytes(MIB))
    (tmp_path / "much longer").write_bytes(content + bytes(MIB) + b"x")
    (tmp_path / "other").write_bytes(content[:512000] + b"?" + content[512001:])
    (tmp_path / "none").write_bytes(b"")
    for name in ("one", "longer"):
        qemu.img("convert", "-f", "raw", "-O", "qcow2", name, f"{name}.qcow2")
    qemu.img("create", "-q", "-f", "qcow2", "empty.qcow2", "2M")
    return tmp_path


PAIRS = [
    ("one", "same"),
    ("one", "one"),
    ("one", "longer"),
    ("longer", "one"),
    ("one", "much longer"),
    ("one", "other"),
    ("other", "one"),
    ("one", "one.qcow2"),
    ("one.qcow2", "longer"),
    ("one.qcow2", "longer.qcow2"),
    ("empty.qcow2", "longer"),
    ("none", "empty.qcow2"),
    ("none", "one"),
]


def formats(*names: str) -> list[str]:
    return [
        word for flag, name in zip(("-f", "-F"), names, strict=True) for word in (flag, name.partition(".")[2] or "raw")
    ]


def cases() -> list[tuple[tuple[str, str], list[str]]]:
    """All pairs with all options, but for strict comparisons of raw with qcow2: there QEMU calls a hole of a raw file
    unallocated, and ours, which storage backs, is allocated and zero."""
    found = [(names, options) for names in PAIRS for options in ([], ["-q"], ["-s"])]
    return [
        (names, options)
        for names, options in found
        if options != ["-s"] or "much longer" in names or {"raw", "qcow2"} != set(formats(*names)[1::2])
    ]


@pytest.mark.parametrize(("names", "options"), cases())
def test_the_same_verdict_as_the_peer(
    qemu: Qemu, folder: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, str], options: list[str]
) -> None:
    words = ["compare", *options, *formats(*names), *names]
    peer = qemu.img(*words, check=False)
    capsys.readouterr()
    assert main(words) == peer.returncode
    told = capsys.readouterr().out

    # The peer tells the sector, we tell the byte.
    def sectors(text: str) -> str:
        return re.sub(r"offset (\d+)!", lambda found: f"offset {int(found[1]) & -512}!", text)

    assert sectors(told) == sectors(peer.stdout)


def test_the_byte_that_differs_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "one", "other"]) == 1
    assert capsys.readouterr().out == "Content mismatch at offset 512000!\n"


def test_progress_is_told_in_lines_that_scripts_know(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "-p", "one", "same"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("    (0.00/100%)\r")
    assert told.endswith("    (100.00/100%)\r\nImages are identical.\n")


def test_what_cannot_be_found_out_is_neither_same_nor_different(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "one", "missing"]) == 2
    assert main(["compare", "-f", "qcow2", "one", "one"]) == 2
    assert main(["compare", "-z", "one", "one"]) == 1  # as of qemu-img: the command line is wrong
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("lamina: ") == 3

"""The cache modes that scripts give: accepted where qemu-img accepts them, under its names, and others refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lamina import atomic_file
from lamina.cli.arguments import CACHE_MODES
from lamina.cli.main import main
from tests.conftest import Qemu

LINES = {
    "convert -t": "convert -t MODE -f raw -O qcow2 a.raw b",
    "convert -T": "convert -T MODE -f raw -O qcow2 a.raw b",
    "convert -n": "convert -n -t MODE -T MODE -f raw -O raw a.raw c.raw",
    "amend -t": "amend -t MODE -o lazy_refcounts=on a.qcow2",
    "check -T": "check -T MODE a.qcow2",
    "compare -T": "compare -T MODE -f raw -F qcow2 a.raw a.qcow2",
}
#: The names that QEMU 10 added.
LONG = {
    "convert": "convert --target-cache MODE --source-cache MODE -f raw -O raw a.raw b",
    "amend": "amend --cache MODE -o lazy_refcounts=on a.qcow2",
    "check": "check --cache MODE a.qcow2",
    "compare": "compare --cache MODE -f raw -F qcow2 a.raw a.qcow2",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu: Qemu) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.raw").write_bytes(os.urandom(1 << 20))
    Path("c.raw").write_bytes(bytes(1 << 20))
    qemu.img("convert", "-q", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2")
    return tmp_path


@pytest.mark.parametrize("line", LINES.values(), ids=list(LINES))
@pytest.mark.parametrize("mode", [*CACHE_MODES, "on", "", "None"])
def test_the_same_words(qemu: Qemu, folder: Path, line: str, mode: str) -> None:
    words = [mode if word == "MODE" else word for word in line.split()]
    theirs = qemu.img(*words, check=False).returncode
    ours = main(words)
    assert bool(ours) == bool(theirs) == (mode not in CACHE_MODES)


@pytest.mark.parametrize("line", LONG.values(), ids=list(LONG))
def test_the_newer_names(qemu: Qemu, folder: Path, line: str) -> None:
    words = line.replace("MODE", "none").split()
    if qemu.version >= (10,) and words[0] != "convert":  # 10.0 has the names in its help, and refuses them
        qemu.img(*words)
    assert main(words) == 0


def test_an_unknown_word_names_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "-t", "writebak", "-f", "raw", "a.raw", "b"]) == 1
    said = capsys.readouterr().err
    assert all(mode in said for mode in CACHE_MODES)
    assert "did you mean writeback?" in said
    assert not Path("b").exists()


@pytest.mark.parametrize(("mode", "flushed"), [(None, False), ("none", False), ("unsafe", False), ("directsync", True)])
def test_what_is_durable(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None, flushed: bool) -> None:
    """A new file is flushed before it gets its name."""
    seen: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(atomic_file.os, "fsync", lambda fd: (seen.append(fd), fsync(fd)))
    assert main(["convert", *(["-t", mode] if mode else []), "-f", "raw", "-O", "raw", "a.raw", "new"]) == 0
    assert bool(seen) == flushed

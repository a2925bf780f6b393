"""What signals do to commands that change an image in place: it reads as before, and the command works again."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main

from .test_signals import LAMINA, ended, said, started

KIB, MIB = 1 << 10, 1 << 20
SIZE = 16 * MIB

#: The commands, without the image: they are given one whose files are read slowly.
COMMANDS = {
    "commit": ["commit", "-p", "-r", "1M"],
    "rebase": ["rebase", "-p", "-b", ""],
    "flatten": ["flatten", "-p"],
    "compact": ["compact", "-p"],
}


@pytest.fixture
def chain(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """base.qcow2 and top.qcow2 in the working directory; returns what top reads as."""
    monkeypatch.chdir(tmp_path)
    dice = random.Random(seed)
    lamina.create("base.qcow2", "qcow2", size=SIZE)
    lamina.create("top.qcow2", "qcow2", backing_file="base.qcow2", backing_fmt="qcow2")
    for name in ("base.qcow2", "top.qcow2"):
        with lamina.open(name, format="qcow2", read_only=False) as image:
            for at in range(0, SIZE, MIB):
                image.write(at + dice.randrange(512 * KIB), dice.randbytes(256 * KIB))
    with lamina.open("top.qcow2", format="qcow2") as image:
        return image.read(0, SIZE)


@pytest.mark.parametrize("word", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_image_reads_the_same_after_a_signal(chain: bytes, command: str, word: signal.Signals) -> None:
    slow = "driver=delay,read-ms=20,image.driver=file,image.filename="
    options = [f"file.{part}" for part in f"{slow}top.qcow2".split(",")]
    options += [f"backing.file.{part}" for part in f"{slow}base.qcow2".split(",")]
    name = ",".join(["driver=qcow2", *options, "backing.driver=qcow2"])
    with started(*LAMINA, *COMMANDS[command], "--image-opts", "--references", "any", name) as process:
        assert process.stdout is not None
        process.stdout.read(24)
        process.send_signal(word)
        status, _, told = ended(process)
    assert status == 128 + word, told
    assert told.startswith(said(word))
    assert told.count("\n") == 1
    for path in ("base.qcow2", "top.qcow2"):
        found = lamina.check(path, format="qcow2")
        assert (found.corruptions, found.check_errors) == (0, 0)
    with lamina.open("top.qcow2", format="qcow2") as image:
        assert image.read(0, SIZE) == chain

    assert main([*(word for word in COMMANDS[command] if word not in ("-r", "1M")), "-f", "qcow2", "top.qcow2"]) == 0
    with lamina.open("top.qcow2", format="qcow2") as image:
        assert image.read(0, SIZE) == chain
    assert lamina.check("top.qcow2", format="qcow2").clean

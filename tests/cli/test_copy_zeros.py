"""`lamina copy` of zeros: what the target reads as zero already stays as it is."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from lamina.graph import Opener
from lamina.image import Image
from lamina.jobs.copy import Copy, Plan
from lamina.jobs.copy_ends import StorageSource, StorageTarget
from lamina.nbd import Export, Server
from lamina.request import Child
from tests.nbd_peers import qemu_nbd

MIB = 1 << 20
SIZE = 8 * MIB + 512
OPTIONS = [[], ["-C", "3", "-R", "2", "--request-size", "4k"], ["--no-extents", "-S", "64k"], ["--allocated"]]


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> bytes:
    """Bytes with zeros of all sizes between them; they are in source.raw, in the working directory."""
    monkeypatch.chdir(tmp_path)
    dice = random.Random(seed)
    disk = bytearray(SIZE)
    for _ in range(40):
        at = dice.randrange(SIZE)
        piece = dice.randbytes(dice.choice([1, 511, 4096, 70_000, 300_000]))[: SIZE - at]
        disk[at : at + len(piece)] = piece
    Path("source.raw").write_bytes(disk)
    return bytes(disk)


@contextmanager
def served(path: str, size: int, *, align: int = 1, rules: Any = ()) -> Iterator[tuple[Image, str]]:
    """A disk of memory, which fails as the rules say, behind our server at the socket `path`; and its address."""
    blocks = {"driver": "blkdebug", "align": align, "image": {"driver": "memory", "size": size}}
    image = lamina.open({"driver": "faults", "rules": list(rules), "image": blocks}, read_only=False)
    with image, Server([Export(image, "disk", writable=True)], unix=path):
        yield image, f"nbd+unix:///disk?socket={path}"


def summary(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["copy", "--output", "json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


TIB = 1 << 40
#: The server fails every request that changes anything.
REFUSES = [{"kind": "zero"}, {"kind": "write"}, {"kind": "discard"}]


@pytest.mark.parametrize("align", [1, 4096])
def test_what_an_empty_export_reads_is_not_made_zero(
    content: bytes, capsys: pytest.CaptureFixture[str], align: int
) -> None:
    with served("empty.sock", 8 * TIB, align=align, rules=REFUSES) as (there, uri):
        found = summary(capsys, "null-co://?size=8T", uri)
        assert (found["zeroed"], found["written"], found["skipped"]) == (0, 0, 8 * TIB)
        Path("zeros.raw").write_bytes(bytes(3 * MIB))  # the source does not say that these are zero
        assert summary(capsys, "zeros.raw", uri)["skipped"] == 3 * MIB
        convert = ["convert", "-n", "-f", "raw", "-O", "raw"]
        for name in ("null-co://?size=8T", "zeros.raw"):
            assert main([*convert, name, uri]) == 0
        assert main(["copy", "--allocated", "zeros.raw", uri]) == 1
        assert "zero" in capsys.readouterr().err
        there.node.rules.clear()  # type: ignore[attr-defined]
        there.write(5 * TIB + 4096, b"old" * 4096)
        assert main(["copy", "null-co://?size=8T", uri]) == 0
        assert not there.extents().where(zero=False)


@pytest.mark.parametrize("align", [1, 4096])
def test_zeros_over_what_is_partly_zero(content: bytes, seed: int, align: int) -> None:
    dice = random.Random(seed)
    with served("old.sock", SIZE + 3584, align=align) as (there, uri):
        for _ in range(3):
            for _ in range(20):
                there.write(dice.randrange(SIZE - 70_000), b"o" * dice.choice([1, 4096, 70_000]))
            assert main(["copy", *dice.choice(OPTIONS), "source.raw", uri]) == 0
            assert there.read(0, SIZE) == content


def test_zeros_over_a_device_or_a_file_that_is_there(content: bytes) -> None:
    Path("there.raw").write_bytes(b"o" * MIB)
    with Path("there.raw").open("r+b") as file:
        file.truncate(SIZE)
    child = Child(Opener(read_only=False).open("there.raw", storage=True), "target")
    target = StorageTarget(child, "there.raw", blank=False, grows=False)
    with ExitStack() as stack:
        stack.callback(target.close)
        source_image = lamina.open("source.raw", format="raw")
        stack.callback(source_image.close)
        done = Copy(StorageSource(source_image), target, Plan()).run()
    assert Path("there.raw").read_bytes() == content
    assert done.skipped


def test_zeros_into_an_empty_image_behind_qemu_nbd(content: bytes, tmp_path: Path) -> None:
    lamina.create("there.qcow2", "qcow2", 64 << 30)
    before = os.path.getsize("there.qcow2")
    with qemu_nbd(tmp_path, "-f", "qcow2", "there.qcow2") as address:
        assert main(["copy", "null-co://?size=64G", address]) == 0
    assert os.path.getsize("there.qcow2") == before

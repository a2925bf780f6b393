"""`lamina create`: the same image as the peer makes with the same arguments."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lamina.cli.main import main
from tests.conftest import Qemu


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["-f", "qcow2", "FILE", "100M"],
        ["FILE", "-f", "qcow2", "100M"],
        ["-qf", "qcow2", "FILE", "1.5G"],
        ["-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", "FILE", "1M"],
        ["-f", "qcow2", "-o", "cluster_size=2M", "-o", "size=3G", "FILE"],
        ["-f", "qcow2", "-o", "compat=0.10", "FILE", "0x100000"],
        ["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "FILE"],
        ["-f", "qcow2", "-b", "base.raw", "-F", "raw", "FILE", "7M"],
        ["-f", "qcow2", "-u", "-b", "missing", "-F", "raw", "FILE", "7M"],
        ["-f", "qcow2", "-o", "backing_file=base.raw,backing_fmt=raw", "FILE"],
        ["-f", "raw", "FILE", "3M"],
        ["FILE", "3M"],
    ],
    ids=" ".join,
)
def test_the_same_image_as_the_peer_makes(
    qemu: Qemu, folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(["create", "-q", "-f", "qcow2", "base.qcow2", "5M"]) == 0
    (folder / "base.raw").write_bytes(bytes(2 << 20))
    assert capsys.readouterr().out == ""
    told = {}
    for name in ("ours", "peers"):
        words = [name if word == "FILE" else word for word in arguments]
        if name == "ours":
            assert main(["create", *words]) == 0
            line = capsys.readouterr().out
            quiet = any(word.startswith("-q") for word in arguments)
            assert line.count("\n") == (0 if quiet else 1)
            assert quiet or line.startswith("Formatting 'ours', fmt=")
        else:
            qemu.img("create", *words)
        told[name] = json.loads(qemu.img("info", "--output=json", name).stdout)
        for key in ("filename", "actual-size", "children"):
            told[name].pop(key, None)
    assert told["ours"] == told["peers"]
    if told["ours"]["format"] == "qcow2" and "-u" not in arguments:
        assert qemu.check("ours")[0] == 0
    assert (folder / "ours").stat().st_mode == (folder / "peers").stat().st_mode


def test_options_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create", "-f", "qcow2", "-o", "help"]) == 0
    told = capsys.readouterr().out
    for name in ("size", "cluster_size", "refcount_bits", "backing_file"):
        assert f"\n  {name}=" in told


def test_sizes_are_exact(folder: Path) -> None:
    assert main(["create", "-q", "a", "1000"]) == 0
    assert (folder / "a").stat().st_size == 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-f", "qcow2", "a"], "size"),
        (["-f", "qcow2", "-o", "size=1M", "a", "1M"], "given twice"),
        (["-f", "qcow2", "-b", "x", "-o", "backing_file=x", "a", "1M"], "given twice"),
        (["-f", "qcow2", "-o", "cluster_size=64k", "-o", "cluster_size=64k", "a", "1M"], "given twice"),
        (["-f", "qcow2", "-o", "cluster_sizes=64k", "a", "1M"], "did you mean cluster_size?"),
        (["-f", "qcow2", "-o", "cluster_size=3k", "a", "1M"], "power of two"),
        (["-f", "qcow2", "-b", "base", "a", "1M"], "format of the backing file"),
        (["-f", "qcow2", "-b", "base", "-F", "raw", "a", "1M"], "base"),
        (["-f", "qcow2", "a", "-1M"], "-1M"),
        (["-f", "blkdebug", "a", "1M"], "blkdebug"),
        (["a", "1M", "b"], "b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_makes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["create", *arguments]) == 1
    assert words in capsys.readouterr().err
    assert os.listdir(folder) == []

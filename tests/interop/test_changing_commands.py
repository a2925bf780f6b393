"""`resize`, `snapshot`, `bitmap` and `amend` beside qemu-img: the same lines, on twin images, end in the same state."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from tests.conftest import Qemu

#: Lines that both programs run, one after the other; the image of each group is new.
GROUPS: dict[str, list[str]] = {
    "resize": [
        "resize disk 20M",
        "resize disk +1M",
        "resize disk -5M",
        "resize --shrink disk -5M",
        "resize disk +0",
        "resize disk 16M",
        "resize -f qcow2 disk +512k",
        "resize --preallocation=metadata disk +1M",
        "resize --preallocation=falloc -q disk +1M",
        "resize --preallocation=full disk +1M",
        "resize --preallocation=metadata --shrink disk -1M",
        "resize --preallocation=other disk +1M",
        "resize disk",
        "resize disk abc",
        "resize disk -1G",
        "resize none 1G",
        "resize --shrink disk 512",
        "resize -f raw disk.raw 2M",
        "resize -f raw disk.raw -1M",
        "resize -f raw --shrink disk.raw -1M",
    ],
    "snapshot": [
        "snapshot disk",
        "snapshot -l disk",
        "snapshot -c one disk",
        "snapshot -c two disk",
        "snapshot -a one disk",
        "snapshot -d two disk",
        "snapshot -a two disk",
        "snapshot -d two disk",
        "snapshot -c three disk",
        "snapshot -a 1 disk",
        "snapshot -l -c x disk",
        "snapshot -d one -a three disk",
        "snapshot -c",
        "snapshot none",
        "snapshot -q -d three disk",
        "snapshot -c x disk.raw",
        "snapshot -U -l disk",
    ],
    "bitmap": [
        "bitmap --add disk b0",
        "bitmap --add -g 4k --disable disk b1",
        "bitmap --merge b0 disk b1",
        "bitmap --remove disk none",
        "bitmap disk b0",
        "bitmap --enable --disable disk b0",
        "bitmap --add --remove disk b3",
        "bitmap --clear --enable disk b1",
        "bitmap --add -g 512 --merge b0 --merge b1 disk b4",
        "bitmap --add disk b4",
        "bitmap --merge none disk b4",
        "bitmap --merge b0 -b other -F qcow2 disk b4",
        "bitmap -b other --add disk b5",
        "bitmap -F qcow2 --add disk b5",
        "bitmap -g 4k --clear disk b4",
        "bitmap --add -g 3 disk b6",
        "bitmap --add -g 4G disk b6",
        "bitmap --add disk",
        "bitmap --remove disk b0",
        "bitmap -f qcow2 --disable disk b1",
        "bitmap --add disk.raw b0",
    ],
    "amend": [
        "amend -o lazy_refcounts=on disk",
        "amend -o refcount_bits=32 disk",
        "amend -o refcount_bits=16,lazy_refcounts=off disk",
        "amend -o compat=0.10 disk",
        "amend -o lazy_refcounts=on disk",
        "amend -o compat=1.1 disk",
        "amend -f qcow2 -o compat=v3 -q disk",
        "amend -o size=12M disk",
        "amend -o nosuch=1 disk",
        "amend -o refcount_bits=3 disk",
        "amend -o cluster_size=4k disk",
        "amend disk",
        "amend -f raw -o size=2M disk.raw",
    ],
}


def state(qemu: Qemu, path: Path) -> Any:
    told = json.loads(qemu.img("info", "--output=json", "-f", "qcow2", path).stdout)
    for name in "filename", "actual-size", "full-backing-filename", "children":
        told.pop(name, None)
    for one in told.get("snapshots", []):
        for name in "date-sec", "date-nsec", "icount":  # QEMU says 0 instructions where it counts none
            one.pop(name, None)
    for one in told["format-specific"]["data"].get("bitmaps", []):
        one["flags"].sort()
    return told


@pytest.mark.peers
@pytest.mark.parametrize("group", GROUPS)
def test_the_same_lines_end_in_the_same_state(
    tmp_path: Path, qemu: Qemu, group: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for folder in folders:
        folder.mkdir()
        (folder / "disk.raw").write_bytes(bytes(1 << 20))
        (folder / "base").write_bytes(bytes(1 << 20))
        for name in "disk", "other":
            qemu.img("create", "-q", "-f", "qcow2", folder / name, "10M")
            qemu.io("-f", "qcow2", "-c", "write -P 1 1M 1M", folder / name)
        qemu.img("bitmap", "--add", folder / "other", "b0")
    for number, line in enumerate(GROUPS[group]):
        words = line.split()
        monkeypatch.chdir(folders[1])
        theirs = qemu.img(*words, check=False)
        monkeypatch.chdir(folders[0])
        ours = main(words)
        said = capsys.readouterr()
        assert ours == theirs.returncode, f"{line}: {said.err} {theirs.stderr}"
        if group == "resize":
            assert said.out == theirs.stdout, line
        assert bool(said.err) == (ours != 0), f"{line}: {said.err}"
        where = "0 512" if group == "resize" else f"{number * 64}k 100k"
        for folder in folders:
            qemu.io("-f", "qcow2", "-c", f"write -P {number + 2} {where}", folder / "disk")
        assert state(qemu, folders[0] / "disk") == state(qemu, folders[1] / "disk"), line
        qemu.img("compare", "-f", "qcow2", "-F", "qcow2", folders[0] / "disk", folders[1] / "disk")
        qemu.img("check", folders[0] / "disk")
        assert os.path.getsize(folders[0] / "disk.raw") == os.path.getsize(folders[1] / "disk.raw")


def test_the_list_of_snapshots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "disk.qcow2")
    lamina.create(path, "qcow2", 1 << 20)
    for name in "first", "second":
        assert main(["snapshot", "-c", name, path]) == 0
    assert main(["snapshot", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Snapshot list:"
    assert [line.split()[:2] for line in lines[2:]] == [["1", "first"], ["2", "second"]]
    assert main(["snapshot", "--output=json", path]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["first", "second"]


def test_a_deletion_is_not_a_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A word that is the id of one snapshot and the name of another deletes neither."""
    path = str(tmp_path / "disk.qcow2")
    lamina.create(path, "qcow2", 1 << 20)
    for name in "first", "1":
        assert main(["snapshot", "-c", name, path]) == 0
    assert main(["snapshot", "-d", "1", path]) == 1
    assert "2 snapshots" in capsys.readouterr().err
    assert main(["snapshot", "-d", "snapshot.name=1", path]) == 0
    with lamina.open(path, format="qcow2") as image:
        assert [one.name for one in image.snapshots()] == ["first"]


def test_what_may_not_be_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(4096))
    assert main(["resize", str(raw), "8k"]) == 1
    assert "-f raw" in capsys.readouterr().err
    assert main(["resize", "-U", "-f", "raw", str(raw), "8k"]) == 1
    assert "omit -U" in capsys.readouterr().err
    assert raw.stat().st_size == 4096
    assert main(["resize", "-f", "raw", "--", str(raw), "+4k"]) == 0
    assert raw.stat().st_size == 8192


def test_amend_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["amend", "-f", "qcow2", "-o", "help"]) == 0
    assert "lazy_refcounts" in capsys.readouterr().out
    assert main(["amend", "-f", "raw", "-o", "help"]) == 1
    assert "no options" in capsys.readouterr().err

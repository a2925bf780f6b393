"""`commit` and `rebase` beside qemu-img: the same lines, in twin folders, end with the same status and the same disks."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from lamina.cli.main import main
from tests.conftest import Qemu

#: Lines that both programs run, each in new folders. `top` lies over `mid`, and that over `base`; `other` and `raw` are
#: not in the chain; `long` is longer than `top`, `short` shorter than its backing file; `lost` names a file that is missing.
LINES = [
    "commit -f qcow2 top",
    "commit -f qcow2 -d top",
    "commit -f qcow2 -b base top",
    "commit -f qcow2 -b mid top",
    "commit -f qcow2 -q top",
    "commit -f qcow2 -p -q top",
    "commit -f qcow2 -b other top",
    "commit -f qcow2 -b nosuch top",
    "commit -f qcow2 base",
    "commit -f raw raw",
    "commit",
    "commit top mid",
    "commit nosuch",
    "commit -f qcow2 short",
    "commit -f qcow2 long",
    "commit -f qcow2 lost",
    "commit -d -f qcow2 short",
    "commit --image-opts driver=qcow2,file.filename=top",
    "commit -f qcow2 --image-opts driver=qcow2,file.filename=top",
    "rebase -f qcow2 -b other -F qcow2 top",
    "rebase -f qcow2 -b raw -F raw top",
    "rebase -f qcow2 -b base -F qcow2 top",
    "rebase -f qcow2 -b mid -F qcow2 top",
    "rebase -f qcow2 -F qcow2 -b other mid",
    "rebase -f qcow2 -b other -F qcow2 base",
    "rebase -f qcow2 -b other -F qcow2 short",
    "rebase -f qcow2 -b raw -F raw long",
    "rebase -f qcow2 -b long -F qcow2 short",
    "rebase -f qcow2 -b other top",
    "rebase -f qcow2 -b nosuch -F qcow2 top",
    "rebase -f qcow2 -F qcow2 top",
    "rebase top",
    "rebase -f qcow2 -u top",
    "rebase -f qcow2 -u -b nosuch -F qcow2 top",
    "rebase -f qcow2 -u -b nosuch top",
    "rebase -f qcow2 -u -b other -F qcow2 lost",
    "rebase -f qcow2 -u -b other -F raw lost",
    "rebase -u -b other -F qcow2 top",
    "rebase -f qcow2 -b other -F qcow2 lost",
    "rebase -f qcow2 -b other -F nosuch top",
    "rebase -f qcow2 -u -b other -F nosuch top",
    "rebase -f raw -b other -F qcow2 raw",
    "rebase -f qcow2 -q -b other -F qcow2 top",
    "rebase -f qcow2 -p -q -b other -F qcow2 top",
    "rebase --image-opts -b other -F qcow2 driver=qcow2,file.filename=top",
    "rebase --image-opts -u -b other -F qcow2 driver=qcow2,file.filename=lost",
    "rebase -f qcow2 -b top -F qcow2 top",
]
#: Qemu writes a name beside it; `-b ""` is no line of words.
EMPTY = [["rebase", "-f", "qcow2", *rest] for rest in (["-b", "", "top"], ["-u", "-b", "", "top"], ["-b", "", "base"])]


def make(qemu: Qemu, folder: Path, seed: int) -> None:
    dice = random.Random(seed)
    folder.mkdir()

    def new(name: str, size: str, backing: str | None, writes: int) -> None:
        over = [] if backing is None else ["-b", backing, "-F", "qcow2"]
        qemu.img(
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            f"cluster_size={dice.choice(['4k', '64k'])}",
            *over,
            folder / name,
            size,
        )
        for _ in range(writes):
            at, length = dice.randrange(1000) * 512, dice.randrange(1, 200) * 512
            how = dice.choice([f"-P {dice.randrange(1, 255)}", "-z", "-P 0"])
            qemu.io("-f", "qcow2", "-c", f"write {how} {at} {length}", folder / name)

    new("base", "2M", None, 6)
    new("mid", "2M", "base", 4)
    new("top", "2M", "mid", 4)
    new("other", "2M", None, 6)
    new("long", "3M", "mid", 3)
    new("short", "1M", "base", 3)
    new("gone", "2M", None, 0)
    new("lost", "2M", "gone", 3)
    (folder / "gone").unlink()
    (folder / "raw").write_bytes(random.Random(seed).randbytes(1 << 20) + bytes(1 << 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, qemu7: Qemu) -> Path:
    """The files as they are before each line."""
    folder = tmp_path_factory.mktemp("twins") / "before"
    make(qemu7, folder, random.randrange(1 << 30))
    return folder


@pytest.mark.peers
def test_rebase_compresses_as_much(tmp_path: Path, folder: Path, qemu10: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option of the newer QEMU, which also compresses what is a zero cluster here."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for twin in ours, theirs:
        shutil.copytree(folder, twin)
    words = ["rebase", "-c", "-f", "qcow2", "-b", "raw", "-F", "raw", "top"]
    monkeypatch.chdir(theirs)
    qemu10.img(*words)
    monkeypatch.chdir(ours)
    assert main(words) == 0
    told = [json.loads(qemu10.img("check", "--output=json", twin / "top").stdout) for twin in (ours, theirs)]
    assert 0 < told[0]["compressed-clusters"] <= told[1]["compressed-clusters"]
    assert told[0]["image-end-offset"] <= told[1]["image-end-offset"]
    qemu10.img("compare", "-f", "qcow2", "-F", "qcow2", ours / "top", theirs / "top")


@pytest.mark.peers
@pytest.mark.parametrize("words", [*map(str.split, LINES), *EMPTY], ids=" ".join)
def test_the_same_lines_end_in_the_same_disks(
    tmp_path: Path,
    folder: Path,
    qemu: Qemu,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for twin in ours, theirs:
        shutil.copytree(folder, twin)
    monkeypatch.chdir(theirs)
    peer = qemu.img(*words, check=False)
    monkeypatch.chdir(ours)
    status = main(words)
    said = capsys.readouterr()
    assert status == peer.returncode, f"{said.err} {peer.stderr}"
    assert said.out == peer.stdout
    for path in sorted(ours.iterdir()):
        contents = {twin.joinpath(path.name).read_bytes() for twin in (folder, ours, theirs)}
        if len(contents) == 1:
            continue
        told = [json.loads(qemu.img("info", "--output=json", twin / path.name).stdout) for twin in (ours, theirs)]
        names = [(one.get("backing-filename"), one.get("backing-filename-format")) for one in told]
        assert names[0] == names[1], path.name
        if names[0][0] is None or (ours / names[0][0]).exists():
            qemu.img("check", "-q", "-f", "qcow2", path)
            qemu.img("compare", "-f", "qcow2", "-F", "qcow2", path, theirs / path.name)

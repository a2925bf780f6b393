"""-l of `convert`: an internal snapshot in place of the disk, named as for QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from tests.conftest import Qemu

SIZE = 1 << 20


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """An image, and its disk at each of its snapshots by id. The name of one is the id of another."""
    path, disks = tmp_path / "disk.qcow2", {}
    lamina.create(path, "qcow2", SIZE, cluster_size=4096)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for number, name in enumerate(("first", "a, b=c", "1", "last")):
            image.write(number * 5000, bytes([number + 1]) * 9000)
            disks[image.create_snapshot(name).id] = image.read(0, SIZE)
        image.write(0, b"now" * 1000)
    return path, disks


@pytest.mark.peers
@pytest.mark.parametrize(
    ("wanted", "id"),
    [
        ("first", "1"),
        ("1", "1"),
        ("4", "4"),
        ("last", "4"),
        ("a, b=c", "2"),
        ("snapshot.id=3", "3"),
        ("snapshot.name=1", "3"),
        ("snapshot.id=3,snapshot.name=1", "3"),
        ("snapshot.name=a,, b=c", "2"),
        ("snapshot.id=1,snapshot.name=1", None),
        ("none", None),
        ("snapshot.id=", None),
        ("", None),
    ],
)
def test_convert_takes_what_qemu_takes(
    tmp_path: Path, images: tuple[Path, dict[str, bytes]], qemu: Qemu, wanted: str, id: str | None
) -> None:
    path, disks = images
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    if id is None:
        assert main(["convert", "-f", "qcow2", "-O", "raw", "-l", wanted, str(path), str(ours)]) == 1
        assert not ours.exists()
        return
    qemu.img("convert", "-f", "qcow2", "-O", "raw", "-l", wanted, path, theirs)
    assert main(["convert", "-f", "qcow2", "-O", "raw", "-l", wanted, str(path), str(ours)]) == 0
    assert ours.read_bytes() == theirs.read_bytes() == disks[id]


def test_the_name_of_the_image_may_be_anything(tmp_path: Path, images: tuple[Path, dict[str, bytes]]) -> None:
    path, disks = images
    ours = tmp_path / "ours"
    for words in (
        [str(path)],
        ["-f", "qcow2", f"file:{path}"],
        ["--image-opts", f"driver=qcow2,file.driver=file,file.filename={path}"],
        [f'json:{{"driver": "qcow2", "file": {{"driver": "file", "filename": "{path}"}}}}'],
        ["--image-opts", f"file.filename={path}"],
        [f'json:{{"file": "{path}"}}'],
        ["-f", "qcow2", f'json:{{"driver": "file", "filename": "{path}"}}'],
        [f"blkdebug::{path}"],
        ["-f", "qcow2", f"blkdebug::{path}"],
    ):
        ours.unlink(missing_ok=True)
        assert main(["convert", "-O", "raw", "-l", "first", *words, str(ours)]) == 0, words
        assert ours.read_bytes() == disks["1"]


def test_of_what_has_no_snapshots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(SIZE))
    assert main(["convert", "-f", "raw", "-O", "raw", "-l", "x", str(raw), str(tmp_path / "new")]) == 1
    assert "snapshots" in capsys.readouterr().err
    assert main(["convert", "-f", "qcow2", "-O", "qcow2", "--bitmaps", "-l", "x", "a", "b"]) == 1
    assert "omit one of them" in capsys.readouterr().err


def test_the_backing_file_of_a_detected_image_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.raw").write_bytes(b"secret" * 1000)
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, backing_file="base.raw", backing_fmt="raw")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.create_snapshot("first")
    assert main(["convert", "-O", "raw", "-l", "first", str(path), str(tmp_path / "new")]) == 1
    assert "is refused" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["convert", "-f", "qcow2", "-O", "raw", "-l", "first", str(path), str(tmp_path / "new")]) == 0
    assert (tmp_path / "new").read_bytes()[:6] == b"secret"
    (tmp_path / "new").unlink()
    named = f'json:{{"driver": "qcow2", "file": "{path}"}}'
    assert main(["convert", "-O", "raw", "-l", "first", named, str(tmp_path / "new")]) == 0

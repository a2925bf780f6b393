"""Images that are opened for writing, or for reading alone, while they are in use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.image import Image
from lamina.testing.interrupts import interrupts
from tests.conftest import Qemu

SIZE = 256 * 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    lamina.create(path, "qcow2", backing_file="base", backing_fmt="raw", cluster_size=4096)
    return path


def spec(path: Path, *filters: dict[str, Any], **file: Any) -> dict[str, Any]:
    graph: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path), **file}}
    for one in filters:
        graph = {**one, "image": graph}
    return graph


def writable(path: Path) -> bool:
    """Whether another user may open it for writing; and for reading: nobody writes."""
    try:
        lamina.open(path, format="qcow2", read_only=False).close()
    except lamina.Locked:
        return False
    return True


def readable(path: Path) -> bool:
    try:
        lamina.open(path, format="qcow2").close()
    except lamina.Locked:
        return False
    return True


@pytest.mark.parametrize(
    "filters",
    [
        (),
        ({"driver": "cache"}, {"driver": "throttle"}, {"driver": "stats"}),
        ({"driver": "blkdebug", "align": 4096}, {"driver": "protect", "ranges": "200k-"}),
    ],
)
@pytest.mark.parametrize("direct", [False, True])
def test_there_and_back(path: Path, qemu: Qemu, filters: tuple[dict[str, Any], ...], direct: bool) -> None:
    with lamina.open(spec(path, *filters, cache={"direct": direct})) as image:
        descriptors = len(os.listdir("/proc/self/fd"))
        for number in range(3):
            with pytest.raises(lamina.ReadOnly):
                image.write(0, b"x")
            assert readable(path)
            image.reopen(read_only=False)
            assert not image.read_only
            assert not readable(path)
            image.write(5000 * number, b"round %d" % number)
            image.reopen(read_only=False)  # it is
            image.reopen(read_only=True)
            assert image.read_only
            assert not writable(path)
            with lamina.open(path, format="qcow2") as reader:
                assert reader.read(5000 * number, 9) == b"round %db" % number + b"b"
                assert reader.node.check().clean  # type: ignore[attr-defined]
        assert len(os.listdir("/proc/self/fd")) == descriptors
    assert qemu.check(path)[0] == 0
    assert writable(path)


def test_raw_memory_and_what_refuses(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(SIZE))
    with lamina.open(tmp_path / "disk.raw", format="raw") as image:
        image.reopen(read_only=False)
        image.write(0, b"written")
    assert (tmp_path / "disk.raw").read_bytes()[:7] == b"written"
    with lamina.open({"driver": "memory", "size": SIZE}) as image:
        image.reopen(read_only=False)
        image.write(0, b"x")
    file = {"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "disk.raw")}}
    with lamina.open({"driver": "readonly", "image": file}) as image, pytest.raises(lamina.ReadOnly):
        image.reopen(read_only=False)
    with lamina.open(tmp_path / "disk.raw", format="raw", force_share=True) as image:
        with pytest.raises(lamina.OptionError, match="force-share"):
            image.reopen(read_only=False)
        assert image.read(0, 7) == b"written"
    with lamina.open(tmp_path / "disk.raw", format="raw", snapshot=True) as image:
        image.reopen(read_only=False)
        image.write(0, b"kept in memory")
        assert (tmp_path / "disk.raw").read_bytes()[:7] == b"written"
        image.reopen(read_only=True)
        assert image.read(0, 14) == b"kept in memory"


def test_another_reader_is_in_the_way_and_all_is_as_it_was(path: Path) -> None:
    with lamina.open(path, format="qcow2") as image:
        with lamina.open(path, format="qcow2") as other:
            with pytest.raises(lamina.Locked):
                image.reopen(read_only=False)
            assert image.read_only
            assert readable(path)
            assert not writable(path)
            assert other.read(0, 2) == image.read(0, 2) == b"bb"
        image.reopen(read_only=False)
        image.write(0, b"x")


def test_what_open_refuses_is_refused(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(79)
        file.write(b"\2")  # marked corrupt
    with lamina.open(path, format="qcow2") as image:
        with pytest.raises(lamina.CorruptImage):
            image.reopen(read_only=False)
        assert image.read_only
        assert image.node.children["file"].node.read_only
        assert readable(path)


def test_users_keep_what_they_may_do(path: Path) -> None:
    image = lamina.open(path, format="qcow2", read_only=False)
    other = image.share()
    image.reopen(read_only=True)
    with pytest.raises(lamina.ReadOnly):
        image.write(0, b"x")
    other.write(0, b"written")
    assert image.read(0, 7) == b"written"
    other.reopen(read_only=True)
    assert readable(path)
    image.reopen(read_only=False)
    with pytest.raises(lamina.ReadOnly):
        other.write(0, b"x")
    image.write(0, b"again")
    file = image.share(image.node.children["file"].node)
    with pytest.raises(lamina.OptionError, match="another node"):
        file.reopen(read_only=False)
    image.close()
    assert other.read(0, 7) == b"againen"
    other.close()
    file.close()
    assert writable(path)


def test_the_file_that_is_open_is_reopened_whatever_its_name_means(path: Path) -> None:
    with lamina.open(path, format="qcow2") as image:
        moved = path.rename(path.with_name("moved.qcow2"))
        path.write_bytes(b"another")
        image.reopen(read_only=False)
        image.write(0, b"written")
        image.reopen(read_only=True)
        with lamina.open(moved, format="qcow2") as again:
            assert again.read(0, 7) == b"written"
    assert path.read_bytes() == b"another"


@pytest.mark.parametrize("read_only", [True, False])
def test_an_interrupt_leaves_an_image_that_can_be_used_and_closed(path: Path, read_only: bool) -> None:
    before = path.read_bytes()
    for interrupt in interrupts(step=3):
        path.write_bytes(before)
        image: Image = lamina.open(path, format="qcow2", read_only=not read_only)
        if read_only:
            image.write(0, b"written")
        interrupt.run(lambda image=image: image.reopen(read_only=read_only))  # type: ignore[misc]
        assert image.read(0, 7) in (b"written", b"bbbbbbb")
        if not image.read_only:
            image.write(0, b"written")
        image.close()
        assert writable(path), interrupt.struck
        with lamina.open(path, format="qcow2") as again:
            assert again.read(7, 1) == b"b"
            assert again.node.check().corruptions == 0, interrupt.struck  # type: ignore[attr-defined]

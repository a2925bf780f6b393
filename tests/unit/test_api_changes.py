"""The public functions that change images in place: commit, rebase, flatten, compact, resize."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from tests.random_changes import changed_meanwhile

from .api_images import MIB, SIZE, WAYS, content, disk, given, overlay, printed


@pytest.mark.parametrize("way", WAYS)
def test_commit(way: str, tmp_path: Path) -> None:
    base = disk(tmp_path / "base.qcow2")
    top = overlay(tmp_path / "top.qcow2", base)
    before = content(top, "qcow2")
    with given(way, top, "qcow2", read_only=False) as (it, format):
        done = lamina.commit(it, format=format)
    assert done == lamina.CommitResult(str(top), str(base), SIZE, MIB, MIB, 0, True)
    assert done.to_json() == {
        "image": str(top), "base": str(base), "size": SIZE, "read": MIB, "written": MIB, "zeroed": 0, "emptied": True,
    }  # fmt: skip
    assert content(base, "qcow2") == content(top, "qcow2") == before
    assert all(extent.depth > 0 for extent in lamina.map(top, format="qcow2"))


def test_commit_to_a_file_further_down_keeps_the_overlay(tmp_path: Path) -> None:
    base = disk(tmp_path / "base.qcow2")
    middle = overlay(tmp_path / "middle.qcow2", base)
    top = overlay(tmp_path / "top.qcow2", middle)
    done = lamina.commit(top, base, format="qcow2", rate="1G")
    assert (done.base, done.emptied) == (str(base), False)
    assert content(base, "qcow2") == content(top, "qcow2")
    with pytest.raises(lamina.OptionError, match="not a backing file"):
        lamina.commit(top, tmp_path / "other", format="qcow2")


def test_commit_without_emptying_needs_no_writable_overlay(tmp_path: Path) -> None:
    base = disk(tmp_path / "base.qcow2")
    top = overlay(tmp_path / "top.qcow2", base)
    with lamina.open(top, format="qcow2") as image:
        with pytest.raises(lamina.ReadOnly):
            lamina.commit(image)
        assert not lamina.commit(image, empty=False).emptied
        assert image.read_only
    assert content(base, "qcow2") == content(top, "qcow2")


@pytest.mark.parametrize("way", WAYS)
def test_rebase(way: str, tmp_path: Path) -> None:
    base, other = disk(tmp_path / "base.qcow2"), disk(tmp_path / "other.qcow2", seed=9)
    top = overlay(tmp_path / "top.qcow2", base)
    before = content(top, "qcow2")
    with given(way, top, "qcow2", read_only=False) as (it, format):
        done = lamina.rebase(it, "other.qcow2", "qcow2", format=format)
    assert (done.image, done.size, done.backing, done.backing_format) == (str(top), SIZE, "other.qcow2", "qcow2")
    assert done.written == SIZE // 2
    assert done.to_json()["backing-format"] == "qcow2"
    assert lamina.info(top).backing_filename == "other.qcow2"
    assert content(top, "qcow2") == before
    assert content(other, "qcow2") != before


def test_rebase_to_none(tmp_path: Path) -> None:
    top = overlay(tmp_path / "top.qcow2", disk(tmp_path / "base.qcow2"))
    before = content(top, "qcow2")
    done = lamina.rebase(top, None, format="qcow2")
    assert done.backing is None
    assert "backing" not in done.to_json()
    assert lamina.info(top).backing_filename is None
    assert content(top, "qcow2") == before


def test_rebase_compresses_what_it_takes_over(tmp_path: Path) -> None:
    top = overlay(tmp_path / "top.qcow2", disk(tmp_path / "base.qcow2"))
    before = content(top, "qcow2")
    lamina.rebase(top, None, format="qcow2", compress=True)
    assert [extent.compressed for extent in lamina.map(top, 0, MIB, format="qcow2")] == [True]
    assert content(top, "qcow2") == before
    with pytest.raises(lamina.OptionError, match="nothing is taken over"):
        lamina.rebase(top, None, format="qcow2", compress=True, name_only=True)


@pytest.mark.parametrize("way", [*WAYS, "probe"])
def test_rebase_of_the_name_alone_needs_no_backing_file(way: str, tmp_path: Path) -> None:
    base = disk(tmp_path / "base.qcow2")
    top = overlay(tmp_path / "top.qcow2", base)
    moved = tmp_path / "moved.qcow2"
    if way != "image":
        base.rename(moved)
    with given("path" if way == "probe" else way, top, "qcow2", read_only=False) as (it, format):
        format = "probe" if way == "probe" else format
        done = lamina.rebase(it, "moved.qcow2", "qcow2", format=format, name_only=True)
    assert (done.written, done.backing) == (0, "moved.qcow2")
    assert lamina.info(top).backing_filename == "moved.qcow2"
    with pytest.raises(lamina.OptionError, match="the format of the backing file is not given"):
        lamina.rebase(top, "moved.qcow2", format="qcow2", name_only=True)
    with pytest.raises(lamina.OptionError, match="the format is not given"):
        lamina.rebase(top, "moved.qcow2", "qcow2", name_only=True)


@pytest.mark.parametrize("way", WAYS)
def test_flatten(way: str, tmp_path: Path) -> None:
    base = disk(tmp_path / "base.qcow2")
    top = overlay(tmp_path / "top.qcow2", base)
    before, below = content(top, "qcow2"), base.read_bytes()
    with given(way, top, "qcow2", read_only=False) as (it, format):
        done = lamina.flatten(it, format=format)
    assert done == lamina.FlattenResult(str(top), SIZE, SIZE // 2, SIZE // 2, 0, str(base))
    assert done.to_json() == {
        "image": str(top), "size": SIZE, "read": SIZE // 2, "written": SIZE // 2, "zeroed": 0, "backing": str(base),
    }  # fmt: skip
    assert base.read_bytes() == below
    base.unlink()
    assert content(top, "qcow2") == before
    assert lamina.flatten(top, format="qcow2") == lamina.FlattenResult(str(top), SIZE, 0, 0, 0)


def test_what_flatten_refuses(tmp_path: Path) -> None:
    top = overlay(tmp_path / "top.qcow2", disk(tmp_path / "base.qcow2"))
    with lamina.open(top, format="qcow2") as image, pytest.raises(lamina.ReadOnly):
        lamina.flatten(image)
    with lamina.open(top, format="qcow2", read_only=False) as image:
        with pytest.raises(lamina.LimitExceeded, match="1048576"):
            lamina.flatten(image, max_output="1M")
        image.create_snapshot("one")
        with pytest.raises(lamina.OptionError, match="snapshot"):
            lamina.flatten(image)
    with pytest.raises(lamina.UnsupportedFeature, match="raw has no backing files"):
        lamina.flatten(disk(tmp_path / "disk.raw", "raw"), format="raw")


@pytest.mark.parametrize("way", WAYS)
def test_compact(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = disk(tmp_path / "disk.qcow2")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, bytes(MIB))
    shutil.copy(path, tmp_path / "second.qcow2")
    before, was = content(path, "qcow2"), path.stat()
    with given(way, path, "qcow2", read_only=False) as (it, format):
        done = lamina.compact(it, format=format, parallel=1)
    now = path.stat()
    assert (done.image, done.leaks, done.zeroed) == (str(path), 0, MIB)
    assert done.length == (was.st_size, now.st_size)
    assert done.allocated == (was.st_blocks * 512, now.st_blocks * 512)
    assert done.given_back == (was.st_blocks - now.st_blocks) * 512 >= MIB
    assert content(path, "qcow2") == before
    told = printed(capsys, "compact", "-f", "qcow2", tmp_path / "second.qcow2")
    assert {**done.to_json(), "filename": str(tmp_path / "second.qcow2")} == told
    assert lamina.compact(path, format="qcow2").given_back == 0


def test_what_compact_refuses(tmp_path: Path) -> None:
    path = disk(tmp_path / "disk.qcow2")
    with lamina.open(path, format="qcow2") as image, pytest.raises(lamina.ReadOnly):
        lamina.compact(image)
    spec = {"driver": "stats", "image": {"driver": "qcow2", "file": {"filename": str(path)}}}
    with pytest.raises(lamina.UnsupportedFeature, match="no file of its own"):
        lamina.compact(spec)
    with pytest.raises(lamina.OptionError, match="17"):
        lamina.compact(path, format="qcow2", parallel=17)


def test_others_write_while_an_image_is_compacted(tmp_path: Path) -> None:
    """What they do at the same time is no damage."""
    lamina.create(tmp_path / "disk.qcow2", "qcow2", 64 * MIB)
    with lamina.open(tmp_path / "disk.qcow2", format="qcow2", read_only=False) as image:
        with changed_meanwhile(image):
            for _ in range(10):
                assert lamina.compact(image).leaks == 0
        assert lamina.check(image).clean


@pytest.mark.parametrize("way", WAYS)
def test_resize(way: str, tmp_path: Path) -> None:
    path = disk(tmp_path / "a.qcow2")
    with given(way, path, "qcow2", read_only=False) as (it, format):
        assert lamina.resize(it, "+1M", format=format) == lamina.ResizeResult(str(path), SIZE, SIZE + MIB)
        assert lamina.resize(it, 12 * MIB, format=format).new_size == 12 * MIB
        with pytest.raises(lamina.OptionError, match=r"would lose .*shrink=True"):
            lamina.resize(it, "4M", format=format)
        with pytest.raises(lamina.OptionError, match="smaller than empty"):
            lamina.resize(it, "-1G", format=format, shrink=True)
        with pytest.raises(lamina.OptionError, match="nothing to preallocate"):
            lamina.resize(it, "-1M", format=format, shrink=True, preallocation="full")
        done = lamina.resize(it, "-8M", format=format, shrink=True)
    assert done.to_json() == {"image": str(path), "old-size": 12 * MIB, "new-size": 4 * MIB}
    assert lamina.info(path).virtual_size == 4 * MIB


@pytest.mark.parametrize("size", ["++5", "+-5", "-+5", "--5", "+ +5", " ++1M", "+", "-", "", "+x"])
def test_a_size_has_one_sign(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = disk(tmp_path / "a.qcow2")
    before = path.read_bytes()
    with pytest.raises(lamina.OptionError, match="is not a size"):
        lamina.resize(path, size, format="qcow2", shrink=True)
    if size:
        assert main(["resize", "--shrink", "-f", "qcow2", str(path), size]) == 1
        assert capsys.readouterr().err.startswith("lamina: ")
    assert path.read_bytes() == before


def test_spaces_before_a_difference_do_not_make_it_a_size(tmp_path: Path) -> None:
    path = disk(tmp_path / "a.qcow2")
    assert lamina.resize(path, " +1M ", format="qcow2", shrink=True).new_size == SIZE + MIB
    assert lamina.resize(path, "- 1M", format="qcow2", shrink=True).new_size == SIZE


def test_truncate_takes_no_difference(tmp_path: Path) -> None:
    """It would be taken for the size itself, and everything behind it would be lost."""
    path = disk(tmp_path / "a.qcow2")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for size in ("+1M", " +1M", "-1M"):
            with pytest.raises(lamina.OptionError):
                image.truncate(size)
        assert image.size == SIZE


def test_changes_need_a_format_and_a_writable_image(tmp_path: Path) -> None:
    path = disk(tmp_path / "a.raw", "raw")
    with pytest.raises(lamina.OptionError, match="not guessed"):
        lamina.resize(path, "+1M")
    with pytest.raises(lamina.OptionError, match="no magic was found"):
        lamina.resize(path, "+1M", format="probe")
    with lamina.open(path, format="raw") as image, pytest.raises(lamina.ReadOnly):
        lamina.resize(image, "+1M")

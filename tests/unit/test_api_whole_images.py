"""The public functions that read whole images: convert, copy, compare, diff, map, measure, detect."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main

from .api_images import MIB, SIZE, WAYS, Counter, content, disk, given, overlay, printed


@pytest.mark.parametrize("way", WAYS)
def test_convert_makes_an_equal_image(way: str, tmp_path: Path) -> None:
    source, target = disk(tmp_path / "a.qcow2"), tmp_path / "b.raw"
    progress = Counter()
    with given(way, source, "qcow2") as (it, format):
        done = lamina.convert(it, target, "raw", format=format, progress=progress)
    assert content(target, "raw") == content(source, "qcow2")
    assert done == lamina.ConvertResult(str(source), str(target), "raw", SIZE, SIZE // 2, SIZE // 2, 0, 0, 0)
    assert done.to_json()["written"] == SIZE // 2
    assert json.loads(json.dumps(done.to_json())) == done.to_json()
    assert progress.calls[-1] == (SIZE, SIZE)


def test_convert_takes_the_options_of_the_command(tmp_path: Path) -> None:
    source = disk(tmp_path / "a.qcow2")
    small = tmp_path / "small.qcow2"
    options = {"cluster_size": "2M", "size": "9M"}
    lamina.convert(source, small, "qcow2", format="qcow2", compress=True, compression_level=9, options=options)
    found = lamina.info(small)
    assert (found.cluster_size, found.virtual_size) == (2 * MIB, 9 * MIB)
    assert all(extent.compressed for extent in lamina.map(small, format="qcow2") if extent.data and not extent.zero)
    assert content(small, "qcow2")[:SIZE] == content(source, "qcow2")
    dense = tmp_path / "dense.raw"
    done = lamina.convert(source, dense, "raw", format="qcow2", smallest_hole=0, parallel=2, in_order=False, rate="1G")
    assert done.written == SIZE
    assert os.stat(dense).st_blocks * 512 >= SIZE


@pytest.mark.parametrize("how", ["backing", "options"])
def test_convert_makes_an_overlay(how: str, tmp_path: Path) -> None:
    base = disk(tmp_path / "base.qcow2")
    top = overlay(tmp_path / "top.qcow2", base)
    target = tmp_path / "new.qcow2"
    names: dict[str, Any] = {"backing": "base.qcow2", "backing_format": "qcow2"}
    if how == "options":
        names = {"options": {"backing_file": "base.qcow2", "backing_fmt": "qcow2"}}
    done = lamina.convert(top, target, "qcow2", format="qcow2", **names)
    assert done.written == MIB
    assert lamina.info(target).backing_filename == "base.qcow2"
    assert content(target, "qcow2") == content(top, "qcow2")


def test_convert_copies_a_snapshot_and_bitmaps(tmp_path: Path) -> None:
    source = disk(tmp_path / "a.qcow2")
    before = content(source, "qcow2")
    with lamina.open(source, format="qcow2", read_only=False) as image:
        image.create_snapshot("monday")
        image.add_bitmap("daily")
        image.write(0, b"new" * 1000)
    lamina.convert(source, tmp_path / "then.raw", "raw", format="qcow2", source_snapshot="monday")
    assert content(tmp_path / "then.raw", "raw") == before
    lamina.convert(source, tmp_path / "now.qcow2", "qcow2", format="probe", bitmaps="all")
    with lamina.open(tmp_path / "now.qcow2", format="qcow2") as image:
        assert list(image.bitmaps["daily"].dirty(0, SIZE)) == [(0, 65536)]
    lamina.convert(tmp_path / "then.raw", tmp_path / "full.qcow2", "qcow2", format="raw")
    done = lamina.convert(
        source, tmp_path / "inc.qcow2", "qcow2", format="qcow2",
        backing="full.qcow2", backing_format="qcow2", changed="daily",
    )  # fmt: skip
    assert done.written == 65536
    assert content(tmp_path / "inc.qcow2", "qcow2") == content(source, "qcow2")


def test_convert_salvages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = disk(tmp_path / "a.raw", "raw")
    rules = [{"event": "none", "iotype": "read", "errno": 5, "sector": 4, "once": False}]
    broken = {
        "driver": "blkdebug",
        "inject-error": rules,
        "image": {"driver": "raw", "file": {"filename": str(source)}},
    }
    done = lamina.convert(broken, tmp_path / "b.raw", "raw", salvage=True)
    assert done.unreadable == 512
    assert "512 bytes at offset 2048 could not be read" in caplog.text
    assert all(record.name.split(".")[0] == "lamina" for record in caplog.records)
    with pytest.raises(lamina.BlockIOError):
        lamina.convert(broken, tmp_path / "c.raw", "raw")
    assert not (tmp_path / "c.raw").exists()


@pytest.mark.parametrize("way", WAYS)
def test_convert_overwrites_an_existing_image(way: str, tmp_path: Path) -> None:
    source = disk(tmp_path / "a.qcow2")
    target = disk(tmp_path / "b.qcow2", seed=50)
    inode = target.stat().st_ino
    with given(way, target, "qcow2", read_only=False) as (it, format):
        done = lamina.convert(source, it, format, format="qcow2", create=False)
    assert (done.written, done.target, target.stat().st_ino) == (SIZE // 2, str(target), inode)
    assert content(target, "qcow2") == content(source, "qcow2")
    again = lamina.convert(source, target, "qcow2", format="qcow2", create=False, only_differences=True)
    assert again.written == 0


def test_what_convert_refuses(tmp_path: Path) -> None:
    source = disk(tmp_path / "a.qcow2")
    target = tmp_path / "b.raw"
    with lamina.open(source, format="qcow2") as image:
        with pytest.raises(lamina.OptionError, match="format is for an image that is not open yet"):
            lamina.convert(image, target, "raw", format="qcow2")
        with pytest.raises(lamina.OptionError, match="source_snapshot is for"):
            lamina.convert(image, target, "raw", source_snapshot="x")
        with pytest.raises(lamina.ReadOnly):
            lamina.convert(target_of(tmp_path), image, format="raw")
        with pytest.raises(lamina.OptionError, match="the source itself"):
            lamina.convert(image, source, "raw")
    with pytest.raises(lamina.Closed):
        lamina.convert(image, target, "raw")
    with pytest.raises(lamina.OptionError, match="not given, and is not guessed"):
        lamina.convert(source, target, "raw")
    with pytest.raises(lamina.OptionError, match="the format of the target is not given"):
        lamina.convert(source, target, format="qcow2")
    for word in ("target_is_zero", "only_differences"):
        with pytest.raises(lamina.OptionError, match=f"{word} is for an existing target"):
            lamina.convert(source, target, "raw", format="qcow2", **{word: True})  # type: ignore[arg-type]
    with pytest.raises(lamina.OptionError, match="is for a new target"):
        lamina.convert(source, target, "raw", format="qcow2", create=False, backing="x")
    with pytest.raises(lamina.LimitExceeded, match="more than the 1024 bytes"):
        lamina.convert(source, target, "raw", format="qcow2", max_output="1k")
    assert not target.exists()


def target_of(folder: Path) -> Path:
    path = folder / "small.raw"
    path.write_bytes(b"x" * 512)
    return path


@pytest.mark.parametrize("way", WAYS)
def test_copy_copies_bytes(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = disk(tmp_path / "a.raw", "raw"), tmp_path / "b.raw"
    with given(way, source, "raw") as (it, _):
        done = lamina.copy(it, target, flush=True)
    assert target.read_bytes() == source.read_bytes()
    assert (done.size, done.read, done.written, done.flushed) == (SIZE, SIZE // 2, SIZE // 2, True)
    if way == "name":
        command = printed(capsys, "copy", "--flush", source, tmp_path / "c.raw")
        assert done.to_json() | {"seconds": 0, "target": ""} == command | {"seconds": 0, "target": ""}
        assert list(done.to_json()) == list(command)


def test_copy_writes_in_place(tmp_path: Path) -> None:
    source, target = disk(tmp_path / "a.raw", "raw"), disk(tmp_path / "b.qcow2", seed=50, size=SIZE + MIB)
    with lamina.open(target, format="qcow2", read_only=False) as image:
        tail = image.read(SIZE, MIB)
        done = lamina.copy(source, image)
        assert image.read(0, SIZE) == source.read_bytes()
        assert image.read(SIZE, MIB) == tail
    assert (done.source, done.target) == (str(source), str(target))
    with lamina.open(target, format="qcow2") as image, pytest.raises(lamina.ReadOnly):
        lamina.copy(source, image)
    with pytest.raises(lamina.OptionError, match="this is the source itself"):
        lamina.copy(source, source)


def test_copy_goes_on_with_a_journal(tmp_path: Path) -> None:
    source, target, journal = disk(tmp_path / "a.raw", "raw"), tmp_path / "b.raw", tmp_path / "journal"

    def stop(done: int, total: int) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError):
        lamina.copy(source, target, journal=journal, progress=stop)
    assert journal.exists()
    assert not target.exists()
    done = lamina.copy(source, target, journal=journal)
    assert done.resumed > 0
    assert target.read_bytes() == source.read_bytes()
    assert not journal.exists()
    with lamina.open(source, format="raw") as image, pytest.raises(lamina.OptionError, match="names the source"):
        lamina.copy(image, target, journal=journal)


@pytest.mark.parametrize("first_way", WAYS)
@pytest.mark.parametrize("second_way", ["path", "image"])
def test_compare(first_way: str, second_way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = disk(tmp_path / "a.qcow2")
    second = tmp_path / "b.raw"
    lamina.convert(first, second, "raw", format="qcow2")
    with given(first_way, first, "qcow2") as (a, af), given(second_way, second, "raw") as (b, bf):
        found = lamina.compare(a, b, first_format=af, second_format=bf)
        assert found == lamina.CompareResult(str(first), str(second), SIZE, SIZE, True)
        assert found.to_json() == {
            "first": str(first), "second": str(second), "first-size": SIZE, "second-size": SIZE, "identical": True,
        }  # fmt: skip
    with lamina.open(second, format="raw", read_only=False) as image:
        image.write(5 * MIB + 7, b"!")
    with given(first_way, first, "qcow2") as (a, af), given(second_way, second, "raw") as (b, bf):
        found = lamina.compare(a, b, first_format=af, second_format=bf)
        ranges = list(lamina.diff(a, b, first_format=af, second_format=bf, granularity="4k"))
    assert (found.identical, found.difference, found.offset) == (False, "content", 5 * MIB + 7)
    assert ranges == [lamina.Range(5 * MIB, 4096)]
    assert main(["compare", "-f", "qcow2", "-F", "raw", str(first), str(second)]) == 1
    assert f"offset {5 * MIB + 7}!" in capsys.readouterr().out


def test_compare_strictly(tmp_path: Path) -> None:
    first, second = disk(tmp_path / "a.qcow2"), disk(tmp_path / "b.qcow2", size="9M")
    found = lamina.compare(first, second, first_format="qcow2", second_format="qcow2", strict=True)
    assert (found.difference, found.offset) == ("size", SIZE)
    assert (found.first_size, found.second_size) == (SIZE, 9 * MIB)


def test_diff_opens_when_it_is_asked(tmp_path: Path) -> None:
    with pytest.raises(lamina.OptionError):
        lamina.diff("a", "b", granularity=3)
    never = lamina.diff(tmp_path / "a", tmp_path / "b", first_format="raw", second_format="raw")
    with pytest.raises(lamina.NotFound):
        next(never)


@pytest.mark.parametrize("way", WAYS)
def test_map(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = disk(tmp_path / "a.qcow2")
    with given(way, source, "qcow2") as (it, format):
        found = lamina.map(it, format=format)
        part = lamina.map(it, "1M", "2M", format=format, exact=False)
    assert [(row.start, row.length, row.data) for row in found][:2] == [(0, MIB, True), (MIB, MIB, False)]
    assert (part.begin, part.end) == (MIB, 3 * MIB)
    command = printed(capsys, "map", "-f", "qcow2", source)
    assert [(row.start, row.length, row.data, row.zero, row.depth) for row in found] == [
        (row["start"], row["length"], row["data"], row["zero"], row["depth"]) for row in command
    ]
    with pytest.raises(lamina.OutOfRange):
        lamina.map(source, SIZE, 1, format="qcow2", exact=False)


def test_map_rounds_as_the_command_does(tmp_path: Path) -> None:
    source = disk(tmp_path / "a.raw", "raw")
    coarse = {"driver": "blkdebug", "align": 4096, "image": {"driver": "raw", "file": {"filename": str(source)}}}
    found = lamina.map(coarse, 100, 10, exact=False)
    assert (found.begin, found.end) == (0, 4096)
    assert lamina.map(coarse, 100, 10).end == 110


@pytest.mark.parametrize("way", WAYS)
def test_measure(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = disk(tmp_path / "a.raw", "raw")
    with given(way, source, "raw") as (it, format):
        found = lamina.measure(it, "qcow2", format=format, options={"cluster_size": "2M"})
    assert found.to_json() == printed(capsys, "measure", "-O", "qcow2", "-o", "cluster_size=2M", "-f", "raw", source)
    empty = lamina.measure(None, "qcow2", size="10G")
    assert empty.to_json() == printed(capsys, "measure", "-O", "qcow2", "--size", "10G")
    for arguments in ((None, None), (source, 1)):
        with pytest.raises(lamina.OptionError):
            lamina.measure(arguments[0], "qcow2", size=arguments[1], format="raw")


@pytest.mark.parametrize("way", WAYS)
def test_detect(way: str, tmp_path: Path) -> None:
    source = disk(tmp_path / "a.qcow2")
    with given(way, source, "raw") as (it, _):
        found = lamina.detect(it)
    assert (found.format, found.matches, found.certain) == ("qcow2", ("qcow2",), True)
    assert found.to_json() == {"filename": str(source), "format": "qcow2", "matches": ["qcow2"], "contents": []}


def test_what_cannot_be_detected(tmp_path: Path) -> None:
    path = tmp_path / "both"
    path.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(56) + b"\x7f\x10\xda\xbe" + bytes(4096))
    found = lamina.detect(path)
    assert found.matches == ("qcow2", "vdi")
    assert "format" not in found.to_json()
    with pytest.raises(lamina.FormatError):
        found.format  # noqa: B018


def test_the_old_name_of_detect_names_the_line_of_its_caller(tmp_path: Path) -> None:
    source = disk(tmp_path / "a.qcow2")
    with pytest.warns(DeprecationWarning, match=r"lamina\.detect") as caught:
        assert lamina.probe(source) == "qcow2"
    assert caught[0].filename == __file__


def test_sizes_are_numbers_or_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    lamina.create(path, "qcow2", size="10M")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        assert image.size == 10 * MIB
        image.truncate("20M")
        assert image.size == 20 * MIB
        last = image.extents().length[-1]  # an integer of numpy
        image.truncate(last)
        assert image.size == int(last)
        with pytest.raises(lamina.OptionError):
            image.truncate("20 apples")
    with pytest.raises(lamina.OptionError, match="rate is True"):
        lamina.convert(path, tmp_path / "b", "raw", format="qcow2", rate=True)


def test_references_are_a_policy(tmp_path: Path) -> None:
    source = disk(tmp_path / "a.qcow2")
    wrong: Any = "none"
    with pytest.raises(lamina.OptionError, match=r"not a Policy.*Policy\.parse"):
        lamina.open(source, format="qcow2", references=wrong)
    with pytest.raises(lamina.OptionError, match="not a Policy"):
        lamina.convert(source, tmp_path / "b.raw", "raw", format="qcow2", references=wrong)


def test_sources_are_not_changed(tmp_path: Path) -> None:
    source = disk(tmp_path / "a.qcow2")
    before = hashlib.sha256(source.read_bytes()).digest()
    lamina.map(source, format="qcow2")
    lamina.measure(source, "raw", format="qcow2")
    lamina.convert(source, tmp_path / "b.raw", "raw", format="qcow2")
    lamina.compare(source, source, first_format="qcow2", second_format="qcow2")
    lamina.copy(source, tmp_path / "c")
    lamina.detect(source)
    assert hashlib.sha256(source.read_bytes()).digest() == before


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    source = disk(tmp_path / "a.qcow2")
    top = overlay(tmp_path / "top.qcow2", source)
    for call in (
        lambda: lamina.convert(source, name, "raw", format="qcow2"),
        lambda: lamina.copy(source, tmp_path / "c", journal=name),
        lambda: lamina.view(source, first_format="qcow2", output=name),
        lambda: lamina.commit(top, name, format="qcow2"),
        lambda: lamina.open(name, format="qcow2"),
    ):
        with pytest.raises(lamina.OptionError):
            call()


@pytest.mark.parametrize("name", [b"a.qcow2", 5, None, ["a.qcow2"]])
def test_what_is_no_name_is_refused(name: Any, tmp_path: Path) -> None:
    source = disk(tmp_path / "a.qcow2")
    for call in (
        lambda: lamina.open(name, format="qcow2"),
        lambda: lamina.info(name),
        lambda: lamina.convert(name, tmp_path / "b", "raw", format="qcow2"),
        lambda: lamina.convert(source, name, "raw", format="qcow2"),
        lambda: lamina.copy(source, name),
    ):
        with pytest.raises(lamina.OptionError) as caught:
            call()
        assert str(caught.value)

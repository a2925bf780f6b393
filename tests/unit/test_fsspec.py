"""`lamina.fsspec`: disks and partitions inside images as files of fsspec."""

from __future__ import annotations

import os
import pickle
import stat
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import quote

import pytest

import lamina

from ..conftest import in_ci
from .test_filter_partition import gpt

if not in_ci():
    pytest.importorskip("fsspec")

import fsspec

from lamina.fsspec import ImageFile, ImageFileSystem

MIB = 1 << 20
TABLE = b"name,count\n" + b"".join(b"row%d,%d\n" % (number, number * number) for number in range(5000))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the entry point does it, also where the package is not installed."""
    fsspec.register_implementation("lamina", ImageFileSystem, clobber=True)


@pytest.fixture
def disk(tmp_path: Path) -> str:
    """A qcow2 image with a GPT: partition 1 holds a table of text, partition 5 zeros, and the bytes between are `x`."""
    path = str(tmp_path / "disk.qcow2")
    lamina.create(path, "qcow2", 16 * MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for offset, part in gpt(16 * MIB, 512, {1: (2048, 4095), 5: (8192, 8199)}).items():
            image.write(offset, part)
        image.write(2 * MIB, b"x" * MIB)
        image.write(MIB, TABLE)
    return path


def test_the_package_registers_it() -> None:
    found = [point for point in entry_points(group="fsspec.specs") if point.name == "lamina"]
    # An installation that is older than this file system has no such entry point.
    assert [point.value for point in found] in ([], ["lamina.fsspec.ImageFileSystem"])
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."fsspec.specs"]\nlamina = "lamina.fsspec.ImageFileSystem"\n' in project


def test_a_partition_and_a_disk_are_files(disk: str) -> None:
    with fsspec.open(f"lamina://{disk}?format=qcow2&partition=1", "rb") as file:
        assert file.size == MIB
        assert file.read(len(TABLE)) == TABLE
        assert file.read() == bytes(MIB - len(TABLE))
        assert file.read(1) == b""
        assert file.seek(-3, os.SEEK_END) == MIB - 3
        assert file.read(100) == bytes(3)
        file.seek(5)
        assert file.readline() == b"count\n"
        buffer = bytearray(4)
        assert file.readinto(buffer) == 4
        assert buffer == b"row0"
    with fsspec.open(f"lamina://{disk}", "rt", format="qcow2") as file:
        assert file.seek(MIB) == MIB
        assert file.readline() == "name,count\n"
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_relative_paths(disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(os.path.dirname(disk))
    for path in ("lamina://disk.qcow2?partition=1", "disk.qcow2?partition=1", "./disk.qcow2?partition=1"):
        assert ImageFileSystem(format="qcow2").cat_file(path, 0, 4) == b"name"


def test_what_a_disk_contains(disk: str) -> None:
    fs = fsspec.filesystem("lamina", format="qcow2")
    names = [disk, f"{disk}?partition=1", f"{disk}?partition=5"]
    assert fs.ls(disk, detail=False) == names
    assert [one["size"] for one in fs.ls(disk)] == [16 * MIB, MIB, 4096]
    assert fs.ls(names[1], detail=False) == names[1:2]
    assert fs.find(disk) == names
    assert fs.du(disk, total=False) == dict(zip(names, (16 * MIB, MIB, 4096), strict=True))
    assert [fs.info(name) for name in names] == fs.ls(disk)
    assert fs.info(names[1]) | {"mtime": 0, "version": ""} == {
        "name": names[1],
        "size": MIB,
        "type": "file",
        "format": "qcow2",
        "mtime": 0,
        "version": "",
    }
    assert ImageFileSystem().ls(f"{disk}?format=probe", detail=False)[1] == f"{disk}?format=probe&partition=1"
    assert fs.isfile(names[2])
    assert not fs.isdir(disk)
    assert fs.glob(names[1]) == [names[1]]
    assert fs.glob(f"{disk}?partition=7") == []


def test_a_disk_without_partitions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(bytes(4096))
    assert ImageFileSystem(format="raw").ls(str(tmp_path / "plain"), detail=False) == [str(tmp_path / "plain")]
    (tmp_path / "bad").write_bytes(gpt(MIB, 512, {})[0].ljust(MIB, b"\0"))
    with pytest.raises(lamina.CorruptImage):
        ImageFileSystem(format="raw").ls(str(tmp_path / "bad"))


def test_ranges(disk: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("lamina", format="qcow2")
    one, none = f"{disk}?partition=1", str(tmp_path / "none")
    assert fs.cat_file(one, 5, 10) == b"count"
    assert fs.cat_file(one, -2) == bytes(2)
    assert fs.cat_file(one, MIB - 1, MIB + 100) == b"\0"
    assert fs.cat_file(one, 10, 5) == b""
    assert fs.cat_file(disk, MIB, MIB + 4) == b"name"
    found = fs.cat_ranges([one, disk, none, one], [0, MIB + 5, 0, 5], [4, MIB + 10, 4, 6])
    assert [found[0], found[1], found[3]] == [b"name", b"count", b"c"]
    assert isinstance(found[2], FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges([one, none], 0, 4, on_error="raise")
    with pytest.raises(lamina.OptionError):
        fs.cat_ranges([one], [0, 1], [4])
    assert fs.cat([one, f"{disk}?partition=5"])[f"{disk}?partition=5"] == bytes(4096)
    assert fs.head(one, 4) == b"name"
    assert fs.tail(one, 4) == bytes(4)


def test_copies_out_of_an_image(disk: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("lamina", format="qcow2")
    fs.get_file(f"{disk}?partition=1", str(tmp_path / "one"))
    fs.get(f"{disk}?partition=5", str(tmp_path / "five"))
    fs.get(f"lamina://{disk}?partition=5", tmp_path)
    assert (tmp_path / "disk.qcow2?partition=5").read_bytes() == bytes(4096)
    assert (tmp_path / "one").read_bytes()[: len(TABLE)] == TABLE
    assert (tmp_path / "five").read_bytes() == bytes(4096)
    with fsspec.open(f"simplecache::lamina://{disk}?partition=1", lamina={"format": "qcow2"}) as file:
        assert file.read(4) == b"name"


def test_a_copy_never_overwrites_a_file_of_the_image(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = str(tmp_path / "top.qcow2")
    lamina.create(top, "qcow2", backing_file="disk.qcow2", backing_fmt="qcow2")
    os.link(disk, tmp_path / "linked")
    (tmp_path / "symbolic").symlink_to(top)
    before = [Path(name).read_bytes() for name in (top, disk)]
    monkeypatch.chdir(tmp_path)
    fs = fsspec.filesystem("lamina", format="qcow2")
    for target in (top, "top.qcow2", ".", "symbolic", disk, "linked"):
        with pytest.raises(lamina.OptionError, match="would be overwritten"):
            fs.get(top, target)
    with pytest.raises(lamina.OptionError, match="would be overwritten"):
        fs.get([f"{top}?partition=1"], [disk])
    with pytest.raises(lamina.OptionError, match="would be overwritten"):
        fs.get_file(top, Path("linked"))
    assert [Path(name).read_bytes() for name in (top, disk)] == before


def test_what_is_missing(disk: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("lamina", format="qcow2")
    for path in (str(tmp_path / "none"), f"{disk}?partition=7", f"{tmp_path}/none?partition=1"):
        assert not fs.exists(path)
        for ask in (fs.info, fs.ls, fs.cat_file, fs.open):
            with pytest.raises(FileNotFoundError):
                ask(path)
    with pytest.raises(lamina.NotFound, match="has no partition 7") as caught:
        fs.info(f"{disk}?partition=7")
    assert "1, 5" in str(caught.value)
    with pytest.raises(lamina.BlockIOError):
        fs.exists(str(tmp_path))
    (tmp_path / "text").write_text("not an image")
    with pytest.raises(lamina.FormatError):
        fs.exists(str(tmp_path / "text"))
    lamina.create(tmp_path / "empty.qcow2", "qcow2", MIB)
    with pytest.raises(lamina.FormatError, match="no partition table"):
        fs.info(f"{tmp_path}/empty.qcow2?partition=1")


@pytest.mark.parametrize(
    "query",
    [
        "?",
        "?partition",
        "?partition=",
        "?partition=0",
        "?partition=-1",
        "?partition=+1",
        "?partition=01",
        "?partition=1.0",
        "?partition=\u0661",
        "?partition=99999999999999999999",
        "?partition=1&partition=1",
        "?partition=1&",
        "?partitions=1",
        "?read_only=no",
        "?PARTITION=1",
        "?partition=1?format=qcow2",
        "?references=everything",
        "?format=nosuch",
        "?format=json:{}",
        "?format=qc%",
        "?format=%00",
    ],
)
def test_queries_that_say_nothing_are_refused(disk: str, query: str) -> None:
    fs = ImageFileSystem() if "format" in query else ImageFileSystem(format="qcow2")
    for ask in (fs.info, fs.exists, fs.open):
        with pytest.raises(lamina.OptionError):
            ask(disk + query)


def test_a_query_cannot_change_what_the_program_has_said(disk: str) -> None:
    """So a name from a stranger grants nothing, and chooses no format."""
    for fs in (ImageFileSystem(format="raw", references="none"), ImageFileSystem(format="raw", references="any")):
        for query in ("?references=any", "?format=qcow2", "?format=raw"):
            with pytest.raises(lamina.OptionError, match="storage option already"):
                fs.info(disk + query)


def test_the_format_is_never_guessed(disk: str) -> None:
    fs = ImageFileSystem()
    for path in (disk, f"{disk}?partition=1"):
        with pytest.raises(lamina.OptionError, match="format is not given"):
            fs.info(path)
    assert fs.info(f"{disk}?format=probe")["format"] == "qcow2"
    assert fs.info(f"{disk}?format=raw")["size"] == os.path.getsize(disk)


def test_names_are_paths_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever characters they have: no prefix, no pattern, no query inside a name."""
    monkeypatch.chdir(tmp_path)
    fs = ImageFileSystem(format="raw")
    for name in ("json:{}", "nbd:unix:x", "a?partition=1", "100%", "a*b[c]", "a#b", "a&b=c", "a b", "\udcff"):
        Path(name).write_bytes(name.encode("utf-8", "surrogateescape"))
        assert fs.cat_file(quote(name, errors="surrogateescape")) == Path(name).read_bytes()
    assert fs.cat_file("a*b[c]") == b"a*b[c]"
    with fsspec.open("lamina://a*b[c]", format="raw") as file:
        assert file.read() == b"a*b[c]"
    with pytest.raises(lamina.NotFound):
        fs.info("a*b*")
    for name in ("", "lamina://", "100%", "a%0", "%00", "a\0"):
        with pytest.raises(lamina.OptionError):
            fs.info(name)


def test_references(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "elsewhere")
    base, top = str(tmp_path / "elsewhere" / "base.raw"), str(tmp_path / "top.qcow2")
    Path(base).write_bytes(b"base" * 1024)
    lamina.create(top, "qcow2", 4096, backing_file="../" + os.path.relpath(base, tmp_path.parent), backing_fmt="raw")
    fs = ImageFileSystem(format="qcow2")
    granted = f"{top}?references=beneath:{quote(str(tmp_path), safe='')}"
    assert fs.cat_file(granted, 0, 4) == b"base"
    before = fs.info(granted)
    with pytest.raises(lamina.PolicyError):
        fs.cat_file(f"{top}?references=none")
    with pytest.raises(lamina.PolicyError):
        ImageFileSystem(format="qcow2", references="none").exists(top)
    assert ImageFileSystem(format="qcow2", references=lamina.Policy.any()).cat_file(top, 4, 8) == b"base"
    with open(base, "r+b") as file:
        file.write(b"B")
    os.utime(base, ns=(1, 1))
    assert fs.ukey(granted) != before["version"]
    after = fs.info(granted)
    assert after["version"] != before["version"], "caches of dask depend on it"
    assert abs(after["mtime"] - os.stat(top).st_mtime) < 1e-5
    assert abs(fs.modified(granted).timestamp() - after["mtime"]) < 1e-5


def test_nothing_is_written(disk: str) -> None:
    fs = fsspec.filesystem("lamina", format="qcow2")
    before = Path(disk).read_bytes()
    for mode in ("wb", "ab", "xb", "r+b"):
        with pytest.raises(PermissionError):
            fs.open(disk, mode)
    for refused in (
        lambda: fs.pipe_file(disk, b"x"),
        lambda: fs.touch(disk),
        lambda: fs.rm(disk),
        lambda: fs.rm_file(disk),
        lambda: fs.mv(disk, disk + "2"),
        lambda: fs.cp_file(disk, disk + "2"),
        lambda: fs.copy(disk, disk + "2"),
        lambda: fs.mkdir(disk + "2"),
        lambda: fs.makedirs(disk + "2"),
        lambda: fs.rmdir(os.path.dirname(disk)),
        lambda: fs.put_file(disk, disk + "2"),
    ):
        with pytest.raises(lamina.ReadOnly):
            refused()
    assert Path(disk).read_bytes() == before
    assert os.listdir(os.path.dirname(disk)) == [os.path.basename(disk)]
    os.chmod(disk, stat.S_IRUSR)
    assert fs.info(disk)["size"] == 16 * MIB


def test_unknown_storage_options_are_refused() -> None:
    for options in ({"formt": "raw"}, {"partition": 1}, {"read_only": False}):
        with pytest.raises(lamina.OptionError, match="no storage option"):
            ImageFileSystem(**options)
    with pytest.raises(lamina.OptionError):
        ImageFileSystem(references="everything")
    with pytest.raises(lamina.OptionError, match="no option 'format' for opening"):
        ImageFileSystem().open("disk.raw", format="raw")


def test_file_systems_and_files_are_pickled(disk: str) -> None:
    fs = ImageFileSystem(format="qcow2", references="same-dir", budget=lamina.Budget(chain_depth=3))
    other = pickle.loads(pickle.dumps(fs))
    assert other.cat_file(f"{disk}?partition=1", 0, 4) == b"name"
    assert (other._references, other._budget) == (lamina.Policy.beneath(), lamina.Budget(chain_depth=3))
    with fs.open(f"{disk}?partition=1") as file:
        file.read(5)
        with pickle.loads(pickle.dumps(file)) as copy:
            assert isinstance(copy, ImageFile)
            assert copy.read(5) == b"count"
            assert copy == file
    with fsspec.open(f"lamina://{disk}?partition=1", format="qcow2") as file:
        assert pickle.loads(pickle.dumps(fsspec.open(f"lamina://{disk}", format="qcow2"))).fs == fs.__class__(
            format="qcow2"
        )


def test_a_running_machine(disk: str) -> None:
    """Its image is locked; `force_share` reads nevertheless."""
    with lamina.open(disk, format="qcow2", read_only=False):
        with pytest.raises(lamina.Locked):
            ImageFileSystem(format="qcow2").info(disk)
        assert ImageFileSystem(format="qcow2", force_share=True).cat_file(disk, MIB, MIB + 4) == b"name"


def test_large_and_small_caches_read_the_same(disk: str) -> None:
    fs = ImageFileSystem(format="qcow2")
    for options in ({"cache_type": "none"}, {"cache_type": "bytes"}, {"block_size": 512}, {"cache_type": "readahead"}):
        with fs.open(f"{disk}?partition=1", **options) as file:
            assert [file.readline() for _ in range(3)] == TABLE.splitlines(keepends=True)[:3]
            file.seek(0)
            assert file.read(len(TABLE)) == TABLE


def test_a_failing_file_leaves_nothing_open(disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture of all tests counts descriptors."""
    fs = ImageFileSystem(format="qcow2")
    with pytest.raises(KeyError):
        fs.open(disk, cache_type="nosuch")
    file = fs.open(disk)
    file.close()
    file.close()
    with pytest.raises(ZeroDivisionError), fs.open(disk):
        raise ZeroDivisionError

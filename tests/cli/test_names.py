"""A name means one thing to every command. Each runs in a folder of its own: a name that is misread makes its file there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from lamina.errors import LaminaError, OptionError
from lamina.options import parse_name, path_in, stored_name

MIB = 1 << 20

#: What a user types, and the file that it means in the current folder; None: no file.
NAMES: dict[str, str | None] = {
    "x.raw": "x.raw",
    "file:x.raw": "x.raw",
    "host_device:x.raw": "x.raw",
    "./a:b": "a:b",
    "file:a:b": "a:b",
    "file:-": "-",
    "./-": "-",
    "./file:x.raw": "file:x.raw",
    "./json:x": "json:x",
    "file:json:x": "json:x",
    'json:{"filename": "x.raw"}': "x.raw",
    'json:{"driver": "file", "filename": "a:b"}': "a:b",
    "-": None,
    "a:b": None,
    "json:x": None,
    'json:{"driver": "qcow2", "file.filename": "x.raw"}': None,
    'json:{"driver": "file", "filename": "x.raw", "locking": "off"}': None,
    "https://host/x": None,
    "nbd:unix:nowhere": None,
    "NBD+unix:///?socket=nowhere": None,
    "null-co://": None,
    "blkdebug::x.raw": None,
    "": None,
    "file:": None,
}
FILES = sorted({path for path in NAMES.values() if path is not None})

#: Each names one image as NAME. The last ones make it.
READERS = {
    "info": ["info", "NAME"],
    "map": ["map", "-f", "raw", "NAME"],
    "check": ["check", "-f", "qcow2", "NAME"],
    "compare": ["compare", "-f", "raw", "-F", "raw", "good.raw", "NAME"],
    "io": ["io", "-f", "raw", "-r", "-c", "r 0 512", "NAME"],
    "convert from": ["convert", "-f", "raw", "NAME", "out/x"],
    "convert -n": ["convert", "-n", "-f", "raw", "-O", "raw", "good.raw", "NAME"],
    "copy from": ["copy", "NAME", "out/x"],
}
MAKERS = {
    "create": ["create", "-q", "-f", "raw", "NAME", "1M"],
    "convert": ["convert", "-O", "raw", "good.raw", "NAME"],
    "copy": ["copy", "good.raw", "NAME"],
    "copy again": ["copy", "--resume-file", "out/journal", "good.raw", "NAME"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work" / "out").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    Path("good.raw").write_bytes(b"good" * (MIB // 4))
    return tmp_path / "work"


def run(command: list[str], name: str) -> int:
    return main([name if word == "NAME" else word for word in command])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", MAKERS)
def test_commands_that_make_a_file(folder: Path, capsys: pytest.CaptureFixture[str], name: str, command: str) -> None:
    path = NAMES[name]
    if command.startswith("copy") and name in ("-", "null-co://"):
        return  # it streams; it keeps nothing
    before = sorted(os.listdir(folder))
    status = run(MAKERS[command], name)
    said = capsys.readouterr().err
    assert sorted(os.listdir(folder)) == (before if path is None else sorted([*before, path])), said
    assert (status == 0) == (path is not None), said
    if path is None:
        assert said.count("\n") == 1
        assert command == "copy again" or not list((folder / "out").iterdir())
    elif command == "create":
        assert os.path.getsize(path) == MIB
    else:
        assert Path(path).read_bytes() == Path("good.raw").read_bytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", READERS)
def test_commands_that_read_a_file(folder: Path, capsys: pytest.CaptureFixture[str], name: str, command: str) -> None:
    path = NAMES[name]
    if path is None and ((command == "copy from" and name == "-") or name.startswith(("blkdebug", "null", "json:{"))):
        return  # it streams; or it is an image all the same
    for other in FILES:
        Path(other).write_bytes(b"other" * (MIB // 5))
    if path is not None:
        Path(path).unlink()
        if command == "check":
            lamina.create(Path(path), "qcow2", MIB)
        else:
            Path(path).write_bytes(Path("good.raw").read_bytes())
    before = sorted(os.listdir(folder))
    status = run(READERS[command], name)
    said = capsys.readouterr().err
    assert sorted(os.listdir(folder)) == before
    assert (status == 0) == (path is not None), said
    if command in ("convert from", "copy from") and path is not None:
        assert Path("out/x").read_bytes() == Path("good.raw").read_bytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["create -b", "create -u", "convert -B"])
def test_what_an_image_stores_as_its_base_is_the_same_file(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    path = NAMES[name]
    for other in FILES:
        Path(other).write_bytes(b"other" * (MIB // 5))
    if path is not None:
        Path(path).write_bytes(b"this" * (MIB // 4))
    if command == "convert -B":
        status = main(["convert", "-O", "qcow2", "-B", name, "-F", "raw", "good.raw", "top"])
    else:
        unchecked = ["-u", "-b"] if command == "create -u" else ["-b"]
        status = main(["create", "-q", "-f", "qcow2", *unchecked, name, "-F", "raw", "top", "1M"])
    said = capsys.readouterr().err
    assert (status == 0) == (path is not None), said
    assert os.path.exists("top") == (path is not None)
    if path is not None:
        with lamina.open("top", format="qcow2") as image:
            assert image.read(0, 4) == (b"good" if command == "convert -B" else b"this")


@pytest.mark.parametrize("name", ["-", "a:b", "json:x", "file:x", "nbd://h/x"])
def test_a_path_object_is_a_path(folder: Path, name: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lamina.create(path, "raw", MIB)
    assert os.path.getsize(path) == MIB
    with lamina.open(path, format="raw", read_only=False) as image:
        image.write(0, b"QFI\xfb\0\0\0\3")
    assert lamina.detect(path).format == "qcow2"
    with pytest.raises(LaminaError), lamina.open(path):
        pass


def test_a_stream_is_refused_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (*READERS.values(), *MAKERS.values()):
        if command[0] not in ("copy", "convert"):
            assert run(command, "-") != 0
            assert '"-" is standard input or output' in capsys.readouterr().err
    assert main(["copy", "--resume-file", "-", "good.raw", "x"]) == 1
    assert "./-" in capsys.readouterr().err


def test_what_names_become() -> None:
    assert {name: _or_none(name) for name in NAMES} == NAMES
    assert stored_name("file:a:b") == "./a:b"
    assert stored_name("file:x") == stored_name("x") == "x"
    assert stored_name("./file:x") == "./file:x"
    assert stored_name("/a:b/c") == "/a:b/c"
    assert path_in(Path("-")) == "-"
    assert parse_name("NBD://host/x") == {"driver": "nbd", "uri": "NBD://host/x"}


def _or_none(name: str) -> str | None:
    try:
        return path_in(name).removeprefix("./")
    except OptionError:
        return None

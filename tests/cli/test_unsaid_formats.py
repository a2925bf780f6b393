"""A backing file whose format the overlay does not say: the error names a command that opens it, and none that harms it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main

MIB = 1 << 20


def forget_format(path: Path) -> None:
    """Takes the stored format of the backing file out of a qcow2 header: that extension gets a type that nobody knows."""
    content = bytearray(path.read_bytes())
    at = content.index((0xE2792ACA).to_bytes(4, "big"))
    content[at : at + 4] = b"\x12\x34\x56\x78"
    path.write_bytes(content)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments]) != 0
    return capsys.readouterr().err


def options_in(said: str) -> str:
    """The argument of --image-opts in a message, as the shell would read it."""
    return shlex.split(said.partition("--image-opts ")[2])[0]


@pytest.mark.parametrize("folder", ["plain", "a b,c=d"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("base", ["qcow2", "raw"])
def test_followed_literally_it_opens_the_right_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    layers: int,
    base: str,
) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    lamina.create("0.img", base, MIB)
    with lamina.open("0.img", format=base, read_only=False) as image:
        image.write(0, b"what the base holds")
    for number in range(1, layers + 1):
        below = base if number == 1 else "qcow2"
        lamina.create(f"{number}.img", "qcow2", backing_file=f"{number - 1}.img", backing_fmt=below)
    forget_format(Path("1.img"))
    said = complaint(capsys, "convert", "-f", "qcow2", f"{layers}.img", "out.raw")
    assert "never guessed" in said
    assert "create -F" not in said
    assert main(["convert", "--image-opts", options_in(said), "out.raw"]) == 0
    assert Path("out.raw").read_bytes()[:19] == b"what the base holds"


def test_what_the_magic_does_not_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").write_bytes(bytes(MIB))
    lamina.create("top", "qcow2", backing_file="base", backing_fmt="raw")
    forget_format(Path("top"))
    Path("base").write_bytes(b"KDMV" + bytes(MIB))
    assert "no driver" in complaint(capsys, "map", "-f", "qcow2", "top")
    Path("base").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(MIB) + b"conectix" + bytes(504))
    said = complaint(capsys, "map", "-f", "qcow2", "top")
    assert "qcow2 and vpc" in said
    assert "backing.driver=FORMAT" in options_in(said)
    for policy in ("none", "list:elsewhere"):  # nothing is told of files that are not granted
        said = complaint(capsys, "map", "-f", "qcow2", "--references", policy, "top")
        assert "never guessed" in said
        assert "its magic" not in said
        assert "backing.driver=FORMAT" in options_in(said)
    Path("base").unlink()
    assert "backing.driver=FORMAT" in options_in(complaint(capsys, "map", "-f", "qcow2", "top"))

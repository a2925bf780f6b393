"""What a probed image may open: nothing, in every command, until its format or the grant is named."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina
from lamina import Policy, PolicyError
from lamina.cli.main import main

from .images import KIB, overlay
from .oracle import opened_files, strangers

COMMANDS = {
    "map": ["map", "TOP"],
    "map json": ["map", "--output=json", "TOP"],
    "compare": ["compare", "-F", "raw", "TOP", "base.raw"],
    "convert": ["convert", "-O", "raw", "TOP", "out.raw"],
    "io": ["io", "-r", "-c", "read 0 512", "TOP"],
    "info": ["info", "--backing-chain", "TOP"],
    "serve": ["serve", "-k", "socket", "TOP"],
}


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.raw").write_bytes(b"secret" * 1000)
    return overlay(tmp_path, "base.raw", size=64 * KIB)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_probed_image_opens_no_other_file(top: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = [top.name if word == "TOP" else word for word in COMMANDS[name]]
    with opened_files() as opened:
        assert main(words) != 0
    granted = [top, *([top.parent / "base.raw"] if name == "compare" else []), top.parent / "out.raw"]
    assert not strangers([path for path in opened if not path.startswith("/dev/")], granted)
    told = capfd.readouterr()
    assert told.out == ""
    assert "only detected" in told.err
    assert "-f qcow2" in told.err
    assert f"--references list:{top.parent}/base.raw" in told.err


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "serve"])
@pytest.mark.parametrize("given", [["-f", "qcow2"], ["--references", "list:base.raw"], ["--references", "same-dir"]])
def test_the_format_or_the_grant_is_enough(top: Path, name: str, given: list[str]) -> None:
    words = [top.name if word == "TOP" else word for word in COMMANDS[name]]
    assert main([words[0], *given, *words[1:]]) in (0, 1 if name == "compare" else 0)


def test_the_default_of_a_site_is_no_grant_for_a_guess(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_REFERENCES", "any")
    with pytest.raises(PolicyError, match="only detected"):
        lamina.open(top, format="probe")
    lamina.open(top, format="qcow2").close()
    monkeypatch.setenv("LAMINA_REFERENCES", "none")
    with pytest.raises(PolicyError, match="no name inside"):
        lamina.open(top, format="qcow2")
    lamina.open(top, format="qcow2", references=Policy.beneath()).close()


def test_the_names_below_a_named_image_are_not_a_guess(top: Path) -> None:
    """The image on top is named, and says what lies below it, and so on."""
    higher = overlay(top.parent, top.name, fmt="qcow2", name="higher.qcow2", size=64 * KIB)
    with lamina.open(higher, format="qcow2") as image:
        assert image.read(0, 6) == b"secret"
    with pytest.raises(PolicyError, match="only detected"):
        lamina.open(higher, format="probe")


def test_hidden_files_of_a_home_directory(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id").write_bytes(b"key" * 1000)
    path = overlay(tmp_path, ".ssh/id", size=64 * KIB)
    with opened_files() as opened, pytest.raises(PolicyError, match="hidden"):
        lamina.open(path, format="qcow2")
    assert not strangers(opened, [path])


@pytest.mark.parametrize(
    ("backing", "words"),
    [
        ("base.raw", None),
        ("../outside.raw", "leads outside"),
        (".hidden.raw", "hidden"),
        ("linked/base.raw", "symlink"),
        ("missing.raw", None),
    ],
)
@pytest.mark.parametrize("command", ["create", "convert"])
def test_a_new_image_says_when_it_would_not_open(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    backing: str,
    words: str,
    command: str,
) -> None:
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    monkeypatch.chdir(home)
    (home / "linked").symlink_to("sub")
    for name in ("base.raw", "../outside.raw", ".hidden.raw", "sub/base.raw"):
        (home / name).write_bytes(bytes(64 * KIB))
    if command == "create":
        made = main(["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", "top.qcow2", "64k"])
    else:
        if backing == "missing.raw":
            pytest.skip("convert reads it")
        made = main(["convert", "-f", "raw", "-O", "qcow2", "-B", backing, "-F", "raw", "base.raw", "top.qcow2"])
    assert made == 0
    told = capsys.readouterr()
    assert told.out == ""
    if words is None:
        assert told.err == ""
        return
    assert words in told.err
    assert "--references list:" in told.err
    assert told.err.count("\n") == 1
    # The option that is named is the one that works.
    grant = told.err.partition("--references ")[2].split()[0]
    assert main(["map", "-f", "qcow2", "top.qcow2"]) == 1
    assert main(["map", "-f", "qcow2", "--references", grant, "top.qcow2"]) == 0


def test_the_default_of_a_site_decides_about_the_warning(
    top: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAMINA_REFERENCES", "none")
    assert main(["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "other.qcow2"]) == 0
    assert "needs a grant" in capsys.readouterr().err
    monkeypatch.setenv("LAMINA_REFERENCES", "any")
    assert main(["create", "-q", "-f", "qcow2", "-b", "/dev/null", "-F", "raw", "-u", "other.qcow2", "64k"]) == 0

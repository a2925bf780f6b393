"""The help of each command, and all that is made from it: its examples run, its words can be completed, its manual page is
that of the code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.described import options_of, parser_of
from lamina.cli.main import COMMANDS, FIRST, main

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


def examples_of(command: str) -> list[list[str]]:
    """The words of each example that the command parses: without what a shell does with its output, and what explains it."""
    text = (parser_of(command).epilog or "").removeprefix("examples:\n")
    found: list[list[str]] = []
    for line in re.sub(r" \\\n\s*", " ", text).splitlines():
        for part in line.split(" | "):
            if part.strip().startswith(f"lamina {command} "):
                words = shlex.split(re.split(r"   +", part.strip())[0])
                end = next((number for number, word in enumerate(words) if word in ("<", ">")), len(words))
                found.append(words[2:end])
    return found


def words_of_all() -> set[str]:
    return {flag for command in COMMANDS for one in options_of(parser_of(command)) for flag in one.flags}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: lamina {command} ")
    assert len(examples_of(command)) >= 2
    body = told.partition("\nexamples:\n")[0]
    assert max(map(len, body.splitlines())) <= 80
    for one in options_of(parser_of(command)):
        assert one.help, f"{one.flags} has no help"


def test_the_first_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert len(told.splitlines()) <= 24
    assert len(FIRST) == 6
    for name in FIRST:
        assert f"\n  {name:<11}{COMMANDS[name][1]}\n" in told
    assert set(COMMANDS) <= set(told.split())
    assert main(["help", "--all"]) == 0
    everything = capsys.readouterr().out
    assert all(summary in everything for _, summary in COMMANDS.values())
    assert max(map(len, (told + everything).splitlines())) <= 80


def test_help_of_a_command_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ["help", "resize"], ["resize", "--help"], ["resize", "-h"]:
        assert main(words) == 0
    told = capsys.readouterr().out
    assert told.count("usage: lamina resize ") == 3
    assert main(["help", "reszie"]) == 1
    assert "did you mean resize?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--output=json"], ["--output", "json"]])
def test_an_error_is_an_object_where_json_is_asked_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *words, "/none/disk"]) == 1
    told = capsys.readouterr()
    assert not told.out
    error = json.loads(told.err)["error"]
    assert error == {
        "type": "NotFound",
        "message": "cannot be opened: No such file or directory",
        "path": "/none/disk",
        "operation": "open",
        "hint": "check the name, or create it first",
        "errno": "ENOENT",
    }
    assert main(["info", *words, "--nonsense", "/none/disk"]) == 1
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["type"] == "UsageError"
    assert "--nonsense" in error["message"]
    assert main(["info", "--", "--output=json"]) == 1
    assert capsys.readouterr().err.startswith("lamina: --output=json: ")


@pytest.mark.parametrize(
    "words", [["--debug", "info", "/none"], ["info", "--debug", "/none"], ["info", "/none", "--debug"]]
)
def test_debug_shows_where_an_error_came_from(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last):")
    assert told.splitlines()[-1].startswith("lamina: /none: cannot be opened")
    assert main(["info", "--", "--debug"]) == 1
    assert capsys.readouterr().err.startswith("lamina: --debug: ")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of the names that examples use."""
    monkeypatch.chdir(tmp_path)
    data = os.urandom(MIB) + bytes(3 * MIB)
    for name in "disk.raw", "a.raw", "b.raw", "input.raw", "copy.raw", "upload.img":
        Path(name).write_bytes(data)
    for name in (
        "disk.qcow2",
        "base.qcow2",
        "other.qcow2",
        "new-base.qcow2",
        "moved.qcow2",
        "before.qcow2",
        "after.qcow2",
        "full.qcow2",
    ):
        lamina.create(name, "qcow2", 4 * MIB)
        with lamina.open(name, format="qcow2", read_only=False) as image:
            image.write(0, data[:MIB])
            image.write(2 * MIB, b"x" * 5000)
            if name == "disk.qcow2":
                image.create_snapshot("before-upgrade")
                image.add_bitmap("b0")
    for name, below in ("overlay.qcow2", "base"), ("middle.qcow2", "base"), ("top.qcow2", "middle"):
        lamina.create(name, "qcow2", backing_file=f"{below}.qcow2", backing_fmt="qcow2")
        with lamina.open(name, format="qcow2", read_only=False) as image:
            image.write(MIB, name.encode() * 500)
    return tmp_path


#: Commands whose examples need a server, a terminal, or take long: their own tests run them.
ELSEWHERE = {"serve", "copy", "io"}


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ELSEWHERE])
def test_two_examples_of_each_command_run(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = 0
    told = []
    for words in examples_of(command):
        if any("://" in word or word.startswith("/dev/") or word == "-" for word in words):
            continue
        status = main([command, *words])
        said = capsys.readouterr()
        ran += status == 0 or (command in ("compare", "inspect", "check") and status == 1 and not said.err)
        told.append((words, status, said.err))
    assert ran >= 2, told


def test_the_manual_pages_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("manual_pages", ROOT / "docs" / "manual_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = dict(module.pages())
    assert {path.name for path in (ROOT / "docs" / "man").iterdir()} == set(made), "run make docs"
    for name, content in made.items():
        assert (ROOT / "docs" / "man" / name).read_text() == content, f"{name}: run make docs"


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_the_manual_pages_are_whole() -> None:
    for path in sorted((ROOT / "docs" / "man").iterdir()):
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-P-cbou", path],
            capture_output=True,
            text=True,
            check=True,
            env={"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]},
        )
        assert not done.stderr, path.name
        assert "EXAMPLES" in done.stdout or path.name == "lamina.1"


# -- completion


def complete(script: str, *words: str) -> set[str]:
    line = f"{script}\nCOMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}; _lamina\n"
    line += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert not done.stderr
    return set(done.stdout.split())


def test_bash_completes_commands_options_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert complete(script, "lamina", "") >= set(COMMANDS)
    assert complete(script, "lamina", "comp") == {"compare", "compact", "completion"}
    assert complete(script, "lamina", "help", "conv") == {"convert"}
    for command in COMMANDS:
        flags = {flag for one in options_of(parser_of(command)) for flag in one.flags}
        assert complete(script, "lamina", command, "-") == flags
    assert complete(script, "lamina", "check", "-r", "") == {"leaks", "all"}
    assert complete(script, "lamina", "convert", "-O", "q") == {"qcow2"}
    assert complete(script, "lamina", "info", "disk") == set()  # bash completes file names


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_other_shells_accept_their_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for flag in words_of_all():
        assert flag.lstrip("-") in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)
    if shell == "fish":
        done = subprocess.run(
            ["fish", "-c", f"source {tmp_path}/script; complete -C 'lamina convert --sp'"],
            capture_output=True,
            text=True,
            check=True,
            env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        )
        assert done.stdout.startswith("--sparse-size\t")

"""The help of `lamina io` tells the truth: what it lists is there and does what it says, and what is there is listed."""

from __future__ import annotations

import inspect
import re
import string
from pathlib import Path

import pytest

import lamina
from lamina.cli.io import breakpoints, commands, opening, status, target, transfers
from lamina.cli.io.commands import COMMANDS
from lamina.cli.main import main

#: An operand, or the value of an option, by how the help calls it.
WORDS = {
    "OFFSET": "0", "LENGTH": "64k", "BYTE": "1", "SIZE": "1M", "FILE": "pattern", "EVENT": "write_aio", "TAG": "A",
    "MILLISECONDS": "1", "NUMBER": "0", "COMMAND": "read", "KEY=VALUE,...": "read-only=on",
}  # fmt: skip
MODES = {("open", "i"): target.AIO_MODES, ("open", "t"): target.CACHE_MODES, ("open", "d"): target.DISCARD_MODES}
#: Values that only one option takes.
VALUES = {
    ("open", "i"): "threads",
    ("open", "t"): "none",
    ("open", "d"): "on",
    ("open", "o"): "read-only=on,driver=raw",
    ("reopen", "c"): "none",
    ("truncate", "m"): "off",
}
#: Options that need another one beside them, as their help says ("with -z: ...", "needs -r").
NEEDS = {"u": "z", "n": "z", "s": "P", "l": "P", "U": "r"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an image, and a file with a pattern."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMINA_DEBUG", "1")
    lamina.create("base", "qcow2", 1 << 20)
    lamina.create("disk", "qcow2", 1 << 20, backing_file="base", backing_fmt="qcow2")
    (tmp_path / "pattern").write_bytes(b"\1")
    return tmp_path


def say(capsys: pytest.CaptureFixture[str], *lines: str) -> tuple[str, str]:
    """What these commands say, with the image open."""
    capsys.readouterr()
    main(["io", *(word for line in lines for word in ("-c", line)), "-f", "qcow2", "disk"])
    told = capsys.readouterr()
    return told.out, told.err


def listed(command: commands.Command) -> dict[str, str]:
    """The letters that the help of a command lists: what it says of each."""
    rows = (re.fullmatch(r"    -(\w)(.*)", line) for line in command.help())
    return {row[1]: row[2].strip() for row in rows if row}


def line_with(command: commands.Command, letter: str) -> str:
    """A line that has this option, and what else the option needs."""
    letters = [letter]
    if command.name in ("read", "write", "aio_write", "open") and NEEDS.get(letter, "") in command.letters:
        letters.append(NEEDS.get(letter, ""))
    if (command.name, letter) == ("write", "s"):
        letters = ["s"]  # of a write, it is a pattern itself
    words = [command.name]
    for one in filter(None, letters):
        words.append(f"-{one}")
        if f"{one}:" in command.accepts:
            kind = listed(command)[one].split("  ")[0]
            words.append(VALUES.get((command.name, one)) or WORDS[kind])
    operands = re.findall(r"[A-Z]+", command.operands.partition("[LENGTH...]")[0])
    return " ".join(words + [WORDS[name] for name in operands if command.minimum or name == "FILE"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_letter_that_is_listed_is_taken_and_no_other(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    command = COMMANDS[name]
    if name in ("abort", "quit"):
        assert not command.letters
        return
    for letter in string.ascii_letters:
        _, err = say(capsys, f"{name} -{letter}" if letter not in listed(command) else line_with(command, letter))
        assert (f"there is no option -{letter}" in err) == (letter not in listed(command)), (letter, err)


@pytest.mark.parametrize(
    "name", ["read", "write", "readv", "writev", "aio_read", "aio_write", "aio_discard", "discard"]
)
def test_what_is_not_there_yet_is_said_to_be_so(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """An option that works is not denied, and one that does not is not promised."""
    command = COMMANDS[name]
    for letter, meaning in listed(command).items():
        before = [] if letter != "P" or "write" in name else ["write -P 1 0 64k"]
        out, err = say(capsys, *before, line_with(command, letter), "aio_flush")
        assert ("not there yet" in meaning) == ("yet" in err), (letter, meaning, err)
        if "not there yet" not in meaning and letter not in ("s", "l"):
            assert err == "", (letter, err)
        if letter == "q":
            assert out == ""
        if letter == "C":
            assert re.search(r"^\d+,1,\d", out, re.MULTILINE)
        if letter == "v":
            assert re.search(r"^0{8}:  [0-9a-f]{2} ", out, re.MULTILINE)


def test_every_mode_that_is_listed_is_taken_and_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for (name, letter), modes in MODES.items():
        text = listed(COMMANDS[name])[letter]
        for mode in modes:
            assert re.search(rf"\b{mode}\b", text), (letter, mode)
            _, err = say(capsys, "close", f"open -r -{letter} {mode} base")
            assert err == ""
    _, err = say(capsys, "close", "open -t warp disk")
    assert "there is no cache mode 'warp'" in err


def test_every_handler_is_listed() -> None:
    """What can be done can be said: no function that carries out a command is missing in the table."""
    there = {
        function
        for module in (breakpoints, opening, status, transfers)
        for _, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and list(inspect.signature(function).parameters) == ["session", "flags", "operands"]
    }
    assert there <= {command.handler for command in COMMANDS.values()}


def test_the_list_has_all_names_and_short_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["io", "-c", "help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert command.summary in line
        assert not command.alias or line.split()[1] == command.alias
        for word in (name, command.alias):
            if word:
                assert main(["io", "-c", f"help {word}"]) == 0
                assert capsys.readouterr().out.startswith(command.usage)


def test_the_examples_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lamina.create("disk.qcow2", "qcow2", 4 << 20)
    for command in COMMANDS.values():
        if not command.example:
            continue
        if command.name == "break":
            words = ["io", "-f", "raw", "-c", command.example, "blkdebug::pattern"]
            assert main(words) == 0, command.example
            continue
        before = {"read": ["write 512 1k"], "open": ["close"]}.get(command.name, [])
        lines = [word for line in [*before, command.example] for word in ("-c", line)]
        assert main(["io", *lines, "-f", "qcow2", "disk.qcow2"]) == 0, command.example


def test_operands_are_as_many_as_the_help_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS.values():
        needed = len(re.findall(r"[A-Z]+", re.sub(r"\[.*?\]", "", command.operands)))
        assert needed == command.minimum, command.name
        if command.maximum is not None:
            assert len(re.findall(r"[A-Z]+", command.operands)) == command.maximum, command.name
            _, err = say(capsys, " ".join([command.name, *["1"] * (command.maximum + 1)]))
            assert "too many operands" in err, command.name

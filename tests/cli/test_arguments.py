"""The words of the command line: names that begin with a dash, options that are misspelt, values that are none, help."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lamina.cli.arguments import Parser
from lamina.cli.described import parser_of
from lamina.cli.main import COMMANDS, main

from .test_help import examples_of


@pytest.fixture
def parsers() -> dict[str, Parser]:
    """The parser of each command."""
    return {name: parser_of(name) for name in COMMANDS}


def run(folder: Path, *words: str, environment: dict[str, str] | None = None) -> SimpleNamespace:
    done = subprocess.run(
        [sys.executable, "-m", "lamina", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        env={**os.environ, **(environment or {})},
    )
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


# -- names


@pytest.mark.parametrize("mark", ["--", "./"])
def test_a_name_may_begin_with_a_dash(tmp_path: Path, mark: str) -> None:
    """Behind `--`, or with `./` before it, every command takes it for a name, and shows it as it was given."""

    def names(*words: str) -> list[str]:
        return ["--", *words] if mark == "--" else [f"./{word}" for word in words]

    shown = "-q.raw" if mark == "--" else "./-q.raw"
    made = run(tmp_path, "create", "-f", "raw", *names("-q.raw"), "1M")
    assert made.out.startswith(f"Formatting '{shown}'")
    assert run(tmp_path, "info", *names("-q.raw")).out.startswith(f"image: {shown}\n")
    for words in (
        ["map", "-f", "raw", *names("-q.raw")],
        ["convert", "-f", "raw", "-O", "qcow2", *names("-q.raw", "--force-share")],
        ["compare", "-f", "raw", "-F", "qcow2", *names("-q.raw", "--force-share")],
        ["check", *names("--force-share")],
        ["copy", *names("-q.raw", "-o.raw")],
        ["io", "-f", "raw", "-c", "read 0 1k", *names("-q.raw")],
        ["io", "-c", f"open -r {'-- -q.raw' if mark == '--' else './-q.raw'}", "-c", "read 0 1k"],
    ):
        done = run(tmp_path, *words)
        assert (done.status, done.err) == (0, ""), words
    assert sorted(os.listdir(tmp_path)) == ["--force-share", "-o.raw", "-q.raw"]


def test_only_the_first_two_dashes_are_special(tmp_path: Path) -> None:
    assert run(tmp_path, "create", "-q", "--", "--", "1M").status == 0
    assert os.listdir(tmp_path) == ["--"]


def test_names_behind_the_dashes_are_told_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--", "-a", "-b"]) == 1
    assert "-b" in capsys.readouterr().err


# -- options that are not there


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["info", "--forma", "raw", "x"], "--format"),
        (["check", "--formt=raw"], "--format"),
        (["create", "--backng", "b", "x", "1M"], "--backing"),
        (["convert", "--compres", "a", "b"], "--compress"),
        (["compare", "--strct", "a", "b"], "--strict"),
        (["map", "--start-ofset", "0", "a"], "--start-offset"),
        (["copy", "--resume", "j", "a", "b"], "--resume-file"),
        (["serve", "--persistant", "a"], "--persistent"),
        (["io", "--read-onyl", "a"], "--read-only"),
        (["info", "--output", "jsno", "x"], "json"),
        (["serve", "--tls", "requir", "x"], "require"),
        (["chek", "x"], "check"),
        (["create", "-f", "qcow3", "-o", "help"], "qcow2"),
        (["create", "-f", "qcow2", "-o", "cluster_sise=1M", "x", "1M"], "cluster_size"),
        (["map", "--image-opts", "driver=raw,file.filename=/dev/null,ofset=0"], "offset"),
        (["io", "-c", "raed 0 1k"], "read"),
    ],
)
def test_a_misspelt_word_is_told_with_the_nearest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], near: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    told = capsys.readouterr().err
    assert f"did you mean {near}?" in told or f"did you mean {near} or" in told
    assert told.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("word", ["-Z", "-Z7", "--zzzzzz", "-~"])
def test_what_resembles_no_option_is_named(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert main(["info", word]) == 1
    told = capsys.readouterr().err
    assert f"unrecognized arguments: {word}" in told
    assert "did you mean" not in told


# -- values that are none


def test_no_value_of_an_option_is_hidden_by_argparse(parsers: dict[str, Parser]) -> None:
    """Every option that reads its value tells why it cannot, in one line that is not long, whatever the value is."""
    bad = [
        "",
        "x",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "9" * 5000,
        "-" + "9" * 5000,
        "1_0",
        "\u0663",
        "a\udcff",
        "\x1b[2J",
        "%s",
    ]
    looked = 0
    for command, parser in parsers.items():
        for action in parser._actions:
            if action.type is None or not action.option_strings:
                continue
            looked += 1
            for value in bad:
                try:
                    parser._get_value(action, value)
                except argparse.ArgumentError as error:
                    said = str(error)
                    assert not said.startswith("invalid"), (command, action.option_strings, value)
                    assert "invalid " not in said, (command, action.option_strings, said)
                    assert len(said) < 500
                else:
                    raise AssertionError(f"{command} {action.option_strings} takes {value!r}")
    assert looked > 15


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["map", "-s", "12q", "x"], "argument -s/--start-offset: '12q' is not a size; write bytes"),
        (["info", "--references", "everything", "x"], "argument --references: "),
        (["serve", "-e", "many", "x"], "argument -e/--shared: 'many' is not a whole number"),
        (["serve", "--handshake-limit", "nan", "x"], "argument --handshake-limit: nan is not a time limit"),
        (["serve", "-p", "99999", "x"], "argument -p/--port: 99999 is not a port; give 0 to 65535"),
        (["copy", "-R", "5%", "x", "y"], "argument -R/--requests: '5%' is not a size"),
    ],
)
def test_the_message_of_a_value_is_the_option_s_own(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(words) == 1
    assert said in capsys.readouterr().err


# -- help


def test_every_option_says_what_it_does(parsers: dict[str, Parser]) -> None:
    for command, parser in parsers.items():
        shown = parser.format_help()
        for action in parser._actions:
            if action.help is not argparse.SUPPRESS:
                assert action.help or action.dest in ("first", "second"), (command, action.dest)
                assert all(option in shown for option in action.option_strings)


def test_the_examples_of_the_help_can_be_read(parsers: dict[str, Parser]) -> None:
    """Each line of an example that calls a command is one that its parser takes."""
    for command, parser in parsers.items():
        for words in examples_of(command):
            parser.parse(words)

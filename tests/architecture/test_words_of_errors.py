"""Errors speak the words of their reader: the library names arguments of Python, the command line its options.

A text that names an option (`-f`, `--force-share`) belongs to the command line. Below it, such a text is the part of a `Hint`
that the command line prints (`command=`), and never what `str(error)` shows in a program.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lamina
from lamina import errors
from lamina.cli.main import main

PACKAGE = Path(lamina.__file__).parent
#: An option of a command, as a word of its own.
OPTION = re.compile(r"(?<![^\s(;,:])(-[a-zA-Z]|--[a-z][a-z-]+)(?![\w-])")
#: Programs of the system that a hint may name, with their options.
PROGRAMS = re.compile(r"python -m pip|truncate -s")
#: Texts that are no errors: the help of options that only the command line shows; arguments of Python itself; and the
#: commands that the page of a viewer tells.
EXEMPT_CALLS = {"Option", "PeerOption"}
EXEMPT_FILES = {"__init__.py", "viewer/collect.py"}


def naming_options(source: str) -> Iterator[tuple[int, str]]:
    """The texts in a module that name options of the command line: (line, text)."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) or _is_doc(node)}
    allowed: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in EXEMPT_CALLS:
            allowed |= {id(each) for each in ast.walk(node)}
        for keyword in node.keywords:
            if name == "Hint" and keyword.arg == "command":
                allowed |= {id(each) for each in ast.walk(keyword.value)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if id(node) in docs or id(node) in allowed:
            continue
        if OPTION.search(PROGRAMS.sub("", node.value)):
            yield node.lineno, node.value


def _is_doc(node: ast.AST) -> bool:
    """Whether the node sets the docstring of a type that has no body."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Attribute)
        and node.targets[0].attr == "__doc__"
    )


def test_no_error_of_the_library_names_options_of_the_command_line() -> None:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        inner = file.relative_to(PACKAGE)
        if inner.parts[0] == "cli" or str(inner) in EXEMPT_FILES:
            continue
        found += [f"src/lamina/{inner}:{line}: {text}" for line, text in naming_options(file.read_text())]
    assert not found, "use errors.Hint(..., command=...):\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('raise OptionError("x", hint="give it (-f)")', True),
        ('hint = f"use {word}, or --force-share"', True),
        ('append_hint(error, "-r")', True),
        ('hint = Hint("format=...", command="give it (-f)")', False),
        ('hint = Hint("give it (-f)", command="give it (-f)")', True),
        ('hint = "python -m pip install x"', False),
        ('Option("a", "str", "the id of a secret (--object)")', False),
        ('"""Use -f."""', False),
        ('hint = "copy-on-read, chmod go-w, a - b"', False),
    ],
)
def test_what_names_an_option(text: str, names: bool) -> None:
    assert bool(list(naming_options(text))) is names


def test_a_hint_has_both_words() -> None:
    hint = errors.Hint('give it: format="raw"', command="give it (-f raw)")
    error = lamina.OptionError("the format is not given", path="disk.img", hint=hint)
    assert str(error) == 'disk.img: the format is not given; give it: format="raw"'
    assert error.command_text() == "disk.img: the format is not given; give it (-f raw)"
    errors.append_hint(error, "try again")
    assert error.command_text().endswith("; give it (-f raw); try again")
    errors.append_hint(error, errors.Hint("call it again", command="run it again"))
    assert str(error).endswith('; give it: format="raw"; try again; call it again')
    assert error.command_text().endswith("; give it (-f raw); try again; run it again")


def test_each_reader_gets_its_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(4096))
    with pytest.raises(lamina.OptionError) as caught:
        lamina.resize(disk, "1M", format="probe")
    assert str(caught.value).endswith('if the image is raw, give format="raw"')
    assert main(["resize", str(disk), "1M"]) == 1
    assert capsys.readouterr().err.endswith("if the image is raw, give -f raw\n")


def test_errors_as_json_speak_as_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    lamina.create(tmp_path / "a.qcow2", "qcow2", "1M", backing_file="b", backing_fmt="raw", backing_unchecked=True)
    assert main(["map", "--output", "json", str(tmp_path / "a.qcow2")]) == 1
    hint = json.loads(capsys.readouterr().err)["error"]["hint"]
    assert "--references list:" in hint
    assert "Policy" not in hint
    with pytest.raises(lamina.PolicyError, match=r"references=Policy\.listed") as caught:
        lamina.open(tmp_path / "a.qcow2", format="probe")
    assert "--references" not in str(caught.value)

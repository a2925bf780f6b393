"""The parsers of all commands, for what describes them: completion, manual pages, tests of the help."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from typing import NamedTuple

from . import arguments
from .main import COMMANDS


class Option(NamedTuple):
    """An option of a command. `value`: the name of its value in the help, None if it takes none. `choices`: the words that
    are its values, if they are known."""

    flags: tuple[str, ...]
    help: str
    value: str | None = None
    choices: tuple[str, ...] = ()


def parser_of(command: str) -> arguments.Parser:
    """The parser of a command. The command does not run."""
    arguments.describing = True
    try:
        import_module(f"{__package__}.{COMMANDS[command][0]}").main([])
    except arguments.Described as found:
        return found.parser
    finally:
        arguments.describing = False
    raise AssertionError(f"the command {command} parses no arguments")


def groups_of(parser: arguments.Parser) -> Iterator[tuple[str, list[Option]]]:
    """The options of a command by groups, as the help shows them: (title, options). Those without help are left out."""
    for group in parser._action_groups:
        options = [_option(action) for action in group._group_actions if _is_shown(action)]
        if options:
            yield group.title or "options", options


def names_of(parser: arguments.Parser) -> Iterator[str]:
    """The words of a command that are no options, as the usage shows them: FILE, [SIZE], ..."""
    forms = {None: "{0}", "?": "[{0}]", "*": "[{0} ...]", "+": "{0} [{0} ...]"}
    for action in parser._actions:
        if not action.option_strings and action.help is not argparse.SUPPRESS:
            name = action.metavar if isinstance(action.metavar, str) else action.dest
            if action.choices is not None:
                name = "|".join(map(str, action.choices))
            yield forms[action.nargs if isinstance(action.nargs, str) else None].format(name)


def options_of(parser: arguments.Parser) -> list[Option]:
    """All options of a command that its help shows."""
    return [option for _, options in groups_of(parser) for option in options]


def _is_shown(action: argparse.Action) -> bool:
    return bool(action.option_strings) and action.help is not argparse.SUPPRESS


def _option(action: argparse.Action) -> Option:
    text = " ".join((action.help or "").replace("%%", "%").split())
    choices = tuple(map(str, action.choices)) if action.choices is not None else ()
    if action.nargs == 0:
        return Option(tuple(action.option_strings), text)
    value = action.metavar if isinstance(action.metavar, str) else "{" + ",".join(choices) + "}" if choices else None
    if action.metavar == arguments.FORMAT and not choices:
        from .. import registry

        choices = registry.names("format")
    return Option(tuple(action.option_strings), text, value or action.dest.upper(), choices)


#: Exit status -> meaning, for the commands that have others than 0 and 1.
_STATUSES: dict[str, tuple[tuple[str, str], ...]] = {
    "check": (
        ("0", "the image is clean, or what was wrong is repaired"),
        ("1", "the check is incomplete: the image cannot be opened, or an error ended the check"),
        ("2", "the image has errors"),
        ("3", "the image has leaked clusters and no errors"),
        ("63", "the format has no check"),
    ),
    "compare": (
        ("0", "the disks are equal"),
        ("1", "the disks differ, or an option is wrong"),
        ("2", "an error: an image cannot be opened or read"),
    ),
    "inspect": (
        ("0", "the file is safe"),
        ("1", "the file is not safe; the reasons are printed"),
        ("2", "an error: there is no verdict (no such file, a folder, a wrong option, a failed read)"),
    ),
    "io": (
        ("0", "all commands succeeded"),
        ("1", "a command failed, or the image cannot be opened"),
    ),
    "serve": (
        (
            "0",
            "the last client has disconnected, or a signal has stopped the server and all images are flushed and closed",
        ),
        ("1", "an error: the server cannot start, or the images could not be closed within 60 seconds of the signal"),
    ),
}
_USUAL = (("0", "the command has done its work"), ("1", "an error, which one line on standard error describes"))
_SIGNAL = ("128 + N", "the signal N ended the command: 130 after Ctrl-C, 141 if the reader of its output has ended")


def statuses_of(command: str) -> tuple[tuple[str, str], ...]:
    """The exit statuses of a command and their meanings."""
    signal = ("128 + N", "a second signal N ended the server at once") if command == "serve" else _SIGNAL
    return (*_STATUSES.get(command, _USUAL), signal)

"""Parsing of the rules of `blkdebug`, from lists of options and from rule files.

    # every second write fails
    [inject-error]
    event = "write_aio"
    state = "1"
    errno = "28"

    [set-state]
    event = "write_aio"
    state = "1"
    new_state = "2"

Each group is one rule. Values are in double quotes; the last of several equal keys counts; `#` begins a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import FormatError, LimitExceeded, OptionError
from ...named_file import read_named
from ...schema import Option, Schema
from .rules import KINDS, USUAL_KINDS, Injection, Transition

_EVENT = Option("event", "str", "the event that activates the rule", required=True)
INJECT_ERROR = Schema(
    "inject-error",
    [
        _EVENT,
        Option("state", "int", "the state in which the event activates the rule; 0: any", default=0, minimum=0),
        Option("iotype", "enum", "the requests that fail (default: all but block-status)", choices=KINDS),
        Option(
            "errno",
            "int",
            "the error number; 0: the requests succeed, and no later rule applies",
            default=5,
            minimum=0,
            maximum=4095,
        ),
        Option(
            "sector",
            "int",
            "only requests that contain the first byte of this sector of 512 bytes; -1: any",
            default=-1,
            minimum=-1,
        ),
        Option("once", "bool", "remove the rule after the first matching request", default=False),
        Option("immediately", "bool", "fail the request before any other thread runs", default=False),
    ],
)
SET_STATE = Schema(
    "set-state",
    [
        _EVENT,
        Option("state", "int", "the state in which the rule applies; 0: any", default=0, minimum=0),
        Option("new_state", "int", "the state after the event", default=0, minimum=0),
    ],
)
_GROUPS = {"inject-error": INJECT_ERROR, "set-state": SET_STATE}

#: The maximum size of a rule file.
_MAX_BYTES = 1 << 20
_HEADING = re.compile(r'\s*\[\s*([^\s\]"]+)(?:\s+"([^"]*)")?\s*\]\s*(?:#.*)?')
_KEY = re.compile(r'\s*([^\s="]+)\s*=\s*"([^"]*)"\s*(?:#.*)?')
_NOTHING = re.compile(r"\s*(?:#.*)?")


def injection(values: Mapping[str, Any]) -> Injection:
    """The rule that the values of `INJECT_ERROR` describe."""
    return Injection(
        event=values["event"],
        state=values["state"],
        kinds=(values["iotype"],) if values["iotype"] else USUAL_KINDS,
        errno=values["errno"],
        sector=None if values["sector"] < 0 else values["sector"],
        once=values["once"],
        immediately=values["immediately"],
    )


def transition(values: Mapping[str, Any]) -> Transition:
    """The rule that the values of `SET_STATE` describe."""
    return Transition(values["event"], values["state"], values["new_state"])


def from_options(options: Mapping[str, Any]) -> list[Injection | Transition]:
    """The rules of the options `inject-error` and `set-state`, whose values are already typed."""
    injections: Iterable[Any] = options.get("inject-error") or ()
    transitions: Iterable[Any] = options.get("set-state") or ()
    return [*map(injection, injections), *map(transition, transitions)]


def from_file(path: str) -> list[Injection | Transition]:
    """The rules of the file `path`, in order. Raises BlockIOError if it cannot be read, FormatError or OptionError, with the
    file and the line, if it is invalid."""
    return parse(_read(path), path)


def _read(path: str) -> str:
    raw, _ = read_named(path, _MAX_BYTES + 1, failure="the rules of blkdebug cannot be read")
    if len(raw) > _MAX_BYTES:
        raise LimitExceeded(f"a rule file has at most {_MAX_BYTES} bytes", path=path)
    return raw.decode("utf-8", "surrogateescape")


def parse(text: str, path: str = "<rules>") -> list[Injection | Transition]:
    """Parse the text of a rule file; `path` is its name for errors."""
    groups: list[tuple[str, str, dict[str, str]]] = []
    names: set[tuple[str, str]] = set()
    for number, line in enumerate(text.split("\n"), 1):
        where, shown = f"{path}:{number}", repr(line.strip()[:64])
        if heading := _HEADING.fullmatch(line):
            kind, name = heading.groups()
            if kind not in _GROUPS:
                raise FormatError(f"unknown kind of rule {shown}", path=where, hint=f"use {' or '.join(_GROUPS)}")
            if (kind, name) in names:
                raise FormatError(f"duplicate rule {shown}", path=where, hint="names may be omitted")
            if name is not None:
                names.add((kind, name))
            groups.append((kind, where, {}))
        elif key := _KEY.fullmatch(line):
            if not groups:
                raise FormatError(f"{shown} is before the first rule", path=where, hint="write [inject-error] first")
            groups[-1][2][key[1]] = key[2]
        elif not _NOTHING.fullmatch(line):
            raise FormatError(f"syntax error: {shown}", path=where, hint='write key = "value"')
    return [_rule(*group) for group in groups]


def _rule(kind: str, where: str, values: dict[str, str]) -> Injection | Transition:
    try:
        parsed = _GROUPS[kind].parse(values)
        return injection(parsed) if kind == "inject-error" else transition(parsed)
    except OptionError as error:
        raise OptionError(error.message, path=where, hint=error.hint) from error

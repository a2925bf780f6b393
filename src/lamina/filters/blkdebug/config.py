"""How the rules of `blkdebug` are written: in lists of options, and in a file of groups.

    # every second write fails
    [inject-error]
    event = "write_aio"
    state = "1"
    errno = "28"

    [set-state]
    event = "write_aio"
    state = "1"
    new_state = "2"

A group is one rule. Values stand in double quotes; of a key that is given twice the last counts; `#` begins a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import FormatError, LimitExceeded, OptionError
from ...named_file import read_named
from ...schema import Option, Schema
from .rules import KINDS, USUAL_KINDS, Injection, Transition

_EVENT = Option("event", "str", "the event that arms it", required=True)
INJECT_ERROR = Schema(
    "inject-error",
    [
        _EVENT,
        Option("state", "int", "the state in which it is armed; 0: any", default=0, minimum=0),
        Option("iotype", "enum", "the requests that fail; all but block-status if not given", choices=KINDS),
        Option("errno", "int", "the error, as a number; 0: these requests pass", default=5, minimum=0, maximum=4095),
        Option("sector", "int", "only requests with this sector of 512 bytes in them; -1: any", default=-1, minimum=-1),
        Option("once", "bool", "the first request that it meets uses it up", default=False),
        Option("immediately", "bool", "no other thread gets a turn before it fails", default=False),
    ],
)
SET_STATE = Schema(
    "set-state",
    [
        _EVENT,
        Option("state", "int", "the state in which it counts; 0: any", default=0, minimum=0),
        Option("new_state", "int", "the state after the event", default=0, minimum=0),
    ],
)
_GROUPS = {"inject-error": INJECT_ERROR, "set-state": SET_STATE}

#: A file of rules is a page or two.
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
    """The rules of the options `inject-error` and `set-state`, which their schemas have read already."""
    injections: Iterable[Any] = options.get("inject-error") or ()
    transitions: Iterable[Any] = options.get("set-state") or ()
    return [*map(injection, injections), *map(transition, transitions)]


def from_file(path: str) -> list[Injection | Transition]:
    """The rules in the file `path`, in its order. BlockIOError if it cannot be read, FormatError or OptionError if it cannot
    be understood; either names the file and the line."""
    return parse(_read(path), path)


def _read(path: str) -> str:
    raw, _ = read_named(path, _MAX_BYTES + 1, failure="the rules of blkdebug cannot be read")
    if len(raw) > _MAX_BYTES:
        raise LimitExceeded(f"a file of rules has at most {_MAX_BYTES} bytes", path=path)
    return raw.decode("utf-8", "surrogateescape")


def parse(text: str, path: str = "<rules>") -> list[Injection | Transition]:
    """The rules that `text` describes; `path` names it in errors."""
    groups: list[tuple[str, str, dict[str, str]]] = []
    names: set[tuple[str, str]] = set()
    for number, line in enumerate(text.split("\n"), 1):
        where, shown = f"{path}:{number}", repr(line.strip()[:64])
        if heading := _HEADING.fullmatch(line):
            kind, name = heading.groups()
            if kind not in _GROUPS:
                raise FormatError(f"there is no kind of rule {shown}", path=where, hint=f"use {' or '.join(_GROUPS)}")
            if (kind, name) in names:
                raise FormatError(f"{shown} is there twice", path=where, hint="names are not needed")
            if name is not None:
                names.add((kind, name))
            groups.append((kind, where, {}))
        elif key := _KEY.fullmatch(line):
            if not groups:
                raise FormatError(
                    f"{shown} stands before the first rule", path=where, hint="write [inject-error] first"
                )
            groups[-1][2][key[1]] = key[2]
        elif not _NOTHING.fullmatch(line):
            raise FormatError(f"{shown} is not understood", path=where, hint='write key = "value"')
    return [_rule(*group) for group in groups]


def _rule(kind: str, where: str, values: dict[str, str]) -> Injection | Transition:
    try:
        parsed = _GROUPS[kind].parse(values)
        return injection(parsed) if kind == "inject-error" else transition(parsed)
    except OptionError as error:
        raise OptionError(error.message, path=where, hint=error.hint) from error

"""The rules of `faults`: which operations one takes, when, and what is to happen to them.

A rule says which operations it takes (`kind`, a range), when (the nth of them, every kth, with a probability, in a window of
time), and what happens: an error, a write that is lost or torn, a flush that lies, flipped bits, another place, a delay, a
wait until the test goes on. Each rule draws from a source of its own, in the order of the operations that it is asked about.
"""

from __future__ import annotations

import errno as _errno
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...errors import OptionError, printable
from ...limits import MAX_SIZE
from ...options import clip, shown
from ...schema import Option, Schema

SECTOR = 512
KINDS = ("read", "write", "zero", "discard", "truncate", "flush", "extents")
#: What can happen, and to which operations.
APPLIES: dict[str, tuple[str, ...]] = {
    "error": KINDS,
    "latency": KINDS,
    "jitter": KINDS,
    "hang": KINDS,
    "drop": ("write", "zero", "discard", "truncate"),
    "ack-only": ("flush",),
    "torn": ("write",),
    "flip": ("read", "write"),
    "misdirect": ("read", "write"),
}

#: The longest time: a day, in milliseconds.
_LONGEST = 86_400_000

RULE = Schema(
    "faults rule",
    [
        Option("kind", "enum", "which operations", default="any", choices=("any", *KINDS)),
        Option("start", "size", "only those that touch the bytes from here on", default=0),
        Option("length", "size", "how many bytes from there; 0: to the end", default=0),
        Option("after", "int", "so many of them pass first", default=0, minimum=0),
        Option("nth", "int", "only the nth of those that are left, from 1", minimum=1),
        Option("every", "int", "only every kth of those that are left", default=1, minimum=1),
        Option("p", "any", "only with this probability: 0.01, 1% or 1:100", default=1.0),
        Option("once", "bool", "only the first time", default=False),
        Option("times", "int", "only so many times", minimum=1),
        Option("up", "int", "milliseconds without faults before each window", default=0, minimum=0, maximum=_LONGEST),
        Option(
            "down",
            "int",
            "milliseconds with faults, again and again; 0: always",
            default=0,
            minimum=0,
            maximum=_LONGEST,
        ),
        Option("error", "any", "the errno that is raised (EIO, ENOSPC, 5); EIO if the rule names no action"),
        Option("heal-on-write", "bool", "what is written can be read again", default=False, aliases=("heal_on_write",)),
        Option("drop", "bool", "report success and change nothing", default=False),
        Option("ack-only", "bool", "a flush reports success and flushes nothing", default=False, aliases=("ack_only",)),
        Option("torn", "enum", "only some sectors of a write are stored", choices=("prefix", "subset")),
        Option("keep", "int", "with torn=prefix: how many; at random if not given", minimum=0),
        Option("flip", "int", "so many bits are inverted, at random places", default=0, minimum=0),
        Option("misdirect", "int", "so many sectors further on, or back", default=0),
        Option("latency", "int", "milliseconds that it takes longer", default=0, minimum=0, maximum=_LONGEST),
        Option("jitter", "int", "up to so many milliseconds more, at random", default=0, minimum=0, maximum=_LONGEST),
        Option("hang", "str", "it waits until the test calls `release` with this tag"),
    ],
)


class Injected(NamedTuple):
    """One thing that was done to one operation."""

    operation: int  #: which operation of this node, from 1
    kind: str  #: read, write, ...
    offset: int
    length: int
    rule: int  #: the index of the rule, -1: the space was used up
    action: str  #: error, drop, torn, ..., space


class Spans:
    """A set of bytes, as half-open ranges in order."""

    def __init__(self, *spans: tuple[int, int]) -> None:
        self.spans = list(spans)

    def add(self, start: int, end: int) -> int:
        """How many bytes were not in it before."""
        added = end - start - self.within(start, end)
        touching = [span for span in self.spans if span[0] <= end and start <= span[1]]
        self.spans = [span for span in self.spans if span not in touching]
        joined = (min([start, *(low for low, _ in touching)]), max([end, *(high for _, high in touching)]))
        self.spans = sorted([*self.spans, joined])
        return added

    def remove(self, start: int, end: int) -> int:
        """How many bytes were in it."""
        removed = self.within(start, end)
        pieces = [((low, min(high, start)), (max(low, end), high)) for low, high in self.spans]
        self.spans = [(low, high) for pair in pieces for low, high in pair if low < high]
        return removed

    def within(self, start: int, end: int) -> int:
        """How many bytes of [start, end) are in it."""
        return sum(max(min(high, end) - max(low, start), 0) for low, high in self.spans)


class Rule:
    """One rule, and how often it took part. OptionError for one that can never do anything."""

    def __init__(self, number: int, options: Mapping[str, Any], seed: int) -> None:
        values = RULE.parse(options, f"rules.{number}")
        self.number = number
        # Drawn from one after the other by this rule alone: another rule changes nothing for it.
        self.rng = random.Random(f"{seed}/{number}")
        self.actions = {name: values[name] for name in APPLIES if values[name]}
        if not self.actions:
            self.actions["error"] = "EIO"
        if "error" in self.actions:
            self.actions["error"] = _error(self.actions["error"], number)
        possible = {kind for action in self.actions for kind in APPLIES[action]}
        kind = values["kind"]
        if kind != "any" and not all(kind in APPLIES[action] for action in self.actions):
            raise _wrong(number, f"{', '.join(self.actions)} cannot happen to a {kind}")
        self.kinds = possible if kind == "any" else {kind}
        start, length = values["start"], values["length"]
        self.bad = Spans((start, start + length if length else MAX_SIZE)) if start or length else None
        self.heals = values["heal-on-write"]
        if self.heals and (self.bad is None or kind != "read"):
            raise _wrong(number, "heal-on-write is for kind=read with a range")
        self.after, self.nth, self.every = values["after"], values["nth"], values["every"]
        self.p = _probability(values["p"], number)
        self.left = 1 if values["once"] else values["times"]
        self.up, self.down = values["up"], values["down"]
        self.keep = values["keep"]
        self.seen = 0

    def takes(self, kind: str, offset: int, length: int, now: float) -> bool:
        """Whether it acts on this operation; counts it."""
        if kind not in self.kinds or self.left == 0:
            return False
        if self.bad is not None and not self.bad.within(offset, offset + length):
            return False
        if self.down and now * 1000 % (self.up + self.down) < self.up:
            return False
        self.seen += 1
        count = self.seen - self.after
        if count < 1 or count % self.every or (self.nth is not None and count != self.nth):
            return False
        if self.p < 1 and self.rng.random() >= self.p:
            return False
        if self.left is not None:
            self.left -= 1
        return True


def _error(value: Any, number: int) -> int:
    """The errno that `value` names."""
    text = _text(value)
    if text.isascii() and text.isdecimal() and int(text) in _errno.errorcode:
        return int(text)
    found = getattr(_errno, text, None) if text.isupper() else None
    if not isinstance(found, int):
        raise _wrong(number, f"error is {_seen(value)}", "it takes a name as EIO, or a number of errno.h")
    return found


def _text(value: Any) -> str:
    """What the user wrote, where that is a short text or a number; else nothing."""
    if isinstance(value, str | float) or (isinstance(value, int) and abs(value) <= MAX_SIZE):
        text = str(value)
        return text if len(text) <= 64 else ""
    return ""


def _seen(value: Any) -> str:
    return printable(clip(value)) if isinstance(value, str) else shown(value)


def _probability(value: Any, number: int) -> float:
    text = _text(value).strip()
    part, _, whole = text.removesuffix("%").partition(":")
    try:
        found = float(part) / float(whole or (100 if text.endswith("%") else 1))
    except (ValueError, ZeroDivisionError):
        found = -1.0
    if not 0 <= found <= 1:
        raise _wrong(number, f"p is {_seen(value)}", "it takes 0 to 1, 0% to 100%, or 1:N")
    return found


def _wrong(number: int, message: str, hint: str | None = None) -> OptionError:
    return OptionError(f"rules.{number}: {message}", hint=hint)

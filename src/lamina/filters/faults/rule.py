"""The rules of `faults`, each of which selects operations and describes the faults to inject.

A rule selects operations by kind and range, by number (the nth, every kth), by probability and by a window of time. Its
faults are an error, a lost or torn write, a flush without effect, inverted bits, a wrong offset, a delay, or a wait until the
test continues. Each rule has its own random generator, which is used in the order of the operations.
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
#: The faults, and the operations in which they can occur.
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
        Option("kind", "enum", "the kind of operations", default="any", choices=("any", *KINDS)),
        Option("start", "size", "the start of the range that the operations must overlap", default=0),
        Option("length", "size", "the length of that range; 0: to the end", default=0),
        Option("after", "int", "the number of operations to skip first", default=0, minimum=0),
        Option("nth", "int", "only the nth of the remaining operations, from 1", minimum=1),
        Option("every", "int", "only every kth of the remaining operations", default=1, minimum=1),
        Option("p", "any", "the probability of the fault: 0.01, 1% or 1:100", default=1.0),
        Option("once", "bool", "only the first time", default=False),
        Option("times", "int", "the maximum number of faults", minimum=1),
        Option("up", "int", "milliseconds without faults before each window", default=0, minimum=0, maximum=_LONGEST),
        Option(
            "down",
            "int",
            "milliseconds of each window with faults; 0: always",
            default=0,
            minimum=0,
            maximum=_LONGEST,
        ),
        Option("error", "any", "the errno to raise (EIO, ENOSPC, 5); EIO is the default of a rule without a fault"),
        Option("heal-on-write", "bool", "written bytes can be read again", default=False, aliases=("heal_on_write",)),
        Option("drop", "bool", "report success and change nothing", default=False),
        Option("ack-only", "bool", "a flush reports success and flushes nothing", default=False, aliases=("ack_only",)),
        Option("torn", "enum", "store only some sectors of a write", choices=("prefix", "subset")),
        Option("keep", "int", "with torn=prefix: the number of stored sectors (default: random)", minimum=0),
        Option("flip", "int", "the number of bits to invert, at random offsets", default=0, minimum=0),
        Option("misdirect", "int", "add this number of sectors to the offset; may be negative", default=0),
        Option("latency", "int", "additional milliseconds", default=0, minimum=0, maximum=_LONGEST),
        Option(
            "jitter", "int", "the maximum of additional, random milliseconds", default=0, minimum=0, maximum=_LONGEST
        ),
        Option("hang", "str", "wait until the test calls `release` with this tag"),
    ],
)


class Injected(NamedTuple):
    """One fault that was injected into one operation."""

    operation: int  #: the number of the operation of this node, from 1
    kind: str  #: read, write, ...
    offset: int
    length: int
    rule: int  #: the index of the rule; -1: no free space
    action: str  #: error, drop, torn, ..., space


class ByteSet:
    """A set of bytes, stored as half-open ranges in order."""

    def __init__(self, *spans: tuple[int, int]) -> None:
        self.spans: list[tuple[int, int]] = list(spans)

    def add(self, start: int, end: int) -> int:
        """Add a range. Returns the number of bytes that were not in the set."""
        added = end - start - self.within(start, end)
        touching = [span for span in self.spans if span[0] <= end and start <= span[1]]
        self.spans = [span for span in self.spans if span not in touching]
        joined = (min([start, *(low for low, _ in touching)]), max([end, *(high for _, high in touching)]))
        self.spans = sorted([*self.spans, joined])
        return added

    def remove(self, start: int, end: int) -> int:
        """Remove a range. Returns the number of bytes that were in the set."""
        removed = self.within(start, end)
        pieces = [((low, min(high, start)), (max(low, end), high)) for low, high in self.spans]
        self.spans = [(low, high) for pair in pieces for low, high in pair if low < high]
        return removed

    def within(self, start: int, end: int) -> int:
        """The number of bytes of [start, end) in the set."""
        return sum(max(min(high, end) - max(low, start), 0) for low, high in self.spans)


class Rule:
    """One rule and its counters. Raises OptionError for a rule that can never inject a fault."""

    actions: dict[str, Any]
    after: int
    down: Any
    every: Any
    nth: Any
    up: Any

    def __init__(self, number: int, options: Mapping[str, Any], seed: int) -> None:
        values = RULE.parse(options, f"rules.{number}")
        self.number = number
        # Used by this rule only, so that its choices do not depend on other rules.
        self.rng: random.Random = random.Random(f"{seed}/{number}")
        self.actions = {name: values[name] for name in APPLIES if values[name]}
        if not self.actions:
            self.actions["error"] = "EIO"
        if "error" in self.actions:
            self.actions["error"] = _error(self.actions["error"], number)
        possible = {kind for action in self.actions for kind in APPLIES[action]}
        kind = values["kind"]
        if kind != "any" and not all(kind in APPLIES[action] for action in self.actions):
            raise _wrong(number, f"{', '.join(self.actions)} cannot occur in the operation {kind}")
        self.kinds: set[str] = possible if kind == "any" else {kind}
        start, length = values["start"], values["length"]
        self.bad: ByteSet | None = ByteSet((start, start + length if length else MAX_SIZE)) if start or length else None
        self.heals: Any = values["heal-on-write"]
        if self.heals and (self.bad is None or kind != "read"):
            raise _wrong(number, "heal-on-write needs kind=read and a range")
        self.after, self.nth, self.every = values["after"], values["nth"], values["every"]
        self.p: float = _probability(values["p"], number)
        self.left = 1 if values["once"] else values["times"]
        self.up, self.down = values["up"], values["down"]
        self.keep: Any = values["keep"]
        self.seen: int = 0

    def matches(self, kind: str, offset: int, length: int, now: float) -> bool:
        """Whether the rule applies to this operation. Updates the counters of the rule."""
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
        raise _wrong(number, f"error is {_quoted(value)}", "it takes a name such as EIO, or an error number")
    return found


def _text(value: Any) -> str:
    """`value` as text, if it is a short text or a number; otherwise an empty text."""
    if isinstance(value, str | float) or (isinstance(value, int) and abs(value) <= MAX_SIZE):
        text = str(value)
        return text if len(text) <= 64 else ""
    return ""


def _quoted(value: Any) -> str:
    return printable(clip(value)) if isinstance(value, str) else shown(value)


def _probability(value: Any, number: int) -> float:
    text = _text(value).strip()
    part, _, whole = text.removesuffix("%").partition(":")
    try:
        found = float(part) / float(whole or (100 if text.endswith("%") else 1))
    except (ValueError, ZeroDivisionError):
        found = -1.0
    if not 0 <= found <= 1:
        raise _wrong(number, f"p is {_quoted(value)}", "it takes 0 to 1, 0% to 100%, or 1:N")
    return found


def _wrong(number: int, message: str, hint: str | None = None) -> OptionError:
    return OptionError(f"rules.{number}: {message}", hint=hint)

"""The filter `blkdebug`: makes chosen requests fail or stop at chosen events, and imposes chosen limits on what lies above.

It changes no byte, no size and no extent. Its rules (`rules`), their files (`config`) and its limits are the ones of the
program people know by this name. An event is something that the node directly above is about to do (`Node.event`), or that
the request path does with a request to this node: the edge tells of both.
"""

from __future__ import annotations

import math
import os
import time
from errno import ENOTSUP
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ...errors import BlockIOError, NotSupported, OptionError
from ...limits import Limits, is_power_of_two
from ...node import FilterNode
from ...request import Child
from ...schema import Option, Schema
from . import config
from .rules import Rules

if TYPE_CHECKING:
    from ...extents import Extents
    from ...graph import Opener


#: Permissions by name, as the locks of files number them (`storage.locks`).
_PERMISSIONS = {"consistent-read": 0, "write": 1, "write-unchanged": 2, "resize": 3}
_PERMISSION = Option("permission", "enum", "a permission", choices=tuple(_PERMISSIONS))
#: Every limit is below this.
_CEILING = (1 << 31) - 1


class Blkdebug(FilterNode):
    """A filter over `image` with rules, and with `limits` of its own. Each of them is optional; 0, like none, takes the
    child's. Requests that fail never reach the child. FUA comes as a flush, which a rule can meet."""

    driver: ClassVar[str] = "blkdebug"
    faithful = True
    schema: ClassVar[Schema] = Schema(
        "blkdebug",
        [
            Option("image", "node", "the node below", required=True),
            Option("config", "str", "a file with rules", default=""),
            Option("inject-error", "list", "more rules: requests that fail", items=config.INJECT_ERROR),
            Option("set-state", "list", "more rules: changes of state", items=config.SET_STATE),
            Option("align", "size", "request alignment: a power of two", default=0),
            Option("max-transfer", "size", "the largest read or write: a multiple of the alignment", default=0),
            Option("opt-write-zero", "size", "zeroes are multiples of this, and not shorter", default=0),
            Option("max-write-zero", "size", "the largest zeroes: a multiple of opt-write-zero", default=0),
            Option("opt-discard", "size", "discards are multiples of this", default=0),
            Option("max-discard", "size", "the largest discard: a multiple of opt-discard", default=0),
            Option("take-child-perms", "list", "permissions that its files are locked for, too", items=_PERMISSION),
            Option("unshare-child-perms", "list", "permissions that nobody else may have", items=_PERMISSION),
        ],
    )

    # The request path above flushes, so that a rule about flushes decides on writes that must be stable, too.
    supported_flags = 0

    def __init__(
        self,
        image: Child,
        limits: Limits | None = None,
        *,
        rules: Rules | None = None,
        name: str | None = None,
        read_only: bool = False,
    ) -> None:
        """`limits`: None for the child's. The event `none` happens at once."""
        super().__init__(image, name=name, read_only=read_only)
        self._limits = limits or image.node.limits
        self._asked: dict[str, Any] = {}
        self.rules = rules or Rules()
        self.rules.fire("none")

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """Raises OptionError for limits that cannot be kept and for rules that cannot be, FormatError for a file of rules
        that is not understood, BlockIOError for one that cannot be read."""
        path = options.get("config")
        rules = Rules([*(config.from_file(path) if path else ()), *config.from_options(options)])
        taken = [_PERMISSIONS[name] for name in options.get("take-child-perms", ())]
        unshared = [_PERMISSIONS[name] for name in options.get("unshare-child-perms", ())]
        if opener.read_only and {_PERMISSIONS["write"], _PERMISSIONS["write-unchanged"]}.intersection(taken):
            raise OptionError("permission to write is taken of what is opened for reading", hint="open it for writing")
        image = opener.permitting(taken, unshared).child("image", options["image"], grows=True)
        limits = _limits(options, image.node.limits)
        node = cls(image, limits, rules=rules, name=opener.name, read_only=opener.read_only)
        node._asked = options
        return node

    @property
    def limits(self) -> Limits:
        return self._limits

    def graph_changed(self) -> None:
        self._limits = _limits(self._asked, self.image.node.limits)

    def event(self, name: str) -> None:
        self.rules.fire(name)

    def read_into(self, offset: int, view: memoryview) -> None:
        if self.rules.active:
            self._meet("read", offset, len(view))
        self.image.read_into(offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        if self.rules.active:
            self._meet("write", offset, len(view))
        self.image.write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        shortest = max(self._limits.request_alignment, self._limits.zero_alignment)
        if length < shortest:
            raise NotSupported(f"zeroes here are at least {shortest} bytes", node=self.name, operation="zero")
        if self.rules.active:
            self._meet("write-zeroes", offset, length)
        self.image.zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        shortest = self._limits.request_alignment
        if length < shortest:
            raise NotSupported(f"discards here are at least {shortest} bytes", node=self.name, operation="discard")
        if self.rules.active:
            self._meet("discard", offset, length)
        self.image.discard(offset, length)

    def flush(self) -> None:
        self.image.tell("flush_to_os")
        self.image.tell("flush_to_disk")
        if self.rules.active:
            self._meet("flush", 0, 0)
        self.image.flush()

    def extents(self, offset: int, length: int) -> Extents:
        if self.rules.active:
            self._meet("block-status", offset, length)
        return self.image.extents(offset, length)

    def _meet(self, kind: str, offset: int, length: int) -> None:
        """Raise the error that a rule has for this request."""
        rule = self.rules.meet(kind, offset, length)
        if rule is None:
            return
        if not rule.immediately:
            time.sleep(0)
        words = f"an error that was asked for: {os.strerror(rule.errno)}"
        place: dict[str, Any] = {"node": self.name, "operation": kind, "offset": offset, "length": length}
        raise NotSupported(words, **place) if rule.errno == ENOTSUP else BlockIOError(words, errno=rule.errno, **place)


def _limits(options: dict[str, Any], below: Limits) -> Limits:
    """The limits that `options` ask for over a child with the limits `below`; OptionError names the one that cannot
    be."""
    align = options.get("align") or 0
    if align and (not is_power_of_two(align) or align > _CEILING):
        raise _unmet("align", align, "a power of two below 2**31")
    unit = max(align, below.request_alignment)

    def limit(name: str, multiple: int, otherwise: int) -> int:
        value: int = options.get(name) or 0
        if value and (value >= _CEILING or value % multiple):
            raise _unmet(name, value, f"a multiple of {multiple} below 2**31 - 1")
        return value or otherwise

    zero = limit("opt-write-zero", unit, unit)
    discard = limit("opt-discard", unit, below.discard_alignment)
    # A maximum of the child's that is less than one block here is left to the edge below, which splits again.
    return Limits(
        request_alignment=unit,
        max_transfer=limit("max-transfer", unit, below.max_transfer if below.max_transfer >= unit else 0),
        optimal_transfer=below.optimal_transfer,
        zero_alignment=zero,
        max_zero=limit(
            "max-write-zero",
            max(options.get("opt-write-zero") or 0, unit),
            below.max_zero if below.max_zero >= math.lcm(unit, zero) else 0,
        ),
        discard_alignment=discard,
        max_discard=limit(
            "max-discard",
            max(options.get("opt-discard") or 0, unit),
            below.max_discard if below.max_discard >= math.lcm(unit, discard) else 0,
        ),
    )


def _unmet(name: str, value: int, rule: str) -> OptionError:
    return OptionError(f"blkdebug cannot keep to {name} {value}", hint=f"it must be {rule}, or 0 for the child's")

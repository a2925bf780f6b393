"""The filter `blkdebug`: makes selected requests fail or stop at named events, and declares limits for the node above.

The filter changes no bytes, sizes or extents. Its rules (`rules`), their files (`config`) and its limits are those of QEMU's
blkdebug. An event is a step of the node directly above (`Node.event`), or a step of the request path with a request to this
node; the edge reports both.
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


#: The numbers of the permissions in file locks (`storage.locks`), by name.
_PERMISSIONS = {"consistent-read": 0, "write": 1, "write-unchanged": 2, "resize": 3}
_PERMISSION = Option("permission", "enum", "a permission", choices=tuple(_PERMISSIONS))
#: All limits must be smaller.
_CEILING = (1 << 31) - 1


class Blkdebug(FilterNode):
    """A filter above `image` with rules and limits. The default of each limit, also for 0, is that of the child. A request
    that a rule fails never reaches the child. The request path emulates FUA by a flush, to which rules apply."""

    driver: ClassVar[str] = "blkdebug"
    faithful = True
    schema: ClassVar[Schema] = Schema(
        "blkdebug",
        [
            Option("image", "node", "the child node", required=True),
            Option("config", "str", "a file with rules", default=""),
            Option("inject-error", "list", "further rules: requests that fail", items=config.INJECT_ERROR),
            Option("set-state", "list", "further rules: changes of state", items=config.SET_STATE),
            Option("align", "size", "the request alignment, a power of two; 0: that of the child", default=0),
            Option(
                "max-transfer",
                "size",
                "the largest read or write, a multiple of the alignment; 0: that of the child",
                default=0,
            ),
            Option(
                "opt-write-zero", "size", "the alignment and minimum of zero requests; 0: that of the child", default=0
            ),
            Option(
                "max-write-zero",
                "size",
                "the largest zero request, a multiple of opt-write-zero; 0: that of the child",
                default=0,
            ),
            Option("opt-discard", "size", "the alignment of discards; 0: that of the child", default=0),
            Option(
                "max-discard", "size", "the largest discard, a multiple of opt-discard; 0: that of the child", default=0
            ),
            Option("take-child-perms", "list", "further permissions to lock on the files", items=_PERMISSION),
            Option("unshare-child-perms", "list", "further permissions to deny other processes", items=_PERMISSION),
        ],
    )

    # The request path emulates FUA by a flush, so that rules about flushes also apply to FUA writes.
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
        """`limits`: the default is those of the child. The event `none` happens immediately."""
        super().__init__(image, name=name, read_only=read_only)
        self._limits = limits or image.node.limits
        self._options: dict[str, Any] = {}
        self.rules: Rules = rules or Rules()
        self.rules.fire("none")

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """Raises OptionError for invalid limits and rules, FormatError for a rule file with a syntax error, BlockIOError for
        a rule file that cannot be read."""
        path = options.get("config")
        rules = Rules([*(config.from_file(path) if path else ()), *config.from_options(options)])
        taken = [_PERMISSIONS[name] for name in options.get("take-child-perms", ())]
        unshared = [_PERMISSIONS[name] for name in options.get("unshare-child-perms", ())]
        if opener.read_only and {_PERMISSIONS["write"], _PERMISSIONS["write-unchanged"]}.intersection(taken):
            raise OptionError(
                "take-child-perms needs write access, and the image is read-only", hint="open it for writing"
            )
        image = opener.permitting(taken, unshared).child("image", options["image"], grows=True)
        limits = _limits(options, image.node.limits)
        node = cls(image, limits, rules=rules, name=opener.name, read_only=opener.read_only)
        node._options = options
        return node

    @property
    def limits(self) -> Limits:
        return self._limits

    def graph_changed(self) -> None:
        self._limits = _limits(self._options, self.image.node.limits)

    def event(self, name: str) -> None:
        self.rules.fire(name)

    def read_into(self, offset: int, view: memoryview) -> None:
        if self.rules.active:
            self._inject("read", offset, len(view))
        self.image.read_into(offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        if self.rules.active:
            self._inject("write", offset, len(view))
        self.image.write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        shortest = max(self._limits.request_alignment, self._limits.zero_alignment)
        if length < shortest:
            raise NotSupported(f"a zero request has at least {shortest} bytes", node=self.name, operation="zero")
        if self.rules.active:
            self._inject("write-zeroes", offset, length)
        self.image.zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        shortest = self._limits.request_alignment
        if length < shortest:
            raise NotSupported(f"a discard has at least {shortest} bytes", node=self.name, operation="discard")
        if self.rules.active:
            self._inject("discard", offset, length)
        self.image.discard(offset, length)

    def flush(self) -> None:
        self.image.tell("flush_to_os")
        self.image.tell("flush_to_disk")
        if self.rules.active:
            self._inject("flush", 0, 0)
        self.image.flush()

    def extents(self, offset: int, length: int) -> Extents:
        if self.rules.active:
            self._inject("block-status", offset, length)
        return self.image.extents(offset, length)

    def _inject(self, kind: str, offset: int, length: int) -> None:
        """Raise the error of the rule that applies to this request, if there is one."""
        rule = self.rules.match(kind, offset, length)
        if rule is None:
            return
        if not rule.immediately:
            time.sleep(0)
        text = f"injected error: {os.strerror(rule.errno)}"
        context: dict[str, Any] = {"node": self.name, "operation": kind, "offset": offset, "length": length}
        raise (
            NotSupported(text, **context) if rule.errno == ENOTSUP else BlockIOError(text, errno=rule.errno, **context)
        )


def _limits(options: dict[str, Any], below: Limits) -> Limits:
    """The limits of `options` above a child with the limits `below`. Raises OptionError for an invalid limit."""
    align = options.get("align") or 0
    if align and (not is_power_of_two(align) or align > _CEILING):
        raise _invalid("align", align, "a power of two below 2**31")
    unit = max(align, below.request_alignment)

    def limit(name: str, multiple: int, otherwise: int) -> int:
        value: int = options.get(name) or 0
        if value and (value >= _CEILING or value % multiple):
            raise _invalid(name, value, f"a multiple of {multiple} below 2**31 - 1")
        return value or otherwise

    zero = limit("opt-write-zero", unit, unit)
    discard = limit("opt-discard", unit, below.discard_alignment)
    # A maximum of the child below the alignment of this node is not declared; the edge to the child splits requests again.
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


def _invalid(name: str, value: int, rule: str) -> OptionError:
    return OptionError(f"blkdebug: {name} is {value}", hint=f"it takes {rule}, or 0 for the limit of the child")

"""The filter `blkdebug`: imposes chosen limits on what lies above it, to test that every request path keeps to them.

It changes no byte, no size and no extent. The limits it declares are the ones of the program people know by this name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import NotSupported, OptionError, UnsupportedFeature
from ..limits import Limits, is_power_of_two
from ..node import FilterNode
from ..request import Child
from ..schema import Option, Schema

if TYPE_CHECKING:
    from ..graph import Opener

#: Every limit is below this.
_CEILING = (1 << 31) - 1


class Blkdebug(FilterNode):
    """A filter over `image` with `limits` of its own. Each of them is optional; 0, like none, takes the child's."""

    driver: ClassVar[str] = "blkdebug"
    schema: ClassVar[Schema] = Schema(
        "blkdebug",
        [
            Option("image", "node", "the node below", required=True),
            Option("config", "str", "a file with rules for errors; only empty so far", default=""),
            Option("align", "size", "request alignment: a power of two", default=0),
            Option("max-transfer", "size", "the largest read or write: a multiple of the alignment", default=0),
            Option("opt-write-zero", "size", "zeroes are multiples of this, and not shorter", default=0),
            Option("max-write-zero", "size", "the largest zeroes: a multiple of opt-write-zero", default=0),
            Option("opt-discard", "size", "discards are multiples of this", default=0),
            Option("max-discard", "size", "the largest discard: a multiple of opt-discard", default=0),
        ],
    )

    def __init__(
        self, image: Child, limits: Limits | None = None, *, name: str | None = None, read_only: bool = False
    ) -> None:
        super().__init__(image, name=name, read_only=read_only)
        self._limits = limits or image.node.limits

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """Raises OptionError for limits that cannot be kept, UnsupportedFeature for rules."""
        if options.get("config"):
            raise UnsupportedFeature(
                "blkdebug has no rules for errors yet", path=options["config"], hint="leave config empty"
            )
        image = opener.child("image", options["image"], grows=True)
        limits = _limits(options, image.node.limits)
        return cls(image, limits, name=opener.name, read_only=opener.read_only)

    @property
    def limits(self) -> Limits:
        return self._limits

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        shortest = max(self._limits.request_alignment, self._limits.zero_alignment)
        if length < shortest:
            raise NotSupported(f"zeroes here are at least {shortest} bytes", node=self.name, operation="zero")
        self.image.zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        shortest = self._limits.request_alignment
        if length < shortest:
            raise NotSupported(f"discards here are at least {shortest} bytes", node=self.name, operation="discard")
        self.image.discard(offset, length)


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

    zero = limit("opt-write-zero", unit, below.zero_alignment)
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

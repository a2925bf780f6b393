"""The sizes of the caches of an open image: L2 tables and refcount blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...errors import OptionError
from ...schema import Option

#: Options of the node. Sizes that are not given follow from the others.
OPTIONS = (
    Option("cache-size", "size", "bytes of the caches of L2 tables and refcount blocks (default: by the budget)"),
    Option("l2-cache-size", "size", "bytes of the cache of L2 tables (default: four fifths of cache-size)"),
    Option("refcount-cache-size", "size", "bytes of the cache of refcount blocks (default: the rest of cache-size)"),
)


class Caches(NamedTuple):
    """The most bytes of each cache. Four L2 tables and one refcount block are cached even if that is more."""

    l2: int
    refcounts: int

    @classmethod
    def of(cls, total: int) -> Caches:
        """Both caches in `total` bytes: an L2 entry has four times as many bytes as a count of 16 bits, so they cover about
        the same part of the disk."""
        l2 = total * 4 // 5
        return cls(l2, total - l2)

    @classmethod
    def given(cls, options: Mapping[str, Any], default: Caches) -> Caches:
        """The caches that the options of a node ask for. OptionError if these contradict each other."""
        total, l2, refcounts = (options.get(option.name) for option in OPTIONS)
        if total is None:
            return cls(default.l2 if l2 is None else l2, default.refcounts if refcounts is None else refcounts)
        if l2 is not None and refcounts is not None:
            raise OptionError(
                "cache-size, l2-cache-size and refcount-cache-size are given", hint="leave one of them out"
            )
        if max(l2 or 0, refcounts or 0) > total:
            raise OptionError(f"cache-size is {total}, and a part of it is to be larger", hint="raise cache-size")
        if l2 is not None:
            return cls(l2, total - l2)
        return cls.of(total) if refcounts is None else cls(total - refcounts, refcounts)

"""Threads that encode and decode: several of them share a long request.

Compression and decompression take most of the time of such a request, and their libraries release the GIL: two threads read
compressed clusters 1.6 times as fast as one.
"""

from __future__ import annotations

import os
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from .limits import KIB

if TYPE_CHECKING:
    from .format import Format
    from .format_node import FormatNode, Mapping
    from .workers import Workers

#: The least number of bytes for a thread.
_SHARE = 128 * KIB
#: More threads than this wait for the file or the tables.
_MOST_THREADS = 8


class Encoded(NamedTuple):
    """A part of a read: `view` is to hold the bytes of the disk from `offset`, all of them of the encoded `mapping`."""

    mapping: Mapping
    offset: int
    view: memoryview


def load_all(node: FormatNode, parts: list[Encoded]) -> None:
    """`node.load_parts` of all parts, in several threads where that pays. The caller has locked the range of the request.
    Raises the first error in the order of the parts, when no thread fills a buffer any more."""
    if node.file.event is not None:  # it observes each part, and may suspend the thread
        for part in parts:
            node.load(*part)
        return
    threads = min(threads_for(sum(len(part.view) for part in parts)), len(parts))
    if threads < 2:
        node.load_parts(parts)
        return
    ends = list(accumulate(len(part.view) for part in parts))
    shares: list[list[Encoded]] = [[] for _ in range(threads)]
    for part, end in zip(parts, ends, strict=True):
        shares[(end - 1) * threads // ends[-1]].append(part)
    workers_of(node).map(node.load_parts, [share for share in shares if share])


def threads_for(length: int) -> int:
    """The number of threads that encode or decode so many bytes; 1: the calling thread."""
    return max(min(_processors(), length // _SHARE), 1)


def workers_of(node: Format) -> Workers:
    """The threads of the node, which end when it is closed."""
    if node.coders is None:
        from .workers import Workers

        node.coders = Workers(_processors(), "lamina-code")
    return node.coders


def _processors() -> int:
    return min(os.cpu_count() or 1, _MOST_THREADS)

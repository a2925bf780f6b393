"""What lies beneath a new overlay: whether the source is built on that base itself, and if not, in what it differs from it.

Used by `convert`. Where the base is a layer of the source, what the layers above it own is what differs. That is decided by
the opened graphs, not by names: every node from the top of the source down to the base must leave bytes where they are, and
the base must be opened in the same way on both sides. In doubt the answer is no, and both are read and compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ..format_node import FormatNode
from ..limits import MIB
from ..node import FilterNode, Node, StorageNode, is_faithful
from ..numeric import np

if TYPE_CHECKING:
    from ..image import Image

_ZEROS = bytes(2 * MIB)


class Below(NamedTuple):
    """What lies below the target already. `image`: its content, to compare with; or, where the source itself is built
    on that very image, `depth`: the number of layers of the source that lie above it."""

    image: Image | None = None
    depth: int | None = None


def layers_above(top: Node, base: Node) -> int | None:
    """How many layers of the graph `top` lie above the one that shows the same disk as the graph `base`, for the same
    reason: the same driver over the same file, and the same below it. None if none does, or where that cannot be told
    because something between changes bytes, offsets or lengths, or a driver was given options of its own."""
    depth = 0
    node = top
    while True:
        node = _beneath_filters(node)
        if _same(node, base):
            return depth
        backing = node.children.get("backing")
        if backing is None or not isinstance(node, FormatNode) or not is_faithful(node):
            return None
        node = backing.node
        depth += 1


def _beneath_filters(node: Node) -> Node:
    while isinstance(node, FilterNode) and is_faithful(node):
        node = node.image.node
    return node


def _same(one: Node, other: Node) -> bool:
    """Whether both show the same bytes for the same reason."""
    one, other = _beneath_filters(one), _beneath_filters(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, StorageNode):
        return one.identity is not None and one.identity == other.identity  # type: ignore[attr-defined]
    return (
        is_faithful(one)
        and is_faithful(other)
        and one.children.keys() == other.children.keys()
        and all(_same(child.node, other.children[role].node) for role, child in one.children.items())
    )


def differing(base: Image, at: int, view: memoryview, unit: int) -> Iterator[tuple[int, int]]:
    """The parts of `view`, in units and as long as can be, in which it is not what `base` has at the same place. `at`, where
    `view` begins on the disk, is a multiple of `unit`, itself a power of two from 8 on. Past its end the base is zero."""
    length = len(view)
    inside = min(max(base.size - at, 0), length)
    there = bytearray(length)
    if inside:
        base.read_into(at, memoryview(there)[:inside])
    yield from _unlike(there, view, unit)


def stored(base: Image, at: int, length: int, unit: int) -> Iterator[tuple[int, int]]:
    """The parts of these bytes, in units and as long as can be, in which `base` is not zero."""
    yield from differing(base, at, memoryview(_ZEROS)[:length], unit)


def _unlike(there: bytearray, view: memoryview, unit: int) -> Iterator[tuple[int, int]]:
    length = len(view)
    if there.startswith(view):  # one memcmp
        return
    whole = length // unit
    rest = whole * unit
    words = np.frombuffer(there, np.uint64, rest // 8) != np.frombuffer(view, np.uint64, rest // 8)
    differs = words.reshape(whole, unit // 8).any(axis=1)
    if rest < length:
        differs = np.append(differs, not there.startswith(view[rest:], rest))
    edges = np.flatnonzero(np.diff(differs, prepend=False, append=False)) * unit
    for lo, hi in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield lo, min(hi, length)

"""The backing file of a new overlay: whether it is a layer of the source, and if not, where the source differs from it.

Used by `convert` and `diff`. If the backing file is a layer of the source, the layers above it own everything that differs.
The opened graphs decide this, not file names: every node from the top of the source down to that layer must leave offsets and
bytes unchanged, and the layer must be opened in the same way on both sides. Otherwise the job reads both and compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ..errors import Hint, OptionError, UnsupportedFeature
from ..extents import PRESENT, Extents
from ..format_node import FormatNode
from ..limits import MAX_SIZE, MIB
from ..node import FilterNode, Node, StorageNode, is_faithful
from ..numeric import np

if TYPE_CHECKING:
    from ..bitmap import DirtyBitmap
    from ..format import Format
    from ..image import Image
    from ..request import Child

_ZEROS = bytes(2 * MIB)

#: For an overlay whose backing file has no format.
GIVE_BACKING_FORMAT = Hint("give it: backing_format=...", command="give it (-F)")


class Backing(NamedTuple):
    """The backing file of the target. `image`: its content, for comparison; or, if the backing file is a layer of the source,
    `depth`: the number of layers of the source above it. `keeps_rest`: behind the end of the source the target stays as it
    is. `replaces`: the target is the source, and is to have `image`, as long as itself, in place of its backing file; if
    `image` is also one of its layers, `depth` says which. `changed`: the source differs from the backing file only there,
    and these ranges are as those of a layer above it: `depth` is 1."""

    image: Image | None = None
    depth: int | None = None
    keeps_rest: bool = False
    replaces: bool = False
    changed: DirtyBitmap | None = None

    def marked(self, found: Extents) -> Extents:
        """The extents of a source, divided at the ends of the ranges in `changed`: those have the depth 0, the others 1."""
        if self.changed is None:
            return found
        edges = [edge for dirty in self.changed.dirty(found.begin, found.end) for edge in dirty]
        cuts = np.array(edges, np.int64)
        starts = np.unique(np.concatenate((found.start, cuts[cuts < found.end])))
        row = np.searchsorted(found.start, starts, "right") - 1
        depth = (np.searchsorted(cuts, starts, "right") % 2 == 0).astype(np.int32)
        offset = np.where(found.offset[row] < 0, -1, found.offset[row] + starts - found.start[row])
        length = np.diff(np.append(starts, found.end))
        return Extents(found.begin, starts, length, found.flags[row], depth, found.file[row], offset, found.files)

    @staticmethod
    def wanted(found: Extents, layers: int) -> Extents:
        """The extents of a source whose backing file `image` replaces. Those that it does not own, and that `image` may not
        have, since they are of the first `layers` layers, get the depth 0 and the others 1, so that rounding to blocks leaves
        out none."""
        owned = (found.flags & PRESENT != 0) & (found.depth == 0)
        shared = found.depth >= layers
        depth = (owned | shared).astype(np.int32)
        columns = (found.start, found.length, found.flags | np.uint8(PRESENT), depth, found.file, found.offset)
        return Extents(found.begin, *columns, found.files)


class Layer:
    """The layer of `image` with `depth` layers above it, which edits may move while a job runs. None: no layer. Without
    `moves`, `depth` is no place in the graph, and stays (see `Backing.changed`)."""

    def __init__(self, image: Image, depth: int | None, *, moves: bool = True) -> None:
        self._image = image
        self._node = None if depth is None or not moves else beneath_filters(_layers(image.node)[depth])
        self._above = MAX_SIZE if depth is None else depth

    def above(self) -> int:
        """The most layers that were above it at any call so far; more than there are if it was not found. Extents that were
        queried before this call, and have this depth or a larger one, belong to the layer or to those below it."""
        if self._node is not None:
            layers = enumerate(_layers(self._image.node))
            now = next((depth for depth, node in layers if beneath_filters(node) is self._node), MAX_SIZE)
            self._above = max(self._above, now)
        return self._above


def _layers(top: Node) -> list[Node]:
    """The layers of the graph `top`, as far as each leaves offsets and bytes unchanged."""
    return [top, *(edge.node for edge in backing_edges(top))]


def layers_above(top: Node, base: Node) -> int | None:
    """The number of layers of the graph `top` above the layer that equals the graph `base`: the same driver over the same
    file, and the same below it. None if no layer equals it, or if that is unknown because a node between them changes bytes,
    offsets or lengths, or has options of its own."""
    return next((depth for depth, layer in enumerate(_layers(top)) if _same(layer, base)), None)


def shared_layers(first: Node, second: Node) -> tuple[int, int] | None:
    """The numbers of layers of two graphs above the first layer that both have, with all below it (see `layers_above`); None
    if they are not known to share one."""
    for depth, layer in enumerate(_layers(second)):
        if (above := layers_above(first, layer)) is not None:
            return above, depth
    return None


def backing_edges(top: Node) -> Iterator[Child]:
    """The edges to the backing nodes of `top`, from the first one down, as far as each layer leaves offsets and bytes
    unchanged: what a layer owns, and what it does not, shows which layer has a byte of `top`."""
    node = beneath_filters(top)
    while isinstance(node, FormatNode) and is_faithful(node) and node.backing is not None:
        yield node.backing
        node = beneath_filters(node.backing.node)


def require_no_snapshots(node: Format) -> None:
    """Raise OptionError if the image has internal snapshots: they show its backing file, too, and would change with it."""
    try:
        found = node.snapshots()
    except UnsupportedFeature:
        return
    if found:
        raise OptionError(
            "the image has internal snapshots, which show its backing file as well, and would change",
            path=node.filename,
            hint=Hint(
                "delete them (image.delete_snapshot), or convert the image to a new one",
                command="delete them (lamina snapshot -d), or convert the image to a new one",
            ),
        )


def loses(node: Node) -> bool:
    """Whether bytes that are written to `node` are gone when it is closed: it keeps them in memory, or nowhere."""
    return node.transient or any(loses(edge.node) for role, edge in node.children.items() if role != "backing")


def require_backing_open(node: Format) -> None:
    """Raise OptionError if the image names a backing file that is not open: its bytes are part of the disk, and are not
    known."""
    if "backing" in node.children or type(node).inspect(node.children["file"], {}).backing_filename is None:
        return
    raise OptionError(
        "the backing file that the image names is not open, so its bytes cannot be copied",
        path=node.filename,
        hint="open it with the image",
    )


def beneath_filters(node: Node) -> Node:
    """The first node that is not a filter which leaves all bytes where they are."""
    while isinstance(node, FilterNode) and is_faithful(node):
        node = node.image.node
    return node


def _same(one: Node, other: Node) -> bool:
    """Whether both nodes have the same bytes because they read the same files in the same way."""
    one, other = beneath_filters(one), beneath_filters(other)
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
    """The ranges of `view`, in multiples of `unit` and as long as possible, that differ from `base`. `at`, the offset of
    `view` on the disk, is a multiple of `unit`, a power of two of at least 8. Past its end `base` reads as zero."""
    length = len(view)
    inside = min(max(base.size - at, 0), length)
    there = bytearray(length)
    if inside:
        base.read_into(at, memoryview(there)[:inside])
    yield from unlike(there, view, unit)


def stored(base: Image, at: int, length: int, unit: int) -> Iterator[tuple[int, int]]:
    """The ranges of these bytes, in multiples of `unit` and as long as possible, in which `base` is not zero."""
    yield from differing(base, at, memoryview(_ZEROS)[:length], unit)


def unlike(there: bytearray, view: memoryview, unit: int) -> Iterator[tuple[int, int]]:
    """The ranges of `view`, in multiples of `unit`, a power of two, and as long as possible, that differ from the first bytes
    of `there`. The last unit may be incomplete."""
    length = len(view)
    if there.startswith(view):  # one memcmp
        return
    whole = length // unit
    rest = whole * unit
    word = np.dtype(f"u{min(unit, 8)}")
    count = rest // word.itemsize
    words = np.frombuffer(there, word, count) != np.frombuffer(view, word, count)
    differs = words.reshape(whole, unit // word.itemsize).any(axis=1)
    if rest < length:
        differs = np.append(differs, not there.startswith(view[rest:], rest))
    edges = np.flatnonzero(np.diff(differs, prepend=False, append=False)) * unit
    for lo, hi in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield lo, min(hi, length)

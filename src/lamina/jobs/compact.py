"""Make the file of an image smaller, in place: free leaked clusters and the storage of zeros, and cut off what nothing uses.

No byte of the disk changes, at any moment. Every step is complete in itself, so the job may be interrupted and begun again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from errno import ENOSPC
from typing import TYPE_CHECKING

from ..descriptors import opening
from ..errors import BlockIOError, CorruptImage, Hint, NotSupported, UnsupportedFeature
from ..extents import DATA, PRESENT
from ..format import Format
from ..format_node import FormatNode
from ..image import Image
from ..job_results import CompactResult
from ..numeric import np
from ..zeros import stored_parts
from .in_place import Batches, Part, parts
from .progress import Monitor
from .windows import stretches, windows

if TYPE_CHECKING:
    from ..extents import Extents
    from ..numeric import NDArray

#: The usual block size of file systems, which make no smaller holes.
_BLOCK = 4096


def compact(image: Image, *, parallel: int | None = None, monitor: Monitor | None = None) -> CompactResult:
    """Free what the image does not need: clusters that are leaked, blocks of data that are all zero, storage that is reserved
    for zeros, and free space inside the file: data from its end is moved there, the file is cut off behind what is left, and
    the rest becomes holes. Blocks that snapshots use as well stay, and so do zeros in a qcow2 image of version 2 over a
    backing file. The bytes of the disk stay the same, at any moment, and so do dirty bitmaps.

    `parallel`: the number of threads that read, 1 to 16; None: two, or 8 if a file is remote. Other users may read and write
    meanwhile.

    Raises CorruptImage, before anything changes, for an image that needs a repair; UnsupportedFeature if the top node is no
    format; the errors of reading and writing, and Cancelled. The disk is as before then.
    """
    watch = monitor or Monitor()
    with opening(image.share) as own:
        node = own.node
        if not isinstance(node, Format):
            raise UnsupportedFeature(f"the filter {node.driver} has no file of its own", path=image.filename)
        own.root.edge.require_writable("change")
        before = _extent_of(node)
        leaks = own.root.alone("checks the image", _free_leaks, node)  # a mixture of two states would look damaged
        zeros = _Zeros(node)
        batches = Batches(own, "frees the storage of zeros", "lamina-compact", zeros.find, zeros.free, parallel)
        try:
            batches.run(zeros.parts(own), watch)
        except NotSupported as error:
            node.warn("blocks of zeros stay stored: %s", error)
        own.flush()
        _pack(own, node, watch)
        with suppress(UnsupportedFeature):  # a format without free space
            own.root.alone("gives back free space", node.trim)
        own.flush()
        after = _extent_of(node)
        watch.update(own.size, own.size)
        return CompactResult(image.filename, leaks, zeros.freed, (before[0], after[0]), (before[1], after[1]))


def _free_leaks(node: Format) -> int:
    try:
        report = node.check()
    except UnsupportedFeature:
        return 0  # it has no structures that could leak
    if report.corruptions or report.check_errors:
        raise CorruptImage(
            "the image is damaged or cannot be read, so free space cannot be told from data",
            path=node.filename,
            hint=Hint("lamina.check tells more", command="lamina check tells more"),
        )
    if report.leaks:
        node.repair("leaks")
    return report.leaks


def _pack(own: Image, node: Format, watch: Monitor) -> None:
    steps = node.pack()
    try:
        while own.root.alone("moves data", next, steps, None) is not None:
            watch.check()
    except BlockIOError as error:
        if error.errno != ENOSPC:
            raise
        node.warn("some data stays at the end of the file, since the file system is full")


def _extent_of(node: Format) -> tuple[int, int | None]:
    """The length of the files of the image itself, and the bytes that they take up."""
    files = [child.node for role, child in node.children.items() if role != "backing"]
    taken = [file.allocated for file in files]
    return sum(file.size for file in files), None if None in taken else sum(bytes_ or 0 for bytes_ in taken)


class _Zeros:
    """Finds the blocks of zeros that the top node stores, and frees their storage. `freed`: the bytes so far."""

    def __init__(self, node: Format) -> None:
        self.freed = 0
        self._node = node
        limits = node.limits
        self._block = max(node.serialise or _BLOCK, limits.zero_alignment, limits.request_alignment)

    def parts(self, image: Image) -> Iterator[Part]:
        """The parts of the disk that have storage of this node."""
        return parts(self._stored(image), self._block, self._node.size)

    def _stored(self, image: Image) -> Iterator[tuple[int, int]]:
        for found in windows(image, 0, self._node.size, grid=self._block):
            stored = self._has_storage(found)
            starts = found.start[stored]
            for _, start, length in stretches(np.zeros_like(starts), starts, found.length[stored]):
                yield start, length

    def find(self, part: Part) -> list[tuple[int, int]]:
        """The runs (start, stop) of blocks that the node stores and that are zero. No request changes them meanwhile."""
        block = self._block
        count = -(-(part.stop - part.start) // block)
        needed, stored = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        at = part.start
        while at < part.stop:
            found = self._node.extents(at, part.stop - at)
            storage = self._has_storage(found).tolist()
            for row, has_storage in zip(found, storage, strict=True):
                if has_storage:
                    _mark(stored, part, row.start, row.end, block)
                if row.depth:  # of a layer below: then the block stays as it is
                    _mark(needed, part, row.start, row.end, block)
                elif not row.zero:
                    for lo, hi in self._data(row.start, row.length):
                        _mark(needed, part, lo, hi, block)
            at = found.end
        edges = np.flatnonzero(np.diff(stored & ~needed, prepend=False, append=False)) * block + part.start
        return [(lo, min(hi, part.stop)) for lo, hi in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)]

    def _data(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """The ranges of these bytes that are not zero, rounded to blocks or to the range."""
        view = memoryview(bytearray(length))
        self._node.read_into(start, view)
        for lo, hi in stored_parts(view, start, self._block, self._block):
            yield start + lo, start + hi

    def free(self, found: list[list[tuple[int, int]]]) -> None:
        for runs in found:
            for start, stop in runs:
                self.freed += self._node.free_zeros(start, stop - start)

    def _has_storage(self, found: Extents) -> NDArray[np.bool_]:
        """Which of these extents the node stores, or has storage for."""
        stores = found.flags & DATA != 0
        if isinstance(self._node, FormatNode):  # one that maps its disk tells storage that is reserved for zeros
            stores |= found.file >= 0
        result: NDArray[np.bool_] = stores & (found.depth == 0) & (found.flags & PRESENT != 0)
        return result


def _mark(marks: NDArray[np.bool_], part: Part, start: int, stop: int, block: int) -> None:
    """Mark the blocks of `part` that have bytes of this range."""
    marks[(start - part.start) // block : -(-(stop - part.start) // block)] = True

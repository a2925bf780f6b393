"""Make an overlay independent of its backing chain, in place: copy what the layers below own, then remove the reference.

Until the last step the image shows the same bytes as before, whatever part of the chain has been copied: it may be
interrupted, and begun again, at any moment. The reference goes when all copies are on stable storage, by one write of
the header.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from ..errors import OptionError, UnsupportedFeature
from ..format_node import FormatNode
from ..limits import MIB, align_down, align_up
from ..numeric import np
from ..workers import Workers
from ..zeros import stored_parts
from .progress import Monitor
from .requests import FAR, MOST, is_far
from .windows import stretches, windows

if TYPE_CHECKING:
    from ..image import Image

#: The bytes that one thread copies at a time. Clusters are not larger.
_PIECE = 2 * MIB
#: Threads if the chain is local: one reads while another writes.
_NEAR = 2


def flatten(image: Image, *, parallel: int | None = None, monitor: Monitor | None = None) -> int:
    """Copy what the backing chain of `image` owns into the image, and remove the name of the backing file from its header.
    Returns the number of bytes that were written. Zeros are not stored. The bytes of the disk stay the same, at any moment,
    and so do dirty bitmaps. An image without a backing file is left as it is.

    `parallel`: the number of threads that copy, 1 to 16; None: two, or 8 if the chain is remote. Other users may read and
    write meanwhile; their requests wait while a few megabytes are copied.

    Raises OptionError if the image has internal snapshots, which show the backing file as well, or if its backing file is
    not open; UnsupportedFeature for a format without a changeable backing file; the errors of reading and writing, and
    Cancelled. The disk is as before then, and a repeated call continues.
    """
    watch = monitor or Monitor()
    if parallel is not None and not 1 <= parallel <= MOST:
        raise OptionError(f"{parallel} threads cannot copy at once", hint=f"ask for 1 to {MOST}")
    with image.share() as own:
        node = _overlay(own)
        if node is None:
            return 0
        own.root.edge.require_writable("change")
        threads = parallel or (FAR if is_far(node) else _NEAR)
        copies = _Copies(own, node, threads)
        try:
            try:
                copies.run(watch)
            finally:
                copies.close()
        finally:
            copies.close()  # an interrupt that struck the first time finds the second
        own.amend(backing_file="")  # it flushes the copies first
        own.flush()
        with own.edit() as edit:
            edit.set_backing(node, None)
        watch.update(node.size, node.size)
        return copies.written


def _overlay(image: Image) -> FormatNode | None:
    """The top node if it has a backing node to copy from; None if it needs none."""
    node = image.node
    if not isinstance(node, FormatNode):
        raise UnsupportedFeature(f"the driver {node.driver} has no backing file", path=image.filename)
    if node.backing is None:
        if type(node).inspect(node.file, {}).backing_filename:
            raise OptionError(
                "the backing file that the image names is not open, so its bytes cannot be copied",
                path=image.filename,
                hint="open it with the image",
            )
        return None
    if node.amend_schema is None or all(option.name != "backing_file" for option in node.amend_schema.options):
        raise node.refusal("cannot change the name of a backing file")
    if node.snapshots():
        raise OptionError(
            "the image has internal snapshots, and they show the backing file as well",
            path=image.filename,
            hint="delete the snapshots, or convert the image to a new one",
        )
    return node


class _Copies:
    """Copies pieces of the disk by several threads, some pieces at a time, while no other request runs."""

    def __init__(self, image: Image, node: FormatNode, threads: int) -> None:
        self.written = 0
        self._image, self._node = image, node
        self._batch = max(threads, 4)
        self._workers = Workers(threads, "lamina-flatten") if threads > 1 else None
        limits = node.limits
        #: What the image allocates; its zeros are not stored.
        self._unit = max(limits.zero_alignment, limits.request_alignment, 512)

    def run(self, watch: Monitor) -> None:
        pieces = self._pieces()
        while batch := list(islice(pieces, self._batch)):
            self.written += self._image.root.alone("copies from the backing file", self._copy_all, batch)
            watch.update(batch[-1][1], self._node.size)

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """The ranges (start, stop) with bytes of the layers below, each inside the clusters of one piece."""
        size = self._node.size
        grid = max(self._node.serialise, self._unit)
        for found in windows(self._image, 0, size, grid=grid):
            rows = found.where(zero=False)
            below = rows.depth > 0
            starts = rows.start[below]
            for _, start, length in stretches(np.zeros_like(starts), starts, rows.length[below]):
                at, stop = align_down(start, grid), min(align_up(start + length, grid), size)
                while at < stop:
                    end = min(align_down(at, _PIECE) + _PIECE, stop)
                    yield at, end
                    at = end

    def _copy_all(self, pieces: list[tuple[int, int]]) -> int:
        if self._workers is None or len(pieces) == 1:
            return sum(map(self._copy, pieces))
        return sum(self._workers.map(self._copy, pieces))

    def _copy(self, piece: tuple[int, int]) -> int:
        """Copy what the layers below have of these bytes. Other users may have written some of them meanwhile."""
        node, (at, end) = self._node, piece
        written = 0
        while at < end:
            mapping = node.map(at, end - at)
            if not mapping.flags:
                view = memoryview(bytearray(mapping.length))
                node.read_below(at, view)
                for lo, hi in stored_parts(view, at, self._unit, self._unit):
                    # The disk does not change, so no bitmap is to record it.
                    FormatNode.write(node, at + lo, view[lo:hi])
                    written += hi - lo
            at += mapping.length
        return written

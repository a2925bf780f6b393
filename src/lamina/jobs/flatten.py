"""Make an overlay independent of its backing chain, in place: copy what the layers below own, then remove the reference.

Until the last step the image shows the same bytes as before, whatever part of the chain has been copied: it may be
interrupted, and begun again, at any moment. The reference goes when all copies are on stable storage, by one write of
the header.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import OptionError, UnsupportedFeature
from ..format_node import FormatNode
from ..numeric import np
from ..zeros import stored_parts
from .in_place import Batches, Part, parts
from .progress import Monitor
from .windows import stretches, windows

if TYPE_CHECKING:
    from ..image import Image


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
    with image.share() as own:
        node = _overlay(own)
        if node is None:
            return 0
        own.root.edge.require_writable("change")
        copies = _Copies(node)
        batches = Batches(own, "copies from the backing file", "lamina-flatten", copies.copy, copies.count, parallel)
        batches.run(copies.parts(own), watch)
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
    """Copies from the layers below `node`. `written`: the bytes so far."""

    def __init__(self, node: FormatNode) -> None:
        self.written = 0
        self._node = node
        limits = node.limits
        #: What the image allocates; its zeros are not stored.
        self._unit = max(limits.zero_alignment, limits.request_alignment, 512)
        self._block = max(node.serialise, self._unit)

    def parts(self, image: Image) -> Iterator[Part]:
        """The parts of the disk with bytes of the layers below."""
        return parts(self._below(image), self._block, self._node.size)

    def _below(self, image: Image) -> Iterator[tuple[int, int]]:
        for found in windows(image, 0, self._node.size, grid=self._block):
            rows = found.where(zero=False)
            below = rows.depth > 0
            starts = rows.start[below]
            for _, start, length in stretches(np.zeros_like(starts), starts, rows.length[below]):
                yield start, length

    def copy(self, part: Part) -> int:
        """Copy what the layers below have of these bytes, and return the number of written ones. Other users may have
        written some of them since the plan was made."""
        node, (at, end) = self._node, part
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

    def count(self, written: list[int]) -> None:
        self.written += sum(written)

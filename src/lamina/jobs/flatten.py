"""Make an overlay independent of its backing chain, in place: a rebase to no backing file, of an image without snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UnsupportedFeature
from ..format import Format
from ..job_results import FlattenResult
from .beneath import beneath_filters, require_backing_open
from .progress import Monitor
from .rebase import rebase

if TYPE_CHECKING:
    from ..image import Image


def flatten(image: Image, *, max_output: int | None = None, monitor: Monitor | None = None) -> FlattenResult:
    """Copy what the backing chain of `image` owns into the image, and remove the name of the backing file from its header.
    Zeros are not stored. The bytes of the disk stay the same, at any moment,
    and so do dirty bitmaps. An image without a backing file is left as it is.

    Until the last step the image needs its backing file, whatever part of the chain has been copied: the job may be
    interrupted, and begun again, at any moment. Meanwhile the image is only read, as by `rebase`.

    Raises OptionError if the image has internal snapshots, which show the backing file as well, or if its backing file is
    not open; UnsupportedFeature for a format without backing files; LimitExceeded for more than `max_output` bytes; the
    errors of reading and writing, and Cancelled. The disk is as before then, and a repeated call continues.
    """
    node = beneath_filters(image.node)
    if not isinstance(node, Format) or node.amend_schema is None or "backing_file" not in node.amend_schema:
        raise UnsupportedFeature(f"the driver {node.driver} has no backing files", path=image.filename)
    require_backing_open(node)
    if "backing" not in node.children:
        return FlattenResult(image.filename, image.size, 0, 0, 0)
    backing = node.children["backing"].node.filename
    done = rebase(image, None, max_output=max_output, monitor=monitor)
    return FlattenResult(done.image, done.size, done.read, done.written, done.zeroed, backing)

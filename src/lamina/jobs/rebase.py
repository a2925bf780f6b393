"""Rebase an overlay: it gets another backing file, or none, and reads the same.

The image first takes over what the new backing file does not have, compared block by block, and only of what it does not own
itself. Until that is on stable storage it names the old backing file; so a job that ends early, by an error, a signal or a
power cut, leaves an image that reads the same, and can be started again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from ..api import open as open_image
from ..descriptors import opening
from ..errors import OptionError
from ..format import Format
from ..image import Image
from ..job_results import RebaseResult
from ..options import stored_name
from ..own_files import refuse_own
from ..policy import Policy
from .beneath import (
    GIVE_BACKING_FORMAT,
    Backing,
    beneath_filters,
    layers_above,
    require_backing_open,
    require_no_snapshots,
)
from .convert import Result, copy_disk
from .progress import Monitor
from .sole_writer import as_sole_writer


@contextmanager
def _compressing(image: Image) -> Iterator[None]:
    """While the block runs, what is written to `image` is compressed."""
    with image.edit() as edit:
        inserted = edit.insert("compress")
    try:
        yield
    finally:
        with image.edit() as edit:
            edit.remove(inserted)


def rebase(
    image: Image,
    backing: str | None,
    backing_format: str | None = None,
    *,
    references: Policy | None = None,
    compress: bool = False,
    max_output: int | None = None,
    monitor: Monitor | None = None,
) -> RebaseResult:
    """Give `image` the backing file `backing`, by its name as the image stores it (relative to the directory of the image),
    of the format `backing_format`; None: no backing file. The image reads as before, and takes over what differs.

    Only blocks that the image does not own are read and compared; where the new backing file is a layer of the old chain,
    only those that the layers above it own. `references` decides about the backing file of the new backing file. `compress`:
    the blocks that it takes over are stored compressed where that makes them smaller. The image uses its new backing file,
    and is on stable storage, when this returns.

    No other user of the graph writes to it meanwhile, and `image` refuses writes of other threads. Raises OptionError if the
    format has no backing files, the image has internal snapshots, or names a backing file that is not open,
    UnsupportedFeature if the image cannot compress, the errors of opening `backing`, those of reading and writing, and
    Cancelled. The bytes of `image` are the same in any case.
    """
    node = beneath_filters(image.node)
    if not isinstance(node, Format) or node.amend_schema is None or "backing_file" not in node.amend_schema:
        raise OptionError("it cannot have another backing file", path=image.filename, hint="convert it to a new image")
    image.root.edge.require_writable("rebase")
    require_no_snapshots(node)
    require_backing_open(node)
    values = node.amend_schema.parse({"backing_file": backing or "", "backing_fmt": backing_format})
    if backing and backing_format is None:
        raise OptionError("the format of the backing file is not given", path=backing, hint=GIVE_BACKING_FORMAT)
    node.require_amendable(values)
    spec: Mapping[str, Any] | None = None
    compared: dict[str, Any] = {"driver": "null", "size": image.size}
    if backing:
        name = os.path.join(os.path.dirname(os.path.realpath(image.filename)), stored_name(backing))
        spec = {"driver": backing_format, "file": {"driver": "file", "filename": name}}
        compared = {"driver": "truncate", "size": image.size, "image": spec}
    with opening(open_image, compared, references=references, budget=image.budget) as new:
        depth = None
        if backing:
            refuse_own(new.node, image.filename, what="new backing file")
            depth = layers_above(node, new.node.children["image"].node)
        below = Backing(new, depth, keeps_rest=True, replaces=True)

        def work(own: Image) -> Result:
            try:
                node.backing_changes = True
                with _compressing(own) if compress else nullcontext():
                    result = copy_disk(own, own, below=below, max_output=max_output, monitor=monitor or Monitor())
            finally:
                node.backing_changes = False
            own.flush()
            own.root.alone("names another backing file", node.amend, values)
            own.root.alone("replaces the backing file", own.edit(references=references).set_backing, node, spec)
            own.flush()
            return result

        done = as_sole_writer(image, work)
    name, size = image.filename, image.size
    return RebaseResult(
        name, size, done.read, done.written, done.zeroed, values["backing_file"] or None, backing_format
    )

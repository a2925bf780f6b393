"""Commit an overlay: what its layers own goes down into a backing file, and then the overlay may be emptied.

No step changes a byte that the overlay reads as: data goes into the backing file only where a layer above hides it, it is on
stable storage before the overlay gives anything up, and each cluster that the overlay then gives up reads the same below. So
a job that ends early, by an error, a signal or a power cut, can be started again.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from ..errors import Hint, OptionError
from ..format import Format
from ..job_results import CommitResult
from ..options import file_path
from ..own_files import is_same_file
from .beneath import Backing, backing_edges, beneath_filters, loses, require_no_snapshots
from .convert import Result, copy_disk
from .progress import Monitor
from .sole_writer import as_sole_writer, writing_beneath

if TYPE_CHECKING:
    from ..image import Image
    from ..request import Child


def commit(
    image: Image,
    base: str | os.PathLike[str] | None = None,
    *,
    empty: bool | None = None,
    rate: int = 0,
    max_output: int | None = None,
    monitor: Monitor | None = None,
) -> CommitResult:
    """Make the backing file `base` read as `image` does, as far as `image` reaches; a shorter one becomes as long. The files
    between them then read differently than before, and are of no further use.

    `base`: a backing file of `image`, by its path or by its name in the image above it; None: the first one. Its new content
    is on stable storage at the end. `empty`: `image` gives up what it owns, and reads as `base`; None: if `base` is its first
    backing file. Then `image` must be open for writing. `rate` as for `convert`.

    No other user of the graph writes to it meanwhile, and `image` refuses writes of other threads. Raises OptionError if no
    such backing file is known, another user has it open, it keeps changes in memory, or `image` has internal snapshots;
    Locked if another program has it open; the errors of reading and writing, and Cancelled. The bytes of `image` are the
    same in any case.
    """
    edges = list(backing_edges(image.node))
    depth = _find(edges, base, image)
    if empty is None:
        empty = depth == 1
    elif empty and depth > 1:
        raise OptionError(
            "the image can be emptied only into its first backing file: it would read as the files between",
            path=image.filename,
            hint="commit without emptying it",
        )
    top = beneath_filters(image.node)
    assert isinstance(top, Format)  # it has a backing file
    require_no_snapshots(top)
    if any(len(edge.node.parents()) > 1 for edge in edges[:depth]):
        raise OptionError(
            "a file between the image and that backing file, or that one itself, has another user",
            path=image.filename,
            hint="close the image, export or job that uses it",
        )
    if empty:
        image.root.edge.require_writable("commit")
    monitor = monitor or Monitor()
    edge, below = edges[depth - 1], Backing(depth=depth, keeps_rest=True)
    if loses(edge.node) and not loses(top):
        raise OptionError(
            "what is written to that backing node is discarded when it is closed, and would be lost",
            path=edge.node.filename,
            hint="open the backing file itself, without snapshot=on or cow",
        )

    def copy(source: Image, target: Image) -> Result:
        if target.size < source.size:
            target.truncate(source.size)
        result = copy_disk(source, target, below=below, rate=rate, max_output=max_output, monitor=monitor)
        target.flush()
        return result

    def work(source: Image) -> Result:
        result = writing_beneath(source, edge, partial(copy, source))
        if empty:
            source.flush()  # what filters above hold is part of the image that was committed
            source.root.alone("empties the image", top.make_empty)
            source.flush()
        return result

    done = as_sole_writer(image, work)
    base_name = edge.node.filename
    return CommitResult(image.filename, base_name, image.size, done.read, done.written, done.zeroed, emptied=empty)


def _find(edges: list[Child], base: str | os.PathLike[str] | None, image: Image) -> int:
    """The depth of the backing file `base`."""
    if not edges:
        raise OptionError("it has no backing file to commit to", path=image.filename)
    if base is None:
        return 1
    name = file_path(base)
    inside = os.path.join(os.path.dirname(image.filename), name)
    paths = [edge.node.filename for edge in edges]
    if name in paths:
        return paths.index(name) + 1
    found = {depth for depth, path in enumerate(paths, 1) if is_same_file(name, path) or is_same_file(inside, path)}
    if len(found) == 1:
        return found.pop()
    if found:
        raise OptionError(
            "this names one backing file relative to the image, and another one relative to the working directory",
            path=name,
            hint="give the absolute path",
        )
    raise OptionError(
        "this is not a backing file of the image",
        path=name,
        hint=Hint("lamina.info_chain lists them", command="lamina info --backing-chain lists them"),
    )

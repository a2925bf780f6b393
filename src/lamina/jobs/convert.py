"""Copy a disk into another image: the job reads only allocated data, and writes only data that is not zero.

The plan comes from the exact extents of the source (`convert_plan`). Two threads carry it out (`convert_transfer`). Ranges
that the operating system copies, or that both files share, pass through neither thread (see `sharing`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..api import open as open_image
from ..creation import create_driver, made_beside, new_file, open_new, write_image
from ..descriptors import opening
from ..errors import BlockIOError, OptionError
from ..format_node import FormatNode
from ..image import Image
from ..options import path_in
from ..own_files import refuse_own, refuse_shared
from ..policy import Policy
from .beneath import GIVE_BACKING_FORMAT, Backing, layers_above
from .bitmaps import Chosen, copied, require_bitmaps
from .convert_plan import Offload as Offload
from .convert_plan import Plan
from .convert_transfer import Result as Result
from .convert_transfer import Transfer
from .output import OutputLimit
from .pipe_storage import PipeStorage
from .progress import Monitor
from .requests import Requests, is_far, reconnects, requests_for

if TYPE_CHECKING:
    from ..atomic_file import AtomicFile
    from ..bitmap import DirtyBitmap
    from ..limits import Budget
    from ..node import Node
    from .rate import RateLimit
    from .salvage import Unreadable


def convert(
    source: Image,
    target: Image,
    *,
    blank: bool = False,
    smallest_hole: int = 4096,
    below: Backing | None = None,
    offload: Offload = "",
    parallel: int | None = None,
    in_order: bool | None = None,
    bitmaps: Chosen = "",
    max_output: int | None = None,
    rate: int = 0,
    salvage: bool = False,
    monitor: Monitor | None = None,
) -> Result:
    """Make the first `source.size` bytes of `target` read as `source` does.

    `blank`: the target reads as zero, so the job skips zeros of the source. Runs of zeros of at least `smallest_hole` bytes
    are not written as data; with 0 there is no search for zeros, and the whole target is allocated. `below`: the backing
    file of the target, which owns no clusters yet; the job writes only what differs from it.

    `offload`: the operating system copies ranges of the source's file, without a search for zeros: "share": only by sharing
    blocks of the file system; "copy": also by copying. The source must be open read-only. On btrfs and xfs, sharing 1 GiB
    takes 0.01 s instead of 1.1 and 0.16; on ext4, which shares nothing, the copy of the operating system takes 0.30 s instead
    of 0.16: hence the default is neither.

    `parallel`: the number of buffers of 2 MiB to read at once, 1 to 16; None: one, or 8 if the source is remote. The job
    writes them one after the other, or with `in_order` False in any order and as many at once; None: in order unless the
    target is remote. With 20 ms for each request, 512 MiB take 0.9 s with 8, and 3.1 with one.

    `bitmaps`: the target gets the dirty bitmaps of the source, with what they have recorded: "all" (OptionError for one that
    is inconsistent), or "usable" ones.

    `max_output`: the most bytes of data that the job writes or copies, before compression; None: the limit of the source's
    budget. Zeros that are skipped, or that the target makes without a write, do not count.

    `rate`: the most bytes per second that the job reads, and the most that it writes; 0: no limit. Large requests pass as a
    whole, and those after them wait.

    `salvage`: the job goes on where the source cannot be read. Blocks of 512 bytes, or of the request alignment if that is
    larger, become zeros if they cannot be read; `monitor` is told of them, and `Result.unreadable` counts them. Where the
    status cannot be queried, all is read. A lost connection ends the job nevertheless. Not with `offload`.

    `monitor` belongs to this job: it is cancelled if the job fails.

    Both images may be used, edited and closed meanwhile: the job has roots of its own.

    Raises LimitExceeded if there are more; OptionError if the target is too small, or shares a file with the source; the
    errors of reading and writing; and Cancelled. The content of the target is then undefined.
    """
    refuse_shared(source.node, target.node)
    if target.size < source.size:
        raise OptionError(
            f"the target has {target.size} bytes and the source {source.size}",
            path=target.filename,
            hint="make a target that is large enough",
        )
    monitor = monitor or Monitor()
    piped = isinstance(source.node, PipeStorage)
    if salvage and piped:
        raise OptionError("what could not be read from a pipe is not read again", hint="omit salvage")
    if salvage and offload:
        raise OptionError(
            "the operating system copies whole ranges or nothing: it cannot skip blocks that are unreadable",
            hint="omit one of them: salvage, or the offloading of copies",
        )
    with ExitStack() as stack:
        own_source = stack.enter_context(opening(source.share))
        own_target = stack.enter_context(opening(target.share))
        unreadable: Unreadable | None = None
        if salvage:
            from .salvage import salvaging

            own_source, unreadable = stack.enter_context(salvaging(own_source, monitor))
        stack.enter_context(copied(source, target, bitmaps))
        result = copy_disk(
            own_source,
            own_target,
            blank=blank,
            smallest_hole=smallest_hole,
            below=below,
            offload=offload,
            parallel=parallel,
            in_order=in_order,
            rate=rate,
            max_output=max_output,
            monitor=monitor,
        )
        return result if unreadable is None else result._replace(unreadable=unreadable.length)


def convert_and_flush(source: Image, target: Image, **how: Any) -> Result:
    """As `convert`, and flush `target`.

    The flush fails if a connection was lost meanwhile: the server may have restarted without what it had acknowledged. The
    job then writes everything again, twice at most. The error is raised where that cannot mend the target: a format keeps
    tables in what may be lost, or a pipe is not read again."""
    again = 2 if reconnects(target.node) and not _has_tables(target.node) else 0
    if isinstance(source.node, PipeStorage):
        again = 0
    while True:
        result = convert(source, target, **how)
        try:
            target.flush()
            return result
        except BlockIOError:
            if not again:
                raise
        again -= 1


def _has_tables(top: Node) -> bool:
    return isinstance(top, FormatNode) or any(_has_tables(child.node) for child in top.children.values())


def copy_disk(
    source: Image,
    target: Image,
    *,
    blank: bool = False,
    smallest_hole: int = 4096,
    below: Backing | None = None,
    offload: Offload = "",
    parallel: int | None = None,
    in_order: bool | None = None,
    rate: int = 0,
    max_output: int | None = None,
    monitor: Monitor,
) -> Result:
    """As `convert`, between two images that nobody closes meanwhile. They may be of one graph, where the source reads the
    same whatever part of the job is done; they may be one."""
    limit: RateLimit | None = None
    if rate:
        from .rate import RateLimit

        limit = RateLimit(rate, monitor)
    how: Any = {"blank": blank, "smallest_hole": smallest_hole, "below": below, "offload": offload, "rate": limit}
    plan = Plan(source, target, **how)
    reading = Requests(source, 1, "", rate=limit)
    if not isinstance(source.node, PipeStorage):
        reading = requests_for(source, asked=parallel, name="lamina-convert-read", rate=limit)
    if in_order is None:
        in_order = not is_far(target.node)
    writing = Requests(target, 1, "", rate=limit)
    if not in_order:
        writing = requests_for(target, source.node, asked=parallel, name="lamina-convert-write", rate=limit)
    output = OutputLimit(source.budget.max_output if max_output is None else max_output, source.filename)
    return Transfer(plan, output, monitor).run(reading, writing)


def convert_to_file(
    source: Image,
    path: str | os.PathLike[str],
    format: str,
    options: Mapping[str, Any],
    *,
    smallest_hole: int = 4096,
    backing: str | None = None,
    backing_format: str | None = None,
    changed: DirtyBitmap | None = None,
    references: Policy | None = None,
    offload: Offload = "",
    compress: bool = False,
    compression_level: int | None = None,
    parallel: int | None = None,
    in_order: bool | None = None,
    bitmaps: Chosen = "",
    durable: bool = False,
    max_output: int | None = None,
    rate: int = 0,
    salvage: bool = False,
    monitor: Monitor | None = None,
) -> Result:
    """Make a new image at `path` that reads as `source` does. It appears under its name when it is whole; if anything
    goes wrong, nothing is left of it. `options` are those of `create`; a `size` among them may make the disk longer.
    `durable`: it is on stable storage when this returns; where a file is replaced it is in any case (see `AtomicFile`).

    With `backing`, the new image is an overlay over that file, and owns only what differs from it. Where the source is
    itself built on that file, that is what the layers above it own; else both are read and compared. `changed`: the
    source differs from that file only where this bitmap says so, and the new image owns these ranges. `compress`: all is
    stored packed, as far as that is smaller; UnsupportedFeature where the format cannot; `compression_level`: with this
    effort, for qcow2 1 to 9, with zstd to 22. The backing file and the new image are opened within the budget of `source`
    each.
    """
    path = path_in(path)
    refuse_own(source.node, path)
    kind = create_driver(format)
    require_bitmaps(source, kind, bitmaps)
    given = {"size": source.size, **options}
    if backing is not None:
        if backing_format is None:
            raise OptionError("the format of the backing file is not given", path=backing, hint=GIVE_BACKING_FORMAT)
        given |= {"backing_file": backing, "backing_fmt": backing_format}
    values = kind.creation_schema().parse(given)
    kind.prepare_create(values, path, source.budget)
    how: Any = {"smallest_hole": smallest_hole, "offload": offload, "parallel": parallel, "in_order": in_order}
    how |= {"bitmaps": bitmaps, "max_output": max_output, "rate": rate, "salvage": salvage}
    below: Backing | None = None
    given = kind.options_to_open(values)
    if compression_level is not None and compress and "compression-level" in kind.schema:
        given = {**given, "compression-level": compression_level}
    with ExitStack() as stack:
        if backing is not None:
            # Names inside the target are relative to its directory; what the user named is opened as such.
            name = os.path.join(os.path.dirname(os.path.realpath(path)), values["backing_file"])
            given["backing"] = {"driver": backing_format, "file": {"driver": "file", "filename": name}}
            how_to_open: dict[str, Any] = {"references": references, "budget": source.budget}
            image = stack.enter_context(opening(open_image, given["backing"], **how_to_open))
            refuse_own(image.node, path, what="backing file")
            depth = layers_above(source.node, image.node)
            below = Backing(image) if depth is None else Backing(depth=depth)
            below = below if changed is None else Backing(depth=1, changed=changed)
        stack.enter_context(made_beside(kind, values, path))
        file = stack.enter_context(new_file(path, durable=durable))
        write_image(kind, file, values)
        with opening(_open_made, file, format, given, references, source.budget, compress) as target:
            # A device keeps what was on it; a format above it knows what it has written and what it has not.
            blank = backing is None and (not file.is_device or isinstance(target.node, FormatNode))
            result = convert(source, target, blank=blank, below=below, monitor=monitor, **how)
            if kind.side_files(values):  # at the end `file` flushes itself alone, and may replace an image
                target.flush()
            return result


def _open_made(
    file: AtomicFile, format: str, options: Mapping[str, Any], references: Policy | None, budget: Budget, compress: bool
) -> Image:
    """The image that is being made in `file`, for writing."""
    storage = open_new(file)
    made: dict[str, Any] = {"driver": format, "file": storage, **options}
    if compress:
        made = {"driver": "compress", "image": made}
    try:
        return open_image(made, read_only=False, references=references, budget=budget)
    except BaseException:
        storage.close()
        raise

"""`lamina.map`, `lamina.measure` and `lamina.detect`: what a disk, a new image and a file are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..creation import create_driver
from ..descriptors import opening
from ..errors import OptionError
from ..format import Format
from ..graph import Opener, named, probe
from ..image import Image
from ..jobs.windows import windows
from ..limits import DEFAULT_BUDGET, Budget, align_down, align_up
from ..options import size_of
from ..parameters import checked
from ..policy import Policy
from .sources import Source, opened

if TYPE_CHECKING:
    from ..detection import Detection
    from ..extents import Extents
    from ..job_results import MeasureResult

#: In messages, and the place to which the names of other files are relative: the current folder.
_NEW = "the new image"


@checked
def map(
    source: Source,
    offset: int | str = 0,
    length: int | str | None = None,
    *,
    format: str | None = None,
    source_snapshot: str | None = None,
    exact: bool = True,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
) -> Extents:
    """The status and location of the bytes of a disk: for each extent whether it is data, reads as zero, is compressed, which
    layer of the chain owns it, and where it lies in which file. See `Extents` for the columns.

    `source` is a path, a name or nested options as for `lamina.open`, opened with `format`, `references`, `budget` and
    `force_share`; `source_snapshot` is the id or name of an internal snapshot. Or it is an open image, which stays open
    (`Image.extents` is then the same, and `Image.windows` returns the result in parts). `offset` and `length` are bytes,
    or texts such as "1G"; by default they are the whole disk. Without `exact` extents are rounded to the request
    alignment of the top node, as the command `lamina map` shows them: a block is data if any byte of it is, and zero if
    all are.

    Raises OutOfRange, LimitExceeded for more extents than `budget.rows`, and the errors of opening and reading.
    """
    with opened(
        source, format, references=references, budget=budget, force_share=force_share, snapshot=source_snapshot
    ) as image:
        begin = size_of(offset, "offset")
        count = max(image.size - begin, 0) if length is None else size_of(length, "length")
        if exact:
            return image.extents(begin, count)
        image.root.require_inside(begin, count, "map")
        block, end = image.alignment, begin + count
        if count:
            begin, end = align_down(begin, block), min(align_up(end, block), image.size)
        return image.extents(begin, end - begin).align(block).coalesce()


@checked
def measure(
    source: Source | None,
    target_format: str,
    *,
    size: int | str | None = None,
    options: Mapping[str, Any] | None = None,
    format: str | None = None,
    source_snapshot: str | None = None,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
) -> MeasureResult:
    """How long the file of a new image would be, empty or with the data of a disk. No file is created.

    `source` is the disk: a path, a name or nested options as for `lamina.open`, opened with `format`, `references`, `budget`
    and `force_share`, where `source_snapshot` is the id or name of an internal snapshot; or an open image, which stays open;
    or None for an empty disk of `size` bytes (a number, or a text such as "10G"). `target_format` and `options` are those of
    `lamina.create`.

    Raises OptionError, UnsupportedFeature, LimitExceeded, and the errors of opening and reading.
    """
    kind = create_driver(target_format)
    values = kind.creation_schema().parse(options or {})
    kind.prepare_create(values, _NEW, budget)
    if source is None:
        if size is None:
            raise OptionError("neither a source nor a size is given", hint="give one of them")
        return kind.measure(size_of(size), values)
    if size is not None:
        raise OptionError("the size is that of the source", hint="omit one of them, or put size into the options")
    with opened(
        source, format, references=references, budget=budget, force_share=force_share, snapshot=source_snapshot
    ) as image:
        return measured(image, kind, values)


def measured(image: Image, kind: type[Format], values: Mapping[str, Any]) -> MeasureResult:
    """The length of the file of a new image with the disk and the bitmaps of `image`. `values`: its parsed options."""
    node = image.node
    keeps = kind.keeps_bitmaps and isinstance(node, Format) and node.takes_bitmaps
    stored = windows(image, 0, image.size, grid=values.get("cluster_size") or 1)
    return kind.measure(values.get("size") or image.size, values, stored, image.bitmaps if keeps else None)


@checked
def detect(source: str | os.PathLike[str] | Mapping[str, Any] | Image, *, force_share: bool = True) -> Detection:
    """The formats whose signature a file has: `detect("disk.img").format` is "qcow2", "vmdk", ..., or "raw" if there is none.

    `source` is a path, a name of storage or nested options; of an open image, which stays open, the bytes of its disk are
    looked at. `force_share`: look also while another program writes to it. The result is a guess: a guest can write any
    signature to its raw disk. Only the first 64 KiB and the last KiB are read, and no other file is opened.

    Raises OptionError and the errors of opening and reading.
    """
    if isinstance(source, Image):
        with opening(source.share, read_only=True) as image:
            return probe(image.root)
    opener = Opener(force_share=force_share)
    with opening(opener.child, "file", named(source), storage=True) as storage:
        return probe(storage)

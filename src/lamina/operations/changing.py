"""`lamina.commit`, `rebase`, `flatten`, `compact` and `resize`: changes of an image in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..api import open as open_image
from ..descriptors import opening
from ..errors import Hint, OptionError
from ..graph import named
from ..image import Image
from ..job_results import CommitResult, CompactResult, FlattenResult, RebaseResult, ResizeResult
from ..jobs import commit as committing
from ..jobs import compact as compacting
from ..jobs import flatten as flattening
from ..jobs import rebase as rebasing
from ..jobs.beneath import GIVE_BACKING_FORMAT
from ..jobs.progress import Monitor
from ..limits import DEFAULT_BUDGET, Budget
from ..options import parse_name, parse_size, shown, size_of
from ..parameters import checked
from ..policy import Policy
from .sources import Source, opened

if TYPE_CHECKING:
    from ..graph import Spec
    from ..jobs.progress import CancelEvent, Progress


@checked
def commit(
    image: Source,
    base: str | os.PathLike[str] | None = None,
    *,
    format: str | None = None,
    empty: bool | None = None,
    rate: int | str = 0,
    max_output: int | str | None = None,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    progress: Progress | None = None,
    cancel: CancelEvent | None = None,
) -> CommitResult:
    """Write what an overlay owns to its backing file `base`, and empty the overlay. The overlay reads the same at any
    moment; a job that ends early can be started again.

    `image` is a path, a name or nested options as for `lamina.open`, opened with `format`, `references` and `budget`; or an
    open image, which stays open. `base`: a backing file of any depth, by its path or by its name in the image above it; None:
    the first one. It then reads as `image` does, and is on stable storage; files between the two are of no further use.
    `empty`: `image` gives up what it owns, and reads as `base`; None: if `base` is its first backing file. An open image must
    be writable for that. `rate`: the most bytes per second that are read, and that are written; `max_output`: the most bytes
    of data that are written; `progress` and `cancel` are those of `lamina.convert`.

    Raises OptionError if there is no such backing file, another user has it open, it keeps changes in memory, or `image` has
    internal snapshots; Locked if another program has it open; Cancelled, and the errors of opening, reading and writing.
    """
    how: dict[str, Any] = {"empty": empty, "rate": size_of(rate, "rate"), "monitor": Monitor(progress, event=cancel)}
    how["max_output"] = None if max_output is None else size_of(max_output, "max_output")
    with opened(image, format, read_only=empty is False, references=references, budget=budget) as overlay:
        return committing.commit(overlay, base, **how)


@checked
def rebase(
    image: Source,
    backing: str | None,
    backing_format: str | None = None,
    *,
    format: str | None = None,
    name_only: bool = False,
    compress: bool = False,
    max_output: int | str | None = None,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    progress: Progress | None = None,
    cancel: CancelEvent | None = None,
) -> RebaseResult:
    """Give an overlay another backing file, or none. The overlay reads the same: it takes over what differs.

    `image` is a path, a name or nested options as for `lamina.open`, opened with `format`, `references` and `budget`; or
    an open and writable image, which stays open. `backing`: the new backing file, by its name as the image stores it
    (relative to the directory of the image), of the format `backing_format`; None: no backing file. With `name_only` only
    the name in the image changes, and no backing file is opened or needs to exist: the overlay reads as before only if
    the new one has the same content. `compress`: what the overlay takes over is stored packed. `references` decides about
    the backing file of the new backing file as well. `max_output`: the most bytes of data that are written; `progress`
    and `cancel` are those of `lamina.convert`.

    Raises OptionError if the format has no backing files, the image has internal snapshots, or its backing file is not open;
    Cancelled, and the errors of opening, reading and writing. The bytes of the image are the same in any case.
    """
    limit = None if max_output is None else size_of(max_output, "max_output")
    if not name_only:
        with opened(image, format, read_only=False, references=references, budget=budget) as overlay:
            return rebasing.rebase(
                overlay,
                backing or None,
                backing_format if backing else None,
                references=references,
                compress=compress,
                max_output=limit,
                monitor=Monitor(progress, event=cancel),
            )
    if compress:
        raise OptionError("nothing is taken over that could be compressed", hint="omit compress, or name_only")
    if isinstance(image, Image):
        return _rename(image, backing, backing_format)
    with opening(open_without_backing, named(image), format, references=references, budget=budget) as alone:
        return _rename(alone, backing, backing_format)


def _rename(image: Image, backing: str | None, backing_format: str | None) -> RebaseResult:
    if backing and backing_format is None:
        raise OptionError("the format of the backing file is not given", path=backing, hint=GIVE_BACKING_FORMAT)
    image.amend(backing_file=backing or "", backing_fmt=backing_format)
    image.flush()
    return RebaseResult(image.filename, image.size, 0, 0, 0, backing or None, backing_format if backing else None)


def open_without_backing(
    source: Spec, format: str | None, *, references: Policy | None = None, budget: Budget = DEFAULT_BUDGET
) -> Image:
    """An overlay without its backing file, which may be missing, for writing."""
    options: dict[str, Any] = dict(parse_name(source) if isinstance(source, str) else source)
    if isinstance(source, str) and not source.startswith("json:"):
        driver: Mapping[str, str] = {} if format in (None, "probe") else {"driver": str(format)}
        options = {"file": options, **driver}
    how: dict[str, Any] = {"references": references, "budget": budget}
    # A driver among the options is the format; what is missing is detected only where that was asked for.
    given = None if "driver" in options else format
    return open_image({**options, "backing": None}, format=given, read_only=False, **how)


@checked
def flatten(
    image: Source,
    *,
    format: str | None = None,
    max_output: int | str | None = None,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    progress: Progress | None = None,
    cancel: CancelEvent | None = None,
) -> FlattenResult:
    """Copy what the backing files of an overlay own of its disk into it, and remove the name of the backing file from it. The
    overlay reads the same at any moment, and is on stable storage at the end; the backing files do not change.

    `image` is a path, a name or nested options as for `lamina.open`, opened with `format`, `references` and `budget`; or an
    open and writable image, which stays open. Only what it does not own is read, and zeros are not stored. A job that ends
    early leaves an overlay, and can be started again. `max_output`: the most bytes of data that are written; `progress` and
    `cancel` are those of `lamina.convert`.

    An image without a backing file is left as it is. Nobody else writes to the image meanwhile. Raises OptionError if the
    image has internal snapshots, which show the backing file as well, or if its backing file is not open; UnsupportedFeature
    if the format has no backing files; LimitExceeded, Cancelled, and the errors of opening, reading and writing.
    """
    limit = None if max_output is None else size_of(max_output, "max_output")
    with opened(image, format, read_only=False, references=references, budget=budget) as overlay:
        overlay.root.edge.require_writable("flatten")
        return flattening.flatten(overlay, max_output=limit, monitor=Monitor(progress, event=cancel))


@checked
def compact(
    image: Source,
    *,
    format: str | None = None,
    parallel: int | None = None,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    progress: Progress | None = None,
    cancel: CancelEvent | None = None,
) -> CompactResult:
    """Make the file of an image smaller, in place: free leaked clusters, the storage of blocks that are all zero, storage
    that is reserved for zeros, and free space inside the file and at its end. The disk reads the same at any moment.

    `image` is a path, a name or nested options as for `lamina.open`, opened with `format`, `references` and `budget`; or an
    open and writable image, which stays open. Others may read and write it meanwhile; they wait while its structures are
    checked. Blocks that internal snapshots use as well stay. A job that ends early can be started again. `parallel`: the
    number of threads that read, 1 to 16; None: two, or 8 if a file is remote. `progress` and `cancel` are those of
    `lamina.convert`.

    Raises CorruptImage, before anything changes, for an image that needs a repair; UnsupportedFeature for a filter, which has
    no file of its own; OptionError, Cancelled, and the errors of opening, reading and writing.
    """
    with opened(image, format, read_only=False, references=references, budget=budget) as disk:
        return compacting.compact(disk, parallel=parallel, monitor=Monitor(progress, event=cancel))


@checked
def resize(
    image: Source,
    size: int | str,
    *,
    format: str | None = None,
    shrink: bool = False,
    preallocation: str = "off",
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
) -> ResizeResult:
    """Change the size of a disk, and flush it. What is added reads as zeros.

    `image` is a path, a name or nested options as for `lamina.open`, opened with `format`, `references` and `budget`; or an
    open and writable image, which stays open. `size`: bytes, or a text: "10G", or the difference "+10G" or "-512M". `shrink`
    allows a smaller size: what lies behind the new end is lost. `preallocation`: the storage of what is added, "off",
    "metadata", "falloc" or "full".

    Raises OptionError for a size that is impossible, or smaller without `shrink`; ReadOnly, and the errors of opening and
    writing.
    """
    with opened(image, format, read_only=False, references=references, budget=budget) as disk:
        before = disk.size
        after = size_after(before, size, disk.filename)
        change_size(disk, after, shrink=shrink, preallocation=preallocation)
        return ResizeResult(disk.filename, before, disk.size)


def size_after(before: int, size: int | str, path: str) -> int:
    """The new size of a disk of `before` bytes, as `resize` takes it. `path`: its name, for messages."""
    text = size.strip() if isinstance(size, str) else ""
    sign, rest = (text[0], text[1:].lstrip()) if text.startswith(("+", "-")) else ("", "")
    if rest.startswith("+"):
        raise OptionError(f"{shown(size)} is not a size", hint="write a size, or one sign and a size: 10G, +10G, -512M")
    number = parse_size(rest) if sign else size_of(size)
    after = before + number if sign == "+" else before - number if sign == "-" else number
    if after < 0:
        raise OptionError(
            f"the disk has {before} bytes, and cannot become {-after} bytes smaller than empty", path=path
        )
    return after


def change_size(image: Image, size: int, *, shrink: bool, preallocation: str) -> None:
    """Give the disk this size, and flush it. OptionError where it would lose bytes without `shrink`."""
    before = image.size
    if size < before and not shrink:
        raise OptionError(
            f"the disk has {before} bytes: with {size} it would lose what lies behind them",
            path=image.filename,
            hint=Hint("pass shrink=True if nothing there is needed", command="add --shrink if nothing there is needed"),
        )
    if size < before and preallocation != "off":
        hint = Hint("omit preallocation", command="omit --preallocation")
        raise OptionError("there is nothing to preallocate in a smaller disk", hint=hint)
    image.truncate(size, preallocation=preallocation)
    image.flush()

"""`lamina.convert` and `lamina.copy`: a whole disk, or the bytes of a file, to another place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from .. import registry
from ..descriptors import opening
from ..errors import Cancelled, Hint, OptionError, append_hint
from ..graph import Opener, Spec, named
from ..image import Image
from ..job_results import ConvertResult, CopyResult
from ..jobs.beneath import Backing
from ..jobs.convert import Result, convert_and_flush, convert_to_file
from ..jobs.copy import Plan
from ..jobs.copy_ends import StorageSource, StorageTarget
from ..jobs.copy_named import NamedTarget, copy_in_place, copy_to_name
from ..jobs.diff import bitmap_of
from ..jobs.progress import Monitor
from ..limits import DEFAULT_BUDGET, KIB, Budget
from ..options import file_path, parse_name, path_in, size_of
from ..own_files import refuse_shared
from ..parameters import checked
from ..policy import Policy
from .sources import Source, open_target, opened

if TYPE_CHECKING:
    from ..jobs.progress import CancelEvent, Progress


@checked
def convert(
    source: Source,
    target: str | os.PathLike[str] | Mapping[str, Any] | Image,
    target_format: str | None = None,
    *,
    format: str | None = None,
    source_snapshot: str | None = None,
    options: Mapping[str, Any] | None = None,
    backing: str | None = None,
    backing_format: str | None = None,
    changed: str | None = None,
    compress: bool = False,
    compression_level: int | None = None,
    bitmaps: Literal["all", "usable"] | None = None,
    create: bool = True,
    target_is_zero: bool = False,
    only_differences: bool = False,
    smallest_hole: int | str = 4096,
    offload: Literal["share", "copy"] | None = None,
    salvage: bool = False,
    parallel: int | None = None,
    in_order: bool | None = None,
    rate: int | str = 0,
    max_output: int | str | None = None,
    durable: bool = False,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
    progress: Progress | None = None,
    cancel: CancelEvent | None = None,
) -> ConvertResult:
    """Copy a disk to an image of any format. Only stored data is read, and zeros are not written.

    `source` is a path, a name or nested options as for `lamina.open`, or an open image, which stays open. `format`,
    `references`, `budget` and `force_share` are those of `lamina.open`; `source_snapshot` is the id or name of an internal
    snapshot, whose disk is copied in place of that of now.

    `target` is the path of a new image of the format `target_format`. It gets its name when it is complete; after an error or
    a cancellation nothing of it is left, and a file that was there is unchanged. `options` are those of `lamina.create`; a
    `size` among them may make the disk longer. With `backing`, a name relative to the directory of the new image, and
    `backing_format`, the new image is an overlay over that file, with only what differs from it; `changed`: a dirty bitmap of
    the source which says what differs. `compress`: store the data packed, with `compression_level` 1 (fast) to 9 (22 with
    zstd). `durable`: the new image is on stable storage when this returns; an image that replaces a file is in any case.

    With `create=False`, `target` (a path with its `target_format`, or nested options) is an existing image that is
    overwritten, and flushed; so is an open image. It must be as long as the source. `target_is_zero`: it is known to read
    as zero. `only_differences`: it is read too, and only what differs is written, as for an overlay over an older state.
    After an error or a cancellation the target is partly overwritten.

    `bitmaps`: the target gets the dirty bitmaps of the source as well: "all", or those that are "usable". `smallest_hole`:
    shorter runs of zeros are written as data; 0: all are. `offload`: the operating system may share blocks between the two
    files ("share"), or copy as well ("copy"). `salvage`: blocks that cannot be read become zeros, with a warning in the log
    "lamina", and `ConvertResult.unreadable` counts them. `parallel`: buffers in flight, 1 to 16; `in_order`: whether they are
    written in order (by default, unless the target is remote). `rate`: the most bytes per second that are read, and that are
    written. `max_output`: the most bytes of data that are written (default: that of the budget). Sizes are bytes, or texts
    such as "64k".

    `progress(done, total)` is called about ten times a second, in the calling thread, with bytes of the source's disk; an
    exception that it raises ends the job, and is raised here. `cancel`: a `threading.Event`, or anything with `is_set()`.
    When it is set, by any thread or by `progress`, the job ends with Cancelled.

    Raises OptionError, LimitExceeded, UnsupportedFeature, Cancelled, and the errors of opening, reading and writing.
    """
    monitor = Monitor(progress, event=cancel)
    with opened(
        source, format, references=references, budget=budget, force_share=force_share, snapshot=source_snapshot
    ) as image:
        how: dict[str, Any] = {
            "smallest_hole": size_of(smallest_hole, "smallest_hole"),
            "offload": offload or "",
            "parallel": parallel,
            "in_order": in_order,
            "bitmaps": bitmaps or "",
            "max_output": None if max_output is None else size_of(max_output, "max_output"),
            "rate": size_of(rate, "rate"),
            "salvage": salvage,
            "monitor": monitor,
        }
        if create and not isinstance(target, Image):
            for word, wanted in (("target_is_zero", target_is_zero), ("only_differences", only_differences)):
                if wanted:
                    raise OptionError(f"{word} is for an existing target", hint="omit it, or add create=False")
            path = _new_path(target)
            if target_format is None:
                raise OptionError("the format of the target is not given", path=path, hint="give it: target_format=...")
            how |= {"compress": compress, "compression_level": compression_level, "durable": durable}
            how |= {"backing": backing, "backing_format": backing_format, "references": references}
            given = dict(options or {})
            if backing is None:
                how["backing"] = given.pop("backing_file", None)
                how["backing_format"] = backing_format or given.pop("backing_fmt", None)
            how["changed"] = None if changed is None else bitmap_of(image, changed)
            done = convert_to_file(image, path, target_format, given, **how)
            return _converted(done, image, path, target_format)
        new = {"options": options, "backing": backing, "changed": changed, "compression_level": compression_level}
        for word, value in new.items():
            if value:
                raise OptionError(f"{word} is for a new target", hint="omit it, or convert to a new file")
        if only_differences and target_is_zero:
            raise OptionError("nothing needs to be compared with zeros", hint="omit only_differences or target_is_zero")
        if isinstance(target, Image):
            if target_format is not None or compress:
                word = "compress" if compress else "target_format"
                raise OptionError(f"{word} is for a target that is not open yet", hint="omit it, or name the target")
            return _overwrite(image, target, only_differences, {"blank": target_is_zero, **how})
        if target_format is None and not isinstance(target, Mapping):
            hint = "give it: target_format=..."
            where = os.fspath(target)
            raise OptionError("the format of the target is not given, and is not guessed", path=where, hint=hint)
        how_to_open: dict[str, Any] = {"references": references, "budget": budget}
        with opening(open_target, named(target), target_format, image, **how_to_open) as there:
            if compress:
                with there.edit() as edit:
                    edit.insert("compress")
            return _overwrite(image, there, only_differences, {"blank": target_is_zero, **how})


def _new_path(target: str | os.PathLike[str] | Mapping[str, Any]) -> str:
    """The path of a new image."""
    if isinstance(target, Mapping):
        raise OptionError("nested options describe an existing target", hint="name a file, or add create=False")
    if isinstance(target, str):
        driver = parse_name(target).get("driver", "file")
        if driver not in ("file", "host_device") and registry.entry(driver).kind == "storage":
            hint = Hint("write to it with create=False", command="add -n")
            raise OptionError("this target is not a file, and cannot be created", path=target, hint=hint)
    return path_in(target)


def _overwrite(source: Image, target: Image, only_differences: bool, how: dict[str, Any]) -> ConvertResult:
    target.root.edge.require_writable("convert")
    below = Backing(target, keeps_rest=True) if only_differences else None
    try:
        done = convert_and_flush(source, target, below=below, **how)
    except (Cancelled, KeyboardInterrupt) as stop:
        append_hint(stop, f"{target.filename} is partly overwritten")
        raise
    return _converted(done, source, target.filename, target.format)


def _converted(done: Result, source: Image, target: str, format: str) -> ConvertResult:
    return ConvertResult(source.filename, target, format, source.size, **done._asdict())


@checked
def copy(
    source: Source,
    target: str | os.PathLike[str] | Image,
    *,
    smallest_hole: int | str = 4096,
    extents: bool = True,
    target_is_zero: bool = False,
    allocated: bool = False,
    requests: int = 32,
    request_size: int | str = 512 * KIB,
    journal: str | os.PathLike[str] | None = None,
    rate: int | str = 0,
    max_output: int | str | None = None,
    flush: bool = False,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
    progress: Progress | None = None,
    cancel: CancelEvent | None = None,
) -> CopyResult:
    """Copy bytes unchanged between files, block devices and exports of NBD servers. (`convert` is for image formats: a
    copy of a qcow2 file is a qcow2 file.)

    `source` is a path, a name of storage such as "nbd://server/disk", nested options, or an open image, whose disk is copied
    and which stays open. `target` is a path: a new file gets its name when it is complete, and after an error or a
    cancellation nothing of it is left; or a device, an export, or an open image, which are written in place from their start,
    and keep what lies behind the end of the source. Pipes ("-") are for the command: in Python `shutil.copyfileobj` reads
    `Image.as_file`, or writes to it. `force_share` opens a source that another program writes to.

    `extents`: skip the holes of the source. `smallest_hole`: shorter runs of zeros are written as data; 0: all are.
    `target_is_zero`: a target that is written in place is known to read as zero; `allocated`: zeros take space in the target.
    `requests` reads of `request_size` bytes (a power of two from 4k to 32M) are in flight at once. `journal`: the path of a
    file that tells every ten seconds how far the copy is. After an error or a cancellation the copied bytes then stay, and
    the same call goes on with them; it is removed at the end. `rate`: the most bytes per second that are read, and that are
    written. `max_output`: the most bytes of data that are written. `flush`: the copy is on stable storage when this returns,
    as with a journal. Sizes are bytes, or texts such as "64k". `references` and `budget` are those of `lamina.open`;
    `progress` and `cancel` those of `lamina.convert`.

    Raises OptionError, LimitExceeded, Cancelled, and the errors of opening, reading and writing.
    """
    begin = monotonic()
    limit = budget.max_output if max_output is None else size_of(max_output, "max_output")
    plan = Plan(
        size_of(request_size, "request_size"),
        requests,
        size_of(smallest_hole, "smallest_hole"),
        flush,
        limit,
        size_of(rate, "rate"),
    )
    monitor = Monitor(progress, event=cancel)
    if journal is not None and (not isinstance(source, str | os.PathLike) or isinstance(target, Image)):
        raise OptionError(
            "a journal names the source and the target", hint="give the names of both, or omit the journal"
        )
    end = _source_of_copy(source, extents, references, budget, force_share)
    try:
        target_name = target.filename if isinstance(target, Image) else _name(target)
        if isinstance(target, Image):
            target.root.edge.require_writable("copy")
            refuse_shared(end.node, target.node)
            there = StorageTarget(
                target.share().root, target_name, blank=target_is_zero, grows=False, allocated=allocated
            )
            done = copy_in_place(end, there, plan, monitor)
        else:
            to = NamedTarget(
                target_name,
                blank=target_is_zero,
                allocated=allocated,
                journal=None if journal is None else file_path(journal),
                source=_name(source) if isinstance(source, str | os.PathLike) else end.name,
                references=references,
                budget=budget,
            )
            done = copy_to_name(end, to, plan, monitor)
        source_name = _shown(source, end.name)
        flushed = flush or journal is not None
        seconds = monotonic() - begin
        target_name = target_name if isinstance(target, Image) else os.fspath(target)
        return CopyResult(source_name, target_name, **done._asdict(), flushed=flushed, seconds=seconds)
    finally:
        try:
            end.close()
        finally:
            end.close()  # completes what an interrupt stopped, and else does nothing


def _source_of_copy(
    source: Source, extents: bool, references: Policy | None, budget: Budget, force_share: bool
) -> StorageSource:
    if isinstance(source, Image):
        return StorageSource(source, extents=extents)
    opener = Opener(read_only=True, policy=references, budget=budget, force_share=force_share)
    image = _open_storage(opener, named(source), budget)
    try:
        return StorageSource(image, extents=extents, owns=True)
    except BaseException:
        image.close()
        raise


def _open_storage(opener: Opener, source: Spec, budget: Budget) -> Image:
    node = opener.open(source, storage=True)
    try:
        return Image(node, budget=budget)
    except BaseException:
        node.close()
        raise


def _name(name: str | os.PathLike[str]) -> str:
    """A name as `parse_name` reads it."""
    found = named(name)
    if not isinstance(found, str):
        raise OptionError("nested options describe no target of a copy", hint="give a path or a name, or an open image")
    return found


def _shown(source: Source, name: str) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else name

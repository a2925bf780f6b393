"""Write a disk to a pipe as an image, in one pass and without space beside it.

The file of the image is computed as it is read (`Format.file_of`), and copied to the pipe as any other bytes (`copy`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..creation import create_driver
from ..descriptors import opening
from ..errors import OptionError
from ..filters.noextents import NoExtents
from ..filters.truncate import Truncate
from ..image import Image
from ..own_files import refuse_stream
from ..request import Child
from .convert_transfer import Result
from .copy import Copy, Plan
from .copy_ends import PipeTarget, StorageSource
from .progress import Monitor

if TYPE_CHECKING:
    from .salvage import Unreadable


def convert_to_pipe(
    source: Image,
    fd: int,
    format: str,
    options: Mapping[str, Any],
    *,
    name: str = "-",
    allocated: bool = False,
    max_output: int | None = None,
    rate: int = 0,
    salvage: bool = False,
    monitor: Monitor | None = None,
) -> Result:
    """Write an image that reads as `source` does to the descriptor `fd`, which stays open, from its first byte to its last.
    `name` names it in messages. The other parameters are those of `convert_to_file`. All data of the source is stored, zeros
    among it, too; all other zeros are written to a raw image, and not to one that has a table for them, unless `allocated`.

    Raises UnsupportedFeature where the format does not make such an image in one pass; BrokenPipeError if nobody reads any
    more; and the errors of `convert`. What was written until then is no whole image."""
    monitor = monitor or Monitor()
    kind = create_driver(format)
    values = kind.creation_schema().parse({"size": source.size, **options})
    kind.prepare_create(values, name, source.budget)
    size = values["size"]
    if size < source.size:
        raise OptionError(
            f"the target has {size} bytes and the source {source.size}",
            path=name,
            hint="make a target that is large enough",
        )
    refuse_stream(source.node, fd, name)
    with ExitStack() as stack:
        disk = stack.enter_context(opening(source.share))
        unreadable: Unreadable | None = None
        if salvage:
            from .salvage import salvaging

            disk, unreadable = stack.enter_context(salvaging(disk, monitor))
        edge = Child(disk.node, "image", read_only=True)
        if size != source.size:
            edge = Child(Truncate(edge, size, read_only=True), "image", read_only=True)
        if allocated:
            edge = Child(NoExtents(edge, read_only=True), "image", read_only=True)
        try:
            file = stack.enter_context(opening(Image, kind.file_of(edge, values)))
        except BaseException:
            edge.close()
            raise
        end = StorageSource(file)
        stack.callback(end.close)
        limit = source.budget.max_output if max_output is None else max_output
        done = Copy(end, PipeTarget(fd, name), Plan(max_output=limit, rate=rate), monitor=monitor).run()
    return Result(done.read, done.written, done.zeroed, 0, unreadable.length if unreadable else 0)

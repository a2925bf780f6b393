"""The sources of a conversion: an image, several whose disks are joined one after the other, or standard input."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ..errors import OptionError
from ..image import Image
from ..options import parse_name
from ..own_files import refuse_input
from ..request import Child
from .source_snapshot import open_source

if TYPE_CHECKING:
    from ..jobs.progress import Monitor


def open_sources(names: Sequence[str], args: Namespace, monitor: Monitor) -> Image:
    """Open the images `names`, as one disk if there are several (the filter `concat`); "-" is a raw disk that comes through
    standard input. A cancel of `monitor` ends a wait for that."""
    if "-" in names:
        if len(names) > 1:
            raise OptionError("standard input (-) is not joined with other sources", hint="write it to a file first")
        return _open_stdin(args, monitor)
    if args.size is not None:
        raise OptionError("--size is the length of what comes through standard input", hint="omit it, or read from -")
    if len(names) == 1:
        return open_source(names[0], args)
    from ..filters.concat import Concat

    with ExitStack() as opened:
        disks: list[Child] = []
        for number, name in enumerate(names):
            with open_source(name, args) as image:
                disks.append(Child(image.node, f"children.{number}", read_only=True))
                opened.callback(disks[-1].close)
        image = Image(Concat(disks, read_only=True), budget=args.limits)
        opened.pop_all()  # the filter closes them
    return image


def _open_stdin(args: Namespace, monitor: Monitor) -> Image:
    name = "standard input"
    for word, given, why in (
        (
            "-f",
            args.format not in (None, "raw"),
            "an image of another format is not read in order: write it to a file first",
        ),
        ("--image-opts", args.image_opts, "it has no options"),
        ("-l", args.source_snapshot is not None, "it is a raw disk, without snapshots"),
        ("--bitmaps", args.bitmaps, "it is a raw disk, without bitmaps"),
        ("--salvage", args.salvage, "what could not be read is not read again"),
        ("-C or --reflink", args.offload, "it shares no blocks"),
    ):
        if given:
            raise OptionError(f"the source - is standard input, which excludes {word}: {why}")
    from ..jobs.copy_ends import PipeSource
    from ..jobs.pipe_storage import PipeStorage, length_of

    fd = sys.stdin.fileno()
    target = args.names[-1]
    if target == "-":
        refuse_input(fd, sys.stdout.fileno(), "standard output")
    elif (file := _file_of(target, args)) is not None:
        refuse_input(fd, file, file)
    size = length_of(fd, name) if args.size is None else args.size
    return Image(PipeStorage(PipeSource(fd, name, monitor), size, guess=args.format is None), budget=args.limits)


def _file_of(target: str, args: Namespace) -> str | None:
    """The path of the target, if that is a file."""
    if args.target_image_opts:
        return None
    file = parse_name(target).get("filename")
    return file if isinstance(file, str) else None

"""`lamina diff`: the ranges in which two images differ, two snapshots of one, or what was written since a bitmap."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ..errors import OptionError
from ..jobs.diff import Range, bitmap_of, changed_since, diff
from ..jobs.progress import Monitor
from .arguments import Parser, open_image
from .terminal import Meter

if TYPE_CHECKING:
    from ..image import Image

_EXAMPLES = """
  lamina diff before.qcow2 after.qcow2
  lamina diff --output json -g 64k before.qcow2 after.qcow2
  lamina diff -l monday -l tuesday disk.qcow2           between two snapshots
  lamina diff -l monday disk.qcow2                      from a snapshot to now
  lamina diff --bitmap daily disk.qcow2                 written since then
  lamina diff -f qcow2 -o inc.qcow2 full.qcow2 disk.qcow2
  lamina diff -f qcow2 -o inc.qcow2 --bitmap daily full.qcow2 disk.qcow2

The ranges are those of the second image. They consist of blocks (-g), each of
which differs in at least one byte. What both images share is not read.
"""


def main(argv: list[str]) -> int:
    parser = Parser("diff", "Show the ranges in which two images differ, or what changed in one.", _EXAMPLES)
    parser.add_format("-f", "--a-format", dest="format", help="format of the first image (default: detected)")
    parser.add_format("-F", "--b-format", dest="other_format", help="format of the second image")
    parser.add_argument(
        "-l", "--snapshot", dest="snapshots", metavar="SNAPSHOT", action="append", default=[],
        help="an internal snapshot of one image, in place of the first image; given twice, of both",
    )  # fmt: skip
    parser.add_argument("--bitmap", metavar="NAME", help="what was written to one image since this dirty bitmap")
    parser.add_size(
        "-g", "--granularity", metavar="SIZE", help="the bytes of a block (default: 4k; with --bitmap: of the bitmap)"
    )
    parser.add_argument(
        "--allocation", action="store_true", help="read nothing: blocks whose equality is not known count as changed"
    )
    parser.add_argument(
        "-o", "--overlay", metavar="FILE",
        help="create a qcow2 overlay over the first image with the differences (needs -f)",
    )  # fmt: skip
    parser.add_max_output()
    parser.add_progress()
    parser.add_output()
    parser.add_access()
    parser.add_argument("names", metavar="FILE", nargs="+", help="the two images, or one with -l or --bitmap")
    args = parser.parse(argv)

    alone = args.snapshots or (args.bitmap is not None and args.overlay is None)
    wanted = 1 if alone else 2
    if len(args.names) != wanted or len(args.snapshots) > 2 or (args.snapshots and args.bitmap is not None):
        parser.error(
            "two images are needed, or one with -l SNAPSHOT (once or twice) or --bitmap NAME; with -o always two"
        )
    if args.overlay is not None:
        return _write_overlay(args)
    with ExitStack() as stack:
        first, second = _open(args, stack)
        meter = stack.enter_context(Meter("comparing", asked=args.progress, quiet=args.quiet))
        if first is None:
            ranges = changed_since(second, args.bitmap, granularity=args.granularity or 1)
        else:
            ranges = diff(
                first,
                second,
                granularity=args.granularity or (1 if args.allocation else 4096),
                content=not args.allocation,
                monitor=Monitor(meter.report),
            )
        if args.output == "json":
            _write_json(ranges, second.size)
        else:
            _write_table(ranges, first, second)
    return 0


def _open(args: Namespace, stack: ExitStack) -> tuple[Image | None, Image]:
    """The images to compare; the first is None for the changes since a bitmap."""
    from ..api import open
    from .source_snapshot import snapshot_options

    found: list[Image | None] = []
    for wanted in args.snapshots:
        options, references = snapshot_options(args.names[0], args, args.format, wanted)
        image = open(options, references=references, budget=args.limits, force_share=args.force_share)
        found.append(stack.enter_context(image))
    if args.bitmap is not None:
        found.append(None)
    formats = (args.format, args.other_format) if len(args.names) == 2 else (args.format,)
    for name, format in zip(args.names, formats, strict=True):
        if len(found) < 2:
            found.append(stack.enter_context(open_image(name, args, format)))
    first, second = found
    assert second is not None
    return first, second


def _write_json(ranges: Iterable[Range], size: int) -> None:
    """In the names of the container storage interface, message GetMetadataDeltaResponse."""
    out = sys.stdout
    out.write('{\n    "block_metadata_type": "VARIABLE_LENGTH",\n')
    out.write(f'    "volume_capacity_bytes": {size},\n    "block_metadata": [')
    before = "\n"
    for offset, length in ranges:
        out.write(f'{before}        {{"byte_offset": {offset}, "size_bytes": {length}}}')
        before = ",\n"
    out.write("]\n}\n" if before == "\n" else "\n    ]\n}\n")


def _write_table(ranges: Iterable[Range], first: Image | None, second: Image) -> None:
    out = sys.stdout
    count = total = 0
    for offset, length in ranges:
        if not count:
            out.write(f"{'Offset':<16}Length\n")
        out.write(f"{offset:<#16x}{length:#x}\n")
        count += 1
        total += length
    what = "were written" if first is None else "differ"
    out.write(f"{total} of {second.size} bytes {what}, in {count} range{'s' * (count != 1)}\n")
    if first is not None and first.size != second.size:
        out.write(f"The sizes differ: {first.size} and {second.size} bytes\n")


def _write_overlay(args: Namespace) -> int:
    from ..jobs.convert import convert_to_file
    from .backing import warn_where_refused

    if args.image_opts or len(args.names) != 2:
        raise OptionError("an overlay needs the names of two image files", hint="omit -l and --image-opts")
    if args.format is None:
        raise OptionError("the format of the backing file is not given, and is never detected", hint="give it (-f)")
    if args.granularity is not None or args.allocation or args.output == "json":
        raise OptionError("-g, --allocation and --output describe a list of ranges", hint="omit them, or -o")
    name, changed = args.names
    with (
        open_image(changed, args, args.other_format) as source,
        Meter(args.overlay, asked=args.progress, quiet=args.quiet) as meter,
    ):
        convert_to_file(
            source,
            args.overlay,
            "qcow2",
            {},
            backing=name,
            backing_format=args.format,
            changed=None if args.bitmap is None else bitmap_of(source, args.bitmap),
            max_output=args.max_output,
            references=args.references,
            monitor=Monitor(meter.report),
        )
    warn_where_refused(args.overlay, name)
    return 0

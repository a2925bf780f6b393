"""`lamina convert`: copy an image into another one, of any format. Only what is stored is read and written."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..api import open as open_any
from ..creation import create_driver
from ..errors import OptionError
from ..image import Image
from ..jobs.convert import convert, convert_to_file
from ..jobs.progress import Monitor
from .arguments import Parser, format_options, image_source, open_image, print_schema
from .terminal import Meter

_EXAMPLES = """
  lamina convert -O qcow2 disk.raw disk.qcow2
  lamina convert -p -f qcow2 -O raw disk.qcow2 disk.raw
  lamina convert -O qcow2 -o cluster_size=2M disk.raw disk.qcow2
  lamina convert -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 overlay.qcow2      only what differs from the base
  lamina convert -n -O raw disk.qcow2 /dev/vg/disk                            into what is there already
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        "convert", "Copy an image into another one, of any format. A new image appears when it is whole.", _EXAMPLES
    )
    parser.add_format("-f", "--source-format", dest="format", help="format of the source (default: found by its magic)")
    parser.add_format("-O", "--target-format", dest="target_format", help="format of the target (default: raw)")
    parser.add_argument(
        "-o",
        "--target-options",
        metavar="NAME=VALUE,...",
        action="append",
        help="options of the target; -o help lists them",
    )
    parser.add_argument("-B", "--backing", metavar="FILE", help="make an overlay over FILE, of what differs from it")
    parser.add_format(
        "-F", "--backing-format", dest="backing_format", help="format of that backing file; never guessed"
    )
    parser.add_argument("-n", "--no-create", action="store_true", help="write into a target that is there already")
    parser.add_argument("--target-image-opts", action="store_true", help="the target is named by options (with -n)")
    parser.add_argument("--target-is-zero", action="store_true", help="with -n: the target is known to read as zero")
    parser.add_size(
        "-S", "--sparse-size", metavar="SIZE", default=4096,
        help="runs of zeros of at least SIZE bytes are not written (default: 4k); 0: everything is",
    )  # fmt: skip
    parser.add_argument("-p", "--progress", action="store_true", help="show progress")
    parser.add_quiet()
    parser.add_argument(
        "-W", "--oob-writes", action="store_true", help="accepted; there is nothing to gain from it here"
    )
    parser.add_size("-m", "--parallel", metavar="NUMBER", help="accepted; there is nothing to gain from it here")
    for flags, metavar in (
        (("-c", "--compress", "writing compressed images is not there yet"), None),
        (("-l", "--source-snapshot", "internal snapshots are not there yet"), "SNAPSHOT"),
        (("-r", "--rate", "limiting the rate is not there yet"), "RATE"),
        (("--bitmaps", "persistent bitmaps are not there yet"), None),
        (("--salvage", "going on after read errors is not there yet"), None),
    ):
        parser.add_later(*flags, metavar=metavar)
    parser.add_access()
    parser.add_argument("names", metavar="FILE", nargs="*", help="the source, then the target")
    args = parser.parse(argv)

    options = format_options(args.target_options)
    if options is None:
        kind: Any = create_driver(args.target_format or "raw")
        print_schema(kind.create_schema)
        return 0
    if len(args.names) != 2:
        parser.error("one source and one target are needed")
    name, target = args.names
    with open_image(name, args, args.format) as source, Meter(target, asked=args.progress, quiet=args.quiet) as meter:
        monitor = Monitor(meter.report)
        if args.no_create:
            _into(source, target, args, options, monitor)
        else:
            _anew(source, target, args, options, monitor)
    return 0


def _anew(source: Image, target: str, args: Namespace, options: dict[str, Any], monitor: Monitor) -> None:
    if args.target_image_opts or args.target_is_zero:
        word = "--target-image-opts" if args.target_image_opts else "--target-is-zero"
        raise OptionError(f"{word} is about a target that is there already", hint="use it with -n")
    backing, backing_format = args.backing, args.backing_format
    if backing is None:
        backing, backing_format = options.pop("backing_file", None), backing_format or options.pop("backing_fmt", None)
    convert_to_file(
        source,
        target,
        args.target_format or "raw",
        options,
        smallest_hole=args.sparse_size,
        backing=backing,
        backing_format=backing_format,
        references=args.references,
        monitor=monitor,
    )


def _into(source: Image, target: str, args: Namespace, options: dict[str, Any], monitor: Monitor) -> None:
    if options or args.backing is not None:
        raise OptionError("-o and -B are about a new target", hint="leave them out, or leave -n out")
    if args.target_format is None and not args.target_image_opts:
        raise OptionError(
            "the format of the target is not given, and what is there is not overwritten on a guess",
            path=target,
            hint="give it (-O)",
        )
    spec = image_source(target, args, args.target_format, image_opts=args.target_image_opts)
    with open_any(spec, format=args.target_format, read_only=False, references=args.references) as there:
        convert(source, there, blank=args.target_is_zero, smallest_hole=args.sparse_size, monitor=monitor)
        there.flush()

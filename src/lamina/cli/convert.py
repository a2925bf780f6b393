"""`lamina convert`: copy an image into another one, of any format. Only what is stored is read and written."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from .. import registry
from ..api import open as open_any
from ..creation import create_driver
from ..errors import Locked, OptionError, append_hint
from ..image import Image
from ..jobs.convert import convert, convert_to_file
from ..jobs.progress import Monitor
from ..options import parse_name
from ..own_files import refuse_own
from .arguments import Parser, format_options, image_source, open_image, print_schema
from .terminal import Meter

_EXAMPLES = """
  lamina convert -O qcow2 disk.raw disk.qcow2
  lamina convert -p -f qcow2 -O raw disk.qcow2 disk.raw
  lamina convert -O qcow2 -o cluster_size=2M disk.raw disk.qcow2
  lamina convert -c -O qcow2 -o compression_type=zstd disk.raw small.qcow2
  lamina convert -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 overlay.qcow2      only what differs from the base
  lamina convert -n -O raw disk.qcow2 /dev/vg/disk                            into what is there already
  lamina convert --connections 4 -O qcow2 nbd://server/disk disk.qcow2
  lamina convert -n -O raw disk.qcow2 nbd://server/disk                       into an export, which is there already
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        "convert",
        "Copy an image to another image, in any format. A new file gets its name when it is complete.",
        _EXAMPLES,
    )
    parser.add_format("-f", "--source-format", dest="format", help="format of the source (default: detected)")
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
        "-S", "--sparse-size", metavar="SIZE",
        help="runs of zeros of at least SIZE bytes are not written (default: 4k); 0: everything is",
    )  # fmt: skip
    offload = parser.add_mutually_exclusive_group()
    offload.add_argument(
        "-C",
        "--copy-range",
        dest="offload",
        action="store_const",
        const="copy",
        default="",
        help="have the system copy data from file to file, or share its blocks; no zeros are looked for in it (not with -S)",
    )
    offload.add_argument(
        "--reflink",
        dest="offload",
        action="store_const",
        const="share",
        help="the same where the file system shares blocks (btrfs, xfs, ...); elsewhere read and write",
    )
    offload.add_argument("-c", "--compress", action="store_true", help="store it compressed, as far as that is smaller")
    parser.add_connections(
        "--connections", default=None,
        help="connections to each server that says that several are coherent (1 to 16; default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--flush",
        action="store_true",
        help="the target is on stable storage when the command ends (a file that is replaced is in any case)",
    )
    parser.add_max_output()
    parser.add_argument("-p", "--progress", action="store_true", help="show progress")
    parser.add_quiet()
    parser.add_size(
        "-m", "--parallel", metavar="NUMBER",
        help="requests of 2 MiB to have under way at once (1 to 16; default: 1, or 8 from and to servers that take long)",
    )  # fmt: skip
    parser.add_argument(
        "-W", "--oob-writes", action="store_true",
        help="write in any order, and as much at once as is read (to servers that is the default)",
    )  # fmt: skip
    for flags, metavar in (
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
        print_schema(create_driver(args.target_format or "raw").creation_schema())
        return 0
    if len(args.names) != 2:
        parser.error("one source and one target are needed")
    if args.offload and args.sparse_size is not None:
        parser.error("-S looks for zeros in what -C and --reflink pass unseen: leave one out")
    args.sparse_size = 4096 if args.sparse_size is None else args.sparse_size
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
    driver = parse_name(target).get("driver", "file")
    if driver not in ("file", "host_device") and registry.entry(driver).kind == "storage":
        raise OptionError("this is no file, and cannot be made anew", path=target, hint="use it with -n")
    backing, backing_format = args.backing, args.backing_format
    if backing is None:
        backing, backing_format = options.pop("backing_file", None), backing_format or options.pop("backing_fmt", None)
    convert_to_file(
        source,
        target,
        args.target_format or "raw",
        options,
        smallest_hole=args.sparse_size,
        offload=args.offload,
        compress=args.compress,
        backing=backing,
        backing_format=backing_format,
        references=args.references,
        parallel=args.parallel,
        in_order=False if args.oob_writes else None,
        durable=args.flush,
        max_output=args.max_output,
        monitor=monitor,
    )
    if backing is not None:
        from .backing import warn_where_refused

        warn_where_refused(target, backing)


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
    try:
        opened = open_any(
            spec, format=args.target_format, read_only=False, references=args.references, budget=args.limits
        )
    except Locked as error:
        if error.path is not None:
            refuse_own(source.node, error.path)  # then it is we who hold it
        raise
    with opened as there:
        if args.compress:
            with there.edit() as edit:
                edit.insert("compress")
        try:
            convert(
                source,
                there,
                blank=args.target_is_zero,
                smallest_hole=args.sparse_size,
                offload=args.offload,
                parallel=args.parallel,
                in_order=False if args.oob_writes else None,
                max_output=args.max_output,
                monitor=monitor,
            )
            there.flush()
        except KeyboardInterrupt as stop:
            append_hint(stop, f"{target} is overwritten in part")
            raise

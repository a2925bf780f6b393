"""`lamina convert`: copy an image to another image, in any format. Only stored data is read and written."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from .. import registry
from ..creation import create_driver
from ..errors import OptionError, append_hint
from ..image import Image
from ..jobs.beneath import Backing
from ..jobs.convert import Result, convert_and_flush, convert_to_file
from ..jobs.progress import Monitor
from ..operations.sources import open_target
from ..options import parse_name
from .arguments import DURABLE_MODES, Parser, format_options, image_source, print_schema
from .sources import open_sources
from .streams import print_error
from .terminal import Meter

_EXAMPLES = """
  lamina convert -O qcow2 disk.raw disk.qcow2
  lamina convert -p -f qcow2 -O raw disk.qcow2 disk.raw
  lamina convert -O qcow2 -o cluster_size=2M disk.raw disk.qcow2
  lamina convert -c -O qcow2 -o compression_type=zstd disk.raw small.qcow2
  lamina convert -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 overlay.qcow2      only what differs from the base
  lamina convert -O qcow2 disk.raw - | ssh host 'cat > disk.qcow2'            to a pipe, uncompressed
  gunzip -c disk.raw.gz | lamina convert --size 10G -O qcow2 - disk.qcow2     from a pipe
  lamina convert -n -O raw disk.qcow2 /dev/vg/disk                            to an existing device
  lamina convert --connections 4 -O qcow2 nbd://server/disk disk.qcow2
  lamina convert -O qcow2 first.raw second.raw both.qcow2                     one disk after the other
  lamina convert -n -O raw disk.qcow2 nbd://server/disk                       to an existing export
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
    parser.add_argument(
        "-B",
        "--backing",
        metavar="FILE",
        help="create an overlay over FILE with the differences from it; with -n: write what differs from an overlay",
    )
    parser.add_format(
        "-F", "--backing-format", dest="backing_format", help="format of that backing file; never detected"
    )
    parser.add_argument("-n", "--no-create", action="store_true", help="write to an existing target")
    parser.add_argument("--target-image-opts", action="store_true", help="with -n: the target is a list of options")
    parser.add_argument("--target-is-zero", action="store_true", help="with -n: the target is known to read as zero")
    parser.add_size(
        "-S", "--sparse-size", metavar="SIZE",
        help="runs of zeros of at least SIZE bytes are not written (default: 4k); 0: data is not searched for zeros",
    )  # fmt: skip
    offload = parser.add_mutually_exclusive_group()
    offload.add_argument(
        "-C",
        "--copy-range",
        "--copy-range-offloading",
        dest="offload",
        action="store_const",
        const="copy",
        default="",
        help="let the kernel copy data between files, or share its blocks; data is not searched for zeros (not with -S)",
    )
    offload.add_argument(
        "--reflink",
        dest="offload",
        action="store_const",
        const="share",
        help="share blocks if the file system supports that (btrfs, xfs, ...), otherwise read and write",
    )
    offload.add_argument("-c", "--compress", action="store_true", help="compress the data where that makes it smaller")
    parser.add_argument(
        "--compression-level", metavar="LEVEL", type=int, choices=range(1, 23),
        help="with -c: 1 is fast, 9 is small (22 with zstd); default: 3, with zstd 2",
    )  # fmt: skip
    parser.add_connections(
        "--connections", default=None,
        help="connections to each server that supports several coherent ones (1 to 16; default: 1)",
    )  # fmt: skip
    parser.add_reconnect(default=10)
    parser.add_argument(
        "--flush",
        action="store_true",
        help="flush the target to stable storage at the end (a replaced file is flushed in any case)",
    )
    parser.add_cache("-t", "--target-cache", dest="target_cache", written=True)
    parser.add_cache("-T", "--source-cache", dest="source_cache", written=False)
    parser.add_rate()
    parser.add_max_output()
    parser.add_progress()
    parser.add_size(
        "-m", "--parallel", metavar="NUMBER",
        help="requests of 2 MiB in flight (1 to 16; default: 1, or 8 if the source or the target is remote)",
    )  # fmt: skip
    parser.add_argument(
        "-W", "--oob-writes", action="store_true",
        help="write in any order, with as many requests in flight as for reads (the default for a remote target)",
    )  # fmt: skip
    parser.add_argument(
        "-l", "--source-snapshot", metavar="SNAPSHOT",
        help="convert an internal snapshot: its id or name, or snapshot.id=ID,snapshot.name=NAME",
    )  # fmt: skip
    parser.add_argument(
        "--bitmaps", action="store_true", help="copy the persistent dirty bitmaps of the source as well"
    )
    parser.add_argument(
        "--skip-broken-bitmaps", action="store_true", help="with --bitmaps: leave out those that are inconsistent"
    )
    parser.add_argument(
        "--salvage",
        action="store_true",
        help="go on after read errors: blocks that cannot be read become zeros, with a warning each",
    )
    parser.add_access()
    parser.add_size("--size", metavar="SIZE", help="the length of the raw disk that comes through standard input")
    parser.add_argument(
        "names",
        metavar="FILE",
        nargs="*",
        help="the source, or several to be joined, then the target; - is standard input or output",
    )
    args = parser.parse(argv)

    options = format_options(args.target_options)
    if options is None:
        print_schema(create_driver(args.target_format or "raw").creation_schema())
        return 0
    if args.backing_format is not None and args.backing is None and "backing_file" not in options:
        parser.error("-F is the format of a backing file, and none is given: add -B")
    if len(args.names) < 2:
        parser.error("a source and a target are needed")
    if len(args.names) > 2:
        _refuse_joined(parser, args, options)
    if args.compression_level is not None and not args.compress:
        parser.error("--compression-level requires -c")
    if args.offload and args.sparse_size is not None:
        parser.error("-S searches the data for zeros, which -C and --reflink do not read: omit one of them")
    if args.salvage and args.offload:
        parser.error(
            "--salvage looks for the blocks that cannot be read, and -C and --reflink do not read: omit one of them"
        )
    if args.skip_broken_bitmaps and not args.bitmaps:
        parser.error("--skip-broken-bitmaps requires --bitmaps")
    if args.bitmaps and args.source_snapshot is not None:
        parser.error("--bitmaps copies those of the disk, and -l converts an earlier state of it: omit one of them")
    args.flush = args.flush or args.target_cache in DURABLE_MODES
    args.bitmaps = ("usable" if args.skip_broken_bitmaps else "all") if args.bitmaps else ""
    args.sparse_size = 4096 if args.sparse_size is None else args.sparse_size
    *names, target = args.names
    if target == "-":
        _refuse_to_pipe(parser, args, options)
    meter = Meter(target, asked=args.progress, quiet=args.quiet, piped=target == "-")
    monitor = Monitor(meter.report, (lambda text: None) if args.quiet else _warn)
    with open_sources(names, args, monitor) as source, meter:
        work = _to_pipe if target == "-" else _into if args.no_create else _anew
        done = work(source, target, args, options, monitor)
    if done.unreadable:
        monitor.warn(f"{done.unreadable} bytes of {' + '.join(names)} could not be read, and are zeros in {target}")
    return 0


def _refuse_joined(parser: Parser, args: Namespace, options: dict[str, Any]) -> None:
    """Report the options that several sources exclude."""
    if args.source_snapshot is not None:
        parser.error("-l names a snapshot of one source, and there are several: convert each alone")
    if args.bitmaps:
        parser.error("--bitmaps copies those of one source, and there are several: omit it")
    if args.backing is not None or "backing_file" in options:
        parser.error("several sources are joined to a disk of its own, which has no backing file: omit -B")


def _refuse_to_pipe(parser: Parser, args: Namespace, options: dict[str, Any]) -> None:
    """Report the options that standard output as the target excludes."""
    for word, given, why in (
        ("-n", args.no_create, "there is no image yet"),
        ("--target-image-opts", args.target_image_opts, "it has no options"),
        ("--target-is-zero", args.target_is_zero, "nothing was written to it before"),
        ("-c", args.compress, "the sizes of compressed clusters are not known beforehand"),
        ("-B", args.backing is not None or "backing_file" in options, "an overlay is not made in one pass"),
        ("-C or --reflink", args.offload, "it shares no blocks"),
        ("--bitmaps", args.bitmaps, "they are written last"),
        ("--flush, -t writethrough and -t directsync", args.flush, "it cannot be flushed"),
        ("-W", args.oob_writes, "it is written in order"),
    ):
        if given:
            parser.error(f"the target - is standard output, which excludes {word}: {why}; name a file")


def _to_pipe(source: Image, target: str, args: Namespace, options: dict[str, Any], monitor: Monitor) -> Result:
    from ..jobs.convert_streams import convert_to_pipe

    return convert_to_pipe(
        source,
        sys.stdout.fileno(),
        args.target_format or "raw",
        options,
        name="standard output",
        allocated=not args.sparse_size,
        max_output=args.max_output,
        rate=args.rate,
        salvage=args.salvage,
        monitor=monitor,
    )


def _warn(text: str) -> None:
    print_error(f"warning: {text}")


def _anew(source: Image, target: str, args: Namespace, options: dict[str, Any], monitor: Monitor) -> Result:
    if args.target_image_opts or args.target_is_zero:
        word = "--target-image-opts" if args.target_image_opts else "--target-is-zero"
        raise OptionError(f"{word} requires an existing target", hint="add -n")
    driver = parse_name(target).get("driver", "file")
    if driver not in ("file", "host_device") and registry.entry(driver).kind == "storage":
        raise OptionError("this target is not a file, and cannot be created", path=target, hint="add -n")
    backing, backing_format = args.backing, args.backing_format
    if backing is None:
        backing, backing_format = options.pop("backing_file", None), backing_format or options.pop("backing_fmt", None)
    done = convert_to_file(
        source,
        target,
        args.target_format or "raw",
        options,
        smallest_hole=args.sparse_size,
        offload=args.offload,
        compress=args.compress,
        compression_level=args.compression_level,
        backing=backing,
        backing_format=backing_format,
        references=args.references,
        parallel=args.parallel,
        in_order=False if args.oob_writes else None,
        bitmaps=args.bitmaps,
        durable=args.flush,
        max_output=args.max_output,
        rate=args.rate,
        salvage=args.salvage,
        monitor=monitor,
    )
    if backing is not None:
        from .backing import warn_where_refused

        warn_where_refused(target, backing)
    return done


def _into(source: Image, target: str, args: Namespace, options: dict[str, Any], monitor: Monitor) -> Result:
    if options or args.compression_level is not None:
        word = "-o" if options else "--compression-level"
        raise OptionError(f"{word} requires a new target", hint="omit it, or omit -n")
    if args.backing is not None and args.target_is_zero:
        raise OptionError("a target over a backing file does not read as zero", hint="omit -B, or --target-is-zero")
    if args.target_format is None and not args.target_image_opts:
        raise OptionError(
            "the format of the target is not given, and an existing target is not overwritten on a guess",
            path=target,
            hint="give it (-O)",
        )
    spec = image_source(target, args, args.target_format, image_opts=args.target_image_opts)
    with open_target(spec, args.target_format, source, references=args.references, budget=args.limits) as there:
        if args.compress:
            with there.edit() as edit:
                edit.insert("compress")
        try:
            return convert_and_flush(
                source,
                there,
                blank=args.target_is_zero,
                smallest_hole=args.sparse_size,
                # An overlay that is there shows its backing file: what it has already is not written.
                below=None if args.backing is None else Backing(there, keeps_rest=True),
                offload=args.offload,
                parallel=args.parallel,
                in_order=False if args.oob_writes else None,
                bitmaps=args.bitmaps,
                max_output=args.max_output,
                rate=args.rate,
                salvage=args.salvage,
                monitor=monitor,
            )
        except KeyboardInterrupt as stop:
            append_hint(stop, f"{target} is partly overwritten")
            raise

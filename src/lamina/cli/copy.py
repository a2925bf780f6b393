"""`lamina copy`: copy raw bytes between files, devices, pipes and exports. `convert` is for image formats."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import ExitStack
from time import monotonic

from ..errors import OptionError
from ..graph import Opener
from ..image import Image
from ..job_results import CopyResult
from ..jobs.copy import Copied, Plan
from ..jobs.copy_ends import PipeSource, PipeTarget, Source, StorageSource
from ..jobs.copy_named import NamedTarget, copy_in_place, copy_to_name
from ..jobs.progress import Monitor
from ..options import parse_name
from ..own_files import refuse_input, refuse_stream
from .arguments import Parser, tell_of_writers
from .terminal import Meter

_EXAMPLES = """
  lamina copy nbd://server/disk disk.raw
  lamina copy -p --flush disk.raw nbd://server/disk
  lamina copy --destination-is-zero disk.raw 'nbd+unix:///disk?socket=/run/nbd.sock'
  lamina copy --resume-file disk.journal nbd://server/disk disk.raw      the same command again resumes after a failure
  gunzip -c disk.raw.gz | lamina copy - nbd://server/disk

The command does not convert formats: it copies an image file byte by byte. It does not read holes of the source, and does not
write zeros if the target is known to read as zero. A new file gets its name when it is complete; a device or an export is
written in place, and an error message contains the position of the copy.
"""


def main(argv: list[str]) -> int:
    parser = Parser("copy", "Copy raw bytes between files, block devices, pipes (-) and exports of servers.", _EXAMPLES)
    parser.add_connections(
        "-C", "--connections", default=0,  # the storage chooses
        help="connections to each server that supports several coherent ones (1 to 16; default: 4 over TCP, otherwise 1)",
    )  # fmt: skip
    parser.add_size("-R", "--requests", metavar="NUMBER", default=32, help="requests in flight (default: 32)")
    parser.add_size("--request-size", metavar="SIZE", default=512 << 10, help="the largest read (default: 512k)")
    parser.add_size(
        "-S", "--sparse-size", metavar="SIZE", default=4096,
        help="runs of zeros of at least SIZE bytes are not written as data (default: 4k); 0: data is not searched for zeros",
    )  # fmt: skip
    parser.add_argument(
        "--no-extents", action="store_true", help="read the complete source, without a query of its extents"
    )
    parser.add_argument(
        "--destination-is-zero",
        "--target-is-zero",
        dest="blank",
        action="store_true",
        help="the target is known to read as zero, so zeros are not written",
    )
    parser.add_argument("--allocated", action="store_true", help="allocate zeros in the target")
    parser.add_argument("--flush", action="store_true", help="flush the target to stable storage at the end")
    parser.add_reconnect(default=10)
    parser.add_argument(
        "--resume-file",
        metavar="PATH",
        help="record the position of the copy in this file every ten seconds; if the file exists already, resume from that "
        "position. It is removed at the end",
    )
    parser.add_rate()
    parser.add_max_output()
    parser.add_timeout()
    parser.add_references()
    parser.add_progress()
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="read a source that another program has open for writing"
    )
    parser.add_output()
    parser.add_argument(
        "source", metavar="SOURCE", help="a file, a device, the URI of an export, or - for standard input"
    )
    parser.add_argument(
        "target", metavar="TARGET", help="a file, a device, the URI of an export, or - for standard output"
    )
    args = parser.parse(argv)
    piped = args.target == "-"
    if piped and (args.output == "json" or args.flush or args.resume_file is not None):
        raise OptionError("a copy to standard output has no summary, and can be neither flushed nor resumed")
    if args.resume_file == "-":
        raise OptionError("the journal cannot be standard output (-)", hint="write ./- for a file named -")
    if args.resume_file is not None and args.source == "-":
        raise OptionError("a copy from a pipe cannot be resumed", hint="omit --resume-file")
    plan = Plan(args.request_size, args.requests, args.sparse_size, args.flush, args.max_output, args.rate)
    begin = monotonic()
    with ExitStack() as stack:
        source = _open_source(args.source, args)
        stack.callback(source.close)
        _refuse_streams(source, args)
        meter = stack.enter_context(Meter(args.target, asked=args.progress, quiet=args.quiet, piped=piped))
        copied = _copy(source, args, plan, Monitor(meter.report))
    if args.output == "json":
        _print_summary(args, copied, plan.flush or args.resume_file is not None, monotonic() - begin)
    return 0


def _print_summary(args: Namespace, copied: Copied, flushed: bool, seconds: float) -> None:
    from json import dumps

    found = CopyResult(args.source, args.target, **copied._asdict(), flushed=flushed, seconds=seconds)
    sys.stdout.write(dumps(found.to_json(), indent=4) + "\n")


def _open_source(name: str, args: Namespace) -> Source | PipeSource:
    if name == "-":
        return PipeSource(sys.stdin.fileno(), "standard input")
    opener = Opener(read_only=True, policy=args.references, budget=args.limits, force_share=args.force_share)
    node = opener.open(name, storage=True)
    if args.force_share:
        tell_of_writers(node)
    with Image(node, budget=args.limits) as image:
        return StorageSource(image, extents=not args.no_extents)


def _refuse_streams(source: Source | PipeSource, args: Namespace) -> None:
    """Raise OptionError if the copy would overwrite what it reads, where one of the two is a standard stream."""
    if isinstance(source, PipeSource):
        if args.target == "-":
            refuse_input(sys.stdin.fileno(), sys.stdout.fileno(), "standard output")
        elif file := parse_name(args.target).get("filename"):
            refuse_input(sys.stdin.fileno(), file, file)
    elif isinstance(source, StorageSource) and args.target == "-":
        refuse_stream(source.node, sys.stdout.fileno(), "standard output")


def _copy(source: Source | PipeSource, args: Namespace, plan: Plan, monitor: Monitor) -> Copied:
    if args.target == "-":
        return copy_in_place(source, PipeTarget(sys.stdout.fileno(), "standard output"), plan, monitor)
    to = NamedTarget(
        args.target,
        blank=args.blank,
        allocated=args.allocated,
        journal=args.resume_file,
        source=args.source,
        references=args.references,
        budget=args.limits,
    )
    return copy_to_name(source, to, plan, monitor)

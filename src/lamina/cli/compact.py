"""`lamina compact`: make the file of an image smaller, in place."""

from __future__ import annotations

import sys

from ..job_results import CompactResult
from ..jobs.compact import compact
from ..jobs.progress import Monitor
from ..options import format_size
from .arguments import Parser, open_writable
from .terminal import Meter

_EXAMPLES = """
  lamina compact -f qcow2 disk.qcow2
  lamina compact --output json -f raw disk.raw

The disk reads the same at every moment. Space that a guest has freed can be
given back if the guest has discarded it, or filled it with zeros.
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        "compact",
        "Free leaked clusters, the storage of zeros, and unused space of an image file.",
        _EXAMPLES,
    )
    parser.add_format(
        "-f", "--format", dest="format", help="format of the image (default: detected; raw must be given)"
    )
    parser.add_size(
        "-m", "--parallel", metavar="NUMBER", help="threads that read (1 to 16; default: 2, or 8 if a file is remote)"
    )
    parser.add_progress()
    parser.add_output()
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image")
    args = parser.parse(argv)

    with (
        open_writable(args.filename, args, args.format) as image,
        Meter(args.filename, asked=args.progress, quiet=args.quiet or args.output == "json") as meter,
    ):
        done = compact(image, parallel=args.parallel, monitor=Monitor(meter.report))
    if args.output == "json":
        import json

        sys.stdout.write(json.dumps({**done.to_json(), "filename": args.filename}, indent=4) + "\n")
    elif not args.quiet:
        sys.stdout.write(_summary(done))
    return 0


def _summary(done: CompactResult) -> str:
    given, (before, after) = done.given_back, done.length
    text = f"{format_size(given)} given back" if given > 0 else "Nothing could be given back"
    text += f"; the file is {format_size(after)} long" + (
        f" (before: {format_size(before)})" if before != after else ""
    )
    return text + "\n"

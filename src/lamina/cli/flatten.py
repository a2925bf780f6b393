"""`lamina flatten`: make an overlay independent of its backing files, in place."""

from __future__ import annotations

import sys

from ..jobs.flatten import flatten
from ..jobs.progress import Monitor
from .arguments import Parser, open_writable
from .terminal import Meter

_EXAMPLES = """
  lamina flatten -f qcow2 overlay.qcow2
  lamina flatten -p -f qcow2 --references beneath:/images overlay.qcow2

The image reads the same at every moment. A command that was interrupted is
continued by running it again.
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        "flatten",
        "Copy what the backing files of an overlay own into it, and remove the reference.",
        _EXAMPLES,
    )
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: detected)")
    parser.add_max_output()
    parser.add_progress()
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image")
    args = parser.parse(argv)

    with (
        open_writable(args.filename, args, args.format) as image,
        Meter(args.filename, asked=args.progress, quiet=args.quiet) as meter,
    ):
        done = flatten(image, max_output=args.max_output, monitor=Monitor(meter.report))
    if not args.quiet:
        said = f"Image flattened: {done.written} bytes were copied into it."
        said = "The image has no backing file." if done.backing is None else said
        sys.stdout.write(said + "\n")
    return 0

"""`lamina commit`: write what an overlay owns to its backing file."""

from __future__ import annotations

import sys

from ..jobs.commit import commit
from ..jobs.progress import Monitor
from .arguments import Parser, open_image, open_writable
from .terminal import Meter

_EXAMPLES = """
  lamina commit -f qcow2 overlay.qcow2                  into its backing file; the overlay is emptied
  lamina commit -f qcow2 -d overlay.qcow2               the overlay stays as it is
  lamina commit -f qcow2 -b base.qcow2 top.qcow2        into a file further down the chain
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        "commit",
        "Write what an overlay owns to its backing file, and empty the overlay. The overlay reads the same at any moment.",
        _EXAMPLES,
    )
    parser.add_format("-f", "--format", dest="format", help="format of the overlay (default: detected)")
    parser.add_argument(
        "-b", "--base", metavar="FILE",
        help="the backing file to write to, of any depth (default: the first one); files between them become useless; "
        "implies -d",
    )  # fmt: skip
    parser.add_argument("-d", "--drop", action="store_true", help="do not empty the overlay")
    parser.add_rate()
    parser.add_cache("-t", "--cache", dest="cache", written=False)
    parser.add_max_output()
    parser.add_progress()
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the overlay")
    args = parser.parse(argv)

    keeps = args.drop or args.base is not None
    opened = (open_image if keeps else open_writable)(args.filename, args, args.format)
    with opened as image, Meter(args.filename, asked=args.progress, quiet=args.quiet) as meter:
        commit(
            image, args.base, empty=not keeps, rate=args.rate, max_output=args.max_output, monitor=Monitor(meter.report)
        )
    if not args.quiet:
        sys.stdout.write("Image committed.\n")
    return 0

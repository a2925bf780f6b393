"""`lamina compare`: compare two images. Exit status: 0 equal, 1 different, 2 an error."""

from __future__ import annotations

import sys

from ..jobs.compare import Difference, compare
from ..jobs.progress import Monitor
from .arguments import Parser, open_image
from .terminal import Meter

_EXAMPLES = """
  lamina compare disk.raw disk.qcow2
  lamina compare -f raw -F qcow2 disk.raw disk.qcow2
  lamina compare -s before.qcow2 after.qcow2             sizes and allocation must be equal too

exit status: 0 equal, 1 different, 2 an error
"""

FAILURE = 2


def main(argv: list[str]) -> int:
    parser = Parser("compare", "Compare the contents of two images. The longer one may end in zeros.", _EXAMPLES)
    parser.add_format("-f", "--a-format", dest="format", help="format of the first image (default: detected)")
    parser.add_format("-F", "--b-format", dest="other_format", help="format of the second image")
    parser.add_argument("-s", "--strict", action="store_true", help="sizes and allocation must be equal as well")
    parser.add_argument("-p", "--progress", action="store_true", help="show progress")
    parser.add_cache("-T", "--cache", dest="cache", written=False)
    parser.add_quiet()
    parser.add_access()
    parser.add_argument("first", metavar="FILE1")
    parser.add_argument("second", metavar="FILE2")
    args = parser.parse(argv)

    with open_image(args.first, args, args.format) as first, open_image(args.second, args, args.other_format) as second:
        if not args.quiet and not args.strict and first.size != second.size:
            print("Warning: Image size mismatch!")
        with Meter("comparing", asked=args.progress, quiet=args.quiet) as meter:
            difference = compare(first, second, strict=args.strict, monitor=Monitor(meter.report))
    if not args.quiet:
        sys.stdout.write(_verdict(difference) + "\n")
    return 0 if difference is None else 1


def _verdict(difference: Difference | None) -> str:
    """The result in the words that scripts parse."""
    if difference is None:
        return "Images are identical."
    if difference.kind == "size":
        return "Strict mode: Image size mismatch!"
    if difference.kind == "status":
        return f"Strict mode: Offset {difference.offset} block status mismatch!"
    return f"Content mismatch at offset {difference.offset}!"

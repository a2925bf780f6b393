"""`lamina compare`: compare two images. Exit status: 0 equal, 1 different, 2 an error."""

from __future__ import annotations

import sys

from ..jobs.compare import Difference, Strict, compare
from ..jobs.progress import Monitor
from . import program
from .arguments import Parser, open_image
from .terminal import Meter

_EXAMPLES = """
  lamina compare disk.raw disk.qcow2
  lamina compare -f raw -F qcow2 disk.raw disk.qcow2
  lamina compare -s before.qcow2 after.qcow2             sizes and allocation must be equal too

exit status: 0 equal, 1 different (or an option is wrong), 2 an error
"""

FAILURE = 2
#: As of qemu-img, for a command line that makes no sense.
WRONG_USAGE = 1


def main(argv: list[str]) -> int:
    parser = Parser("compare", "Compare the contents of two images. The longer one may end in zeros.", _EXAMPLES)
    parser.add_format("-f", "--a-format", dest="format", help="format of the first image (default: detected)")
    parser.add_format("-F", "--b-format", dest="other_format", help="format of the second image")
    parser.add_argument("-s", "--strict", action="store_true", help="sizes and allocation must be equal as well")
    parser.add_progress()
    parser.add_cache("-T", "--cache", dest="cache", written=False)
    parser.add_access()
    parser.add_argument("first", metavar="FILE1")
    parser.add_argument("second", metavar="FILE2")
    args = parser.parse(argv)

    with (
        open_image(args.first, args, args.format) as first,
        open_image(args.second, args, args.other_format) as second,
        Meter("comparing", asked=args.progress, quiet=args.quiet) as meter,
    ):
        strict: Strict = "" if not args.strict else program.current.strictness
        difference = compare(first, second, strict=strict, monitor=Monitor(meter.report))
        # About the part that only one of them has.
        end = min(first.size, second.size)
        longer = first.size != second.size and (difference is None or difference.offset >= end)
        text = "Warning: Image size mismatch!\n" if longer and not args.strict else ""
        text = "" if args.quiet else text + _verdict(difference) + "\n"
        if program.current.plain_progress:
            sys.stdout.write(text)  # before the end of the line of progress
            text = ""
    sys.stdout.write(text)
    return 0 if difference is None else 1


def _verdict(difference: Difference | None) -> str:
    """The result in the words that scripts parse."""
    if difference is None:
        return "Images are identical."
    if difference.kind == "size":
        return "Strict mode: Image size mismatch!"
    if difference.kind == "status":
        return f"Strict mode: Offset {difference.offset} block status mismatch!"
    unit = program.current.mismatch_unit
    return f"Content mismatch at offset {difference.offset // unit * unit}!"

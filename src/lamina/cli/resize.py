"""`lamina resize`: change the size of a disk."""

from __future__ import annotations

import sys

from ..errors import OptionError
from ..options import parse_size
from . import program
from .arguments import Parser, open_writable

_EXAMPLES = """
  lamina resize disk.qcow2 40G
  lamina resize disk.qcow2 +10G
  lamina resize --shrink -f raw disk.raw -512M      what lies behind the new end is lost
"""


def main(argv: list[str]) -> int:
    parser = Parser("resize", "Change the size of a disk. What is added reads as zeros.", _EXAMPLES)
    parser.add_format(
        "-f", "--format", dest="format", help="format of the image (default: detected; raw must be given)"
    )
    parser.add_argument(
        "--shrink", action="store_true", help="allow a smaller size: what lies behind the new end is lost"
    )
    parser.add_argument(
        "--preallocation", metavar="MODE", default="off", help="storage of what is added: off, metadata, falloc or full"
    )
    parser.add_quiet()
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image")
    parser.add_argument("size", metavar="SIZE", help="the new size, or the difference: +SIZE, -SIZE")
    parser.signed_last = True
    args = parser.parse(argv)

    with open_writable(args.filename, args, args.format) as image:
        before = image.size
        sign = args.size[:1] if args.size[:1] in ("+", "-") else ""
        size = parse_size(args.size[len(sign) :].strip())
        size = before + size if sign == "+" else before - size if sign == "-" else size
        if size < 0:
            raise OptionError(
                f"the disk has {before} bytes, and cannot become {-size} bytes smaller than empty", path=image.filename
            )
        if size < program.current.smallest_disk:
            raise OptionError("the new size is 0", path=image.filename, hint="lamina resize makes empty disks")
        if size < before and not args.shrink:
            raise OptionError(
                f"the disk has {before} bytes: with {size} it would lose what lies behind them",
                path=image.filename,
                hint="add --shrink if nothing there is needed",
            )
        if size < before and args.preallocation != "off":
            raise OptionError("there is nothing to preallocate in a smaller disk", hint="omit --preallocation")
        image.truncate(size, preallocation=args.preallocation)
        image.flush()
    if not args.quiet:
        sys.stdout.write("Image resized.\n")
    return 0

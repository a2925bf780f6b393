"""`lamina resize`: change the size of a disk."""

from __future__ import annotations

import sys

from ..errors import OptionError
from ..operations.changing import change_size, size_after
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
        size = size_after(image.size, args.size, image.filename)
        if size < program.current.smallest_disk:
            raise OptionError("the new size is 0", path=image.filename, hint="lamina resize makes empty disks")
        change_size(image, size, shrink=args.shrink, preallocation=args.preallocation)
    if not args.quiet:
        sys.stdout.write("Image resized.\n")
    return 0

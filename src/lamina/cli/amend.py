"""`lamina amend`: change options of an image in place."""

from __future__ import annotations

from . import program
from .arguments import Parser, format_options, open_writable, print_schema
from .terminal import Meter

_EXAMPLES = """
  lamina amend -o compat=1.1,lazy_refcounts=on disk.qcow2
  lamina amend -o backing_file=base.qcow2,backing_fmt=qcow2 disk.qcow2
  lamina amend -f qcow2 -o help                     list the options
"""


def main(argv: list[str]) -> int:
    parser = Parser("amend", "Change options of an image in place. No byte of its disk changes.", _EXAMPLES)
    parser.add_argument(
        "-o", "--options", metavar="NAME=VALUE,...", action="append", help="the new options; -o help lists them"
    )
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: detected)")
    parser.add_progress()
    parser.add_argument("--force", action="store_true", help="erase the last key slot, too: the disk is lost")
    parser.add_cache("-t", "--cache", dest="cache", written=True)
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", nargs="?", help="the image")
    args = parser.parse(argv)

    options = format_options(args.options)
    if options is None:
        from ..format import lookup_format

        kind = lookup_format(args.format or "qcow2")
        if kind.amend_schema is None:
            raise kind.refusal("has no options that can be changed later")
        print_schema(kind.amend_schema, amend=True)
        return 0
    if args.filename is None:
        parser.error("the name of the image is missing")
    if not options:
        parser.error("no option is given: add -o NAME=VALUE")
    if args.force and isinstance(options.get("encrypt"), dict):
        options["encrypt"].setdefault("force", True)
    with (
        open_writable(args.filename, args, args.format) as image,
        Meter(args.filename, asked=args.progress, quiet=args.quiet) as meter,
    ):
        program.current.amending(image, options)
        image.amend(**options)
        image.flush()
        meter.report(1, 1)
    return 0

"""`lamina create`: creates a new image."""

from __future__ import annotations

import sys
from typing import Any

from ..creation import create, create_driver
from ..errors import OptionError, printable
from ..inspection import info
from ..options import parse_size
from . import program
from .arguments import Parser, format_options, print_schema

_EXAMPLES = """
  lamina create -f qcow2 disk.qcow2 20G
  lamina create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2      an overlay of the size of its base
  lamina create -f qcow2 -o cluster_size=2M,refcount_bits=8 disk.qcow2 1T
  lamina create -f qcow2 -o help                                   the options of -o
  lamina create disk.raw 1000                                      exactly 1000 bytes
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        "create",
        "Create a new image. The file gets its name when it is complete; an existing file is replaced.",
        _EXAMPLES,
    )
    parser.add_quiet()
    parser.add_format("-f", "--format", dest="format", help="format of the new image (default: raw)")
    parser.add_argument(
        "-b", "--backing", metavar="FILE", help="the backing file, relative to the directory of the new image"
    )
    parser.add_format(
        "-F", "--backing-format", dest="backing_format", help="format of the backing file; never detected"
    )
    parser.add_argument("-u", "--backing-unsafe", action="store_true", help="do not check the backing file")
    parser.add_argument(
        "-o", "--options", metavar="NAME=VALUE,...", action="append", help="options of the format; -o help lists them"
    )
    parser.add_limits()
    parser.add_objects()
    parser.add_argument("filename", metavar="FILE", nargs="?", help="the new image")
    parser.add_argument("size", metavar="SIZE", nargs="?", help="size in bytes, or with a suffix k, M, G, T, P or E")
    args = parser.parse(argv)

    format = args.format or "raw"
    kind = create_driver(format)
    options = format_options(args.options)
    if options is None:
        print_schema(kind.creation_schema())
        return 0
    if args.filename is None:
        parser.error("the name of the new image is missing")
    for key, value in (("backing_file", args.backing), ("backing_fmt", args.backing_format)):
        if value is not None:
            if key in options:
                raise OptionError(f"the option {key} is given twice, once in -o", hint="give it once")
            options[key] = value
    if args.backing_unsafe:
        options["backing_unchecked"] = True
    if args.size is not None:
        if "size" in options:
            raise OptionError("the size is given twice, once in -o", hint="give it once")
        options["size"] = parse_size(args.size)
    create(
        args.filename,
        format,
        budget=args.limits,
        **program.current.new_image(args.filename, format, options, quiet=args.quiet),
    )
    if not args.quiet:
        text = program.current.created(args.filename, format, options)
        sys.stdout.write(_summary(args.filename, format, options) if text is None else text)
    if options.get("backing_file"):
        from .backing import warn_where_refused

        warn_where_refused(args.filename, options["backing_file"])
    return 0


def _summary(filename: str, format: str, options: dict[str, Any]) -> str:
    """One line with the properties of the new image, read from the file."""
    made = info(filename, format=format)
    words = [f"fmt={format}", f"size={made.virtual_size}"]
    if made.cluster_size is not None:
        words.append(f"cluster_size={made.cluster_size}")
    shown = {key: value for key, value in options.items() if key not in ("size", "cluster_size", "backing_unchecked")}
    words += [f"{key}={printable(str(value))}" for key, value in shown.items()]
    return f"Formatting '{printable(filename)}', {' '.join(words)}\n"

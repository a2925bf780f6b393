"""`lamina measure`: the length of the file of a new image, before it is made."""

from __future__ import annotations

import sys

from ..creation import create_driver
from ..operations.describing import measured
from . import program
from .arguments import Parser, format_options, print_schema
from .source_snapshot import open_source

_EXAMPLES = """
  lamina measure -O qcow2 --size 100G
  lamina measure -O qcow2 -o cluster_size=2M disk.raw     of a copy of that disk
  lamina measure --output=json -O qcow2 disk.qcow2
"""


#: In messages, and the place to which the names of other files are relative: the current folder.
_NEW = "the new image"


def main(argv: list[str]) -> int:
    parser = Parser(
        "measure", "Say how long the file of a new image would be, empty or with the data of a disk.", _EXAMPLES
    )
    parser.add_format("-f", "--format", dest="format", help="format of the source (default: detected)")
    parser.add_format("-O", "--target-format", dest="target_format", help="format of the new image (default: raw)")
    parser.add_argument(
        "-o", "--target-options", metavar="NAME=VALUE,...", action="append",
        help="options of the new image; -o help lists them",
    )  # fmt: skip
    parser.add_size("--size", metavar="SIZE", help="the size of an empty disk, in place of a source")
    parser.add_argument("-l", "--source-snapshot", metavar="SNAPSHOT", help="an internal snapshot of the source")
    parser.add_output()
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", nargs="?", help="the source")
    args = parser.parse(argv)

    kind = create_driver(args.target_format or "raw")
    options = format_options(args.target_options)
    if options is None:
        print_schema(kind.creation_schema())
        return 0
    if (args.size is None) == (args.filename is None):
        parser.error("either a source or --size is needed")
    if args.filename is None and (args.image_opts or args.format is not None or args.source_snapshot is not None):
        parser.error("-f, -l and --image-opts describe a source, and --size stands for one: omit them")
    values = kind.creation_schema().parse(options)
    kind.prepare_create(values, _NEW, args.limits)
    if args.filename is None:
        found = kind.measure(args.size, values)
    else:
        with open_source(args.filename, args) as image:
            found = measured(image, kind, values)
    text = program.current.measured(found, json=args.output == "json")
    if text is not None:
        sys.stdout.write(text)
    elif args.output == "json":
        import json

        sys.stdout.write(json.dumps(found.to_json(), indent=4) + "\n")
    else:
        sys.stdout.write(f"required size: {found.required}\nfully allocated size: {found.fully_allocated}\n")
        if found.bitmaps is not None:
            sys.stdout.write(f"bitmaps size: {found.bitmaps}\n")
    return 0

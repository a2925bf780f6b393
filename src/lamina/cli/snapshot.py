"""`lamina snapshot`: list, create, apply and delete the internal snapshots of an image."""

from __future__ import annotations

import sys

from ..operations.sources import find_snapshot
from . import program
from .arguments import Parser, open_image, open_writable

_EXAMPLES = """
  lamina snapshot disk.qcow2                        list them
  lamina snapshot -c before-upgrade disk.qcow2      keep the disk of now under that name
  lamina snapshot -a before-upgrade disk.qcow2      go back to it
  lamina snapshot -d snapshot.id=3 disk.qcow2       delete that one
"""


def main(argv: list[str]) -> int:
    parser = Parser("snapshot", "List, create, apply or delete the internal snapshots of an image.", _EXAMPLES)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-l", "--list", action="store_true", help="list the snapshots (the default)")
    what.add_argument("-c", "--create", metavar="NAME", help="keep the disk of now under NAME")
    what.add_argument(
        "-a", "--apply", metavar="SNAPSHOT", help="make the disk what it was then; what it is now is lost"
    )
    what.add_argument("-d", "--delete", metavar="SNAPSHOT", help="delete a snapshot")
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: detected)")
    parser.add_quiet()
    parser.add_output()
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image")
    args = parser.parse(argv)

    if args.create is None and args.apply is None and args.delete is None:
        with open_image(args.filename, args, args.format) as image:
            found = program.current.snapshots(image, asked=args.list)
        if args.output == "json":
            import json

            sys.stdout.write(json.dumps([one.to_json() for one in found], indent=4) + "\n")
        elif found:
            from .info import snapshot_table

            sys.stdout.write("".join(f"{line}\n" for line in ["Snapshot list:", *snapshot_table(found)]))
        return 0
    with open_writable(args.filename, args, args.format) as image:
        if args.create is not None:
            image.create_snapshot(args.create)
        elif args.apply is not None:
            image.apply_snapshot(find_snapshot(image.snapshots(), args.apply, image.filename).id)
        else:
            image.delete_snapshot(find_snapshot(image.snapshots(), args.delete, image.filename, certain=True).id)
        image.flush()
    return 0

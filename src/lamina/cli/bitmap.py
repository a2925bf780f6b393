"""`lamina bitmap`: add, remove, clear, enable, disable and merge the persistent dirty bitmaps of an image."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any

from ..errors import OptionError
from ..options import shown
from .arguments import Parser, open_image, open_writable

_EXAMPLES = """
  lamina bitmap --add disk.qcow2 daily                            record writes from now on
  lamina bitmap --add -g 4k --merge daily disk.qcow2 weekly       a new one, which knows what daily has recorded
  lamina bitmap --merge daily -b other.qcow2 -F qcow2 disk.qcow2 daily
  lamina bitmap --clear disk.qcow2 daily

`lamina info` lists the bitmaps of an image; `lamina serve -B NAME` offers one to backup programs.
"""


class _InOrder(argparse.Action):
    """Appends the name of the option and its value to a list that several options share."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = vars(namespace).get(self.dest) or ()
        vars(namespace)[self.dest] = [*before, (self.const, values)]


def main(argv: list[str]) -> int:
    parser = Parser(
        "bitmap", "Change a persistent dirty bitmap of an image. Actions are done as they are given.", _EXAMPLES
    )
    actions = parser.add_argument_group("actions")
    for name, help in (
        ("add", "add the bitmap, which records writes"),
        ("remove", "remove it"),
        ("clear", "forget the writes that it has recorded"),
        ("enable", "record writes from now on"),
        ("disable", "record no more writes"),
    ):
        actions.add_argument(f"--{name}", dest="actions", action=_InOrder, const=name, nargs=0, help=help)
    actions.add_argument(
        "--merge", dest="actions", action=_InOrder, const="merge", metavar="SOURCE",
        help="add what the bitmap SOURCE has recorded",
    )  # fmt: skip
    parser.add_size("-g", "--granularity", metavar="SIZE", help="with --add: bytes for each bit (default: 64k)")
    parser.add_argument("-b", "--source-file", metavar="FILE", help="with --merge: the image that has SOURCE")
    parser.add_format("-F", "--source-format", dest="source_format", help="format of that image (default: detected)")
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: detected)")
    parser.add_quiet()
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image")
    parser.add_argument("bitmap", metavar="BITMAP", help="the name of the bitmap")
    args = parser.parse(argv)

    chosen = [name for name, _ in args.actions or ()]
    if not chosen:
        parser.error("no action is given: --add, --remove, --clear, --enable, --disable or --merge")
    if args.granularity is not None and "add" not in chosen:
        parser.error("a granularity (-g) requires --add")
    if args.source_file is not None and "merge" not in chosen:
        parser.error("a source file (-b) requires --merge")
    if args.source_format is not None and args.source_file is None:
        parser.error("the format of a source file (-F) requires -b")
    with ExitStack() as stack:
        image = stack.enter_context(open_writable(args.filename, args, args.format))
        source = image
        if args.source_file is not None:
            source = stack.enter_context(open_image(args.source_file, args, args.source_format, image_opts=False))
        for action, name in args.actions:
            if action == "add":
                image.add_bitmap(args.bitmap, args.granularity or 65536)
            elif action == "merge":
                if name not in source.bitmaps:
                    raise OptionError(
                        f"there is no bitmap {shown(name)} to merge",
                        path=source.filename,
                        hint="lamina info lists them",
                    )
                image.merge_bitmaps(args.bitmap, [source.bitmaps[name]])
            elif action == "remove":
                image.remove_bitmap(args.bitmap)
            elif action == "clear":
                image.clear_bitmap(args.bitmap)
            else:
                image.enable_bitmap(args.bitmap, action == "enable")
        image.flush()
    return 0

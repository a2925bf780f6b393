"""`lamina view`: one image, or two with their differences, as one HTML page."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..jobs.progress import Monitor
from .arguments import Parser, open_image
from .terminal import Meter

if TYPE_CHECKING:
    from ..image import Image

_EXAMPLES = """
  lamina view -o report.html disk.qcow2
  lamina view -o report.html -f qcow2 overlay.qcow2       with the images below
  lamina view -o report.html before.qcow2 after.qcow2     side by side
  lamina view -o report.html -l monday disk.qcow2         a snapshot and now
  lamina view -o report.html --allocation a.raw b.raw

The page is one file that needs no network: open it in any browser. It shows the
status of every byte of the disk, what every part of each file is, and the chain.
"""


def main(argv: list[str]) -> int:
    parser = Parser("view", "Show an image, or two side by side, as one HTML page that needs no network.", _EXAMPLES)
    parser.add_format("-f", "--format", dest="format", help="format of the first image (default: detected)")
    parser.add_format("-F", "--b-format", dest="other_format", help="format of the second image")
    parser.add_argument(
        "-o", "--output", metavar="PAGE", required=True, help="the HTML file to write (-: standard output)"
    )
    parser.add_argument(
        "-l", "--snapshot", dest="snapshots", metavar="SNAPSHOT", action="append", default=[],
        help="an internal snapshot of one image, in place of the first image; given twice, of both",
    )  # fmt: skip
    parser.add_size(
        "-g",
        "--granularity",
        metavar="SIZE",
        default=4096,
        help="the blocks in which two images are compared (default: 4k)",
    )
    parser.add_argument(
        "--allocation", action="store_true", help="read nothing: blocks whose equality is not known count as different"
    )
    parser.add_progress()
    parser.add_access()
    parser.add_argument("names", metavar="FILE", nargs="+", help="the image, or two")
    args = parser.parse(argv)
    if len(args.names) + len(args.snapshots) > 2 or (args.snapshots and len(args.names) > 1):
        parser.error("one image is needed, or two, or one with -l SNAPSHOT (once or twice)")

    from ..viewer.report import report, require_target

    with ExitStack() as stack:
        images = _open(args, stack)
        target = None if args.output == "-" else args.output
        if target is not None:
            require_target(target, images)
        meter = stack.enter_context(Meter(args.output, asked=args.progress, quiet=args.quiet))
        text = report(
            images,
            output=target,
            granularity=args.granularity,
            content=not args.allocation,
            monitor=Monitor(meter.report),
        )
    if target is None:
        sys.stdout.buffer.write(text.encode("utf-8"))
    return 0


def _open(args: Namespace, stack: ExitStack) -> tuple[Image, ...]:
    from ..api import open
    from ..descriptors import opening
    from .source_snapshot import snapshot_options

    found: list[Image] = []
    for wanted in args.snapshots:
        options, references = snapshot_options(args.names[0], args, args.format, wanted)
        how: dict[str, Any] = {"references": references, "budget": args.limits, "force_share": args.force_share}
        found.append(stack.enter_context(opening(open, options, **how)))
    formats = (args.format, args.other_format) if len(args.names) == 2 else (args.format,)
    for name, format in zip(args.names, formats, strict=True):
        if len(found) < 2:
            found.append(stack.enter_context(opening(open_image, name, args, format)))
    return tuple(found)

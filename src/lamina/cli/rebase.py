"""`lamina rebase`: give an overlay another backing file, or none."""

from __future__ import annotations

from argparse import Namespace
from contextlib import suppress
from typing import TYPE_CHECKING

from .. import registry
from ..errors import OptionError, UnsupportedFeature
from .arguments import Parser, image_source, open_writable
from .terminal import Meter

if TYPE_CHECKING:
    from ..image import Image

_EXAMPLES = """
  lamina rebase -f qcow2 -b new-base.qcow2 -F qcow2 overlay.qcow2
  lamina rebase -f qcow2 -b "" overlay.qcow2                       no backing file any more
  lamina rebase -c -f qcow2 -b "" overlay.qcow2                    the same, and compress what it takes over
  lamina rebase -u -b moved.qcow2 -F qcow2 overlay.qcow2           change the name only
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        "rebase",
        "Give an overlay another backing file, or none. The overlay reads the same: it takes over what differs.",
        _EXAMPLES,
    )
    parser.add_format("-f", "--format", dest="format", help="format of the overlay (default: detected)")
    parser.add_argument(
        "-b", "--backing", metavar="FILE",
        help='the new backing file, relative to the directory of the overlay; "": none',
    )  # fmt: skip
    parser.add_format(
        "-F", "--backing-format", dest="backing_format", help="format of the new backing file; never detected"
    )
    parser.add_argument(
        "-u", "--backing-unsafe", action="store_true",
        help="change only the name in the image; the overlay reads as before only if the new file has the same content",
    )  # fmt: skip
    parser.add_argument("-c", "--compress", action="store_true", help="compress what the overlay takes over")
    parser.add_cache("-t", "--cache", dest="cache", written=False)
    parser.add_cache("-T", "--backing-cache", dest="backing_cache", written=False)
    parser.add_max_output()
    parser.add_progress()
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the overlay")
    args = parser.parse(argv)

    if args.backing is None and not args.backing_unsafe:
        parser.error('the new backing file is missing (-b FILE, or -b "" for none)')
    if args.backing and args.backing_format is None:
        raise OptionError("the format of the backing file is not given", path=args.backing, hint="give it (-F)")
    if args.backing_unsafe:
        if args.backing_format is not None:
            with suppress(UnsupportedFeature):  # other programs may open it
                registry.entry(args.backing_format, "format")
        with _open_alone(args) as image:
            image.amend(backing_file=args.backing or "", backing_fmt=args.backing_format)
            image.flush()
    else:
        from ..jobs.progress import Monitor
        from ..jobs.rebase import rebase

        with (
            open_writable(args.filename, args, args.format) as image,
            Meter(args.filename, asked=args.progress, quiet=args.quiet) as meter,
        ):
            rebase(
                image,
                args.backing or None,
                args.backing_format if args.backing else None,
                references=args.references,
                compress=args.compress,
                max_output=args.max_output,
                monitor=Monitor(meter.report),
            )
    if args.backing:
        from .backing import warn_where_refused

        warn_where_refused(args.filename, args.backing)
    return 0


def _open_alone(args: Namespace) -> Image:
    """The overlay without its backing file, which may be missing."""
    from ..operations.changing import open_without_backing

    if args.force_share:
        raise OptionError("-U opens images that others write to, and this command changes the image", hint="omit -U")
    source = image_source(args.filename, args, args.format)
    return open_without_backing(source, args.format or "probe", references=args.references, budget=args.limits)

"""`lamina map`: shows the status and location of the bytes of an image."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from ..descriptors import opening
from ..errors import OptionError, UnsupportedFeature, printable
from ..extents import Extents
from ..jobs.windows import windows
from ..limits import align_down, align_up
from . import program
from .arguments import Parser, open_image
from .map_json import write as write_json

if TYPE_CHECKING:
    from ..image import Image

_EXAMPLES = """
  lamina map disk.qcow2
  lamina map --output=json disk.qcow2
  lamina map --output=json -s 1G -l 1M disk.qcow2        one MiB at offset 1 GiB
  lamina map --plot disk.qcow2                           a picture of the disk
  lamina map --exact --image-opts driver=blkdebug,align=4k,image.driver=qcow2,image.file.filename=disk.qcow2
  lamina map --context base:allocation --context qemu:dirty-bitmap:b0 nbd://server/disk
  lamina map --context base:allocation --totals nbd://server/disk

Extents are rounded to the request alignment of the node: a block is data if any part of it is data, and zero if all of it is
zero. --exact shows them without rounding.
"""


def main(argv: list[str]) -> int:
    parser = Parser("map", "Show the status and location of the bytes of an image.", _EXAMPLES)
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: detected)")
    parser.add_output()
    parser.add_argument(
        "--exact", action="store_true", help="exact boundaries, not rounded to the alignment of the node"
    )
    parser.add_argument(
        "--plot",
        action="store_true",
        help="draw the disk as rows of cells: what they contain and, in a chain, which layer owns them",
    )
    parser.add_size("-s", "--start-offset", metavar="OFFSET", default=0, help="the first offset in bytes (default: 0)")
    parser.add_size("-l", "--max-length", metavar="LENGTH", help="the number of bytes (default: up to the end)")
    parser.add_argument(
        "--context",
        metavar="CTX",
        action="append",
        help="show the extents of this metadata context of an NBD export (lamina info lists the contexts; all: every one); "
        "may be repeated. Without it an export is mapped like any image",
    )
    parser.add_argument("--totals", action="store_true", help="with --context: the number of bytes of each status")
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image")
    args = parser.parse(argv)
    if args.plot and args.output == "json":
        raise OptionError(
            "--plot is a picture for people, and has no JSON form", hint="omit one of --plot and --output"
        )
    if args.context:
        return _show_contexts(args)
    if args.totals:
        raise OptionError("--totals needs a metadata context of an NBD export", hint="add --context base:allocation")
    with opening(open_image, args.filename, args, args.format) as image:
        sys.stdout.flush()
        if args.plot:
            from .map_plot import show

            show(image, _pieces(image, args), *_range(image, args))
            return 0
        pieces = _joined(_pieces(image, args))
        if args.output == "json":
            write_json(
                pieces,
                sys.stdout.buffer,
                compression=program.current.maps_compression,
                nothing=program.current.map_of_nothing(args.start_offset),
            )
        else:
            _write_table(pieces, sys.stdout.buffer)
    return 0


def _show_contexts(args: Namespace) -> int:
    from .map_nbd import show

    if args.plot:
        raise OptionError("--plot draws the status of an image, not metadata contexts", hint="omit --context")
    if args.format is not None or args.image_opts or args.exact:
        raise OptionError(
            "--context applies to the export itself, not to an image format inside it",
            hint="omit -f, --image-opts and --exact; a Lamina server has the exact extents in --context lamina:exact",
        )
    show(
        args.filename,
        args.context,
        begin=args.start_offset,
        length=args.max_length,
        totals=args.totals,
        json=args.output == "json",
        timeout=args.timeout,
    )
    return 0


def _range(image: Image, args: Namespace) -> tuple[int, int, int]:
    """The begin and end of the requested range, and the size of the blocks to which its extents are rounded. The range covers
    all blocks that overlap the one that the user gave. OptionError if it begins past the end of the image."""
    begin, size = args.start_offset, image.size
    if begin > size:
        raise OptionError(f"the start offset {begin} is past the end of the image at {size}", path=image.filename)
    end = size if args.max_length is None else min(begin + args.max_length, size)
    block = 1 if args.exact else image.alignment
    if begin < end:
        begin, end = align_down(begin, block), min(align_up(end, block), size)
    return begin, end, block


def _pieces(image: Image, args: Namespace) -> Iterator[Extents]:
    """The requested extents, in windows; rounded, unless they are to be exact."""
    if args.start_offset > image.size and program.current.map_of_nothing(args.start_offset):
        return
    begin, end, block = _range(image, args)
    if args.exact:
        yield from windows(image, begin, end)
        return
    for piece in windows(image, begin, end, grid=block):
        yield program.current.mapped(image, piece.align(block))


def _joined(pieces: Iterator[Extents]) -> Iterator[Extents]:
    """The pieces with adjacent equal extents joined, also across pieces."""
    held: Extents | None = None
    for piece in pieces:
        whole = (piece if held is None else Extents.concat([held, piece])).coalesce()
        if len(whole):
            last = int(whole.start[-1])
            if last > whole.begin:
                yield whole.clip(whole.begin, last)
            held = whole.clip(last, whole.end)
    if held is not None:
        yield held


def _write_table(pieces: Iterator[Extents], out: BinaryIO) -> None:
    out.write(b"%-16s%-16s%-16s%s\n" % (b"Offset", b"Length", b"Mapped to", b"File"))
    for piece in pieces:
        for extent in piece.where(data=True, zero=False):
            if extent.file is None or extent.offset is None:
                if program.current.maps_only_files:
                    raise UnsupportedFeature("some of its bytes are encoded, or in no file", hint="use --output=json")
                where, file = "compressed" if extent.compressed else "-", ""
            else:
                where, file = _hex(extent.offset), printable(extent.file.filename)
            out.write(
                f"{_hex(extent.start):<15} {_hex(extent.length):<15} {where:<15} {file}".rstrip().encode() + b"\n"
            )


def _hex(number: int) -> str:
    return hex(number) if number else "0"

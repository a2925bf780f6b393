"""`lamina dd`: copy a range of the blocks of a disk to a new image, with the operands of `qemu-img dd`."""

from __future__ import annotations

from ..errors import OptionError
from ..jobs.convert import convert_to_file
from ..jobs.progress import Monitor
from ..limits import MAX_SIZE
from ..options import parse_size, shown
from . import program
from .arguments import Parser, open_image
from .streams import print_error
from .terminal import Meter

_EXAMPLES = """
  lamina dd -O qcow2 if=disk.raw of=disk.qcow2
  lamina dd -f raw bs=1M count=16 if=disk.raw of=first.raw     the first 16 MiB
  lamina dd bs=1M skip=1 count=3 if=disk.qcow2 of=part.raw     2 MiB

operands:
  if=FILE     the source
  of=FILE     the new image; it gets its name when it is complete
  bs=SIZE     the bytes of a block (default: 512)
  count=N     the copy ends at block N of the source (default: its end)
  skip=N      blocks at the start of the source that are not copied (default: 0)

As in qemu-img, and unlike in dd(1), the blocks of skip are part of those of
count. Zeros are not written.
"""

#: The largest block; the copy does not depend on it, and QEMU has the same bound.
_LARGEST_BLOCK = (1 << 31) - 1


def main(argv: list[str]) -> int:
    parser = Parser("dd", "Copy blocks of a disk to a new image, in any format.", _EXAMPLES)
    parser.add_format("-f", "--format", dest="format", help="format of the source (default: detected)")
    parser.add_format("-O", "--output-format", dest="target_format", help="format of the new image (default: raw)")
    parser.add_max_output()
    parser.add_access()
    parser.add_argument("operands", metavar="NAME=VALUE", nargs="*", help="what to copy, see below")
    args = parser.parse(argv)

    operands: dict[str, str] = {}
    for word in args.operands:
        name, _, value = word.partition("=")
        if name not in ("if", "of", "bs", "count", "skip"):
            parser.error(f"unknown operand {shown(word)}; the operands are if=, of=, bs=, count= and skip=")
        operands[name] = value
    block = _number(operands, "bs", 512)
    if not 1 <= block <= _LARGEST_BLOCK:
        raise OptionError(f"bs={block} is out of range", hint=f"a block has 1 to {_LARGEST_BLOCK} bytes")
    skipped = _number(operands, "skip", 0)
    counted = _number(operands, "count", MAX_SIZE)
    if not operands.keys() >= {"if", "of"}:
        parser.error("the source and the new image are needed: if=FILE of=FILE")
    target = operands["of"]
    with open_image(operands["if"], args, args.format) as source, Meter(target, asked=False) as meter:
        end = min(counted * block, source.size)
        start = min(skipped * block, end)
        if skipped * block > end:
            print_error(
                f"warning: skip={skipped} is past the end of what count and the source leave: nothing is copied"
            )
        with source.edit() as edit:
            edit.insert("offset", {"offset": start, "size": end - start})
        convert_to_file(
            source,
            target,
            args.target_format or "raw",
            {"size": program.current.disk_size(end - start)},
            references=args.references,
            max_output=args.max_output,
            monitor=Monitor(meter.report),
        )
    return 0


def _number(operands: dict[str, str], name: str, default: int) -> int:
    if name not in operands:
        return default
    try:
        return parse_size(operands[name])
    except OptionError as error:
        error.message = f"{name}=: {error.message}"
        raise

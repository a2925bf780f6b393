"""`lamina explain`: what the bytes of an image file are, which bytes of the guest they serve, and the way back."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from ..errors import OptionError, printable
from ..explanation import Explanation, Overview, Part, Step
from ..inspection import explain, explain_guest, structures
from ..options import parse_size
from .arguments import Parser, image_source

_EXAMPLES = """
  lamina explain disk.qcow2                        the header, and where the structures are
  lamina explain disk.qcow2 0x50000 104            what these bytes of the file are
  lamina explain --guest 1G disk.qcow2             where this byte of the disk is
  lamina explain --output=json -f qcow2 disk.qcow2 64k
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        "explain", "Explain bytes of an image file, or find a byte of its disk. Nothing is changed.", _EXAMPLES
    )
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: detected)")
    parser.add_size(
        "--guest",
        metavar="OFFSET",
        action="append",
        help="find this byte of the disk: the table entries that lead to it, through the images below; may be repeated",
    )
    parser.add_output()
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image")
    parser.add_argument(
        "offsets", metavar="OFFSET", nargs="*", type=parse_size, help="offsets in the file; none: an overview of it"
    )
    args = parser.parse(argv)
    if args.guest and args.offsets:
        raise OptionError("offsets in the file and --guest exclude each other", hint="give one of them")
    source = image_source(args.filename, args, args.format)
    given: dict[str, Any] = {"format": args.format or "probe", "budget": args.limits, "force_share": args.force_share}
    if args.guest:
        chains = [explain_guest(source, offset, references=args.references, **given) for offset in args.guest]
        found = [
            {"guest-offset": offset, "layers": [step.to_json() for step in steps]}
            for offset, steps in zip(args.guest, chains, strict=True)
        ]
        _print(args, found, (line for steps in chains for line in _steps(steps)))
    elif args.offsets:
        explained = explain(source, *args.offsets, **given)
        _print(args, [one.to_json() for one in explained], (line for one in explained for line in _explanation(one)))
    else:
        seen = structures(source, **given)
        _print(args, seen.to_json(), _overview(seen))
    return 0


def _print(args: Namespace, found: Any, lines: Iterator[str]) -> None:
    if args.output == "json":
        import json

        sys.stdout.write(json.dumps(found, indent=4) + "\n")
    else:
        sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))


def _explanation(found: Explanation) -> Iterator[str]:
    line = f"offset {found.offset} ({found.offset:#x})"
    if found.cluster is not None:
        line += f", cluster {found.cluster}, refcount {'unknown' if found.refcount is None else found.refcount}"
    yield line
    if len(found.parts) > 1:
        yield f"  {len(found.parts)} structures overlap here: the image is damaged"
    for part in found.parts:
        yield from _part(part)
    yield from (f"  note: {problem}" for problem in found.problems)


def _part(part: Part) -> Iterator[str]:
    names = [part.structure, *(name for name in (part.owner, part.field) if name)]
    yield f"  {', '.join(names)}: {part.length} bytes at {part.offset} ({part.offset:#x})"
    if isinstance(part.value, int):
        yield f"    value {part.value:#x}"
    if part.text:
        yield f"    {part.text}"
    for one in part.guest:
        where = f"snapshot {one.snapshot}, " if one.snapshot is not None else ""
        exact = f", this byte at {one.exact} ({one.exact:#x})" if one.exact is not None else ""
        yield f"    guest {where}{one.length} bytes at {one.offset} ({one.offset:#x}){exact}: {one.status}"
    if part.more:
        yield f"    and {part.more} more guest ranges"


def _steps(steps: tuple[Step, ...]) -> Iterator[str]:
    yield f"guest offset {steps[0].offset} ({steps[0].offset:#x})"
    for step in steps:
        yield f"  layer {step.depth}: {step.filename} ({step.format}): {step.status}, as the next {step.length} bytes"
        for part in step.parts:
            names = ", ".join(name for name in (part.structure, part.field) if name)
            value = f" = {part.value:#x}" if isinstance(part.value, int) else ""
            yield f"    {names} at {part.offset:#x}{value}: {part.text}"
        if step.host is not None:
            yield f"    at offset {step.host} ({step.host:#x}) of {step.file}"
        if step.stored is not None:
            offset, length = step.stored
            yield f"    compressed: up to {length} bytes at {offset} ({offset:#x})"
        yield from (f"    note: {problem}" for problem in step.problems)
    if steps[-1].below:
        yield "  no layer below: it reads as zero"


def _overview(found: Overview) -> Iterator[str]:
    if found.header:
        yield "header:"
        yield from (f"  {part.offset:>6}  {part.field}: {part.text}" for part in found.header)
    yield "structures:"
    for part in found.regions:
        owner = f" of {part.owner}" if part.owner else ""
        yield f"  {part.offset:#14x}  {part.length:>10} bytes  {part.structure}{owner}"
    yield from (f"note: {problem}" for problem in found.problems)

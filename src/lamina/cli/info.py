"""`lamina info`: describe an image. Only its own file is opened, unless --backing-chain is given."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import OptionError, printable
from ..inspection import info, info_chain
from ..options import format_size
from ..results import ImageInfo, Snapshot
from . import program
from .arguments import Parser, image_source, warn_of_writers
from .nbd_names import names_export

_EXAMPLES = """
  lamina info disk.qcow2
  lamina info --output=json -f qcow2 disk.qcow2
  lamina info --backing-chain overlay.qcow2
  lamina info -U disk.qcow2                      while a virtual machine runs on it
  lamina info nbd://server/disk                  an export of an NBD server
  lamina info --list nbd://server                all exports of the server
  lamina info -f qcow2 nbd://server/disk         the image inside that export
"""


def main(argv: list[str]) -> int:
    parser = Parser("info", "Show the format and properties of an image. Opens only the image file.", _EXAMPLES)
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: detected)")
    parser.add_output()
    parser.add_argument(
        "-b", "--backing-chain", action="store_true", help="also show the images below, as --references grants them"
    )
    parser.add_argument("-L", "--list", action="store_true", help="show all exports of the NBD server that FILE names")
    parser.add_argument(
        "--content",
        action="store_const",
        const=True,
        help="detect the content of NBD exports by their first and last bytes (default: of one export, not of a list)",
    )
    parser.add_argument("--no-content", dest="content", action="store_const", const=False, help="disable --content")
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image, or, without a format, an NBD export")
    args = parser.parse(argv)
    if args.list or (names_export(args.filename) and args.format is None and not args.image_opts):
        return _show_exports(args)

    source = image_source(args.filename, args, args.format)
    given: dict[str, Any] = {"format": args.format or "probe", "budget": args.limits, "force_share": args.force_share}
    if args.backing_chain:
        found = info_chain(source, references=args.references, **given)
        for one in found:
            warn_of_writers(one.other_writers)
    else:
        found = (info(source, **given),)
    text = program.current.described(found, json=args.output == "json", chain=args.backing_chain)
    if text is not None:
        sys.stdout.write(text)
    elif args.output == "json":
        import json

        records = [one.to_json() for one in found]
        sys.stdout.write(json.dumps(records if args.backing_chain else records[0], indent=4) + "\n")
    else:
        sys.stdout.write("\n".join(_human(one) for one in found))
    return 0


def _show_exports(args: Namespace) -> int:
    if args.backing_chain or args.format is not None or args.image_opts:
        raise OptionError(
            "-f, --image-opts and --backing-chain concern an image, and --list an NBD server",
            hint="give the format of the image (-f) for its chain; give --list an NBD address alone",
        )
    from .info_nbd import show

    content = not args.list if args.content is None else args.content
    return show(args.filename, every=args.list, content=content, json=args.output == "json", timeout=args.timeout)


def _human(found: ImageInfo) -> str:
    probed = " (probed)" if found.format_probed else ""
    lines = [f"image: {printable(found.filename)}", f"file format: {printable(found.format)}{probed}"]
    if found.virtual_size is not None:
        lines.append(f"virtual size: {format_size(found.virtual_size)} ({found.virtual_size} bytes)")
    lines.append(f"disk size: {'unavailable' if found.actual_size is None else format_size(found.actual_size)}")
    if found.encrypted:
        lines.append("encrypted: yes")
    if found.cluster_size is not None:
        lines.append(f"cluster_size: {found.cluster_size}")
    if found.dirty:
        lines.append("cleanly shut down: no")
    if found.backing_filename is not None:
        name, full = found.backing_filename, found.full_backing_filename or ""
        actual = f" (actual path: {printable(full)})" if full != name else ""
        lines.append(f"backing file: {printable(name)}{actual}")
    if found.backing_format is not None:
        lines.append(f"backing file format: {printable(found.backing_format)}")
    if found.snapshots:
        lines.append("Snapshot list:")
        lines += snapshot_table(found.snapshots)
    data = (found.format_specific or {}).get("data")
    if data:
        lines.append("Format specific information:")
        lines += nested(data, 1)
    lines += (f"not supported here: {printable(feature)}" for feature in found.unsupported)
    return "".join(f"{line}\n" for line in lines)


def snapshot_table(found: Sequence[Snapshot]) -> Iterator[str]:
    """The lines of a table of snapshots."""
    import time

    layout = program.current.snapshot_columns
    yield layout.format(*program.current.snapshot_titles)
    for one in found:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.date))
        seconds, nanoseconds = divmod(one.vm_clock, 1_000_000_000)
        hours = f"{seconds // 3600:0{program.current.hour_digits}}"
        clock = f"{hours}:{seconds // 60 % 60:02}:{seconds % 60:02}.{nanoseconds // 1_000_000:03}"
        icount = "--" if one.icount is None else one.icount
        size = format_size(one.vm_state)
        yield layout.format(printable(one.id), printable(one.name), size, date, clock, str(icount))


def nested(value: Any, level: int) -> Iterator[str]:
    """Nested values, one in each line, indented."""
    rows = value.items() if isinstance(value, dict) else ((f"[{number}]", item) for number, item in enumerate(value))
    for key, item in rows:
        label = f"{'    ' * level}{str(key).replace('-', ' ')}:"
        if isinstance(item, dict | list):
            yield label
            yield from nested(item, level + 1)
        else:
            yield f"{label} {str(item).lower() if isinstance(item, bool) else printable(str(item))}"

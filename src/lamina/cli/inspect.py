"""`lamina inspect`: the verdict on an untrusted file.

Exit status: 0 safe, 1 not safe, 2 for an error: then there is no verdict.
"""

from __future__ import annotations

import sys

from ..errors import printable
from ..options import format_size
from ..verdict.examine import STANDARD_INPUT, inspect
from ..verdict.result import Verdict
from .arguments import Parser

_EXAMPLES = """
  lamina inspect upload.img
  lamina inspect -f qcow2 --max-size 100G --output=json upload.img
  curl -s https://server/disk.qcow2 | lamina inspect -

exit status: 0 safe, 1 not safe, 2 no verdict because of an error
"""

FAILURE, NOT_SAFE = 2, 1


def main(argv: list[str]) -> int:
    parser = Parser(
        "inspect", "Say whether an untrusted file can be handed on as a disk image. Opens only that file.", _EXAMPLES
    )
    parser.add_format("-f", "--format", dest="format", help="the declared format: another one is not safe")
    parser.add_output()
    parser.add_size("--max-size", metavar="SIZE", help="the largest size of the disk that is safe (default: any)")
    parser.add_limits()
    parser.add_argument("filename", metavar="FILE", help="the file; - is standard input, which is read to its end")
    args = parser.parse(argv)

    source: str | int = sys.stdin.fileno() if args.filename == STANDARD_INPUT else args.filename
    found = inspect(source, format=args.format, budget=args.limits, max_size=args.max_size)
    if args.output == "json":
        import json

        sys.stdout.write(json.dumps(found.to_json(), indent=4) + "\n")
    else:
        sys.stdout.write("".join(f"{printable(line)}\n" for line in _human(args.filename, found)))
    return 0 if found.safe else NOT_SAFE


def _human(name: str, found: Verdict) -> list[str]:
    size = found.virtual_size
    rows = [
        ("format", found.format),
        ("matches", ", ".join(found.matches)),
        ("virtual size", "" if size is None else f"{format_size(size)} ({size} bytes)"),
        ("features", ", ".join(found.features)),
        *(("names", f"{one.role} {one.name!r}") for one in found.references),
        *(("exceeds", limit) for limit in found.limits_hit),
        *(("not safe", f"{reason}") for reason in found.reasons if reason not in found.limits_hit),
    ]
    width = max(len(key) for key, _ in rows) + 1
    lines = [f"  {key + ':':<{width}} {value}" for key, value in rows if value]
    return [f"{name}: {'safe' if found.safe else 'not safe'}", *lines]

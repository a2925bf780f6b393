"""`lamina bench`: measure requests to an image."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import OptionError
from ..job_results import BenchResult
from ..jobs.bench import MOST, Load, bench
from ..jobs.progress import Monitor
from ..options import format_size, parse_size, shown
from . import program
from .arguments import Parser, image_source, tell_of_writers
from .io.target import AIO_MODES, CACHE_MODES, Target, choose
from .terminal import Meter

_EXAMPLES = """
  lamina bench -f qcow2 disk.qcow2
  lamina bench -c 1000 -d 1 -s 1M -t none disk.qcow2     past the page cache
  lamina bench -w --pattern 170 -f raw scratch.raw       overwrites the disk
  lamina bench --output json nbd://server/disk
"""

_LARGEST = (1 << 31) - 1


def main(argv: list[str]) -> int:
    parser = Parser("bench", "Measure reads or writes of an image: their rate, and how long each takes.", _EXAMPLES)
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: detected)")
    requests = parser.add_argument_group("requests")
    for flags, what, default, least, most in (
        (("-c", "--count"), "the number of requests", 75000, 1, _LARGEST),
        (("-d", "--depth"), "the most requests in flight", 64, 1, MOST),
        (("-s", "--buffer-size"), "the bytes of each request", 4096, 1, _LARGEST),
        (("-S", "--step-size"), "the bytes from the start of one request to that of the next", 0, 0, _LARGEST),
        (("-o", "--offset"), "the offset of the first request", 0, 0, (1 << 63) - 1),
    ):
        said = "that size" if flags[0] == "-S" else f"{default}"
        requests.add_argument(
            *flags, metavar="NUMBER", type=_within(least, most), default=default, help=f"{what} (default: {said})"
        )
    requests.add_argument(
        "-w", "--write", action="store_true", help="measure writes: what the requests cover is overwritten"
    )
    requests.add_argument(
        "--pattern", metavar="BYTE", type=_within(0, 255), default=0, help="the byte that is written (default: 0)"
    )
    requests.add_argument(
        "--flush-interval",
        metavar="NUMBER",
        type=_within(0, _LARGEST),
        default=0,
        help="with -w: requests between flushes",
    )
    requests.add_argument(
        "--no-drain",
        action="store_true",
        help="with --flush-interval: flush without waiting for the requests in flight",
    )
    parser.add_argument(
        "-t",
        "--cache",
        metavar="MODE",
        default="writeback",
        help=f"one of {', '.join(CACHE_MODES)} (default: writeback)",
    )
    parser.add_argument(
        "-i", "--aio", metavar="MODE", help="how requests are submitted; Lamina has one way, and takes any mode"
    )
    parser.add_argument("-n", "--native", action="store_true", help="the same as -i native; it needs -t none")
    parser.add_quiet()
    parser.add_output()
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image")
    args = parser.parse(argv)

    choose(CACHE_MODES, "cache", args.cache)
    if args.aio is not None:
        choose(AIO_MODES, "aio", args.aio)
    caching = CACHE_MODES[args.cache]
    if (args.native or args.aio == "native") and not caching.direct:
        raise OptionError("native submission needs the cache mode none or directsync", hint="add -t none")
    load = Load(
        count=args.count,
        depth=args.depth,
        size=args.buffer_size,
        offset=args.offset,
        step=args.step_size or None,
        write=args.write,
        pattern=args.pattern,
        stable=caching.stable,
        flush_interval=args.flush_interval,
        drain=not args.no_drain,
    )
    source = image_source(args.filename, args, args.format)
    target = Target(
        name=source if isinstance(source, str) else None,
        options={} if isinstance(source, str) else source,
        format=args.format,
        read_only=not args.write,
        cache=args.cache,
        force_share=args.force_share,
        references=args.references,
        budget=args.limits,
    )
    human = args.output == "human"
    with target.open() as image, Meter(args.filename, asked=False, quiet=args.quiet) as meter:
        if args.force_share:
            tell_of_writers(image.node)
        if human:
            _announce(load)
        found = bench(image, load, Monitor(meter.report)).result(args.filename, load)
    if human:
        sys.stdout.write(f"Run completed in {found.duration / 1e9:.3f} seconds.\n")
        if not args.quiet and program.current.tells_latency:
            sys.stdout.write(_summary(found))
    else:
        import json

        sys.stdout.write(json.dumps(found.to_json(), indent=4) + "\n")
    return 0


def _within(least: int, most: int) -> Any:
    def parse(text: str) -> int:
        number = parse_size(text)
        if not least <= number <= most:
            raise OptionError(f"{shown(text)} is out of range", hint=f"the range is {least} to {most}")
        return number

    return parse


def _announce(load: Load) -> None:
    """The lines that scripts know from qemu-img."""
    what = "write" if load.write else "read"
    sys.stdout.write(
        f"Sending {load.count} {what} requests, {load.size} bytes each, {load.depth} in parallel "
        f"(starting at offset {load.offset}, step size {load.step or load.size})\n"
    )
    if load.flush_interval:
        sys.stdout.write(f"Sending flush every {load.flush_interval} requests\n")


def _summary(found: BenchResult) -> str:
    half, most = (found.percentiles[percent] / 1e3 for percent in (50, 99))
    return (
        f"{found.requests_per_second:.0f} requests per second, {format_size(int(found.bytes_per_second))} per second; "
        f"latency in microseconds: median {half:.0f}, 99 % within {most:.0f}, longest {found.longest / 1e3:.0f}\n"
    )

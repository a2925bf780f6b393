"""Lamina compared with qemu-img and other servers, on the same images, on the same machine, in the same run.

`python -m benchmarks.run` makes its images, runs the commands in turn, checks each result, writes `RESULTS.md` and the other
pages with figures (see `page.py`), and removes its files. The exit status is 0 if everything was measured, whatever the
figures are (a missed target is a measurement); 1 if a command failed, gave a wrong result, or had no peer.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import compare, machine, nbd, page, peers, qcow2, requests
from .compare import Target, Targets
from .measure import Failed, Task, anything, idle_peak, in_turn
from .results import Results, Row, Run, Work, load
from .tools import Tools

MIB = 1 << 20
GIB = 1 << 30

#: Start-up is measured in multiples of this program.
INTERPRETER = "python3 -c pass"

LIBRARY = """\
import sys, lamina
with lamina.open(sys.argv[1], format="qcow2") as image:
    print(len(image.extents()))
"""


@dataclass(frozen=True)
class Group:
    """Commands that do the same work.

    `make_tasks` makes the images and returns the tasks. `targets` contains our programs with what is promised of them.
    """

    section: str
    title: str
    targets: Targets
    make_tasks: Callable[[], list[Task]]
    rounds: int
    again: bool = False  # see `in_turn`
    only_peer: str = ""


def lamina_command() -> list[str]:
    """The installed command next to this interpreter, as users start it, or else the module."""
    script = Path(sys.executable).with_name("lamina")
    return [str(script)] if script.exists() else [sys.executable, "-m", "lamina"]


def has_rows(count: int) -> Callable[[Path], None]:
    def check(stdout: Path) -> None:
        with stdout.open("rb") as lines:
            rows = sum(line.count(b'"start"') for line in lines)
        if rows != count:
            raise Failed(f"the map has {rows} rows, not {count}")

    return check


def prints(expected: str) -> Callable[[Path], None]:
    def check(stdout: Path) -> None:
        if (told := stdout.read_text().strip()) != expected:
            raise Failed(f"printed {told!r}, not {expected!r}")

    return check


def has_content_of(source: Path, made: Path, judge: peers.Peer) -> Callable[[Path], None]:
    """A check that two images, each with its format as suffix, have equal content."""

    def check(_stdout: Path) -> None:
        formats = ["-f", source.suffix[1:], "-F", made.suffix[1:]]
        command = [judge.qemu_img, "compare", *formats, str(source), str(made)]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        if told.returncode:
            raise Failed(f"the result is not its source: {(told.stderr or told.stdout).strip()}")

    return check


def image_maker(folder: Path, small: bool) -> Callable[..., Path]:
    """A function that makes an image in `folder`, once: its name, its kind and the options of `images.py`."""

    def image(name: str, kind: str, *options: str) -> Path:
        path = folder / (f"small-{name}" if small else name)
        if not path.exists():
            print(f"making {path.name} ...", file=sys.stderr, flush=True)
            # In a child, so that its memory does not count in the children that are measured later.
            command = [sys.executable, "-m", "benchmarks.images", kind, *options, str(path)]
            subprocess.run(command, check=True, cwd=peers.ROOT)
        return path

    return image


def plan(folder: Path, rounds: int, small: bool, others: list[peers.Peer]) -> Iterator[Group]:
    """The groups. The images are made in `folder` when the tasks of a group are first used."""
    lamina, image = lamina_command(), image_maker(folder, small)
    count = 10_000 if small else 1 << 20
    size, content = (GIB // 4, GIB // 16) if small else (4 * GIB, 3 * GIB // 2)

    def map_tasks(sharing: int) -> list[Task]:
        name = f"alternating-{sharing}.qcow2"
        path = str(image(name, "alternating", "--count", str(count), "--sharing", str(sharing)))
        arguments = ("map", "--output=json", "-f", "qcow2", path)
        return [
            Task("lamina map", [*lamina, *arguments], has_rows(count)),
            Task("lamina library", [sys.executable, "-c", LIBRARY, path], prints(str(count))),
            *(Task(other.name, [other.qemu_img, *arguments], has_rows(count)) for other in others),
        ]

    def convert_tasks(from_format: str, to_format: str) -> list[Task]:
        source = image("ext4.raw", "ext4", "--size", str(size), "--content", str(content))
        if from_format == "qcow2" and others:
            raw, source = source, source.with_suffix(".qcow2")
            if not source.exists():
                subprocess.run([others[0].qemu_img, "convert", "-f", "raw", "-O", "qcow2", raw, source], check=True)
        made = folder / f"made.{to_format}"
        arguments = ("convert", "-f", from_format, "-O", to_format, str(source), str(made))
        check = has_content_of(source, made, others[0]) if others else anything
        programs = {"lamina convert": lamina} | {other.name: [other.qemu_img] for other in others}
        return [Task(name, [*start, *arguments], check, makes=made) for name, start in programs.items()]

    def start_tasks() -> list[Task]:
        arguments = ("info", "-f", "qcow2", str(image("info.qcow2", "alternating", "--count", "16")))
        return [
            Task("lamina info", [*lamina, *arguments]),
            Task(INTERPRETER, [sys.executable, "-c", "pass"]),
            *(Task(other.name, [other.qemu_img, *arguments]) for other in others),
        ]

    # The library makes columns of it; the command prints a million lines.
    maps = {"lamina map": [Target("cpu", 0.6)], "lamina library": [Target("cpu", 0.25)]}
    for sharing, what in (512, "data stored"), (1, "data in a hole"):
        yield Group("commands", f"{count:,} extents, {what}", maps, partial(map_tasks, sharing), rounds)
    for ends in ("raw", "qcow2"), ("qcow2", "raw"):
        title = f"{' to '.join(ends)}, {size // MIB} MiB ext4"
        yield Group("commands", title, {"lamina convert": [Target("wall", 1.3)]}, partial(convert_tasks, *ends), rounds)
    for title, targets, make in qcow2.works(folder, image, lamina, others, small):
        yield Group("commands", title, targets, make, rounds)
    start = {"lamina info": [Target("wall")]}
    yield Group("commands", "start-up", start, start_tasks, max(rounds, 20), only_peer=INTERPRETER)
    if others:
        tools = Tools(folder, image, lamina, others, small, has_content_of)
        for title, targets, make in tools.works():
            yield Group("tools", title, targets, make, rounds, again=True)


def measured(group: Group, folder: Path) -> Work:
    """One group, measured. A long run tells what it has."""
    print(f"measuring {group.title} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    found = in_turn(group.make_tasks(), group.rounds, folder, again=group.again)
    rows = compare.rows(group.targets, found, group.only_peer)
    rounds = max((len(one) for one in found.values() if isinstance(one, list)), default=0)
    for row in rows:
        row.error = row.error.replace(f"{folder}/", "")
        told = row.error or page.figure(row)
        told += "".join(f", {page.found(promise)} {promise.verdict}" for promise in row.promises)
        print(f"  {row.program}: {told}", file=sys.stderr, flush=True)
    return Work(group.section, group.title, f"median of {rounds}", rows, seconds=time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each command; the median counts (5)")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        help="write the results and the pages into this existing folder, instead of the pages of this repository",
    )
    parser.add_argument(
        "--dir", type=Path, help="work in this existing folder (about 40 GiB) instead of a temporary one"
    )
    parser.add_argument("--keep", action="store_true", help="with --dir: leave the images there for the next run")
    parser.add_argument(
        "--only", metavar="WORD", default="", help="only the work whose title contains WORD; the other rows stay"
    )
    parser.add_argument("--note", default="", help="a remark about this run, for the page")
    parser.add_argument(
        "--small",
        action="store_true",
        help="small images, to try this program; the figures have no meaning, and are only written with --output",
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    if options.keep and not options.dir:
        parser.error("--keep needs --dir")
    others = [peer for peer in (peers.system(), peers.newest()) if peer]
    if not others:
        print("no qemu-img was found for the comparison (install qemu-utils)", file=sys.stderr)

    works: list[Work] = []
    interrupted = False
    with contextlib.ExitStack() as stack:
        if options.keep:
            folder = options.dir
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.dir, prefix="lamina-bench-")))
        run = Run(machine.today(), machine.commit(), machine.facts(folder), options.note)
        run.machine["memory of an idle program"] = f"{idle_peak(folder) / MIB:.0f} MiB"
        try:
            for group in plan(folder, options.rounds, options.small, others):
                if options.only in group.title:
                    works.append(measured(group, folder))
            image = image_maker(folder, options.small)
            works += requests.measure(folder, image, others, only=options.only, small=options.small)
            rounds = min(options.rounds, nbd.ROUNDS)
            works += nbd.measure(lamina_command(), folder, rounds, only=options.only, small=options.small)
        except KeyboardInterrupt:  # keep the results so far
            interrupted = True

    if not works and not interrupted:
        parser.error(f"no work has {options.only!r} in its title")
    whole = not options.only and not interrupted
    if options.output or not options.small:
        target = options.output or page.BENCHMARKS
        results = load(target / page.DATA).updated(run, works, whole=whole)
        page.write_all(results, target)
        print(f"written: {page.PAGE}, {page.DATA} and the pictures", file=sys.stderr)
    else:
        results = Results().updated(run, works, whole=True)
    shown = Results(results.runs, [work for work in results.works if work in works])
    print(page.results_page(shown))
    return 1 if interrupted or any(failed(row) for _, row in shown.rows()) else 0


def failed(row: Row) -> bool:
    """Whether it was not measured, or had no peer."""
    return bool(row.error) or any(promise.verdict == "n/a" for promise in row.promises)


if __name__ == "__main__":
    sys.exit(main())

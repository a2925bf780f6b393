"""Lamina compared with qemu-img and other servers, on the same images, on the same machine, in the same run.

`python -m benchmarks.run` makes its images, runs the commands in turn, checks each result, prints a table with the ratios
that the project promises, and removes its files. The exit status is 0 if everything was measured, whatever the figures are (a
missed target is a measurement); 1 if a command failed, gave a wrong result, or had no peer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import nbd, peers, plot, qcow2, requests
from .measure import Failed, Figures, Task, anything, idle_peak, in_turn
from .tools import Tools

MIB = 1 << 20
GIB = 1 << 30

#: The most memory of each of our commands.
MEMORY_TARGET = 200 * MIB

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

    `make_tasks` makes the images and returns the tasks. `targets` contains our programs, each with the promised highest ratio
    to the best of the others, in `basis` ("cpu" or "wall"); None if the ratio is only shown.
    """

    title: str
    basis: str
    targets: Mapping[str, float | None]
    make_tasks: Callable[[], list[Task]]
    rounds: int
    median: bool = False  # else the best round


@dataclass
class Row:
    """One line of the table, one record of the JSON results: seconds and bytes, None if they could not be measured."""

    work: str
    program: str
    wall: float | None = None
    cpu: float | None = None
    memory: int | None = None
    stored: int | None = None
    basis: str = ""
    peer: str = ""
    ratio: float | None = None
    target: float | None = None
    verdict: str = ""
    error: str = ""


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


def plan(folder: Path, rounds: int, small: bool, others: list[peers.Peer]) -> Iterator[Group]:
    """The groups. The images are made in `folder` when the tasks of a group are first used."""
    lamina = lamina_command()
    count = 10_000 if small else 1 << 20
    size, content = (GIB // 4, GIB // 16) if small else (4 * GIB, 3 * GIB // 2)

    def image(name: str, kind: str, *options: str) -> Path:
        path = folder / (f"small-{name}" if small else name)
        if not path.exists():
            print(f"making {path.name} ...", file=sys.stderr, flush=True)
            # In a child, so that its memory does not count in the children that are measured later.
            command = [sys.executable, "-m", "benchmarks.images", kind, *options, str(path)]
            subprocess.run(command, check=True, cwd=peers.ROOT)
        return path

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
            *(Task(f"{other.name} info", [other.qemu_img, *arguments]) for other in others),
        ]

    maps = {"lamina map": 0.9, "lamina library": 0.25}
    yield Group(f"{count:,} extents, data stored", "cpu", maps, lambda: map_tasks(512), rounds)
    yield Group(f"{count:,} extents, data in a hole", "cpu", maps, lambda: map_tasks(1), rounds)
    for ends in ("raw", "qcow2"), ("qcow2", "raw"):
        title = f"{' to '.join(ends)}, {size // MIB} MiB ext4"
        yield Group(title, "wall", {"lamina convert": 1.3}, partial(convert_tasks, *ends), rounds)
    for title, basis, targets, make in qcow2.works(folder, image, lamina, others, small):
        yield Group(title, basis, targets, make, rounds)
    if others:
        tools = Tools(folder, image, lamina, others, small, has_content_of)
        for title, targets, make in tools.works():
            yield Group(title, "wall", targets, make, rounds, median=True)
    yield Group("start-up", "wall", {"lamina info": None}, start_tasks, max(rounds, 20))


def rows_of(group: Group, tasks: list[Task], found: dict[str, Figures | Failed]) -> Iterator[Row]:
    """The lines of the table for one group; ours also have their ratio to the best of the others."""
    ok = {program: figures for program, figures in found.items() if isinstance(figures, Figures)}
    others = {program: figures for program, figures in ok.items() if program not in group.targets}

    def seconds(program: str) -> float:
        return float(getattr(ok[program], group.basis))

    for task in tasks:
        row = Row(group.title, task.program)
        figures = found[task.program]
        if isinstance(figures, Failed):
            row.error = str(figures)
        else:
            row.wall, row.cpu, row.memory = figures.wall, figures.cpu, figures.memory
            row.stored = figures.stored or None
        if task.program in group.targets:
            row.basis = group.basis
            row.target = group.targets[task.program]
            row.verdict = "n/a"
            if task.program in ok and others:
                row.peer = INTERPRETER if INTERPRETER in others else min(others, key=seconds)
                row.ratio = seconds(task.program) / max(seconds(row.peer), 1e-9)
                missed = [group.basis] if row.target is not None and row.ratio > row.target else []
                if ok[task.program].memory > MEMORY_TARGET:
                    missed.append("memory")
                row.verdict = f"missed: {', '.join(missed)}" if missed else "met" if row.target else ""
        yield row


def table(rows: list[Row]) -> str:
    """The rows as an aligned Markdown table."""

    def cell(value: float | None, form: str) -> str:
        return "n/a" if value is None else format(value, form)

    lines: list[tuple[str, ...]] = [
        ("work", "program", "wall s", "CPU s", "peak MiB", "made MiB", "ratio", "of", "target", "")
    ]
    for row in rows:
        ratio = cell(row.ratio, ".2f") if row.basis else ""
        lines.append(
            (
                row.work,
                row.program,
                cell(row.wall, ".3f"),
                cell(row.cpu, ".3f"),
                cell(row.memory and row.memory / MIB, ".0f"),
                cell(row.stored / MIB, ".1f") if row.stored else "",
                ratio,
                f"{row.peer}, {row.basis}" if row.peer else "",
                cell(row.target, ".2f") if row.target is not None else "",
                row.verdict,
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = {2, 3, 4, 5, 6, 8}
    lines.insert(1, tuple("-" * (w - 1) + ":" if n in numbers else "-" * w for n, w in enumerate(widths)))
    aligned = (
        (text.rjust(w) if n in numbers else text.ljust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each command; the best counts (5)")
    parser.add_argument("--output", type=Path, help="write the results to this file, as JSON")
    parser.add_argument("--plot", type=Path, help="draw the ratios of the table into this file, as SVG")
    parser.add_argument(
        "--dir", type=Path, help="work in this existing folder (about 40 GiB) instead of a temporary one"
    )
    parser.add_argument("--keep", action="store_true", help="with --dir: leave the images there for the next run")
    parser.add_argument("--only", metavar="WORD", default="", help="only the work whose title contains WORD")
    parser.add_argument(
        "--small", action="store_true", help="small images, to try this program; the figures have no meaning"
    )
    options = parser.parse_args()
    if options.keep and not options.dir:
        parser.error("--keep needs --dir")
    others = [peer for peer in (peers.system(), peers.newest()) if peer]
    if not others:
        print("no qemu-img was found for the comparison (install qemu-utils)", file=sys.stderr)

    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        if options.keep:
            folder = options.dir
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.dir, prefix="lamina-bench-")))
        least = idle_peak(folder)
        for group in plan(folder, options.rounds, options.small, others):
            if options.only in group.title:
                print(f"measuring {group.title} ...", file=sys.stderr, flush=True)
                tasks = group.make_tasks()
                measured = list(rows_of(group, tasks, in_turn(tasks, group.rounds, folder, median=group.median)))
                rows += measured
                for row in measured:  # a long run shows what it has
                    told = row.error or f"{row.wall:.3f} s" + (f", {row.ratio:.2f} {row.verdict}" if row.ratio else "")
                    print(f"  {row.program}: {told}", file=sys.stderr, flush=True)
        small_requests: list[dict[str, Any]] = []
        if options.only in "4 KiB requests" and not options.small and (folder / "ext4.raw").exists():
            print("measuring 4 KiB requests ...", file=sys.stderr, flush=True)
            small_requests = requests.measure(folder, others)

        served = nbd.measure(lamina_command(), folder, min(options.rounds, 3), only=options.only, small=options.small)

    if not rows and not served.rows and not small_requests:
        parser.error(f"no work has {options.only!r} in its title")
    machine = {
        "python": platform.python_version(),
        "peers": [".".join(map(str, peer.version)) for peer in others],
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "rounds": options.rounds,
        "small": options.small,
        "memory_floor": least,
    }
    if rows:
        print(table(rows))
        print(
            f"\nBest of {options.rounds} (start-up: of at least 20; tools: the median) after a warm round; ratios to "
            "the best of the peers."
        )
    print(f"Python {machine['python']}, {machine['cpus']} CPUs, Linux {machine['kernel']}.", end=" ")
    print(f"An idle program has {least / MIB:.0f} MiB here; ours may peak at {MEMORY_TARGET // MIB}.")
    if small_requests:
        print(f"\n{requests.table(small_requests)}")
    if served.rows:
        print(f"\n{nbd.table(served)}\nBest of {min(options.rounds, 3)}, in turn; ratios to the best of the peers.")
    for row in rows:
        if row.error:
            print(f"n/a: {row.program} ({row.work}): {row.error}")
    if options.plot and rows:
        options.plot.write_text(plot.svg(rows))
        print(f"\nThe ratios as a picture: {options.plot}")
    if options.output:
        options.output.write_text(
            json.dumps(
                {
                    "machine": machine,
                    "rows": [asdict(row) for row in rows],
                    "requests": small_requests,
                    "nbd": served.json(),
                },
                indent=1,
            )
            + "\n"
        )
    return 1 if served.interrupted or any(row.error or row.verdict == "n/a" for row in (*rows, *served.rows)) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Run commands that do the same work, in turn, and measure each: wall time, CPU time and memory.

CPU time and peak memory are the kernel's figures for that one child (`wait4`). The kernel counts the peak of a child from its
fork, so no child has a smaller peak than the measuring process: `idle_peak` measures that minimum. This module and its
callers therefore import little, and never Lamina.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: The environment of the commands: Python may cache compiled modules, as it does by default.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


#: Seconds, seconds and rounds; see `in_turn`.
_LONG, _BUDGET, _FEWEST = 6.0, 45.0, 3


class Failed(Exception):
    """A command failed, or its result was wrong. The text is one line."""


@dataclass
class Figures:
    """Seconds on the clock, seconds of CPU (user and system), bytes of peak memory, bytes that a new file takes."""

    wall: float
    cpu: float
    memory: int
    stored: int = 0


def anything(_stdout: Path) -> None:
    """The check of a command whose exit status is sufficient."""


@dataclass(frozen=True)
class Task:
    """One command of one program.

    `check` gets the file of the command's standard output and raises Failed if the result is wrong. `makes` names the
    file that the command writes, removed after each run. `prepare` is a command that runs before each run.
    """

    program: str
    command: Sequence[str]
    check: Callable[[Path], None] = anything
    makes: Path | None = None
    prepare: Sequence[str] = ()


def run_once(command: Sequence[str], stdout: Path) -> Figures:
    """Run `command`, its standard output into the file `stdout`. Raises Failed with the last line of its errors."""
    with stdout.open("wb") as out, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=ENVIRONMENT)
        except OSError as error:
            raise Failed(str(error)) from error
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)  # or Popen would look for the child again
        if child.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise Failed(lines[-1] if lines else f"exit status {child.returncode}")
    return Figures(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def in_turn(
    tasks: Sequence[Task], rounds: int, folder: Path, *, again: bool = False
) -> dict[str, list[Figures] | Failed]:
    """Run all `tasks` in turn, after a first round that warms the cache, is checked and is not measured.

    Returns for each program its figures in each round, or its failure. There are `rounds` rounds; fewer, but not less than
    `_FEWEST`, of work that would take more than `_BUDGET` seconds. The programs take turns, so that noise of the machine
    affects all alike: the Nth figures of two programs were measured at almost the same time.

    `again`: before each measured run a program runs once without being measured. (The time of work that fills the page cache
    depends on the memory that it gets: a virtual machine gives free memory back to its host, and the first use of such a page
    takes several times the time of a copy. So each program gets what it used itself. Work that takes longer than `_LONG` is
    not repeated: its time depends on other things.)
    """
    found: dict[str, list[Figures] | Failed] = {}
    stdout = folder / "stdout"
    number, most = 0, rounds
    while number <= most:
        spent = 0.0
        for task in tasks:
            before = found.setdefault(task.program, [])
            if isinstance(before, Failed):
                continue
            try:
                now = _run(task, stdout, check=not number)
                spent += now.wall
                if again and now.wall < _LONG:
                    spent += now.wall
                    if number:
                        now = _run(task, stdout, check=False)
            except Failed as failure:
                found[task.program] = failure
                continue
            if number:
                before.append(now)
        if not number:
            most = min(rounds, max(_FEWEST, int(_BUDGET / max(spent, 1e-9))))
        number += 1
    stdout.unlink(missing_ok=True)
    return found


def _run(task: Task, stdout: Path, *, check: bool) -> Figures:
    """One run, with all that comes before and after it."""
    if task.prepare:
        subprocess.run(task.prepare, check=True)
    os.sync()  # data that the previous program wrote must not be written back in the time of this one
    try:
        figures = run_once(task.command, stdout)
        if check:
            task.check(stdout)
        if task.makes:
            figures.stored = task.makes.stat().st_blocks * 512
        return figures
    finally:
        if task.makes:
            task.makes.unlink(missing_ok=True)


def idle_peak(folder: Path) -> int:
    """The peak memory, in bytes, of a child process that does nothing."""
    stdout = folder / "stdout"
    figures = run_once([sys.executable, "--version"], stdout)
    stdout.unlink()
    return figures.memory

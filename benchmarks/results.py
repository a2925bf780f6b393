"""What `make bench` found: works with a row for each program, and the runs in which they were measured.

`results.json` holds all of it, and the pages and pictures are made from that file alone (`page.py`, `plot.py`). A run of some
works replaces these works and leaves the others, each of which names the run that measured it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

#: The sections of the page, in its order, with their titles.
SECTIONS = {
    "commands": "Status, check, conversions and start-up",
    "tools": "Whole images",
    "requests": "Single requests in the library",
    "nbd": "NBD",
}


@dataclass
class Spread:
    """The median of the rounds, and the least and the greatest of them; these are None if only one figure is known."""

    value: float
    least: float | None = None
    most: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass
class Promise:
    """What is promised of a row: `found`, in comparison with the program `of`, is at most `target`, or at least.

    `what` is compared: "wall", "CPU", "rate", "size", "memory". `unit` is empty for a ratio, else that of a figure: "s more",
    "ms". `found` is None if it could not be measured, `target` if the ratio is only shown."""

    what: str
    of: str = ""
    found: Spread | None = None
    target: float | None = None
    at_least: bool = False
    unit: str = ""

    @property
    def verdict(self) -> str:
        """met, missed, n/a (not measured), or nothing if there is no target."""
        if self.found is None:
            return "n/a"
        if self.target is None:
            return ""
        value = self.found.value
        return "met" if (value >= self.target if self.at_least else value <= self.target) else "missed"


@dataclass
class Row:
    """One program. `figure` is in `unit`: s, ms, us, k/s, GiB/s. `cpu` is in seconds if the unit is s, else in microseconds
    for each request; `memory` (the peak) and `stored` (what a new file takes) are bytes. `error` says why there is none."""

    program: str
    unit: str = "s"
    figure: Spread | None = None
    cpu: float | None = None
    memory: int | None = None
    stored: int | None = None
    promises: list[Promise] = field(default_factory=list)
    error: str = ""

    @property
    def ours(self) -> bool:
        return self.program.startswith("lamina")


@dataclass
class Work:
    """Programs that did the same work. `how`: such as "median of 5". `seconds`: how long it took to measure all of it."""

    section: str
    title: str
    how: str
    rows: list[Row]
    run: int = 0
    seconds: float | None = None

    @property
    def name(self) -> str:
        """The title without the word by which `--only` finds its section."""
        return self.title.removeprefix(f"{self.section}: ")


@dataclass
class Run:
    """When, of which commit and on which machine works were measured. `machine`: facts by name, in the order of the page."""

    date: str
    commit: str
    machine: dict[str, str]
    note: str = ""


@dataclass
class Results:
    runs: list[Run] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)

    def work(self, title: str) -> Work | None:
        return next((work for work in self.works if work.title == title), None)

    def run(self, work: Work) -> Run:
        return self.runs[work.run]

    def rows(self) -> Iterator[tuple[Work, Row]]:
        for work in self.works:
            for row in work.rows:
                yield work, row

    def updated(self, run: Run, works: Sequence[Work], *, whole: bool) -> Results:
        """These results with new works in the place of those with their titles. `whole`: all works were measured, and what
        has no successor is gone. Runs of which no work is left are gone, and the others keep their order."""
        new = {work.title: work for work in works}
        kept = [(work, self.runs[work.run]) for work in self.works]
        if whole:
            merged = [(work, run) for work in works]
        else:
            merged = [(new.pop(old.title), run) if old.title in new else (old, was) for old, was in kept]
            merged += [(work, run) for work in works if work.title in new]
        runs = [one for one in [*self.runs, run] if any(one is by for _, by in merged)]
        numbers = {id(one): number for number, one in enumerate(runs)}
        found = Results(runs)
        order = list(SECTIONS)
        for work, by in sorted(merged, key=lambda pair: order.index(pair[0].section)):
            work.run = numbers[id(by)]
            found.works.append(work)
        return found


def load(path: Path) -> Results:
    """The results in `path`; none if there is no such file."""
    if not path.exists():
        return Results()
    told = json.loads(path.read_text())
    return Results([Run(**run) for run in told["runs"]], [_work(work) for work in told["works"]])


def text(results: Results) -> str:
    """The text of `results.json`: figures with as many digits as mean something, and nothing that is empty."""
    return json.dumps(_brief(asdict(results)), indent=1) + "\n"


def write(path: Path, content: str) -> None:
    """Put `content` into the file at once: whoever reads it finds the old text or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(content)
    os.replace(new, path)


def _brief(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _brief(one) for name, one in value.items() if not _empty(one)}
    if isinstance(value, list):
        return [_brief(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list) and not value)


def _work(told: dict[str, Any]) -> Work:
    rows = [_row(row) for row in told.pop("rows", [])]
    return Work(**told, rows=rows)


def _row(told: dict[str, Any]) -> Row:
    promises = [Promise(**{**promise, "found": _spread(promise.get("found"))}) for promise in told.pop("promises", [])]
    return Row(**{**told, "figure": _spread(told.get("figure")), "promises": promises})


def _spread(told: dict[str, float] | None) -> Spread | None:
    return Spread(**told) if told else None

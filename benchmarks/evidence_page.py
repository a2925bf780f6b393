"""The page about what the long suites found, from their rounds (`evidence.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from .page import aligned
from .suites import Suite


@dataclass
class Failure:
    """A test that failed, and the first line of why."""

    test: str
    why: str


@dataclass
class Round:
    """One run of pytest. `counts`: what the tests examined, by their words; `skipped`: how many tests, by the reason;
    `settings`: how much was asked for. `interrupted`: it did not come to its end."""

    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    passed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False
    seed: int = 0
    settings: dict[str, int] = field(default_factory=dict)


@dataclass
class Section:
    """A suite with its rounds. `cases`: how many tests it has."""

    suite: Suite
    rounds: list[Round] = field(default_factory=list)
    cases: int = 0

    @property
    def counts(self) -> Counter[str]:
        return sum((done.counts for done in self.rounds), Counter())

    @property
    def passed(self) -> int:
        return sum(done.passed for done in self.rounds)

    @property
    def failures(self) -> list[tuple[Round, Failure]]:
        return [(done, failure) for done in self.rounds for failure in done.failures]


@dataclass
class Report:
    """A run of the suites. `missing`: the titles of those that were not reached."""

    date: str
    commit: str
    machine: dict[str, str]
    minutes: float
    seed: int
    sections: list[Section] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[tuple[Round, Failure]]:
        return [found for section in self.sections for found in section.failures]

    @property
    def interrupted(self) -> bool:
        return bool(self.missing) or any(done.interrupted for section in self.sections for done in section.rounds)

    @property
    def right(self) -> bool:
        return not self.failures and not self.interrupted

    @property
    def verdict(self) -> str:
        """A sentence about what was found."""
        passed = sum(section.passed for section in self.sections)
        said = f"{passed:,} tests passed"
        if self.failures:
            return f"{len(self.failures)} of {passed + len(self.failures):,} tests failed."
        return f"{said} until the run was interrupted." if self.interrupted else f"Nothing was found: all {said}."


def told(done: Round) -> str:
    """A line about a round, for who waits."""
    parts = [f"{done.seconds:.0f} s", f"{done.passed} passed"]
    parts += [f"{len(done.failures)} FAILED"] if done.failures else []
    parts += [f"{number:,} {what}" for what, number in done.counts.items()]
    return ", ".join(parts)


def page(report: Report) -> str:
    """The text of the page."""
    facts = "; ".join(f"{name} {value}" for name, value in report.machine.items())
    parts = [
        "# Evidence",
        "`make evidence MINUTES=30` runs the long suites for the chosen time and writes this page. Each suite makes rounds "
        "of random work, every round with a new seed; the numbers are counted by the tests, of work that was right.",
        f"The last run: {report.date}, commit {report.commit}, {report.seconds / 60:.1f} minutes ({report.minutes:g} "
        f"chosen), seed {report.seed}. Machine: {facts}.",
        f"**{report.verdict}**",
    ]
    if report.missing:
        parts.append(f"Not run: {', '.join(report.missing)}.")
    lines = [["suite", "what was examined", "tests", "rounds", "minutes", "found"]]
    lines += [_line(section) for section in report.sections]
    parts.append(aligned(lines, {2, 3, 4}))
    if report.failures:
        parts += ["## Found", "\n".join(_failures(report))]
    for section in report.sections:
        parts += list(_details(section))
    return "\n\n".join(parts) + "\n"


def _line(section: Section) -> list[str]:
    found = f"{len(section.failures)} failures" if section.failures else "nothing"
    if any(done.interrupted for done in section.rounds):
        found += ", interrupted"
    examined = [f"{number:,} {what}" for what, number in section.counts.items()]
    minutes = sum(done.seconds for done in section.rounds) / 60
    return [
        section.suite.title,
        "; ".join(examined) or "see the tests",
        f"{section.passed:,}",
        str(len(section.rounds)),
        f"{minutes:.1f}",
        found,
    ]


def _failures(report: Report) -> Iterator[str]:
    for done, failure in report.failures:
        why = failure.why.replace("`", "'")
        yield f"- `{failure.test}`: {why} Repeat it with `{_settings(done)}`."


def _settings(done: Round) -> str:
    return " ".join([f"LAMINA_SEED={done.seed}", *(f"{name}={value}" for name, value in done.settings.items())])


def _details(section: Section) -> Iterator[str]:
    suite = section.suite
    yield f"## {suite.title}"
    yield suite.shows
    files = " ".join(suite.paths)
    without = (
        f", without {' '.join(f'`{name}`' for name in suite.without)}, which other suites run" if suite.without else ""
    )
    yield f"Tests: `{files}`{without}."
    if section.cases:
        ran = sum(done.passed + len(done.failures) + sum(done.skipped.values()) for done in section.rounds)
        yield f"{ran:,} {'of its' if suite.once else 'runs of its'} {section.cases:,} tests."
    lines = [["round", "settings", "passed", "seconds"]]
    for number, done in enumerate(section.rounds, 1):
        lines.append([str(number), f"`{_settings(done)}`", str(done.passed), f"{done.seconds:.0f}"])
    if section.rounds:
        yield aligned(lines, {0, 2, 3})
    skipped = sum((done.skipped for done in section.rounds), Counter[str]())
    if skipped:
        yield "Skipped: " + "; ".join(f"{number}, because {why}" for why, number in skipped.items()) + "."

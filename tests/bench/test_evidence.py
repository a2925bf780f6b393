"""`make evidence`: how it divides the time, what it takes from pytest, and the page that it writes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from benchmarks import evidence, evidence_page
from benchmarks.evidence_page import Failure, Report, Round, Section
from benchmarks.suites import SUITES, Suite

from tests import evidence as counting

KNOBS = Suite("cuts", "Power cuts", "No state is corrupt.", ("tests/crash/test_*.py",), 3, {"LAMINA_STATES": 100})
CASES = Suite("fail", "Failing storage", "Nothing is lost.", ("tests/faults/test_*.py",), 1, once=True)


# Counting


def test_counting_has_no_effect_when_it_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(counting.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tests.evidence.os.open", lambda *_: pytest.fail("it opened a file"))
    counting.count("states", 5)
    assert list(tmp_path.iterdir()) == []


def test_what_is_counted_is_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "counted"
    assert evidence.counts(path) == {}
    monkeypatch.setenv(counting.VARIABLE, str(path))
    counting.count("states", 5)
    counting.count("kills")
    counting.count("nothing", 0)
    counting.count("states", 7)
    assert evidence.counts(path) == {"states": 12, "kills": 1}
    assert "test_what_is_counted_is_added_up" in path.read_text().splitlines()[0]


def test_every_suite_has_tests_and_every_knob_is_heard() -> None:
    for suite in SUITES:
        texts = "".join((evidence.ROOT / path).read_text() for path in evidence.paths(suite))
        texts += (evidence.ROOT / "tests/conformance/random_disks.py").read_text()
        assert "def test_" in texts
        for knob in suite.knobs:
            assert f'"{knob}"' in texts, f"{suite.name}: no test reads {knob}"
        for path in suite.without:
            assert (evidence.ROOT / path).exists(), path
    with pytest.raises(ValueError, match="no such file"):
        evidence.paths(Suite("x", "X", "", ("tests/nothing_*.py",), 1))


# The time


class Clock:
    """A clock that only rounds move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.rounds: list[tuple[list[str], dict[str, str]]] = []
        monkeypatch.setattr("benchmarks.evidence.time.monotonic", lambda: self.now)
        monkeypatch.setattr("benchmarks.evidence.paths", lambda _: ["tests/x.py"])

    def runner(self, each: float, *, cases: int, failing: int = 0) -> evidence.Runner:
        """Rounds in which a test takes `each` seconds, for each 100 states; the one with the number `failing` fails. The file
        has so many `cases`."""

        def run(tests: Sequence[str], environment: Mapping[str, str], patience: float) -> Round:
            self.rounds.append((list(tests), dict(environment)))
            number = cases if list(tests) == ["tests/x.py"] else len(tests)
            states = int(environment.get("LAMINA_STATES", 100))
            done = Round(1.0 + each * number * states / 100, Counter({"states": states * number}), passed=number)
            assert patience > done.seconds
            self.now += done.seconds
            if len(self.rounds) == failing:
                done.failures = [Failure("tests/x.py::test_a[1]", "assert 1 == 2")]
            return done

        return run

    @property
    def elapsed(self) -> float:
        return self.now - 1000

    def ran(self) -> list[str]:
        return [name for tests, _ in self.rounds for name in tests]


def named(cases: int) -> list[str]:
    return [f"tests/x.py::test_a[{number}]" for number in range(cases)]


def run(clock: Clock, suite: Suite, seconds: float, each: float, cases: int = 50, failing: int = 0) -> Section:
    runner = clock.runner(each, cases=cases, failing=failing)
    return evidence.run_suite(suite, seconds, runner, lambda _: named(cases), random.Random(1))


def test_each_case_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    section = run(clock, CASES, 1000.0, 0.1)
    assert sorted(clock.ran()) == sorted(named(50))
    assert clock.ran() != named(50)
    assert [len(tests) for tests, _ in clock.rounds] == [3, 12, 35]
    assert section.passed == section.cases == 50


def test_cases_for_which_there_is_no_time_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    run(clock, CASES, 40.0, 1.0)
    assert 30 < clock.elapsed <= 40
    assert 25 < len(set(clock.ran())) == len(clock.ran()) < 50


def test_the_first_round_is_made_whatever_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    run(clock, KNOBS, 1.0, 20.0)
    assert [len(tests) for tests, _ in clock.rounds] == [evidence.FIRST_CASES]


def test_a_suite_with_settings_does_more_when_all_its_tests_have_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    section = run(clock, KNOBS, 1000.0, 0.5)
    states = [(tests == ["tests/x.py"], int(environment["LAMINA_STATES"])) for tests, environment in clock.rounds]
    assert states[:3] == [(False, 100)] * 3
    assert states[3] == (True, 400), "no more than four times"
    assert states[4] == (True, 1600)
    assert 900 < clock.elapsed <= 1000
    assert section.counts["states"] == sum(done.counts["states"] for done in section.rounds)
    seeds = [environment["LAMINA_SEED"] for _, environment in clock.rounds]
    assert len(set(seeds)) == len(seeds)
    assert [str(done.seed) for done in section.rounds] == seeds


def test_tests_without_settings_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    run(clock, Suite("again", "Again", "", ("x",), 1), 100.0, 0.1, cases=5)
    assert Counter(clock.ran()).most_common()[-1][1] > 5
    assert 90 < clock.elapsed <= 100


def test_a_suite_that_failed_is_not_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    section = run(clock, KNOBS, 1000.0, 0.01, failing=2)
    assert len(section.rounds) == 2
    assert len(section.failures) == 1


def test_what_a_suite_leaves_of_its_time_belongs_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    report = Report("", "", {}, 1.0, 5)
    evidence.run_all([CASES, KNOBS], 100.0, clock.runner(0.2, cases=10), lambda _: named(10), report)
    assert [section.suite for section in report.sections] == [CASES, KNOBS]
    assert report.missing == []
    assert 90 < clock.elapsed <= 105, "a quarter of the time was for ten tests"


# Pytest

TESTS = """\
import os, pytest
from tests import evidence

def test_counts():
    evidence.count("states", int(os.environ["LAMINA_SEED"]))

@pytest.mark.parametrize("number", [1, 2])
def test_fails(number):
    assert number == 1, "two words"

def test_skipped():
    pytest.skip("no peer")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the repository."""
    root = evidence.ROOT
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'src'}")
    monkeypatch.delenv("LAMINA_SEED")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    return tmp_path


SOME = Suite("some", "Some", "Something.", ("test_*.py",), 1)


def test_a_round_of_pytest(folder: Path) -> None:
    program = evidence.Pytest(folder)
    names = program.collect(SOME)
    assert names == [f"test_some.py::test_{name}" for name in ("counts", "fails[1]", "fails[2]", "skipped")]
    done = program.run(names, {"LAMINA_SEED": "41"}, 60.0)
    assert (done.passed, done.counts, done.skipped) == (2, {"states": 41}, {"no peer": 1})
    (failure,) = done.failures
    assert failure.test == "test_some.py::test_fails[2]"
    assert failure.why.startswith("AssertionError: two words")


def test_pytest_that_runs_nothing_or_hangs_is_a_failure(folder: Path) -> None:
    program = evidence.Pytest(folder)
    (failure,) = program.run(["test_other.py"], {}, 60.0).failures
    assert failure.why.startswith("ended with status 4")
    (folder / "test_long.py").write_text("import time\ndef test_long():\n    time.sleep(300)\n")
    (failure,) = program.run(["test_long.py"], {}, 0.5).failures
    assert failure.why == "did not end within 0 s"


@pytest.mark.parametrize("kind", ["fails", "interrupted", "broken"])
def test_the_page_is_written_whatever_happens(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(evidence, "SUITES", (SOME,))
    monkeypatch.setattr(evidence, "FIRST_CASES", 4)
    monkeypatch.setattr(evidence.machine, "commit", lambda: "abc1234")
    monkeypatch.setattr(evidence.machine, "facts", lambda _: {"processors": "2"})
    page = folder / "evidence.md"
    words = ["--minutes", "0.001", "--output", str(page)]
    if kind == "interrupted":
        monkeypatch.setattr(evidence.Pytest, "run", lambda *_: Round(1.0, interrupted=True))
    elif kind == "broken":
        (folder / "test_some.py").write_text("not python")
    if kind == "broken":
        with pytest.raises(RuntimeError, match="collected no tests of some"):
            evidence.main(words)
        assert "Not run: Some." in page.read_text()
        return
    assert evidence.main(words) == 1
    said = {"fails": "**1 of 3 tests failed.**", "interrupted": "**0 tests passed until the run was interrupted.**"}
    assert said[kind] in page.read_text()
    assert not list(folder.glob(".*.new"))


# The page


def canned() -> Report:
    report = Report("2026-01-02", "abc1234", {"processors": "2", "kernel": "Linux 6.18"}, 30.0, 77, seconds=1805.0)
    first = Round(60.0, Counter({"crash states": 12_000}), 45, seed=1, settings={"LAMINA_STATES": 12_000})
    second = Round(
        600.0, Counter({"crash states": 120_000, "kills": 3}), 45, seed=2, settings={"LAMINA_STATES": 120_000}
    )
    some = Round(90.0, Counter(), 6, Counter({"no newer QEMU": 2}), seed=3)
    report.sections = [Section(KNOBS, [first, second], cases=45), Section(CASES, [some], cases=20)]
    return report


def test_the_page() -> None:
    assert (
        evidence_page.page(canned())
        == """\
# Evidence

`make evidence MINUTES=30` runs the long suites for the chosen time and writes this page. Each suite makes rounds of random \
work, every round with a new seed; the numbers are counted by the tests, of work that was right.

The last run: 2026-01-02, commit abc1234, 30.1 minutes (30 chosen), seed 77. Machine: processors 2; kernel Linux 6.18.

**Nothing was found: all 96 tests passed.**

| suite | what was examined | tests | rounds | minutes | found |
| --- | --- | ---: | ---: | ---: | --- |
| Power cuts | 132,000 crash states; 3 kills | 90 | 2 | 11.0 | nothing |
| Failing storage | see the tests | 6 | 1 | 1.5 | nothing |

## Power cuts

No state is corrupt.

Tests: `tests/crash/test_*.py`.

90 runs of its 45 tests.

| round | settings | passed | seconds |
| ---: | --- | ---: | ---: |
| 1 | `LAMINA_SEED=1 LAMINA_STATES=12000` | 45 | 60 |
| 2 | `LAMINA_SEED=2 LAMINA_STATES=120000` | 45 | 600 |

## Failing storage

Nothing is lost.

Tests: `tests/faults/test_*.py`.

8 of its 20 tests.

| round | settings | passed | seconds |
| ---: | --- | ---: | ---: |
| 1 | `LAMINA_SEED=3` | 6 | 90 |

Skipped: 2, because no newer QEMU.
"""
    )


def test_the_page_of_a_failure_says_how_to_repeat_it() -> None:
    report = canned()
    report.sections[0].rounds[1].failures = [Failure("tests/crash/test_x.py::test_a[1]", "AssertionError: `x`")]
    made = evidence_page.page(report).splitlines()
    assert "**1 of 97 tests failed.**" in made
    assert "| Power cuts | 132,000 crash states; 3 kills | 90 | 2 | 11.0 | 1 failures |" in made
    assert (
        "- `tests/crash/test_x.py::test_a[1]`: AssertionError: 'x' Repeat it with "
        "`LAMINA_SEED=2 LAMINA_STATES=120000`." in made
    )
    assert not report.right


def test_the_page_of_this_repository_has_all_suites() -> None:
    page = evidence.PAGE.read_text()
    assert page.startswith("# Evidence\n")
    assert [suite.title for suite in SUITES if f"\n## {suite.title}\n" not in page] == []

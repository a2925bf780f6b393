"""Run the long suites for a chosen time, and write `docs/evidence.md`: `python -m benchmarks.evidence --minutes 30`.

Each suite (`suites.py`) has a share of the time. It begins with a few of its tests, whose speed says how many fit into
the next round; with enough time all of them run, and then again with larger settings. It ends when no further round
fits: it stops between rounds and not within one. A round is one run of pytest with a seed of its own. The tests count
themselves what they examined (`tests/evidence.py`). A suite whose round failed is not continued.

The page is written whatever happens, also after Ctrl-C. The exit status is 0 if all that was run was right, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from . import evidence_page, machine
from .evidence_page import Failure, Report, Round, Section
from .peers import ROOT
from .results import write
from .suites import SUITES, Suite

PAGE = ROOT / "docs" / "evidence.md"

#: Tests in the first round of a suite.
FIRST_CASES = 3
#: A round is at most so many times as large as the largest before it: a few tests say little about many.
GROWTH = 4.0
#: A round that takes so many times its expected time, and so many seconds more, hangs.
PATIENCE, PATIENCE_SECONDS = 4.0, 900.0

_KNOBS = {name for suite in SUITES for name in suite.knobs}


#: Runs one round: the tests (paths or names), the environment, and the seconds after which it hangs.
Runner = Callable[[Sequence[str], Mapping[str, str], float], Round]
#: The names of the tests of a suite.
Collector = Callable[[Suite], list[str]]


def run_suite(suite: Suite, seconds: float, run: Runner, collect: Collector, dice: random.Random) -> Section:
    """The rounds of a suite, for about `seconds`: a few of its tests, as many more as fit into the time, and, when each of
    them has run and there is time for more than twice that, all of them with larger settings."""
    end, section = time.monotonic() + seconds, Section(suite)
    cases = collect(suite)
    section.cases = len(cases)
    left: list[str] = []
    spent = ran = largest = 0.0  # by rounds of some tests
    each: float | None = (
        None  # seconds of all tests, for each time that the settings of the suite are contained in theirs
    )
    factor = 1.0
    while True:
        remaining = end - time.monotonic()
        if not left:
            if suite.once and section.rounds:
                return section
            left = dice.sample(cases, len(cases))
            if ran and each is None:
                each = spent
        if suite.knobs and each is not None and remaining > 2 * each:
            factor = min(factor * GROWTH, remaining / each)
            tests, settings, expected = paths(suite), suite.multiplied(factor), factor * each
            left = []
        else:
            number = FIRST_CASES if not ran else min(int(remaining * ran / max(spent, 1e-9)), int(largest * GROWTH))
            if number < 1:
                return section
            tests, left = left[:number], left[number:]
            settings, expected = dict(suite.knobs), seconds
        seed = dice.randrange(1 << 32)
        environment = {"LAMINA_SEED": str(seed), **{name: str(value) for name, value in settings.items()}}
        done = run(tests, environment, PATIENCE * expected + PATIENCE_SECONDS)
        done.seed, done.settings = seed, settings
        section.rounds.append(done)
        print(f"  {evidence_page.told(done)}", file=sys.stderr, flush=True)
        if done.failures or done.interrupted:
            return section
        if settings == dict(suite.knobs):
            spent, ran, largest = spent + done.seconds, ran + len(tests), max(largest, len(tests))
        else:
            each = done.seconds / factor


def paths(suite: Suite) -> list[str]:
    """The files of the suite, from the root of the repository. ValueError if a name of it finds none."""
    found: list[str] = []
    for pattern in suite.paths:
        files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
        if not files:
            raise ValueError(f"the suite {suite.name} names {pattern}, and there is no such file")
        found += files
    return [path for path in found if path not in suite.without]


def environment_of(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a round: nothing that says how much the tests do is taken over from the caller."""
    kept = {name: value for name, value in os.environ.items() if name not in _KNOBS and name != "PYTEST_ADDOPTS"}
    return kept | dict(more)


class Pytest:
    """Runs rounds, each as one process of pytest, with their files in `folder`."""

    def __init__(self, folder: Path, workers: int = 1) -> None:
        self.folder = folder
        self._words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        self._workers = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []

    def collect(self, suite: Suite) -> list[str]:
        """The names of all its tests."""
        command = [*self._words, "--collect-only", *paths(suite)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment_of({name: str(value) for name, value in suite.knobs.items()}),
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise RuntimeError(f"pytest collected no tests of {suite.name}: {(done.stdout + done.stderr)[-2000:]}")
        return [line for line in done.stdout.splitlines() if "::" in line]

    def run(self, tests: Sequence[str], environment: Mapping[str, str], patience: float) -> Round:
        counted, report, log = (self.folder / name for name in ("counted", "report.xml", "log"))
        for path in (counted, report):
            path.unlink(missing_ok=True)
        command = [
            *self._words,
            *self._workers,
            f"--junitxml={report}",
            "--tb=short",
            f"--basetemp={self.folder / 'tests'}",
        ]
        began = time.monotonic()
        with log.open("wb") as output:
            child = subprocess.Popen(
                [*command, *tests],
                cwd=ROOT,
                env=environment_of({**environment, "LAMINA_EVIDENCE": str(counted)}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            hung = interrupted = False
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                hung = True
            except KeyboardInterrupt:
                interrupted = True
            finally:
                _end(child)
        found = Round(seconds=time.monotonic() - began, counts=counts(counted), interrupted=interrupted)
        if hung:
            found.failures.append(Failure("pytest", f"did not end within {patience:.0f} s"))
        elif not interrupted:
            read_report(report, child.returncode, found, _last_line(log))
        if found.failures:
            sys.stderr.write(log.read_text(errors="replace")[-4000:])
        return found


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started."""
    for number, patience in ((signal.SIGINT, 20.0), (signal.SIGKILL, 20.0)):
        if child.poll() is not None:
            return
        os.killpg(child.pid, number)
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def counts(path: Path) -> Counter[str]:
    """What the tests counted, from the file that they wrote."""
    found: Counter[str] = Counter()
    if path.exists():
        for line in path.read_text().splitlines():
            told = json.loads(line)
            found[told["what"]] += told["count"]
    return found


def read_report(path: Path, status: int, found: Round, last: str) -> None:
    """Add what pytest reported in JUnit's XML: how many tests passed, which failed, why some were skipped."""
    if path.exists():
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '')}"
            wrong = [*case.findall("failure"), *case.findall("error")]
            skipped = case.find("skipped")
            if wrong:
                found.failures.append(Failure(name, "".join(wrong[0].get("message", "").splitlines()[:1])))
            elif skipped is not None:
                found.skipped[skipped.get("message", "")] += 1
            else:
                found.passed += 1
    if (
        status not in (0, 1)
        or (status == 1 and not found.failures)
        or not (found.passed or found.skipped or found.failures)
    ):
        found.failures.append(Failure("pytest", f"ended with status {status}: {last}"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="the time of all suites together (30)")
    parser.add_argument("--only", default="", metavar="WORD", help="only the suites whose name contains WORD")
    parser.add_argument(
        "--output", type=Path, default=PAGE, metavar="FILE", help="the page to write (docs/evidence.md)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that run the tests of a round (1)")
    parser.add_argument("--seed", type=int, help="repeat the choice of seeds and tests (a random one)")
    options = parser.parse_args(argv)
    suites = [suite for suite in SUITES if options.only in suite.name]
    if not suites:
        parser.error(
            f"no suite has {options.only!r} in its name; there are {', '.join(suite.name for suite in SUITES)}"
        )
    if not options.minutes > 0:
        parser.error("--minutes is more than 0")
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lamina-evidence-") as name:
        pytest = Pytest(Path(name), options.workers)
        facts = machine.facts(Path(name))
        report = Report(machine.today(), machine.commit(), facts, options.minutes, seed)
        try:
            run_all(suites, options.minutes * 60, pytest.run, pytest.collect, report)
        finally:
            report.seconds = time.monotonic() - began
            write(options.output, evidence_page.page(report))
    print(f"written: {options.output.name}; {report.verdict}", file=sys.stderr)
    return 0 if report.right else 1


def run_all(suites: Sequence[Suite], seconds: float, run: Runner, collect: Collector, report: Report) -> None:
    """All suites, one after the other; what one leaves of its time belongs to those after it."""
    end, dice = time.monotonic() + seconds, random.Random(report.seed)
    report.missing = [suite.title for suite in suites]
    for number, suite in enumerate(suites):
        share = suite.share / sum(one.share for one in suites[number:])
        own = max((end - time.monotonic()) * share, 0.0)
        print(f"{suite.title}, about {own:.0f} s ...", file=sys.stderr, flush=True)
        section = run_suite(suite, own, run, collect, dice)
        report.sections.append(section)
        report.missing.remove(suite.title)
        if any(done.interrupted for done in section.rounds):
            return


if __name__ == "__main__":
    sys.exit(main())

"""From the figures of all rounds to rows with promises; and how rounds are counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benchmarks import machine, measure, nbd
from benchmarks.compare import Target, rows
from benchmarks.measure import Failed, Figures, Task, in_turn
from benchmarks.nbd_clients import Figures as Served
from benchmarks.results import Promise, Row, Spread

MIB = 1 << 20


def rounds(*walls: float, cpu: float = 1.0, memory: int = MIB, stored: int = 0) -> list[Figures]:
    return [Figures(wall, cpu, memory, stored) for wall in walls]


def promised(row: Row) -> list[tuple[str, str, Spread | None, str]]:
    return [(one.what, one.of, one.found, one.verdict) for one in row.promises]


def test_medians_are_compared_and_rounds_with_rounds() -> None:
    found: dict[str, list[Figures] | Failed] = {
        "lamina": rounds(1.0, 2.0, 3.0),
        "a": rounds(4.0, 4.0, 2.0),
        "b": rounds(5.0, 5.0, 5.0),
    }
    ours, other, _ = rows({"lamina": [Target("wall", 0.6)]}, found)
    assert ours.figure == Spread(2.0, 1.0, 3.0)
    assert promised(ours) == [("wall", "a", Spread(0.5, 0.25, 1.5), "met")]
    assert other.promises == []


def test_each_basis() -> None:
    found: dict[str, list[Figures] | Failed] = {
        "lamina": rounds(0.3, cpu=0.5, stored=110),
        "a": rounds(0.2, cpu=2.0, stored=100),
        "b": rounds(0.4, cpu=1.0, stored=200),
    }
    targets = [Target("wall"), Target("cpu", 0.4), Target("size", 1.1), Target("more", 0.05)]
    ours = rows({"lamina": targets}, found)[0]
    wall, cpu, size, more = ours.promises
    assert (wall.of, wall.verdict) == ("a", "")
    assert (cpu.of, cpu.found, cpu.verdict) == ("b", Spread(0.5, 0.5, 0.5), "missed")
    assert (size.of, size.verdict) == ("a", "met")
    assert more.unit == "s more"
    assert more.found is not None
    assert more.found.value == pytest.approx(0.1)
    assert more.verdict == "missed"


def test_a_failure_and_a_missing_peer() -> None:
    targets = {"lamina": [Target("wall", 1.0)]}
    ours, other = rows(targets, {"lamina": Failed("no space"), "a": rounds(1.0)})
    assert ours.error == "no space"
    assert promised(ours) == [("wall", "", None, "n/a")]
    assert other.figure == Spread(1.0, 1.0, 1.0)
    (alone,) = rows(targets, {"lamina": rounds(1.0)})
    assert promised(alone) == [("wall", "", None, "n/a")]


def test_only_one_peer_is_compared() -> None:
    found: dict[str, list[Figures] | Failed] = {"lamina": rounds(4.0), "python": rounds(2.0), "a": rounds(1.0)}
    ours = rows({"lamina": [Target("wall")]}, found, "python")[0]
    assert promised(ours) == [("wall", "python", Spread(2.0, 2.0, 2.0), "")]


def test_too_much_memory_is_a_missed_target() -> None:
    found: dict[str, list[Figures] | Failed] = {
        "lamina": rounds(1.0, memory=300 * MIB),
        "a": rounds(1.0, memory=900 * MIB),
    }
    ours, other = rows({"lamina": [Target("wall", 1.0)]}, found)
    assert promised(ours)[1] == ("memory", "200 MiB", Spread(1.5), "missed")
    assert other.promises == []


@pytest.mark.parametrize(
    ("found", "target", "at_least", "verdict"),
    [(1.0, 1.0, False, "met"), (1.01, 1.0, False, "missed"), (1.0, 1.0, True, "met"), (0.99, 1.0, True, "missed")],
)
def test_verdicts(found: float, target: float, at_least: bool, verdict: str) -> None:
    assert Promise("wall", "a", Spread(found), target, at_least).verdict == verdict


def test_rates_of_servers() -> None:
    work = nbd.Work("nbd: reads", "k/s", nbd.memory, [nbd.Target("qemu-nbd", 1.5), nbd.Target(None, 1)])
    found: dict[str, list[Served] | Failed] = {
        "lamina serve": [Served(2000.0, 1e-5, 40 * MIB, 80 * MIB), Served(4000.0, 3e-5, 60 * MIB, 80 * MIB)],
        "qemu-nbd 7.2": [Served(1000.0, 1e-5, MIB), Served(2000.0, 1e-5, MIB)],
        "qemu-nbd 10.0": Failed("it does not listen"),
    }
    ours, _, failed = nbd.rows_of(work, found)
    assert ours.figure == Spread(3.0, 2.0, 4.0)
    assert ours.cpu == pytest.approx(20.0)
    assert ours.memory == 60 * MIB
    assert promised(ours) == [
        ("rate", "qemu-nbd 7.2", Spread(2.0, 2.0, 2.0), "met"),
        ("memory", "80 MiB", Spread(0.625, 0.5, 0.75), "met"),
    ]
    assert failed.error == "it does not listen"


# Rounds


def test_programs_take_turns_after_a_first_round(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", "import sys; open(sys.argv[1], 'a').write(sys.argv[2])", str(log)]
    checked: list[str] = []

    def check(_: Path) -> None:
        checked.append("x")

    tasks = [Task(name, [*command, name], check) for name in "ab"]
    found = in_turn(tasks, 3, tmp_path)
    assert log.read_text() == "abababab"
    assert {name: len(figures) for name, figures in found.items() if isinstance(figures, list)} == {"a": 3, "b": 3}
    assert checked == ["x", "x"]
    log.unlink()
    in_turn(tasks, 2, tmp_path, again=True)
    assert log.read_text() == "ab" + "aabb" * 2


def test_long_work_has_fewer_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_BUDGET", 0.0)
    found = in_turn([Task("a", [sys.executable, "-c", "pass"])], 9, tmp_path)
    assert len(found["a"]) == 3  # type: ignore[arg-type]


def test_a_program_that_fails_does_not_run_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", "import sys; open(sys.argv[1], 'a').write('x'); sys.exit('no space')", str(log)]
    found = in_turn([Task("a", command)], 3, tmp_path)
    assert str(found["a"]) == "no space"
    assert log.read_text() == "x"


def test_the_facts_of_a_machine_name_no_path_and_no_host(tmp_path: Path) -> None:
    import platform

    told = machine.facts(tmp_path)
    assert {"processors", "memory", "kernel", "Python", "file system"} <= set(told)
    said = " ".join(told.values())
    assert "/" not in said
    assert platform.node() not in said.split()
    assert machine.file_system(Path("/proc")) == "proc"

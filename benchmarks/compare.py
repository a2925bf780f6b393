"""Our programs compared with their peers: rows with promises, from the figures of all rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from .measure import Failed, Figures
from .results import Promise, Row, Spread

MIB = 1 << 20

#: The most memory of each of our commands.
MEMORY_TARGET = 200 * MIB

#: What a promise compares: the name on the page, and the figure.
_BASES = {"wall": ("wall", "wall"), "cpu": ("CPU", "cpu"), "size": ("size", "stored"), "more": ("wall", "wall")}


class Target(NamedTuple):
    """A promise of one of our programs, in comparison with the best peer: the highest ratio of wall time, CPU time or size
    ("wall", "cpu", "size"), or the most seconds of wall time beyond those of the peer ("more"). `limit` None: the ratio is
    only shown."""

    basis: str
    limit: float | None = None


#: The targets of our programs, by their names.
Targets = Mapping[str, Sequence[Target]]


def rows(targets: Targets, found: Mapping[str, list[Figures] | Failed], only_peer: str = "") -> list[Row]:
    """A row for each program; those of ours (the keys of `targets`) have promises. `only_peer`: the program that ours are
    compared with; otherwise each promise has the best of the others."""
    made = []
    for program, figures in found.items():
        row = Row(program)
        if isinstance(figures, Failed):
            row.error = str(figures)
        else:
            row.figure = Spread.of([one.wall for one in figures])
            row.cpu = median(one.cpu for one in figures)
            row.memory = max(one.memory for one in figures)
            row.stored = max(one.stored for one in figures) or None
        others = {
            name: other
            for name, other in found.items()
            if name not in targets and not isinstance(other, Failed) and only_peer in ("", name)
        }
        for target in targets.get(program, ()):
            row.promises.append(promise(target, figures, others))
        if program in targets and row.memory is not None and row.memory > MEMORY_TARGET:
            row.promises.append(
                Promise("memory", f"{MEMORY_TARGET // MIB} MiB", Spread(row.memory / MEMORY_TARGET), 1.0)
            )
        made.append(row)
    return made


def promise(target: Target, ours: list[Figures] | Failed, others: Mapping[str, list[Figures]]) -> Promise:
    """A target with what was found: the ratio (or the difference) of the medians, and the extremes of single rounds."""
    what, name = _BASES[target.basis]
    more = target.basis == "more"
    found = Promise(what, target=target.limit, unit="s more" if more else "")
    if isinstance(ours, Failed) or not others:
        return found

    def values(figures: list[Figures]) -> list[float]:
        return [float(getattr(one, name)) for one in figures]

    def compared(mine: float, theirs: float) -> float:
        return mine - theirs if more else mine / max(theirs, 1e-9)

    found.of = min(others, key=lambda one: median(values(others[one])))
    mine, theirs = values(ours), values(others[found.of])
    single = [compared(*pair) for pair in zip(mine, theirs, strict=False)]
    found.found = Spread(compared(median(mine), median(theirs)), min(single), max(single))
    return found

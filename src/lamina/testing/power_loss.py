"""The power-loss harness: record the writes of some code to its storage, then check every state that a power cut could leave.

    from lamina.testing.power_loss import cut_power

    def workload(storage, marks):
        store = Store(storage)
        store.put(b"a", b"1")
        store.sync()
        marks.durable("a")

    def verify(content, state):
        found = Store.recover(content)
        assert b"a" in found or "a" not in state.durable

    cut_power(workload, verify)

It knows nothing of image formats: `disk_history` and `image_checks` add the guarantees of images. The models are those of
`persistence`. The workload must be deterministic, or a failure cannot be repeated by its number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .persistence import DEFAULT_BOUNDS, Bounds, CrashState, Persistence, Record, crash_states
from .recorder import Marks, Recorder

Workload = Callable[[Recorder, Marks], Any]
#: Checks the bytes after the cut, and the state with the marks of that moment; raises if they are not legal.
Verify = Callable[[bytes, CrashState], Any]


class PowerLossFailure(AssertionError):
    """A power cut can leave a state that `verify` rejects. The text names the state, the reason and the way to repeat it; the
    reason is also the cause. `state` is the state, `recording` its recording."""

    def __init__(self, recording: Recording, state: CrashState, why: str) -> None:
        super().__init__(f"{why}\n{recording.describe(state)}")
        self.recording = recording
        self.state = state


@dataclass(frozen=True)
class Recording:
    """One run of a workload: `log`, on storage with the content `start`; and the parameters of its states."""

    start: bytes
    log: tuple[Record, ...]
    model: Persistence = Persistence.P4
    seed: int = 0
    bounds: Bounds = DEFAULT_BOUNDS

    def states(self) -> Iterator[CrashState]:
        """Every state, each once; see `persistence.crash_states`."""
        return crash_states(self.start, self.log, model=self.model, seed=self.seed, bounds=self.bounds)

    def examine(self, verify: Verify, *, only: int | None = None) -> int:
        """Check every state, or only the state with the number `only`. Returns the number of states. Raises PowerLossFailure
        for the first state that `verify` rejects, by an exception or by returning False."""
        count = 0
        for state in self.states():
            if only is not None and state.number != only:
                continue
            count += 1
            try:
                accepted = verify(state.content, state)
            except Exception as error:
                raise PowerLossFailure(self, state, f"{type(error).__name__}: {error}") from error
            if accepted is False:
                raise PowerLossFailure(self, state, "verify returned False")
            if only is not None:
                break
        return count

    def describe(self, state: CrashState) -> str:
        """A readable description of `state`, and the way to repeat it."""
        recent = [f"record {at}: {record}" for at, record in enumerate(self.log[: state.cut]) if record.kind in _MARKS][
            -4:
        ]
        lines = [
            f"state {state.number}: the power cut came before record {state.cut} of {len(self.log)}",
            f"  begun: {_last(state.begun)}; durable: {_last(state.durable)}",
            *(f"  {line}" for line in recent),
            "  since the last flush:" if state.story else "  no write since the last flush",
            *(f"    {line}" for line in state.story),
            f"to repeat it: the same workload with seed={self.seed}, model=Persistence.{self.model.name}, "
            f"bounds={self.bounds}, only={state.number}",
        ]
        return "\n".join(lines)


_MARKS = ("begin", "durable", "flush_done")


def _last(labels: tuple[Any, ...]) -> str:
    if not labels:
        return "nothing"
    return f"{labels[-1]!r}" + (f" and {len(labels) - 1} before it" if len(labels) > 1 else "")


def record(
    workload: Workload,
    *,
    start: bytes = b"",
    model: Persistence = Persistence.P4,
    seed: int = 0,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> Recording:
    """Run `workload(storage, marks)` once on storage with the content `start`."""
    storage = Recorder(start)
    workload(storage, storage.marks)
    return Recording(storage.start, tuple(storage.log), model, seed, bounds)


def cut_power(
    workload: Workload,
    verify: Verify,
    *,
    start: bytes = b"",
    model: Persistence = Persistence.P4,
    seed: int = 0,
    bounds: Bounds = DEFAULT_BOUNDS,
    only: int | None = None,
) -> int:
    """Run the workload, then call `verify(content, state)` for every state that a power cut during it can leave. Returns the
    number of states; raises PowerLossFailure for the first that is rejected. `only`: the number of a state that failed
    before."""
    return record(workload, start=start, model=model, seed=seed, bounds=bounds).examine(verify, only=only)

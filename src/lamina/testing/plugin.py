"""The pytest plugin: fixtures for tests of code that stores data, including drivers of Lamina.

pytest loads it wherever Lamina is installed (entry point `pytest11`), so it imports nothing but pytest until a test uses
one of its fixtures: `lamina_image`, `lamina_faulty`, `lamina_power_loss`. `LAMINA_SEED` in the environment changes the
random part of `lamina_power_loss`. The names `image`, `faulty` and `power_loss` are the old ones, without a prefix: they
warn, and will go. A fixture of the project with the same name takes precedence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from ..image import Image
    from .faulty import FaultyStorage
    from .persistence import CrashState
    from .power_loss import Recording, Verify, Workload


@pytest.fixture
def lamina_image(tmp_path: Path) -> Iterator[Callable[..., Image]]:
    """A function that creates an image in a temporary folder and opens it for writing: `lamina_image(size="10M",
    format="qcow2", **options)`, with the options of `lamina.create`. The images are closed after the test."""
    from ..api import open as open_image
    from ..creation import create

    images: list[Image] = []

    def make(size: int | str = 1 << 20, format: str = "qcow2", **options: Any) -> Image:
        path = tmp_path / f"image{len(images)}.{format}"
        create(path, format, size, **options)
        images.append(open_image(path, format=format, read_only=False))
        return images[-1]

    yield make
    for each in images:
        each.close()


@pytest.fixture
def lamina_faulty() -> FaultyStorage:
    """An empty storage in memory that fails on request: `lamina_faulty.fail("write", nth=3)`, `lamina_faulty.heal()`. It is a
    node, and `lamina_faulty.as_file()` is a file."""
    from .faulty import FaultyStorage

    return FaultyStorage()


class PowerLoss:
    """The value of the fixture `lamina_power_loss`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._at: tuple[Recording, CrashState] | None = None

    def __call__(self, workload: Workload, **options: Any) -> Iterator[CrashState]:
        """Run `workload(storage, marks)`, then yield every state that a power cut during it can leave. The report of a test
        that fails meanwhile contains the state. `options`: start, model, seed, bounds, as for
        `lamina.testing.power_loss.record`."""
        from .power_loss import record

        recording = record(workload, **{"seed": self.seed, **options})
        for state in recording.states():
            self._at = recording, state
            yield state
        self._at = None

    def check(self, workload: Workload, verify: Verify, **options: Any) -> int:
        """As `lamina.testing.cut_power`, with the seed of this run. Returns the number of states."""
        from .power_loss import cut_power

        return cut_power(workload, verify, **{"seed": self.seed, **options})

    def report(self) -> str | None:
        """The last state, if the iteration is not complete."""
        return None if self._at is None else self._at[0].describe(self._at[1])


@pytest.fixture
def lamina_power_loss() -> PowerLoss:
    """Every state that a power cut can leave: `for state in lamina_power_loss(workload): ...`, or
    `lamina_power_loss.check(workload, verify)`. See docs/testing-your-own.md."""
    return PowerLoss(int(os.environ.get("LAMINA_SEED", "0")))


@pytest.fixture
def image(request: pytest.FixtureRequest) -> Any:
    """The old name of `lamina_image`."""
    return _renamed(request, "image")


@pytest.fixture
def faulty(request: pytest.FixtureRequest) -> Any:
    """The old name of `lamina_faulty`."""
    return _renamed(request, "faulty")


@pytest.fixture
def power_loss(request: pytest.FixtureRequest) -> Any:
    """The old name of `lamina_power_loss`."""
    return _renamed(request, "power_loss")


def _renamed(request: pytest.FixtureRequest, name: str) -> Any:
    """The fixture of this old name, with a warning at the test that asks for it."""
    import warnings

    path, line, _ = request.node.location
    text = f"the fixture {name} is called lamina_{name} now"
    warnings.warn_explicit(text, DeprecationWarning, str(path), (line or 0) + 1)
    return request.getfixturevalue(f"lamina_{name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Add the last state to the report of a failing test."""
    report = yield
    asked = getattr(item, "funcargs", {})
    harness = asked.get("lamina_power_loss", asked.get("power_loss"))
    if call.when == "call" and report.failed and isinstance(harness, PowerLoss):
        told = harness.report()
        if told:
            report.sections.append(("power loss", told))
    return report

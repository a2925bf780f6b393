"""Test suites for authors of storage, formats and filters, and tools for tests of any code that stores data.

    from lamina.testing import FilterConformance

    class TestSlow(FilterConformance):
        def make(self, image):
            return Slow(image)

`StorageConformance`, `FormatConformance` and `FilterConformance` test a driver against the contract in `lamina.node`; they
compare it with the flat disk `Disk`. They need hypothesis and pytest (the extra `testing`), which no other module of
Lamina imports. For readable failures pytest should rewrite the assertions of these modules; call this before the import:
`pytest.register_assert_rewrite("lamina.testing")`.

`cut_power` checks every state that a power cut could leave, of any code (docs/testing-your-own.md); `FaultyStorage` fails on
request; `read_log` and `replay` read the logs of the filter `logwrites`. These need neither package. pytest finds the
fixtures `image`, `faulty` and `power_loss` by itself (`plugin`), so this module imports the others on demand.

This module itself has no assertions: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .faulty import FaultyStorage
    from .filters import FilterConformance
    from .formats import FormatConformance
    from .model import Disk, check_status
    from .persistence import Bounds, CrashState, Persistence
    from .plugin import PowerLoss
    from .power_loss import PowerLossFailure, cut_power
    from .recorder import Marks, Recorder
    from .storage import StorageConformance
    from .write_log import read_log, replay

__all__ = [
    "Bounds",
    "CrashState",
    "Disk",
    "FaultyStorage",
    "FilterConformance",
    "FormatConformance",
    "Marks",
    "Persistence",
    "PowerLoss",
    "PowerLossFailure",
    "Recorder",
    "StorageConformance",
    "check_status",
    "cut_power",
    "read_log",
    "replay",
]

_HOMES = {
    "Bounds": "persistence",
    "CrashState": "persistence",
    "Disk": "model",
    "FaultyStorage": "faulty",
    "FilterConformance": "filters",
    "FormatConformance": "formats",
    "Marks": "recorder",
    "Persistence": "persistence",
    "PowerLoss": "plugin",
    "PowerLossFailure": "power_loss",
    "Recorder": "recorder",
    "StorageConformance": "storage",
    "check_status": "model",
    "cut_power": "power_loss",
    "read_log": "write_log",
    "replay": "write_log",
}

#: What the extra `testing` installs.
_OF_TESTING = {"hypothesis", "pytest"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = getattr(import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as error:
        if error.name not in _OF_TESTING:
            raise
        text = f"lamina.testing.{name} needs {error.name}, which is not installed: pip install 'lamina[testing]'"
        raise ModuleNotFoundError(text, name=error.name) from error
    globals()[name] = found  # later lookups find it at once
    return found


def __dir__() -> list[str]:
    return sorted(__all__)

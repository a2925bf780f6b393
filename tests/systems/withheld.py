"""Modules that a child process cannot import, although they are installed here."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Collection, Sequence
from types import ModuleType


class Withheld(importlib.abc.MetaPathFinder):
    """Refuses the import of the modules `names`, and of those inside them."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if any(name == each or name.startswith(f"{each}.") for each in self._names):
            raise ModuleNotFoundError(f"No module named {name!r} (withheld by a test)", name=name)
        return None


def withhold(*names: str) -> None:
    """Let every later import of these modules fail. Those that are loaded are forgotten."""
    for module in list(sys.modules):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            del sys.modules[module]
    sys.meta_path.insert(0, Withheld(names))

"""The types of all public names are complete: what `pyright --verifytypes` finds, for the names of `test_public_names`.

pyright counts every module without an underscore as public. Here only what the list calls public must be known to it, with
all members, and every type that these mention. The drivers of formats are left out: their interface is that of
`lamina.format.Format`, and their other members are how they work inside.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .test_layers import ROOT
from .test_public_names import public

pytest.importorskip("pyright", reason='the extra "dev" has it')


def test_each_public_name_has_complete_types(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, "--verifytypes", "lamina", "--ignoreexternal", "--outputjson"],
        cwd=tmp_path,  # no configuration applies
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    found = json.loads(done.stdout)["typeCompleteness"]
    assert Path(found["packageRootDirectory"]) == ROOT / "src" / "lamina"
    names = {name for name, _ in public()} | {f"{kind.__module__}.{kind.__qualname__}" for _, kind in classes()}
    checked, unknown = set(), []
    for symbol in found["symbols"]:
        owner = next((name for name in parents(symbol["name"]) if name in names), None)
        if owner is None or owner.startswith("lamina.formats."):
            continue
        checked.add(owner)
        if not symbol["isTypeKnown"]:
            why = [
                one["message"].replace("\n", " ") for one in symbol["diagnostics"] if "docstring" not in one["message"]
            ]
            unknown.append(": ".join([symbol["name"], *why]))
    assert not unknown, f"{len(unknown)} types are not complete:\n" + "\n".join(unknown)
    assert len(checked) > 150


def classes() -> list[tuple[str, type]]:
    return [(name, value) for name, value in public() if isinstance(value, type)]


def parents(name: str) -> list[str]:
    """The name itself, and those of what it is inside."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 1, -1)]

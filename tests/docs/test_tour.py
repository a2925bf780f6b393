"""The tour fits two screens, finds all results of Lamina right, and says which of two answers is wrong."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from typing import Any

from tests.docs.markdown import ROOT


def tour() -> Any:
    spec = importlib.util.spec_from_file_location("tour", ROOT / "tour" / "tour.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tour() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, ROOT / "tour" / "tour.py"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 80
    assert lines[-1].startswith("All results of Lamina are right.")
    wrong = [line for line in lines if "WRONG" in line]
    assert all("qemu" in line for line in wrong)
    for program in "qemu-img", "qemu-nbd":
        if shutil.which(program):
            assert any(f"-> {program} is " in line for line in lines)


def test_what_is_wrong_with_a_status() -> None:
    module = tour()
    assert not module.rounding_fault(module.ROUNDED, [])
    assert "no data at all" in module.rounding_fault([module.zero(0, module.MIB100, 0)], [])
    assert "512" in module.rounding_fault(module.EXACT, [512, 1024, 1536])
    assert module.too_fine([0, 1000, 1024], 512) == [1000]

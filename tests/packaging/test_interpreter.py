"""Options of the interpreter: no module warns when it is imported, and nothing depends on assertions or docstrings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lamina.cli.main import COMMANDS
from tests.systems.test_systems import IMPORTS

ROOT = Path(__file__).resolve().parent.parent.parent
#: The first is this tree, wherever Lamina is installed.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src")}


def python(*arguments: str | Path, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    assert not done.stderr
    return done.stdout


def test_no_module_warns(tmp_path: Path) -> None:
    """Compiled anew, since Python warns of some things only then."""
    options = ("-X", "dev", "-W", "error", "-X", f"pycache_prefix={tmp_path / 'compiled'}")
    # Packages of others are compiled before; what they do wrong is not asked here.
    others = "import cryptography, deflate, hypothesis, isal, numpy, pytest, rich.progress\n"
    python("-X", f"pycache_prefix={tmp_path / 'compiled'}", "-c", others, folder=tmp_path)
    assert int(python(*options, "-c", others + IMPORTS, folder=tmp_path)) > 250


def test_jobs_without_assertions_and_docstrings(tmp_path: Path) -> None:
    jobs = ROOT / "tests" / "systems" / "jobs.py"
    told = python("-OO", jobs, tmp_path, "files", "backing", "tcp", "unix", "serve", folder=tmp_path)
    assert told.count("done") == 5


def test_helps_without_docstrings(tmp_path: Path) -> None:
    """Each command's help, from one process: with docstrings and without."""
    code = f"""
from lamina.cli.main import main
for name in {[*COMMANDS, "help"]}:
    if main([name, "--help"] if name != "help" else [name, "--all"]):
        raise SystemExit(name)
"""
    assert python("-OO", "-c", code, folder=tmp_path) == python("-c", code, folder=tmp_path)

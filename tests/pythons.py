"""A quick part of the tests under every Python that is found: `make test-pythons`.

    python tests/pythons.py [PYTEST ARGUMENTS]

Looks on the path for python3.11 and later (free-threaded ones too: python3.13t), and takes those that LAMINA_PYTHONS names,
separated by colons. Each gets an environment in `.venv/pythons`. An extra without a wheel for that Python is left out, and
named in the result.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv" / "pythons"
#: Besides `testing`, which is necessary.
EXTRAS = ("cli", "crypto", "fast", "fsspec")
#: Imports, warnings, start-up; the jobs; numbers and columns; threads, signals and forks; compression and encryption.
SUBSET = (
    "tests/architecture/test_startup.py",
    "tests/packaging/test_extras.py",
    "tests/packaging/test_interpreter.py",
    "tests/systems",
    "tests/unit/test_extents.py",
    "tests/unit/test_block_status.py",
    "tests/unit/test_storage_file.py",
    "tests/unit/test_atomic_file.py",
    "tests/unit/test_coding.py",
    "tests/unit/test_fork.py",
    "tests/unit/test_concurrency.py",
    "tests/unit/test_nbd_channel_waits.py",
    "tests/cli/test_help.py",
    "tests/cli/test_info.py",
)
ABOUT = (
    "import sys, sysconfig; print(sys.version.split()[0] + ('t' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''));"
    "sys.exit(sys.version_info < (3, 11))"
)


def pythons() -> dict[str, str]:
    """The version of each Python that runs, and its program."""
    names = [f"python3.{minor}{kind}" for minor in range(11, 20) for kind in ("", "t")]
    places = [each for each in os.environ.get("LAMINA_PYTHONS", "").split(":") if each]
    found: dict[str, str] = {}
    for place in (*places, *filter(None, map(shutil.which, names))):
        about = subprocess.run([place, "-c", ABOUT], capture_output=True, text=True, check=False)
        if about.returncode == 0:
            found.setdefault(about.stdout.strip(), place)
    return found


def install(python: str, folder: Path) -> tuple[Path, list[str]]:
    """An environment with Lamina, tests and extras: its Python, and the extras that could not be installed."""
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    inside = folder / "bin" / "python"
    pip = [inside, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--only-binary", ":all:"]
    subprocess.run([*pip, "setuptools>=77"], check=True)
    subprocess.run([*pip, "--no-build-isolation", "--editable", f"{ROOT}[testing]"], check=True)
    missing = []
    for extra in EXTRAS:
        command = [*pip, "--no-build-isolation", "--editable", f"{ROOT}[{extra}]"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            missing.append(extra)
    return inside, missing


def main(arguments: list[str]) -> int:
    found = pythons()
    told, failed = [], False
    for version, python in sorted(found.items()):
        try:
            inside, missing = install(python, ENVIRONMENTS / version)
        except subprocess.CalledProcessError as error:
            told.append(f"{version:9} not installed: {error}")
            failed = True
            continue
        command = [inside, "-X", "dev", "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or SUBSET)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        failed = failed or status != 0
        without = f", without {', '.join(missing)}" if missing else ""
        told.append(f"{version:9} {'failed' if status else 'passed'}{without}")
    print(*told or ["no Python from 3.11 on was found"], sep="\n")
    return 1 if failed or not found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

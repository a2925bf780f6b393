"""The wheel and the source distribution: complete, nothing foreign in them, and they work where they are installed.

Both are built, without a network, from a copy of the files under version control. The installation of the wheel needs a
package index: without one the test is skipped, and fails in CI.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

import pytest

from tests.conftest import missing

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: What only a clone has: the configuration of CI and of version control.
OF_A_CLONE = (".ci/", ".git")
#: What the build adds to a source distribution.
MADE = {"PKG-INFO", "setup.cfg"}
SMOKE = ROOT / "tests" / "systems" / "jobs.py"


def tracked() -> set[str]:
    """The files under version control, those of the next commit included; in an unpacked source distribution, its files."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        return {name for name in listed if name and (ROOT / name).is_file()}
    (sources,) = ROOT.glob("src/*.egg-info/SOURCES.txt")
    return {name for name in sources.read_text().splitlines() if ".egg-info/" not in name}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    try:
        version("build")
        fit = int(version("setuptools").partition(".")[0]) >= 77
    except PackageNotFoundError:
        fit = False
    if not fit:
        missing("build with setuptools from 77 on", "pip install 'lamina[dev]'")
    folder = tmp_path_factory.mktemp("distributions")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "source" / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=alone())
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def alone() -> dict[str, str]:
    """The environment without what would lead Python, or git, to this repository."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GIT_DIR")}


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    (found,) = built.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(found) as archive:
        archive.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    return top


def test_the_source_distribution_has_every_file_of_the_repository(unpacked: Path) -> None:
    found = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()}
    found = {name for name in found if ".egg-info/" not in name} - MADE
    expected = {name for name in tracked() if not name.startswith(OF_A_CLONE)} - MADE
    assert found == expected
    for name in expected:
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_the_wheel_has_the_package_and_the_manual(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    expected = {name.removeprefix("src/") for name in tracked() if name.startswith("src/lamina/")}
    manual = {PurePosixPath(name).name for name in tracked() if name.startswith("docs/man/")}
    stem = wheel.name.split("-py3")[0]
    information = {f"{stem}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    information |= {f"{stem}.dist-info/top_level.txt", f"{stem}.dist-info/licenses/LICENSE"}
    assert manual
    assert found == expected | information | {f"{stem}.data/data/share/man/man1/{name}" for name in manual}


def test_the_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(each for each in archive.namelist() if each.endswith("/METADATA"))
        found = Parser().parsestr(archive.read(name).decode())
        entry = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
        tags = archive.read(name.replace("METADATA", "WHEEL")).decode()
    assert found["Name"] == "lamina"
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "Apache-2.0"
    assert set(found.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    base = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.split(r"[^\w.-]", line)[0] for line in base} == {"numpy", "backports.zstd"}
    assert "lamina = lamina.cli.entry:run" in entry
    assert "Tag: py3-none-any" in tags  # for every Python, free-threaded ones included
    said = found["Description-Content-Type"], found.get_payload()
    assert said == ("text/markdown", (ROOT / "README.md").read_text())


def test_the_tests_of_the_source_distribution_start(unpacked: Path) -> None:
    """From the unpacked files alone: every test is found, and some run."""
    environment = alone() | {"PYTHONPATH": str(unpacked / "src"), "LAMINA_SEED": "1"}
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    collected = subprocess.run(
        [*run, "--collect-only", "tests"], cwd=unpacked, capture_output=True, text=True, env=environment
    )
    assert collected.returncode == 0, collected.stdout[-3000:]
    few = ["tests/unit/test_bitmap.py", "tests/architecture/test_layers.py", "tests/cli/test_names.py"]
    done = subprocess.run([*run, *few], cwd=unpacked, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.index
def test_the_wheel_works_with_its_base_requirements_alone(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    install = [programs / "python", "-m", "pip", "install", "--disable-pip-version-check", "--retries", "1", "-q"]
    required = subprocess.run([*install, *PROJECT["dependencies"]], capture_output=True, text=True, env=alone())
    if required.returncode:
        missing(f"what {wheel.name} requires", f"a package index must be reachable: {required.stderr.strip()[-300:]}")
    subprocess.run([*install, "--no-deps", wheel], check=True, env=alone())
    subprocess.run([programs / "python", "-m", "pip", "check"], check=True, env=alone(), capture_output=True)
    there = subprocess.run(
        [programs / "python", "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=True,
        env=alone(),
    ).stdout.lower()
    assert not re.search(r"^(rich|isal|deflate|cryptography|pytest|hypothesis)=", there, re.MULTILINE)
    assert (tmp_path / "venv" / "share" / "man" / "man1" / "lamina-convert.1").is_file()

    jobs = tmp_path / "jobs"
    jobs.mkdir()
    command = [programs / "python", "-I", "-W", "error", SMOKE, jobs, "files", "backing", "tcp", "unix", "serve"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=jobs, env=alone(), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done") == 5
    said = subprocess.run([programs / "lamina", "info", "new.qcow2"], capture_output=True, text=True, cwd=jobs)
    assert said.returncode == 0, said.stderr
    assert "file format: qcow2" in said.stdout

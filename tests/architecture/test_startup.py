"""What a short command may import: start-up is most of what `info`, `create` and `io` cost.

Each command runs in an interpreter of its own, which afterwards lists all that was imported.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lamina
from lamina.nbd import Export, Server

#: Each costs a tenth of a second or a good part of it. Nothing that a short command does needs one.
HEAVY = {"asyncio", "cryptography", "numpy", "rich"}
#: Milliseconds each, with what they import in turn. A small export is copied in little more than the time of the imports.
COSTLY = {"dataclasses", "inspect", "json", "lzma", "random", "shutil", "ssl", "tempfile"}

MARK = "== imported:"
RUN = f"""
import sys
from lamina.cli.main import main
status = main(sys.argv[1:])
sys.stdout.flush()
print("{MARK}", *sorted(sys.modules))
sys.exit(status)
"""


def imported_by(folder: Path, *arguments: str) -> set[str]:
    """The names of all modules that `lamina ARGUMENTS`, run in `folder`, imported. The command must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 0, f"lamina {' '.join(arguments)}: {done.stdout}{done.stderr}"
    last = done.stdout.splitlines()[-1]
    assert last.startswith(MARK)
    return set(last.removeprefix(MARK).split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with image.qcow2, overlay.qcow2 over it, and image.raw."""
    for arguments in (
        ["create", "-f", "qcow2", "image.qcow2", "64M"],
        ["create", "-f", "qcow2", "-b", "image.qcow2", "-F", "qcow2", "overlay.qcow2"],
        ["create", "-f", "raw", "image.raw", "64M"],
    ):
        subprocess.run([sys.executable, "-m", "lamina", *arguments], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["info", "image.qcow2"],
        ["info", "--output=json", "image.qcow2"],
        ["info", "--backing-chain", "-f", "qcow2", "overlay.qcow2"],
        ["info", "-f", "raw", "image.raw"],
        ["create", "-f", "qcow2", "new.qcow2", "1G"],
        ["create", "-f", "qcow2", "-b", "image.qcow2", "-F", "qcow2", "new.qcow2"],
        ["create", "-f", "raw", "new.raw", "1G"],
        ["io", "-c", "read 0 512", "image.qcow2"],
        ["io", "-f", "qcow2", "-c", "write -P 7 0 64k", "-c", "read -P 7 0 64k", "overlay.qcow2"],
        ["io", "-f", "raw", "-c", "write -z 0 1M", "image.raw"],
    ],
    ids=" ".join,
)
def test_short_commands_import_nothing_heavy(folder: Path, arguments: list[str]) -> None:
    modules = imported_by(folder, *arguments)
    assert "lamina.cli.main" in modules
    heavy = sorted(HEAVY & modules)
    assert not heavy, f"lamina {' '.join(arguments)} imports {', '.join(heavy)}"


def test_a_copy_of_an_export_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    with lamina.open({"driver": "memory", "size": len(content)}, read_only=False) as disk:
        disk.write(0, content)
        with Server([Export(disk)], unix=str(tmp_path / "socket")):
            modules = imported_by(tmp_path, "copy", "nbd+unix:///?socket=socket", "copied.raw")
    assert (tmp_path / "copied.raw").read_bytes() == content
    assert "lamina.jobs.copy" in modules
    needless = sorted((HEAVY | COSTLY) & modules)
    assert not needless, f"lamina copy imports {', '.join(needless)}"


def test_a_copy_of_a_file_imports_no_more_than_it_needs(folder: Path) -> None:
    needless = sorted((HEAVY | COSTLY) & imported_by(folder, "copy", "image.raw", "copied.raw"))
    assert not needless, f"lamina copy imports {', '.join(needless)}"


@pytest.mark.parametrize("arguments", [["-O", "qcow2", "image.raw", "there"], ["-O", "raw", "image.qcow2", "there"]])
def test_a_conversion_imports_numpy_and_nothing_else_that_costs(folder: Path, arguments: list[str]) -> None:
    """Threads of `lamina.workers` need neither pools nor logs."""
    modules = imported_by(folder, "convert", *arguments)
    ours = {"asyncio", "concurrent.futures", "cryptography", "logging", "rich", "shutil", "ssl", "tempfile"}
    assert "numpy" in modules
    assert not ours & modules, f"lamina convert imports {', '.join(sorted(ours & modules))}"


def test_the_package_itself_imports_nothing_heavy() -> None:
    """`import lamina` costs next to nothing; the public names come when they are first used."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, lamina; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    modules = set(done.stdout.split())
    assert not HEAVY & modules
    assert "argparse" not in modules


def test_module_and_function_are_one_command(folder: Path) -> None:
    """`python -m lamina` says what `lamina.cli.main.main` says."""
    arguments = ["info", "--output=json", "image.qcow2"]
    by_module = subprocess.run(
        [sys.executable, "-m", "lamina", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    by_function = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    assert by_module.stdout == by_function.stdout.partition(MARK)[0]

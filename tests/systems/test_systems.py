"""macOS and Windows, as far as Linux can show them: without the names that CPython lacks there (`pretend.py`), the main jobs
work, or are refused in plain words. docs/systems.md says what this shows, and what it does not.

Each test runs in a process of its own, whose modules lose these names before Lamina is imported.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from .pretend import MODULES_NOT_ON_WINDOWS, NOT_ON_DARWIN, NOT_ON_WINDOWS

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "src" / "lamina"

START = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "src")!r}]
from tests.systems import pretend
"""


def run(system: str, code: str, *arguments: object, folder: Path, before: str = "") -> str:
    """The standard output of `code` in a process that pretends to be on `system`, after the line `before`."""
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "dev",
            "-W",
            "error",
            "-c",
            f"{START}{before}\npretend.{system}\n{code}",
            *map(str, arguments),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=180,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert "Exception in thread" not in done.stderr, done.stderr
    return done.stdout


JOBS = """
from pathlib import Path
from tests.systems import jobs
for name in sys.argv[1:]:
    jobs.JOBS[name](Path.cwd())
    print(name)
"""

DARWIN = """
from lamina import capabilities as c
from lamina.nbd import sockets
assert not c.LINUX and c.FOLDERS and c.MOVES_OPEN_FILES and c.fcntl is not None
assert not (c.O_DIRECT or c.O_TMPFILE or c.SEEK_HOLES or c.RWF_DSYNC)
assert c.preadv is c._preadv and sockets._COMPLETE and not sockets.NO_SIGNAL
"""

WINDOWS = """
from lamina import capabilities as c
from lamina.nbd import sockets
assert not (c.LINUX or c.FOLDERS or c.MOVES_OPEN_FILES or c.fcntl or c.SEEK_HOLES)
assert not (c.O_NONBLOCK or c.O_NOFOLLOW or c.O_DIRECTORY) and c.O_CLOEXEC
assert c.preadv is c._preadv and not hasattr(c.os, "pread")
assert sockets.AF_UNIX == -1 and not sockets._COMPLETE and not sockets.NO_SIGNAL
"""

#: Imports every module of the package.
IMPORTS = """
import importlib, pkgutil, lamina
names = [each.name for each in pkgutil.walk_packages(lamina.__path__, "lamina.") if each.name != "lamina.__main__"]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


@pytest.mark.parametrize("system", ["darwin()", "darwin(full_fsync=False)"])
def test_the_jobs_on_macos(system: str, tmp_path: Path) -> None:
    names = ["files", "backing", "tcp", "unix", "serve"]
    assert run(system, DARWIN + JOBS, *names, folder=tmp_path).split() == names


def test_the_jobs_on_windows(tmp_path: Path) -> None:
    names = ["files", "tcp", "serve"]
    assert run("windows()", WINDOWS + JOBS, *names, folder=tmp_path).split() == names


def test_a_unix_socket_is_its_owners_alone_on_macos(tmp_path: Path) -> None:
    """The socket itself has no mode there; its name has one before it listens."""
    code = """
import os, socket, lamina
from lamina.nbd import Export, Server
real, seen = socket.socket.listen, []
def listening(self, *rest):
    seen.append(os.lstat("there").st_mode & 0o777)
    return real(self, *rest)
socket.socket.listen = listening
os.umask(0)
with lamina.open({"driver": "memory", "size": 512}) as image, Server([Export(image)], unix="there"):
    pass
assert seen == [0o600], seen
"""
    run("darwin()", code, folder=tmp_path)


@pytest.mark.parametrize("system", ["darwin()", "windows()"])
def test_every_module_is_imported(system: str, tmp_path: Path) -> None:
    others = "import asyncio, cryptography, fsspec, hypothesis, numpy, pytest"  # they look at the system in ways of their own
    assert int(run(system, IMPORTS, folder=tmp_path, before=others)) > 250


def test_what_macos_flushes_to_the_medium(tmp_path: Path) -> None:
    """A flush is F_FULLFSYNC, and a file system without that gets fsync; other errors are errors."""
    code = """
import errno, fcntl, os, lamina
seen, real, answer = [], fcntl.fcntl, 0
def full(fd, command, *rest):
    if command != fcntl.F_FULLFSYNC:
        return real(fd, command, *rest)
    seen.append("full")
    if answer:
        raise OSError(answer, os.strerror(answer))
def plain(fd, fsync=os.fsync):
    seen.append("fsync")
    fsync(fd)
fcntl.fcntl, os.fsync = full, plain
lamina.create("disk.raw", "raw", 1 << 20)
seen.clear()
with lamina.open("disk.raw", format="raw", read_only=False) as image:
    image.write(0, b"x"); image.flush()
    assert seen == ["full"], seen
    answer = errno.ENOTSUP
    image.write(0, b"x"); image.flush()
    assert seen == ["full", "full", "fsync"], seen
    answer = errno.EIO
    image.write(0, b"x")
    try:
        image.flush()
    except lamina.BlockIOError as error:
        assert error.errno == errno.EIO
    else:
        sys.exit("an error of the medium was swallowed")
    answer = 0
    try:
        image.flush()
    except lamina.BlockIOError:
        os._exit(0)
sys.exit("a flush succeeded after a failed one")
"""
    run("darwin()", code, folder=tmp_path)


REFUSED = """
import lamina
from lamina.cli.main import main
from lamina.nbd import Export, Server

def refused(words, job):
    try:
        job()
    except lamina.LaminaError as error:
        assert words in str(error), error
    else:
        sys.exit(f"not refused: {words}")

lamina.create("disk.raw", "raw", 1 << 20)
refused("lock", lambda: lamina.open({"driver": "raw", "file.locking": "on", "file.filename": "disk.raw"}))
refused("direct", lambda: lamina.open({"driver": "raw", "file.cache.direct": True, "file.filename": "disk.raw"}))
"""


def test_what_macos_refuses(tmp_path: Path) -> None:
    code = """
import os, stat
from lamina.storage.opening import require_file
refused("block device", lambda: require_file(stat.S_IFBLK | 0o600, "/dev/disk0"))
"""
    run("darwin()", REFUSED + code, folder=tmp_path)


def test_what_windows_refuses(tmp_path: Path) -> None:
    for arguments in (["base.qcow2", "1M"], ["-u", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "1M"]):
        command = [sys.executable, "-m", "lamina", "create", "-f", "qcow2", *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    code = """
refused("no Unix sockets", lambda: lamina.open("nbd+unix:///?socket=there", format="raw"))
with lamina.open({"driver": "memory", "size": 512}) as image:
    refused("no Unix sockets", lambda: Server([Export(image)], unix="there"))
refused("names inside images are not followed", lambda: lamina.open("top.qcow2", format="qcow2"))
top = {"driver": "qcow2", "file.filename": "top.qcow2", "backing.driver": "qcow2", "backing.file.filename": "base.qcow2"}
with lamina.open(top) as image:  # but a child in the options is opened
    assert image.read(0, 512) == bytes(512)
assert main(["serve", "--fork", "-f", "raw", "disk.raw"]) == 1
assert main(["serve", "--folder", "."]) == 1
"""
    run("windows()", REFUSED + code, folder=tmp_path)


def test_a_file_that_is_being_written_is_not_replaced_on_windows(tmp_path: Path) -> None:
    """There are no locks, and an open file cannot be removed: that is the lock of a temporary file."""
    code = """
import os, lamina
from lamina.atomic_file import AtomicFile
for there in (False, True):
    with AtomicFile("disk") as first:
        os.write(first.fd, b"first")
        try:
            with AtomicFile("disk") as second:
                sys.exit("two writers of one file")
        except lamina.LaminaError as error:
            assert "another program is writing" in str(error), error
    assert open("disk", "rb").read() == b"first"
try:
    with AtomicFile("disk") as failing:
        os.write(failing.fd, b"half")
        raise ValueError
except ValueError:
    pass
assert os.listdir(".") == ["disk"]
open(".lamina-new-disk", "wb").write(b"left by a killed process")
with AtomicFile("disk") as last:
    os.write(last.fd, b"last")
assert os.listdir(".") == ["disk"] and open("disk", "rb").read() == b"last"
"""
    run("windows()", code, folder=tmp_path)


# No name that a system lacks is used anywhere else

#: Where the names are asked for, and used where they are found.
GUARDED = {"capabilities.py", "nbd/sockets.py"}
#: Uses elsewhere, each behind a check of its own that the function makes first.
KNOWN = {
    "cli/daemon.py": {"fork", "setsid"},  # where `fork` is there
    "formats/qcow2/l1_table.py": {"MAP_PRIVATE"},
    "nbd/server/loop.py": {"epoll", "EPOLLIN"},
    "storage/holes.py": {"SEEK_DATA", "SEEK_HOLE"},  # where SEEK_HOLES is true
    "storage/file.py": {"SEEK_DATA"},
    "storage/system.py": {"copy_file_range"},
    "target_file.py": {
        "fchown",
        "getxattr",
        "listxattr",
        "removexattr",
        "setxattr",
    },  # of files with other owners, or any
    "atomic_file.py": {"sync"},  # where folders have descriptors
    "cli/io/shell.py": {"termios"},
    "cli/signals.py": {"SIGUSR1"},
}


def missing_names(source: str) -> set[str]:
    """The names in `source` that CPython on macOS or Windows lacks: attributes of modules of the system, and imports."""
    lacking = {
        (module.__name__, name)
        for table in (NOT_ON_DARWIN, NOT_ON_WINDOWS)
        for module, line in table.items()
        for name in line.split()
    }
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in lacking:
                found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.name for alias in node.names if (node.module, alias.name) in lacking}
            found |= {node.module} & set(MODULES_NOT_ON_WINDOWS) if node.module else set()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & set(MODULES_NOT_ON_WINDOWS)
    return found - {"readline"}  # which the shell of `lamina io` does without


def test_no_module_uses_what_a_system_lacks() -> None:
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        if name not in GUARDED and (found := missing_names(file.read_text()) - KNOWN.get(name, set())):
            wrong.append(f"{name}: {', '.join(sorted(found))}")
    assert not wrong, "take it from lamina.capabilities or lamina.nbd.sockets:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import os\nos.pread(0, 1, 2)", {"pread"}),
        ("from os import preadv, stat", {"preadv"}),
        ("import fcntl", {"fcntl"}),
        ("from termios import tcgetattr", {"termios"}),
        ("import socket\nsocket.AF_UNIX", {"AF_UNIX"}),
        ("import os\nos.read(0, 1)\nself.fork()", set()),
    ],
)
def test_how_such_a_use_is_found(source: str, found: set[str]) -> None:
    assert missing_names(source) == found

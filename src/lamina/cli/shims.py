"""`lamina shims`: write programs with the names of the reference tools, which start Lamina in their place."""

from __future__ import annotations

import os
import site
import stat
import sys
import sysconfig
from pathlib import Path

from ..capabilities import O_CLOEXEC, O_NOFOLLOW
from ..errors import BlockIOError, OptionError
from .arguments import Parser
from .personality import NAMES

_EXAMPLES = """
  lamina shims ~/lamina-bin                       qemu-img, qemu-io and qemu-nbd, which are Lamina
  lamina shims --force ~/lamina-bin               the same in place of other programs of these names
  PATH=~/lamina-bin:$PATH make check              a test suite that calls them
  LAMINA_COMPAT=10.0 ~/lamina-bin/qemu-img info disk.qcow2

The programs use this installation of Lamina, in any environment, until it moves. LAMINA_COMPAT chooses the version whose
behaviour they have: 7.2 (the default) or 10.0.
"""

#: The second line of every program that this command writes.
MARK = "# Written by lamina shims: starts Lamina in the place of the program of this name."
#: The longest first line that all systems accept, in bytes.
_LONGEST = 127


def main(argv: list[str]) -> int:
    parser = Parser(
        "shims", "Write programs named qemu-img, qemu-io and qemu-nbd, which start Lamina, into a folder.", _EXAMPLES
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that this command has not written")
    parser.add_quiet()
    parser.add_argument("folder", metavar="DIR", help="the folder; it is created if it does not exist")
    args = parser.parse(argv)

    folder = Path(args.folder)
    paths = [folder / name for name in NAMES]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            if not args.force and os.path.lexists(path) and not _is_ours(path):
                raise OptionError(
                    "this file is not one of lamina shims", path=str(path), hint="add --force to overwrite it"
                )
        for path in paths:
            _write(path, program_text(path.name))
    except OSError as error:
        if isinstance(error, BlockIOError):
            raise
        where = error.filename if isinstance(error.filename, str) else args.folder
        raise BlockIOError.from_os(error, "cannot write the programs", path=where) from error
    if not args.quiet:
        sys.stdout.write("".join(f"{path}\n" for path in paths))
    return 0


def program_text(name: str) -> str:
    """The program `name`: a script for the Python that runs now, whatever the environment of its caller is."""
    first = f"#!{sys.executable}\n{MARK}\n"
    if len(first.split("\n")[0]) > _LONGEST or " " in sys.executable:
        # The system does not start such a Python by the first line: a shell does, for which the rest is a string of Python.
        quoted = sys.executable.replace("'", "'\"'\"'")
        first = f"#!/bin/sh\n{MARK}\n'''exec' '{quoted}' \"$0\" \"$@\"\n' '''\n"
    return (
        f"{first}import sys\n\n"
        # Python puts the folder of the script first, where any file would replace a module.
        f"{_path_line()}\n"
        "from lamina.cli.entry import run\n\n"
        f'run("{name}")\n'
    )


def _path_line() -> str:
    """The statement that makes Python find this installation."""
    folder = str(Path(__file__).absolute().parents[2])
    installed = {*map(os.path.realpath, site.getsitepackages()), os.path.realpath(sysconfig.get_path("purelib"))}
    if os.path.realpath(folder) in installed:
        return "del sys.path[0]"
    return f"sys.path[0] = {folder!r}"


def _is_ours(path: Path) -> bool:
    """Whether this command has written the file. Never opens anything but a regular file."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    with open(path, "rb") as file:
        return MARK.encode() in file.read(4096).splitlines()


def _write(path: Path, text: str) -> None:
    """Replace the file at `path` by an executable program, at once."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0o777)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise

"""The machine, the versions and the commit of a run, without names of hosts and without paths."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from . import peers

GIB = 1 << 30

#: Programs that are compared or that measure, and the words that make them tell their versions.
PROGRAMS = {"nbdkit": "--version", "nbdcopy": "--version", "fio": "--version"}


def facts(folder: Path | None = None) -> dict[str, str]:
    """By name: processors, memory, kernel, the file system of `folder`, Python, and the peers that are there."""
    found = {
        "processors": f"{len(os.sched_getaffinity(0))}{_model()}",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB",
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "Python": platform.python_version(),
        "QEMU": ", ".join(
            ".".join(map(str, peer.version)) for peer in (peers.system(), peers.newest()) if peer is not None
        ),
    }
    if folder is not None:
        found["file system"] = file_system(folder)
    for program, word in PROGRAMS.items():
        found[program] = _version(program, word)
    return {name: value for name, value in found.items() if value}


def file_system(folder: Path) -> str:
    """The kind of the file system of `folder`, such as ext4."""
    best, kind = "", "unknown"
    where = str(folder.resolve())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, at, name, *_ = line.split(" ")
        if len(at) > len(best) and (where == at or where.startswith(at.rstrip("/") + "/")):
            best, kind = at, name
    return kind


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def commit() -> str:
    """The short name of the checked-out commit, with "and changes" if files of the repository differ from it; "unknown"
    outside of a repository."""
    name = _git("rev-parse", "--short", "HEAD")
    if not name:
        return "unknown"
    # The pages of figures are what a run writes.
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{page}" for page in WRITTEN))
    return f"{name} and changes" if changed else name


#: What the runs themselves write.
WRITTEN = (
    "README.md",
    "benchmarks/RESULTS.md",
    "benchmarks/results.json",
    "docs/evidence.md",
    "docs/speed*.svg",
    "docs/speed.md",
)


def _git(*words: str) -> str:
    if not shutil.which("git"):
        return ""
    done = subprocess.run(["git", *words], cwd=peers.ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if not done.returncode else ""


def _model() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)
    return f" ({found[1].strip()})" if found else ""


def _version(program: str, word: str) -> str:
    path = shutil.which(program)
    if not path:
        return ""
    told = subprocess.run([path, word], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+(\.\d+)+", told)
    return found[0] if found else ""

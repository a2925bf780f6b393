"""The paths of the programs with which Lamina is tested and compared.

`system` is the QEMU of this machine, found on PATH. `newest` is a second, newer one in a folder of its own, named by
`LAMINA_PEERS_BIN`, or `bin` below `LAMINA_PEERS`, or by the script `../shared/tools/peers` if a checkout has it. The tests
(`tests/conftest.py`) and the benchmark (`benchmarks/run.py`) both use this module. Nothing here imports Lamina.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT.parent / "shared" / "tools" / "peers"


@dataclass(frozen=True)
class Peer:
    """One installation of QEMU's tools: the paths of its programs and its version, such as (7, 2, 22)."""

    qemu_img: str
    qemu_io: str
    version: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"qemu-img {self.version[0]}.{self.version[1]}"


def system() -> Peer | None:
    """The QEMU on PATH, or None."""
    return _peer(None)


def newest() -> Peer | None:
    """The newer QEMU in its own folder, or None if no folder is named or it contains no qemu-img."""
    folder = _newest_folder()
    return _peer(folder) if folder else None


def _newest_folder() -> str | None:
    if named := os.environ.get("LAMINA_PEERS_BIN"):
        return named
    if root := os.environ.get("LAMINA_PEERS"):
        return os.path.join(root, "bin")
    if os.access(SCRIPT, os.X_OK):
        asked = subprocess.run([SCRIPT, "path"], capture_output=True, text=True, check=True)
        return asked.stdout.strip()
    return None


def _peer(folder: str | None) -> Peer | None:
    qemu_img = shutil.which("qemu-img", path=folder)
    qemu_io = shutil.which("qemu-io", path=folder)
    if not (qemu_img and qemu_io):
        return None
    told = subprocess.run([qemu_img, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+(?:\.\d+)+)", told)
    if not found:
        raise RuntimeError(f"{qemu_img} --version told no version: {told!r}")
    return Peer(qemu_img, qemu_io, tuple(map(int, found[1].split("."))))

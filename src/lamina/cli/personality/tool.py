"""What the three reference tools have in common."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ...limits import align_up
from ...policy import Policy
from ...version import __version__
from ..program import Program

#: The unit of their sizes of disks.
SECTOR = 512


class Tool(Program):
    """A reference tool in one of its versions."""

    plain_progress = True
    warns_of_references = False
    errors_as_json = False
    warns_of_secrets = False

    def __init__(self, version: tuple[int, int]) -> None:
        self.version = version

    def adjust(self, command: str, args: Namespace) -> None:
        if vars(args).get("references", self) is None:
            args.references = Policy.unchecked()

    def usual_options(self) -> Mapping[str, Any]:
        return {"round-size-up": SECTOR}

    def disk_size(self, size: int) -> int:
        return align_up(size, SECTOR)

    def write_version(self) -> None:
        """Print the first lines of `--version`, in the form that scripts read."""
        major, minor = self.version
        sys.stdout.write(f"{self.name} version {major}.{minor}.0 (lamina {__version__})\n")
        sys.stdout.write("Lamina, in the place of this program: see the documentation for what differs\n")

    def show_version(self) -> None:
        self.write_version()
        raise SystemExit(0)

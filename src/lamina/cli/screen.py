"""What the terminal on standard output can show: its width, its characters and its colours."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..picture.terminal import Look

_DEFAULT = 80


def columns() -> int:
    """The width: that of the environment (COLUMNS), of the terminal, or 80. (argparse imports shutil for that, which imports
    three compressors.)"""
    try:
        found = int(os.environ["COLUMNS"]) if "COLUMNS" in os.environ else os.get_terminal_size(1).columns
    except (ValueError, OSError):
        found = 0
    return found if found > 0 else _DEFAULT


def look() -> Look:
    """Colours and block characters for a terminal with UTF-8; neither where standard output is no terminal, where NO_COLOR
    is set in the environment, and where the locale has another encoding."""
    from ..picture.terminal import Look

    encoding = (sys.stdout.encoding or "").lower().replace("-", "").replace("_", "")
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or encoding != "utf8":
        return Look()
    if os.environ.get("TERM", "dumb") == "dumb":
        return Look(blocks=True)
    true = os.environ.get("COLORTERM") in ("truecolor", "24bit")
    # Some terminals tell the numbers of their colours, "foreground;background"; 7 and 15 are white.
    light = os.environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15")
    return Look(blocks=True, colours=1 << 24 if true else 256, light=light)

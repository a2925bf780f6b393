"""The entry point of the installed program `lamina`, of `python -m lamina`, and of the scripts of `lamina shims`."""

from __future__ import annotations

import gc
import signal
from typing import NoReturn


def run(name: str = "lamina") -> NoReturn:
    """Run the command line of this process, as the program `name`, and end the process.

    Until the command line has handlers of its own (`signals.install`), Ctrl-C ends the process as the system does: Python's
    handler would raise KeyboardInterrupt in the middle of an import, where nothing catches it, and print a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # `run_command` enables it when modules are imported; their objects live to the end
    from .main import run as run_command

    run_command(name)

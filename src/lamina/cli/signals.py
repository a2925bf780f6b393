"""Signal handling of commands.

SIGINT, SIGTERM and SIGHUP end a command: the first signal raises `Interrupted` in the main thread, so that images are closed
and incomplete files are removed; the second signal ends the process immediately. A signal that was ignored at the start of
the program (`nohup`, a background job of a script) stays ignored. SIGUSR1 prints the progress on standard error.

The clean-up after an interrupt may have to wait for an NBD server that does not reply. A watchdog thread checks whether the
other threads make progress: after one second without progress it closes all connections, and after another second it ends the
process. A thread in a system call of local storage (a flush to a slow disk) counts as making progress. `lamina serve`
installs its own handlers for the three signals.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

#: Those of the system: Windows has no SIGHUP, and no SIGUSR1.
ENDING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

#: Seconds without progress after which connections are closed, and again after which the process ends.
_PATIENCE = 1.0
#: Seconds after which the process ends although threads make progress (they may poll for ever), unless one of them was in
#: local storage within the last `_PATIENCE` seconds.
_LONGEST = 30.0
_POLL_INTERVAL = 0.05
_SHOW_CURSOR = b"\x1b[?25h"

#: The signal that ends the command, or 0.
_received = 0
#: The number of interrupts so far; a watchdog thread ends when the number changes.
_round = 0
#: Whether the command has returned, so that an exception could not be caught any more.
_finishing = False
#: Returns the line with the progress of the job; None if no job runs.
progress: Callable[[], str] | None = None
#: Restores the settings of the terminal before the process ends immediately.
restore_terminal: Callable[[], None] | None = None


class Interrupted(KeyboardInterrupt):
    """A signal ends the command. Notes that the command adds with `add_note` are printed after a semicolon."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def install() -> None:
    """Install the signal handlers. For the main thread."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, _tell)


def check() -> None:
    """Raise Interrupted if a signal was received whose exception was lost (in a finalizer, for example)."""
    if _received and not _finishing:
        raise Interrupted(_received)


def resume() -> None:
    """Reset the state after the clean-up of an interrupted command, so that the next signal counts as the first one."""
    global _received, _round
    _received = 0
    _round += 1


def finish() -> None:
    """Record that the command has returned. Later signals raise no exception, since no code would catch it."""
    global _finishing
    _finishing = True


def describe(stop: KeyboardInterrupt) -> tuple[str, int]:
    """The message for an interrupt and the exit status, which is 128 plus the number of the signal, as in shells."""
    number = getattr(stop, "number", int(signal.SIGINT))
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    return "; ".join((f"interrupted{by}", *getattr(stop, "__notes__", ()))), 128 + number


def _end(number: int, _: object) -> None:
    global _received, _round
    if _received:
        _end_at_once(number)
    _received = number
    _round += 1
    # Not threading.Thread: its start acquires locks that the interrupted code may hold.
    _thread.start_new_thread(_watch, (_round,))
    if not _finishing:
        raise Interrupted(number)


def _end_at_once(number: int) -> NoReturn:
    if restore_terminal is not None:
        with contextlib.suppress(Exception):
            restore_terminal()
    if "rich" in sys.modules:
        with contextlib.suppress(OSError):
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR)
    os._exit(128 + number)


def _tell(number: int, _: object) -> None:
    if progress is not None:
        # Not sys.stderr: the handler may have interrupted a write to it, and Python refuses nested writes.
        with contextlib.suppress(OSError):
            os.write(2, progress().encode())


# -- the watchdog


def _watch(mine: int) -> None:
    number = _received
    begun = moved = stored = time.monotonic()
    last: object = None
    abandoned = False
    while mine == _round:
        time.sleep(_POLL_INTERVAL)
        now = time.monotonic()
        positions, storing = _inspect_threads()
        if storing:
            moved = stored = now
        elif positions != last:
            last, moved = positions, now
        if not abandoned and now - moved >= _PATIENCE:
            abandoned, moved = True, now
            _abandon_connections()
        stuck = abandoned and now - moved >= _PATIENCE
        if mine == _round and (stuck or (now - begun >= _LONGEST and now - stored >= _PATIENCE)):
            _end_at_once(number)


def _inspect_threads() -> tuple[dict[int, tuple[int, int]], bool]:
    """The current instruction of each other thread, and whether one of them is in a module of local storage."""
    positions: dict[int, tuple[int, int]] = {}
    storing = False
    for thread, frame in sys._current_frames().items():
        if thread != _thread.get_ident():
            positions[thread] = (id(frame.f_code), frame.f_lasti)
            storing = storing or str(frame.f_globals.get("__name__")).startswith("lamina.storage.")
    return positions, storing


def _abandon_connections() -> None:
    # No import here: the interrupted thread may hold an import lock. A module that is not loaded has no connections.
    links = sys.modules.get("lamina.nbd.links")
    abandon = getattr(links, "abandon_all", None)
    if abandon is not None:
        abandon()

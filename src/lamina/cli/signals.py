"""What signals do to a running command.

SIGINT, SIGTERM and SIGHUP end the work: the first one raises `Interrupted` in the main thread, which unwinds the command, so
that images are closed and unfinished files are removed. The second one ends the process at once. A signal that was ignored
when the program started (`nohup`, a background job of a script) stays ignored. SIGUSR1 prints progress on standard error.

The unwinding may have to wait for an NBD server that says nothing. A watchdog notices when no thread moves: after a second it
abandons all connections, and a second later it ends the process. A thread inside a system call of local storage (a flush
to a slow disk) counts as moving. `lamina serve` replaces the handlers of the three signals by its own.
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

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Seconds without any movement after which connections are abandoned, and after which, once more, the process ends.
_PATIENCE = 1.0
#: Seconds after which the process ends although threads move (they may look again and again for what never comes), unless
#: one of them was in local storage within the last `_PATIENCE` seconds.
_LONGEST = 30.0
_LOOK_AGAIN = 0.05
_SHOW_CURSOR = b"\x1b[?25h"

#: The signal that the work is ending for, or 0.
_received = 0
#: How many signals began an end: a watchdog works only for the one that started it.
_round = 0
#: Whether the command has returned: nothing is left to unwind.
_finishing = False
#: Gives the line that tells how far the work is; None while nothing can be told.
progress: Callable[[], str] | None = None
#: Gives the terminal back as the program found it, before the process ends at once.
restore_terminal: Callable[[], None] | None = None


class Interrupted(KeyboardInterrupt):
    """A signal asks to end the work. What the command adds with `add_note` is told with it, behind a semicolon."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def install() -> None:
    """Handle the signals, in the main thread of the program."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    signal.signal(signal.SIGUSR1, _tell)


def check() -> None:
    """Raise Interrupted if a signal has come whose exception was lost on its way (in a finalizer, for example)."""
    if _received and not _finishing:
        raise Interrupted(_received)


def resume() -> None:
    """The work that was interrupted has unwound, and the program goes on: the next signal is a first one again."""
    global _received, _round
    _received = 0
    _round += 1


def finish() -> None:
    """The command has returned. From now on a signal raises nothing, since nothing could catch it."""
    global _finishing
    _finishing = True


def describe(stop: KeyboardInterrupt) -> tuple[str, int]:
    """The line that tells of an interrupt, and the exit status: 128 and the number of the signal, as shells report it."""
    number = getattr(stop, "number", int(signal.SIGINT))
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    return "; ".join((f"interrupted{by}", *getattr(stop, "__notes__", ()))), 128 + number


def _end(number: int, _: object) -> None:
    global _received, _round
    if _received:
        _end_at_once(number)
    _received = number
    _round += 1
    # Not threading.Thread, whose start takes locks that the interrupted code may hold.
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
        # Not through sys.stderr: the handler may have interrupted a write there, and Python refuses to nest the two.
        with contextlib.suppress(OSError):
            os.write(2, progress().encode())


# -- the watchdog


def _watch(mine: int) -> None:
    number = _received
    begun = moved = stored = time.monotonic()
    last: object = None
    abandoned = False
    while mine == _round:
        time.sleep(_LOOK_AGAIN)
        now = time.monotonic()
        positions, storing = _look()
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


def _look() -> tuple[dict[int, tuple[int, int]], bool]:
    """Where each other thread is, and whether one of them is in local storage."""
    positions: dict[int, tuple[int, int]] = {}
    storing = False
    for thread, frame in sys._current_frames().items():
        if thread != _thread.get_ident():
            positions[thread] = (id(frame.f_code), frame.f_lasti)
            storing = storing or str(frame.f_globals.get("__name__")).startswith("lamina.storage.")
    return positions, storing


def _abandon_connections() -> None:
    # Nothing is imported here: the interrupted thread may hold the lock of an import. What is not loaded has no connection.
    links = sys.modules.get("lamina.nbd.links")
    abandon = getattr(links, "abandon_all", None)
    if abandon is not None:
        abandon()

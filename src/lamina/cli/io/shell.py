"""Commands from standard input: a prompt with history and completion on a terminal, plain lines from a pipe."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from ...errors import BlockIOError
from .. import signals
from .commands import COMMANDS, execute
from .session import Session

PROMPT = "lamina> "
_REMEMBERED = 1000


def run(session: Session) -> None:
    """Carry out line after line until the input ends, or a line asks to end."""
    if sys.stdin.isatty():
        _interactive(session)
    else:
        for line in sys.stdin:
            more = execute(session, line)
            session.output.flush()  # whoever writes the lines may wait for the answer to each
            if not more:
                break


def _interactive(session: Session) -> None:
    save = _prepare_readline(session)
    signals.restore_terminal = _terminal_restorer()
    try:
        while True:
            session.output.flush()
            try:
                if not execute(session, input(PROMPT)):
                    return
            except EOFError:
                session.output.say("")
                return
            except KeyboardInterrupt as stop:
                if getattr(stop, "number", signal.SIGINT) != signal.SIGINT:
                    raise
                # It ends the line, or the command; never the shell.
                signals.resume()
                session.output.say("")
    finally:
        signals.restore_terminal = None
        save()


def _terminal_restorer() -> Callable[[], None] | None:
    """What sets the terminal of standard input as it is now; None if it has no settings."""
    import termios

    try:
        settings = termios.tcgetattr(0)
    except (OSError, termios.error):
        return None
    return lambda: termios.tcsetattr(0, termios.TCSANOW, settings)


def history_file() -> Path:
    """Where the lines of earlier sessions are kept."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return folder / "lamina" / "io_history"


def _prepare_readline(session: Session) -> Callable[[], None]:
    """Switch history and completion on, where there is readline. What is returned keeps the history for the next time."""
    try:
        import readline
    except ImportError:  # a Python that was built without it still reads lines
        return lambda: None

    path = history_file()
    try:
        if path.exists():
            readline.read_history_file(path)
    except OSError as error:
        session.output.complain(str(BlockIOError.from_os(error, "earlier lines cannot be read", path=str(path))))
    readline.set_history_length(_REMEMBERED)
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, state: _nth(complete(readline.get_line_buffer(), text), state))
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")

    def save() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
        except OSError as error:
            session.output.complain(str(BlockIOError.from_os(error, "the lines cannot be kept", path=str(path))))

    return save


def complete(line: str, text: str) -> list[str]:
    """What the word `text` at the end of `line` could become: a command, one of its options, or a file name."""
    words = line.split()
    if not words or (len(words) == 1 and not line.endswith(" ")) or (words[0] == "help"):
        return [f"{name} " for name in sorted(COMMANDS) if name.startswith(text)]
    command = COMMANDS.get(words[0])
    if text.startswith("-"):
        return [f"-{letter} " for letter in (command.letters if command else "") if f"-{letter}".startswith(text)]
    wants_file = words[0] in ("open", "o") or (len(words) > 1 and "-s" in words[-2:] and words[0] in ("write", "w"))
    return _files(text) if wants_file else []


def _files(text: str) -> list[str]:
    folder, name = os.path.split(text)
    try:
        with os.scandir(folder or ".") as found:
            return sorted(
                os.path.join(folder, one.name) + ("/" if one.is_dir() else " ")
                for one in found
                if one.name.startswith(name)
            )
    except OSError:
        return []  # a folder that cannot be listed completes nothing


def _nth(words: list[str], number: int) -> str | None:
    return words[number] if number < len(words) else None

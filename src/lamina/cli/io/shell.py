"""Commands from standard input: a prompt with history and completion on a terminal, or lines from a pipe."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import BlockIOError
from .. import program, signals
from .commands import COMMANDS, execute
from .session import Session

_HISTORY_LENGTH = 1000


def run(session: Session) -> None:
    """Execute lines until the end of the input or the command `quit`."""
    if sys.stdin.isatty():
        _interactive(session)
    else:
        for line in _prompted(session):
            more = execute(session, line)
            session.output.flush()  # the writer of the lines may wait for the result of each
            if not more:
                break


def _prompted(session: Session) -> Iterator[str]:
    """The lines of standard input; before each the prompt, if the program writes one to anything but a terminal."""
    while True:
        if program.current.prompts_always:
            session.output.write(program.current.prompt)
        if not (line := sys.stdin.readline()):
            return
        yield line


def _interactive(session: Session) -> None:
    save = _prepare_readline(session)
    signals.restore_terminal = _terminal_restorer()
    try:
        while True:
            session.output.flush()
            try:
                if not execute(session, input(program.current.prompt)):
                    return
            except EOFError:
                session.output.say("")
                return
            except KeyboardInterrupt as stop:
                if getattr(stop, "number", signal.SIGINT) != signal.SIGINT:
                    raise
                # Ctrl-C ends the line or the command, not the shell.
                signals.resume()
                session.output.say("")
    finally:
        signals.restore_terminal = None
        save()


def _terminal_restorer() -> Callable[[], None] | None:
    """A function that restores the current settings of the terminal; None if standard input has none."""
    try:
        import termios
    except ImportError:  # Windows
        return None
    try:
        settings = termios.tcgetattr(0)
    except (OSError, termios.error):
        return None
    return lambda: termios.tcsetattr(0, termios.TCSANOW, settings)


def history_file() -> Path:
    """The file with the lines of earlier sessions."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return folder / "lamina" / "io_history"


def _prepare_readline(session: Session) -> Callable[[], None]:
    """Enable history and completion, if readline is available. The returned function saves the history."""
    try:
        import readline
    except ImportError:  # a Python without readline still reads lines
        return lambda: None

    path = history_file()
    try:
        if path.exists():
            readline.read_history_file(path)
    except OSError as error:
        session.output.print_error(str(BlockIOError.from_os(error, "cannot read the history", path=str(path))))
    readline.set_history_length(_HISTORY_LENGTH)
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, state: _nth(complete(readline.get_line_buffer(), text), state))
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")

    def save() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
        except OSError as error:
            session.output.print_error(str(BlockIOError.from_os(error, "cannot save the history", path=str(path))))

    return save


def complete(line: str, text: str) -> list[str]:
    """The completions of the word `text` at the end of `line`: commands, options of a command, or file names."""
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
        return []  # the folder cannot be listed


def _nth(words: list[str], number: int) -> str | None:
    return words[number] if number < len(words) else None

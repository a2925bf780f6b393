"""`lamina COMMAND ...`: finds the command, runs it, and turns what goes wrong into one line and an exit status.

Only the module of the command that is asked for is imported. Such a module has `main(argv) -> int`, and FAILURE where
its exit status for an error is not 1.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import NoReturn

from ..errors import LaminaError, OptionError, printable
from ..version import __version__

#: Command -> (module in this package, what it does). In the order of the help.
COMMANDS = {
    "create": ("create", "make a new image"),
    "info": ("info", "show what an image is, opening nothing but the file; what an NBD server has"),
    "map": ("map", "show what each byte of an image is, and where it lies"),
    "check": ("check", "hold the structures of an image against one another"),
    "compare": ("compare", "tell whether two images hold the same"),
    "convert": ("convert", "copy an image into another one, of any format"),
    "serve": ("serve", "serve images over NBD"),
    "copy": ("copy", "copy bytes as they are, fast: files, devices, pipes, NBD exports"),
    "io": ("io.command", "read and write an image by hand: a shell, or -c commands"),
}

_HINT = "lamina --help lists the commands"


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; that of this process by default). Returns its exit
    status: 0, 1 for an error, or what the command defines."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    failure = 1
    try:
        if not arguments:
            raise OptionError("no command is given", hint=_HINT)
        name = arguments[0]
        if name in ("-h", "--help", "help"):
            sys.stdout.write(_help())
            return 0
        if name in ("-V", "--version"):
            sys.stdout.write(f"lamina {__version__}\n")
            return 0
        if name not in COMMANDS:
            raise _unknown(name)
        module = import_module(f"{__package__}.{COMMANDS[name][0]}")
        failure = getattr(module, "FAILURE", 1)
        return int(module.main(arguments[1:]))
    except BrokenPipeError:
        raise
    except (LaminaError, OSError) as error:
        sys.stdout.flush()
        sys.stderr.write(f"lamina: {printable(str(error))}\n")
        return failure
    except SystemExit as stop:  # how argparse ends after --help
        return stop.code if isinstance(stop.code, int) else 0


def run() -> NoReturn:
    """What the installed program `lamina` calls. Ends the process."""
    import signal

    def terminate(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    # So that what is half done is removed, as with Ctrl-C.
    signal.signal(signal.SIGTERM, terminate)
    # A name that this terminal cannot show must not end a command.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("lamina: interrupted\n")
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain when it flushes at the end: let it flush into
        # nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _help() -> str:
    rows = "".join(f"  {name:<9} {summary}\n" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: lamina COMMAND [OPTIONS] ...\n\n"
        "The block layer: disk images made, examined, compared and copied, exact about every byte.\n\n"
        f"commands:\n{rows}\n"
        "options:\n"
        "  -h, --help     show this help, or with a command that command's\n"
        "  -V, --version  show the version\n\n"
        "Commands and options are named as those of qemu-img. `lamina COMMAND --help` has examples.\n"
    )


def _unknown(name: str) -> OptionError:
    from difflib import get_close_matches

    near = get_close_matches(name[:64], COMMANDS, 1)
    return OptionError(f'there is no command "{name[:64]}"', hint=f"did you mean {near[0]}?" if near else _HINT)

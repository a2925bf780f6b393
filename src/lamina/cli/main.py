"""`lamina COMMAND ...`: finds the command, runs it, and turns what goes wrong into one line and an exit status.

Only the module of the command that is asked for is imported. Such a module has `main(argv) -> int`, and FAILURE where
its exit status for an error is not 1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from errno import EIO
from importlib import import_module
from typing import NoReturn

from ..errors import LaminaError, OptionError
from ..version import __version__
from . import signals
from .streams import complain, drop, lost_output, prepare

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
    status: 0, 1 for an error, or what the command defines. KeyboardInterrupt and BrokenPipeError pass; with LAMINA_DEBUG set
    in the environment, so does an exception that only a mistake in Lamina explains."""
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
        # A failed write to standard output is one, too: then what was said before it cannot be written either.
        lost = lost_output()
        complain(f"standard output: {os.strerror(lost.errno or EIO)}" if lost is not None else str(error))
        return failure
    except SystemExit as stop:  # how argparse ends after --help
        return stop.code if isinstance(stop.code, int) else 0
    except MemoryError:
        lost_output()
        complain("there is not enough memory for this; end other programs, or raise the limit of memory (ulimit -v)")
        return failure
    except Exception as error:
        if os.environ.get("LAMINA_DEBUG"):
            raise
        lost_output()
        words = " ".join(str(error).split())[:300]
        complain(
            f"a mistake in lamina: {type(error).__name__}: {words}; please report it, with the traceback that the same "
            "command shows with LAMINA_DEBUG=1 in the environment"
        )
        return failure
    finally:
        if graph := sys.modules.get("lamina.graph"):
            graph.usual.clear()  # options such as --timeout were for this command


def run() -> NoReturn:
    """What the installed program `lamina` calls. Ends the process."""
    try:
        signals.install()
        prepare()
        status = main()
        lost = lost_output()
        if lost is not None:
            complain(f"standard output: {os.strerror(lost.errno or EIO)}")
            status = status or _failure_status()
        # An error while the command unwound (a connection that was given up, ...) stands for the interrupt that it replaced.
        signals.check()
    except KeyboardInterrupt as stop:
        words, status = signals.describe(stop)
        with contextlib.suppress(BrokenPipeError):
            lost_output()
        complain(words)
    except BrokenPipeError:
        # Whoever read our output has enough.
        drop(sys.stdout)
        status = 128 + signal.SIGPIPE
    signals.finish()
    try:
        sys.stderr.flush()
    except OSError:
        drop(sys.stderr)
    sys.exit(status)


def _failure_status() -> int:
    """The exit status for an error of the command that this process ran."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    module = sys.modules.get(f"{__package__}.{COMMANDS[name][0]}") if name in COMMANDS else None
    return int(getattr(module, "FAILURE", 1))


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

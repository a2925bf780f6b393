"""`lamina COMMAND ...`: runs a command, and converts errors to one line on standard error and an exit status.

Only the module of the requested command is imported. Such a module has `main(argv) -> int`, and FAILURE if its exit status
for errors is not 1.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from errno import EIO
from importlib import import_module
from typing import NoReturn

from ..errors import LaminaError, OptionError, UsageError
from ..version import __version__
from . import failure, program, signals
from .streams import drop, lost_output, prepare, print_error

#: Command -> (module in this package, summary). In the order of the help.
COMMANDS = {
    "create": ("create", "create a new image"),
    "info": ("info", "show what an image is, or what an NBD server exports"),
    "inspect": ("inspect", "say whether an untrusted file is safe to open"),
    "map": ("map", "show the status and location of the bytes of an image"),
    "check": ("check", "check the metadata of an image for errors"),
    "resize": ("resize", "change the size of a disk"),
    "snapshot": ("snapshot", "list, create, apply or delete internal snapshots"),
    "bitmap": ("bitmap", "add, remove, clear, enable, disable or merge dirty bitmaps"),
    "amend": ("amend", "change options of an image in place"),
    "measure": ("measure", "say how long the file of a new image would be"),
    "compare": ("compare", "compare the contents of two images"),
    "diff": ("diff", "show the ranges in which two images differ, or what changed in one"),
    "commit": ("commit", "write what an overlay owns to its backing file"),
    "rebase": ("rebase", "give an overlay another backing file, or none"),
    "convert": ("convert", "copy an image to a new image, in any format"),
    "flatten": ("flatten", "make an overlay independent of its backing files, in place"),
    "compact": ("compact", "make the file of an image smaller, in place"),
    "dd": ("dd", "copy blocks of a disk to a new image"),
    "bench": ("bench", "measure the rate and latency of requests to an image"),
    "serve": ("serve", "serve images over NBD"),
    "copy": ("copy", "copy raw bytes between files, devices, pipes and NBD exports"),
    "shims": ("shims", "write programs named qemu-img, qemu-io, qemu-nbd: Lamina"),
    "explain": ("explain", "say what a byte of a file is, or where a byte of the disk is"),
    "view": ("view", "show an image, or two side by side, as an HTML page"),
    "graph": ("graph", "show the nodes of an opened image as a tree or a picture"),
    "drivers": ("drivers", "list storage, formats and filters, or the options of one"),
    "completion": ("completion", "print a script with which a shell completes words"),
    "io": ("io.command", "read and write an image interactively, or with -c commands"),
}

#: The commands that the help explains first.
FIRST = ("create", "info", "map", "check", "convert", "serve")

_HINT = "lamina --help lists the commands"

#: The exit status when the reader of standard output has closed it: as if SIGPIPE, number 13, had ended the program.
_BROKEN_PIPE = 128 + 13

#: The exit status for an error of the command that this process runs.
_failure = 1


def main(argv: list[str] | None = None, *, imported: Callable[[], None] | None = None) -> int:
    """Run the command line `argv` (default: that of this process), which excludes the name of the program. `imported` is
    called when the module of the command is imported, before it runs. Returns the exit status: 0, 1 for an error, or a value
    that the command defines. Raises KeyboardInterrupt and BrokenPipeError; with --debug, or LAMINA_DEBUG in the environment,
    also unexpected exceptions, which are bugs of Lamina."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = False
    global _failure
    _failure = wrong_usage = 1
    try:
        if program.current.errors_as_json and "--debug" in arguments:
            arguments, asked = failure.without_debug(arguments)
            if asked:
                debug = True
                failure.log_everything()
        arguments = program.current.command_line(arguments)
        if not arguments:
            raise OptionError("no command is given", hint=_HINT)
        if arguments[0] == "help" and arguments[1:2] and not arguments[1].startswith("-"):
            arguments = [arguments[1], "--help"]
        name = arguments[0]
        if name in ("-h", "--help", "help"):
            sys.stdout.write(_help(everything="--all" in arguments))
            return 0
        if name in ("-V", "--version"):
            sys.stdout.write(f"lamina {__version__}\n")
            return 0
        if name not in COMMANDS:
            raise _unknown(name)
        module = import_module(f"{__package__}.{COMMANDS[name][0]}")
        _failure = getattr(module, "FAILURE", 1)
        wrong_usage = getattr(module, "WRONG_USAGE", _failure)
        if imported is not None:
            imported()
        return int(module.main(arguments[1:]))
    except BrokenPipeError:
        raise
    except UsageError as error:
        failure.tell(error, arguments, debug=debug)
        return wrong_usage
    except (LaminaError, OSError) as error:
        # The error may be a failed write to standard output, so the buffered output cannot be written either.
        lost = lost_output()
        if lost is None:
            failure.tell(error, arguments, debug=debug)
        else:
            print_error(f"standard output: {os.strerror(lost.errno or EIO)}")
        return _failure
    except SystemExit as stop:  # argparse raises it after --help
        return stop.code if isinstance(stop.code, int) else 0
    except MemoryError:
        lost_output()
        print_error("out of memory; end other programs, or increase the memory limit (ulimit -v)")
        return _failure
    except Exception as error:
        signals.check()  # it may have struck inside code that is not ours, whose clean-up then failed: no bug
        if debug or os.environ.get("LAMINA_DEBUG"):
            raise
        lost_output()
        text = " ".join(str(error).split())[:300]
        print_error(
            f"a bug in lamina: {type(error).__name__}: {text}; please report it, with the traceback that the command prints "
            "with --debug"
        )
        return _failure
    finally:
        if graph := sys.modules.get("lamina.graph"):
            graph.usual.clear()  # options such as --timeout were for this command


def run(name: str = "lamina") -> NoReturn:
    """The entry point of the installed program `lamina`, or of the program `name` whose place it takes (see `personality`).
    Ends the process."""
    try:
        signals.install()
        prepare()
        status = _become(name) or main(imported=_collect_garbage)
        lost = lost_output()
        if lost is not None:
            print_error(f"standard output: {os.strerror(lost.errno or EIO)}")
            status = status or _failure
        # An error during the clean-up of an interrupted command may have replaced the interrupt.
        signals.check()
    except KeyboardInterrupt as stop:
        text, status = signals.describe(stop)
        with contextlib.suppress(BrokenPipeError):
            lost_output()
        print_error(text)
    except BrokenPipeError:
        # The reader of standard output has closed it.
        drop(sys.stdout)
        status = _BROKEN_PIPE
    signals.finish()
    try:
        sys.stderr.flush()
    except OSError:
        drop(sys.stderr)
    sys.exit(status)


def _become(name: str) -> int:
    """Make this process the program `name`. Returns the exit status, 0 if that was possible."""
    if name == program.current.name:
        return 0
    from .personality import personality

    try:
        program.current = personality(name)
    except LaminaError as error:
        print_error(error.command_text())
        return 1
    return 0


def _collect_garbage() -> None:
    # What is imported by now lives to the end of the process. The collector need not look at it, neither while the command
    # runs nor at the end: 6 ms of the 39 of `lamina info`.
    gc.freeze()
    gc.enable()


def _help(*, everything: bool = False) -> str:
    width = max(map(len, COMMANDS))
    rows = [(name, f"  {name:<{width}} {summary}\n") for name, (_, summary) in COMMANDS.items()]
    if everything:
        commands = "commands:\n" + "".join(row for _, row in rows)
    else:
        lines = [""]
        for name in COMMANDS:
            if len(lines[-1]) + len(name) > 76:
                lines.append("")
            lines[-1] += f" {name}"
        first = "".join(row for name, row in rows if name in FIRST)
        commands = f"the first commands:\n{first}\nall commands:\n" + "".join(f" {line}\n" for line in lines)
    return (
        "usage: lamina COMMAND [OPTIONS] ...\n\n"
        f"Create, inspect, compare, convert and serve disk images.\n\n{commands}\n"
        "options:\n"
        "  -h, --help     show this help; with a command, the help of the command\n"
        "  -V, --version  show the version\n"
        "      --debug    with a command: log what happens, and show tracebacks of errors\n\n"
        "`lamina help COMMAND` shows options and examples, `lamina help --all` what each\n"
        "command does. Commands and options have the names of qemu-img.\n"
    )


def _unknown(name: str) -> OptionError:
    from difflib import get_close_matches

    if name.split("=")[0] in ("-T", "--trace"):
        return OptionError(
            f"{name[:64]}: not supported", hint="--debug after the command, or the filter log, tells what happens"
        )
    near = get_close_matches(name[:64], COMMANDS, 1)
    return OptionError(f'unknown command "{name[:64]}"', hint=f"did you mean {near[0]}?" if near else _HINT)

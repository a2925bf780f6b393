"""`lamina io`: reads and writes an image by commands. Options, commands and their output are those of qemu-io."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ...errors import LaminaError, OptionError
from .. import program
from ..arguments import Parser, image_options
from .commands import execute
from .opening import with_modes
from .output import Output
from .session import Session
from .target import AIO_MODES, CACHE_MODES, DISCARD_MODES, Target

_EXAMPLES = """
  lamina io -f raw -c 'write -P 7 1M 64k' -c 'read -P 7 1M 64k' disk.img
  lamina io -r disk.qcow2                        a shell; enter help
  lamina io -c 'read -v 0 512' --image-opts driver=raw,file.filename=disk.img,offset=1M -r
  echo 'alloc 0 1G' | lamina io -r disk.qcow2
"""

_DESCRIPTION = """\
Read and write an image by commands, from the options -c in their order, or from standard input. The exit status is 1 if a
command failed; the other commands are executed all the same. `lamina io -c help` lists the commands."""


def main(argv: list[str]) -> int:
    """Run `lamina io` with these arguments. Returns the exit status."""
    args = _parser().parse(argv)
    session = Session(Output(program.current.name), Target())
    target = _target(args)
    session.default = replace(target, name=None, options={}, format=None)
    if program.current.opens_with_own_options:
        session.default = Target(references=target.references, budget=target.budget)
    try:
        try:
            if args.file is not None:
                session.open(target)
            _run(session, args.cmd)
        finally:
            session.end()
    except LaminaError as error:
        # The image cannot be opened, or its close failed: no further commands run.
        session.output.print_error(error.command_text())
        return 1
    return 1 if session.failed else 0


def _run(session: Session, lines: list[str] | None) -> None:
    if lines is None:
        from . import shell

        shell.run(session)
        return
    for line in lines:
        if not execute(session, line):
            break


def _target(args: argparse.Namespace) -> Target:
    """The image that the options of the program describe."""
    target = Target(args.file, format=args.format, references=args.references, budget=args.limits)
    if args.image_opts:
        if args.format is not None:
            raise OptionError("-f and --image-opts exclude each other", hint="write driver=FORMAT into the options")
        target = replace(target, name=None, options=image_options(args.file or "", last_wins=True))
    names = {"r": "read_only", "s": "snapshot", "n": "nocache", "C": "copy_on_read", "U": "force_share"}
    flags = {letter: [""] for letter, name in names.items() if getattr(args, name)}
    flags |= {letter: [value] for letter in "tdi" if (value := getattr(args, letter)) is not None}
    return with_modes(target, flags)


def _parser() -> Parser:
    parser = Parser("io", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("-c", "--cmd", action="append", metavar="COMMAND", help="execute this command; may be repeated")
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: detected)")
    parser.add_argument("-r", "--read-only", action="store_true", help="open images read-only")
    parser.add_argument("-n", "--nocache", action="store_true", help="bypass the page cache, like -t none")
    parser.add_argument(
        "-t", "--cache", dest="t", metavar="MODE", help=f"cache mode: {', '.join(CACHE_MODES)} (default: writethrough)"
    )
    parser.add_argument("-d", "--discard", dest="d", metavar="MODE", help=f"discards: {', '.join(DISCARD_MODES)}")
    parser.add_argument("-i", "--aio", dest="i", metavar="MODE", help=f"{', '.join(AIO_MODES)}: no difference here")
    parser.add_argument("-k", "--native-aio", action="store_true", help="like -i native")
    parser.add_argument("-m", "--misalign", action="store_true", help="ignored: buffers need not be aligned")
    parser.add_argument("-s", "--snapshot", action="store_true", help="keep changes in memory, not in the image")
    parser.add_argument(
        "-C", "--copy-on-read", action="store_true", help="copy data read from backing images to the image"
    )
    parser.add_later("-T", "--trace", "tracing is not there yet", metavar="PATTERN")
    parser.add_access()
    parser.add_argument("file", metavar="FILE", nargs="?", help="the image")
    return parser

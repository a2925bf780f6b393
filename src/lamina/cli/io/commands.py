"""The commands of `lamina io`: their table, their help, and the execution of a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from errno import ENOMEM

from ...errors import BlockIOError, LaminaError, OptionError
from .. import signals
from . import breakpoints, grammar, opening, status, transfers
from .session import Session

Handler = Callable[[Session, dict[str, list[str]], Sequence[str]], bool]

#: The meaning of each option; `Command.meanings` has the meanings that differ for a command.
_MEANINGS = {
    "C": "report in one line for programs: bytes,operations,time,bytes per second,operations per second",
    "P": "BYTE  the value of every byte to write or expect",
    "q": "do not report the request",
    "v": "show the bytes in hex",
    "f": "FUA: return after the bytes are on stable storage",
    "z": "write zeros, without sending them if possible",
    "u": "with -z: allow deallocation",
    "n": "with -z: fail instead of writing explicit zeros",
    "c": "write compressed clusters if the format supports them",
    "b": "access the saved state of the virtual machine (not there yet)",
    "p": "ignored",
    "r": "ignored (buffers need no registration)",
    "i": "only report the request as invalid",
    "k": "ignored (requests come from threads)",
}
_OPENING = {
    "r": "read-only",
    "s": "keep changes in memory until the image is closed",
    "C": "copy data read from a backing image to the top image",
    "n": "bypass the page cache, like -t none",
    "U": "open without locks while another program may write to it; needs -r",
    "i": "MODE  threads, native, io_uring: no difference here",
    "t": "MODE  writeback, none (off), writethrough, directsync, unsafe",
    "d": "MODE  unmap (on) or ignore (off): the effect of discards",
    "o": "KEY=VALUE,...  options of the driver or of the graph (driver=..., file.filename=...)",
}


@dataclass(frozen=True)
class Command:
    """One command. `accepts`: the letters of its options for `grammar.parse_flags`; `operands`: their notation in the help;
    `minimum` and `maximum`: the number of operands (None: no limit)."""

    name: str
    handler: Handler
    summary: str
    operands: str = ""
    accepts: str = ""
    minimum: int = 0
    maximum: int | None = 0
    alias: str = ""
    meanings: dict[str, str] | None = None
    example: str = ""

    @property
    def letters(self) -> str:
        return self.accepts.replace(":", "")

    @property
    def usage(self) -> str:
        plain = "".join(one for one in self.letters if f"{one}:" not in self.accepts)
        words = [self.name] + ([f"[-{plain}]"] if plain else [])
        words += [f"[-{one} {self._meaning(one).split('  ')[0]}]" for one in self.letters if f"{one}:" in self.accepts]
        return " ".join((*words, *([self.operands] if self.operands else [])))

    def help(self) -> list[str]:
        """The lines of the help."""
        lines = [f"{self.usage}", f"  {self.summary}"]
        if self.alias:
            lines.append(f"  short: {self.alias}")
        for one in self.letters:
            head, _, tail = self._meaning(one).rpartition("  ")
            lines.append(f"    {f'-{one} {head}'.rstrip():<18} {tail}")
        if self.example:
            lines.append(f"  example: {self.example}")
        return lines

    def _meaning(self, letter: str) -> str:
        return (self.meanings or {}).get(letter) or _MEANINGS[letter]


def show_help(session: Session, flags: dict[str, list[str]], operands: Sequence[str]) -> bool:
    if operands:
        session.output.say(*find(operands[0]).help())
        return True
    width = max(map(len, COMMANDS))
    session.output.say(
        *(f"{name:<{width}} {one.alias:>2}  {one.summary}" for name, one in sorted(COMMANDS.items())),
        "",
        "Offsets and lengths are in bytes, with a suffix (64k, 1.5M), or hex (0x200). help COMMAND shows the options.",
    )
    return True


def _quit(session: Session, flags: dict[str, list[str]], operands: Sequence[str]) -> bool:
    return True


_RANGE = "OFFSET LENGTH"
_VECTOR = "OFFSET LENGTH [LENGTH...]"
_READ = {"s": "OFFSET  with -P: the start of the part to verify", "l": "LENGTH  with -P: the length of that part"}
_WRITE = {"s": "FILE  write the repeated content of this file"}
_PREALLOCATE = {"m": "MODE  preallocation of the added part: off"}
_REOPEN = {
    "r": "read-only",
    "w": "read-write",
    "c": "MODE  the cache mode; see open -t",
    "o": "KEY=VALUE,...  options to change",
}

COMMANDS = {
    one.name: one
    for one in (
        Command(
            "read", transfers.read, "read bytes, show or verify them", _RANGE, "bCqrvpP:s:l:", 2, 2, "r", _READ,
            "read -P 0xcd 512 1k",
        ),
        Command(
            "write", transfers.write, "write a pattern (0xcd), zeros, or a file's content", _RANGE, "bcCfnpqruzP:s:",
            2, 2, "w", _WRITE, "write -P 7 1M 64k",
        ),
        Command("readv", transfers.readv, "read bytes into several buffers", _VECTOR, "CqrvP:", 2, None),
        Command("writev", transfers.writev, "write bytes from several buffers", _VECTOR, "CfqrP:", 2, None),
        Command("aio_read", transfers.aio_read, "read in the background", _VECTOR, "CiqrvP:", 2, None),
        Command("aio_write", transfers.aio_write, "write in the background", _VECTOR, "CfiqruzP:", 2, None),
        Command("aio_discard", transfers.aio_discard, "discard in the background", _RANGE, "Cq", 2, 2),
        Command("aio_flush", transfers.aio_flush, "wait for the requests in the background"),
        Command("discard", transfers.discard, "discard bytes", _RANGE, "Cq", 2, 2, "d"),
        Command("flush", status.flush, "flush written data to stable storage", alias="f"),
        Command("truncate", status.truncate, "change the length of the disk", "SIZE", "m:", 1, 1, "t", _PREALLOCATE),
        Command("length", status.length, "show the length of the disk", alias="l"),
        Command("info", status.info, "show the format and its properties", alias="i"),
        Command("map", status.map_allocation, "show the allocated ranges of the top layer"),
        Command("alloc", status.alloc, "count the allocated bytes of the top layer", "OFFSET [LENGTH]", "", 1, 2, "a"),
        Command(
            "open", opening.open_image, "open an image", "[FILE]", "rsCnkUi:t:d:o:", 0, 1, "o", _OPENING,
            "open -r -o driver=qcow2 disk.qcow2",
        ),
        Command("reopen", opening.reopen_image, "open the image again with other options", "", "rwc:o:", meanings=_REOPEN),
        Command("close", opening.close_image, "close the image", alias="c"),
        Command("sleep", opening.sleep, "wait", "MILLISECONDS", "", 1, 1),
        Command(
            "break", breakpoints.set_break, "stop the next request at an event (needs blkdebug)", "EVENT TAG", "", 2, 2,
            example="break write_aio A",
        ),
        Command("remove_break", breakpoints.remove_break, "remove breakpoints and resume their requests", "TAG", "", 1, 1),
        Command("resume", breakpoints.resume, "resume a stopped request", "TAG", "", 1, 1),
        Command("wait_break", breakpoints.wait_break, "wait until a request is stopped", "TAG", "", 1, 1),
        Command("abort", opening.abort, "abort this program, as in a crash"),
        Command("sigraise", opening.raise_signal, "send a signal to this program", "NUMBER", "", 1, 1),
        Command("help", show_help, "show all commands, or one", "[COMMAND]", "", 0, 1, "?"),
        Command("quit", _quit, "end the program", maximum=None, alias="q"),
    )
}  # fmt: skip
_BY_ALIAS = {one.alias: one for one in COMMANDS.values() if one.alias}


def find(word: str) -> Command:
    """The command with the name or alias `word`."""
    found = COMMANDS.get(word) or _BY_ALIAS.get(word)
    if found is None:
        near = get_close_matches(word, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "help lists the commands"
        raise OptionError(f"there is no command {word!r}", hint=hint)
    return found


def execute(session: Session, line: str) -> bool:
    """Execute one line. A failure is reported and sets `session.failed`. Returns False for the command `quit`."""
    signals.check()
    words = grammar.split(line)
    if not words:
        return True
    try:
        command = find(words[0])
        if command.handler is _quit:
            return False
        if not _run(session, command, words[1:]):
            session.failed = True
    except LaminaError as error:
        session.failed = True
        session.output.print_error(error.command_text())
    return True


def _run(session: Session, command: Command, words: Sequence[str]) -> bool:
    try:
        flags, operands = grammar.parse_flags(words, command.accepts)
        if len(operands) < command.minimum:
            raise OptionError("too few operands")
        if command.maximum is not None and len(operands) > command.maximum:
            raise OptionError("too many operands")
    except OptionError as error:
        error.hint = f"usage: {command.usage}"
        error.message = f"{command.name}: {error.message}"
        raise
    try:
        return command.handler(session, flags, operands)
    except MemoryError as error:
        raise BlockIOError(f"{command.name}: out of memory for a buffer of that length", errno=ENOMEM) from error

"""The commands that transfer bytes: read, write and discard, their vectored variants, and those in the background (aio_*).

A command creates a `Transfer`, which runs immediately or in a thread of the session, and reports its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from ...errors import LaminaError, OptionError, OutOfRange, UnsupportedFeature
from ...node import require_writable
from . import grammar, patterns
from .output import hex_dump, machine_statistics, statistics
from .session import Session

if TYPE_CHECKING:
    from ...image import Image

Flags = dict[str, list[str]]


@dataclass
class Transfer:
    """One request. `verb` and `name` are the words that report its success and its failure."""

    verb: str
    name: str
    offset: int
    length: int
    flags: Flags
    action: Callable[[], None]
    #: The buffer of a read.
    data: bytearray | None = None
    #: The part of the buffer to verify: (start, length, value of each byte).
    expected: tuple[int, int, int] | None = None

    def run(self, session: Session) -> bool:
        """Execute the request and report it, in lines that stay together. Returns whether it succeeded."""
        started = perf_counter()
        try:
            self.action()
        except LaminaError as error:
            session.output.failure(self.name, error)
            return False
        seconds = perf_counter() - started
        lines, good = [], True
        if self.expected is not None and self.data is not None:
            start, length, byte = self.expected
            if not patterns.matches(self.data, start, length, byte):
                lines.append(f"Pattern verification failed at offset {self.offset + start}, {length} bytes")
                good = False
        if "q" not in self.flags:
            if "v" in self.flags and self.data is not None:
                lines += hex_dump(self.offset, self.data)
            if "C" in self.flags:
                lines.append(machine_statistics(self.length, seconds))
            else:
                lines += statistics(self.verb, self.offset, self.length, seconds)
        if lines:
            session.output.say(*lines)
        return good


def read(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    offset, length = _range(operands)
    transfer = _reading(session, "read", flags, offset, grammar.bounded(length))
    if "s" in flags or "l" in flags:
        if "P" not in flags:
            raise OptionError("-s and -l need a pattern to verify", hint="add -P")
        start = grammar.size(flags["s"][-1]) if "s" in flags else 0
        count = grammar.size(flags["l"][-1]) if "l" in flags else length - start
        if start > length or start + count > length:
            raise OptionError(f"the part of {count} bytes at offset {start} exceeds the {length} bytes read")
        transfer.expected = (start, count, grammar.pattern_byte(flags["P"][-1]))
    return transfer.run(session)


def readv(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    return _reading(session, "readv", flags, *_ranges(operands)).run(session)


def aio_read(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    transfer = _reading(session, "readv", flags, *_ranges(operands))
    return _submit(session, transfer, "read")


def write(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    offset, length = _range(operands)
    if sum(letter in flags for letter in "zPs") > 1:
        raise OptionError("-z, -P and -s exclude each other", hint="give one of them")
    if "n" in flags and "z" not in flags:
        raise OptionError("-n needs -z", hint="add -z")
    for letter, others in (("b", "cz"), ("c", "z"), ("f", "bc")):
        if letter in flags and any(other in flags for other in others):
            raise OptionError(f"-{letter} cannot be combined with " + " or ".join(f"-{other}" for other in others))
    return _writing(session, "write", flags, offset, length).run(session)


def writev(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    return _writing(session, "writev", flags, *_ranges(operands)).run(session)


def aio_write(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    if "z" in flags and len(operands) > 2:
        raise OptionError("-z takes one length")
    offset, length = _range(operands) if "z" in flags else _ranges(operands)
    return _submit(session, _writing(session, "aio_write", flags, offset, length), "write")


def discard(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    return _discarding(session, "discard", "discard", flags, operands).run(session)


def aio_discard(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    # With a trailing space: qemu-io prints two spaces here, and scripts compare the line.
    return _submit(session, _discarding(session, "aio_discard", "discarded ", flags, operands), "discard")


def aio_flush(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    session.drain()
    return True


def _submit(session: Session, transfer: Transfer, what: str) -> bool:
    if "i" in transfer.flags:
        session.output.say(f"injecting invalid {what} request")
        return True

    def work() -> None:
        transfer.run(session)
        session.output.flush()

    session.submit(work)
    return True


def _range(operands: Sequence[str]) -> tuple[int, int]:
    return grammar.size(operands[0]), grammar.size(operands[1])


def _ranges(operands: Sequence[str]) -> tuple[int, int]:
    """The offset, and the sum of all lengths, since the buffers of a vector are contiguous."""
    return grammar.size(operands[0]), grammar.bounded(sum(map(grammar.size, operands[1:])))


def _is_outside(image: Image, offset: int, length: int) -> bool:
    """Whether a request is outside the disk, so that it fails and needs no buffer."""
    return not 0 <= offset <= image.size - length


def _reading(session: Session, name: str, flags: Flags, offset: int, length: int) -> Transfer:
    image = session.image
    byte = grammar.pattern_byte(flags["P"][-1]) if "P" in flags else None
    outside = _is_outside(image, offset, length)
    data = bytearray(0 if outside else length)

    def action() -> None:
        if "b" in flags:
            raise UnsupportedFeature("the saved state of a machine is not there yet", path=image.filename)
        if outside:
            image.root.require_inside(offset, length, "read")
        image.read_into(offset, data)

    expected = None if byte is None else (0, length, byte)
    return Transfer("read", name, offset, length, flags, action, data, expected)


def _writing(session: Session, name: str, flags: Flags, offset: int, length: int) -> Transfer:
    image = session.image
    if "u" in flags and "z" not in flags:
        raise OptionError("-u needs -z", hint="add -z")
    require_writable(image.node, "write")
    fua = "f" in flags or session.opened_as.caching.stable
    byte = grammar.pattern_byte(flags["P"][-1]) if "P" in flags else patterns.DEFAULT

    if "z" in flags:
        unmap = "u" in flags and session.opened_as.discards

        def zero() -> None:
            image.zero(offset, length, unmap=unmap, fast="n" in flags, fua=fua)

        return Transfer("wrote", name, offset, length, flags, zero)

    grammar.bounded(length)
    outside = _is_outside(image, offset, length)
    count = 0 if outside else length
    data = patterns.from_file(flags["s"][-1], count) if "s" in flags else patterns.repeated(byte, count)

    def action() -> None:
        if "b" in flags:
            raise UnsupportedFeature("the saved state of a machine is not there yet", path=image.filename)
        if outside:
            image.root.require_inside(offset, length, "write")
        image.write(offset, data, fua=fua, compress="c" in flags)

    return Transfer("wrote", name, offset, length, flags, action)


def _discarding(session: Session, name: str, verb: str, flags: Flags, operands: Sequence[str]) -> Transfer:
    image = session.image
    offset, length = _range(operands)
    require_writable(image.node, "discard")

    def action() -> None:
        if session.opened_as.discards:
            image.discard(offset, length)
        elif offset + length > image.size:
            raise OutOfRange("the request is outside the disk", path=image.filename, offset=offset, length=length)

    return Transfer(verb, name, offset, length, flags, action)

"""Parsing of commands: words, options and numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from getopt import GetoptError, gnu_getopt

from ...errors import OptionError
from ...options import parse_size

#: The maximum length of a request with a buffer.
MAX_LENGTH = 2147483136

_INTEGER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)", re.ASCII)


def split(line: str) -> list[str]:
    """The words of a line, separated by spaces. There is no quoting, as in qemu-io."""
    return [word for word in line.rstrip("\r\n").split(" ") if word]


def parse_flags(words: Sequence[str], accepted: str) -> tuple[dict[str, list[str]], list[str]]:
    """Parse options and operands, in any order. `accepted`: the letters, followed by a colon if the option has a value.
    Returns the values of each option by its letter ([""] for an option without value), and the operands."""
    try:
        found, operands = gnu_getopt(list(words), accepted)
    except GetoptError as error:
        if f"{error.opt}:" in accepted and error.opt:
            raise OptionError(f"-{error.opt} needs a value") from error
        raise OptionError(f"there is no option {'-' if len(error.opt) == 1 else '--'}{error.opt}") from error
    flags: dict[str, list[str]] = {}
    for name, value in found:
        flags.setdefault(name[1:], []).append(value)
    return flags, operands


def size(text: str) -> int:
    """Parse a size in bytes: 512, 64k, 1.5M, 0x200. A fraction of a byte is rounded."""
    return parse_size(text, exact=False)


def integer(text: str) -> int:
    """Parse an integer in the notation of C: 10, 0xa, 012."""
    if not _INTEGER.fullmatch(text) or len(text) > 20:
        raise OptionError(f"{text!r} is not a whole number")
    digits = text.lstrip("+-")
    value = int(digits, 0) if digits[:2] in ("0x", "0X") or digits[0] != "0" else int(digits, 8)
    return -value if text[0] == "-" else value


def pattern_byte(text: str) -> int:
    """Parse the value of a pattern: 0 to 255."""
    try:
        value = integer(text)
    except OptionError:
        value = -1
    if not 0 <= value <= 255:
        raise OptionError(f"the pattern {text!r} is not a byte", hint="give 0 to 255, or 0x0 to 0xff")
    return value


def bounded(length: int) -> int:
    """Return `length`, or raise OptionError if it exceeds the maximum of one request."""
    if length > MAX_LENGTH:
        raise OptionError(f"{length} bytes are too many for one request", hint=f"give at most {MAX_LENGTH}")
    return length

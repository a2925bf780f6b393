"""Patterns to write or to verify: a repeated byte, or the repeated content of a file."""

from __future__ import annotations

from ...errors import OptionError
from ...named_file import read_named

#: The byte that a write without a pattern writes.
DEFAULT = 0xCD

_CHUNK = 1 << 20


def repeated(byte: int, length: int) -> bytearray:
    """A buffer of `length` bytes with the value `byte`."""
    return bytearray(bytes((byte,))) * length if byte else bytearray(length)


def from_file(path: str, length: int) -> bytearray:
    """A buffer of `length` bytes with the repeated content of a file."""
    unit, _ = read_named(path, length, failure="cannot read the pattern")
    if not unit and length:
        raise OptionError("the pattern file is empty", path=path)
    data = bytearray(unit)
    if len(data) < length:
        data *= -(-length // len(unit))
        del data[length:]
    return data


def matches(data: bytearray, start: int, length: int, byte: int) -> bool:
    """Whether `length` bytes of `data` from `start` are all `byte`."""
    expected = bytes((byte,)) * min(length, _CHUNK)
    view = memoryview(data)[start : start + length]
    # `bytes.startswith` compares at the speed of memcmp; `==` between bytes and a view does not.
    return all(expected.startswith(view[at : at + _CHUNK]) for at in range(0, length, _CHUNK))

"""What is written, and what is expected to be read: a byte repeated, or a file repeated."""

from __future__ import annotations

from ...errors import OptionError
from ...named_file import read_named

#: What a write without a pattern writes.
DEFAULT = 0xCD

_CHUNK = 1 << 20


def repeated(byte: int, length: int) -> bytearray:
    """`length` times `byte`."""
    return bytearray(bytes((byte,))) * length if byte else bytearray(length)


def from_file(path: str, length: int) -> bytearray:
    """The first `length` bytes of a file, which is repeated as often as that needs."""
    unit, _ = read_named(path, length, failure="the pattern cannot be read")
    if not unit and length:
        raise OptionError("this file is empty: there is no pattern in it", path=path)
    data = bytearray(unit)
    if len(data) < length:
        data *= -(-length // len(unit))
        del data[length:]
    return data


def matches(data: bytearray, start: int, length: int, byte: int) -> bool:
    """Whether `length` bytes of `data` from `start` are all `byte`."""
    expected = bytes((byte,)) * min(length, _CHUNK)
    view = memoryview(data)[start : start + length]
    # `bytes.startswith` compares a view at the speed of memcmp; `==` between the two does not.
    return all(expected.startswith(view[at : at + _CHUNK]) for at in range(0, length, _CHUNK))

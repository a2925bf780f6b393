"""File descriptors that no interrupt loses: each is an item of a list, which its owner closes.

Python raises KeyboardInterrupt when a call of C code returns, so in `fd = os.open(...)` the number may be lost between the
call and the assignment: the file, and its locks, then stay open until the program ends. The functions here store the number
in the call that opens the file, and take it out in the call that closes it:

    fds: list[int] = []
    try:
        fd = open_into(fds, path, os.O_RDONLY)
        ...
    finally:
        close_all(fds)

Base layer.
"""

from __future__ import annotations

import os
from functools import partial

_LAST = (-1,)


def open_into(
    fds: list[int], path: str | os.PathLike[str], flags: int, mode: int = 0o777, *, folder: int | None = None
) -> int:
    """Append the descriptor of `os.open(path, flags, mode, dir_fd=folder)` to `fds`, and return it. Raises OSError, and
    ValueError for an invalid name."""
    fds.extend(map(os.open if folder is None else partial(os.open, dir_fd=folder), (path,), (flags,), (mode,)))
    return fds[-1]


def duplicate_into(fds: list[int], fd: int) -> int:
    """Append a duplicate of `fd` to `fds`, and return it. Raises OSError."""
    fds.extend(map(os.dup, (fd,)))
    return fds[-1]


def close_last(fds: list[int]) -> None:
    """Close the last descriptor of `fds`, if there is one. Any number of threads may do this at the same time: one of them
    closes it (`list.pop` is one step also without a GIL, and the other objects belong to this call). Raises OSError; the
    descriptor is closed then, too."""
    if fds:
        try:
            next(map(os.close, map(fds.pop, _LAST)))
        except IndexError:  # another thread did
            return


def close_all(fds: list[int]) -> None:
    """Close all descriptors of `fds`, also those after one that fails and after an interrupt. Raises the last OSError."""
    try:
        while fds:
            close_last(fds)
    finally:
        if fds:
            close_all(fds)

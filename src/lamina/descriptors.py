"""File descriptors, and other things to be closed, that no interrupt loses.

Python raises KeyboardInterrupt when a call of C code returns, so in `fd = os.open(...)` the number may be lost between the
call and the assignment: the file, and its locks, then stay open until the program ends. The functions here store the number
in a list in the call that opens the file, and take it out in the call that closes it:

    fds: list[int] = []
    try:
        fd = open_into(fds, path, os.O_RDONLY)
        ...
    finally:
        for fd in fds:
            os.close(fd)

(A function in Python begins with a step at which an interrupt may strike; `os.close` has none before it.) Base layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import ParamSpec, Protocol, TypeVar


class Closable(Protocol):
    def close(self) -> None:
        """Release what it holds. After an interrupt, another call completes that."""


_Made = TypeVar("_Made", bound=Closable)
_P = ParamSpec("_P")


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


def close_one(fds: list[int], index: int = -1) -> None:
    """Close the last descriptor of `fds`, or that with this index, if there is one. Any number of threads may do this at the
    same time: one of them closes it (`list.pop` is one step also without a GIL, and the other objects belong to this call).
    Raises OSError; the descriptor is closed then, too."""
    if fds:
        try:
            next(map(os.close, map(fds.pop, (index,))))
        except IndexError:  # another thread did
            return


def close_all(fds: list[int]) -> None:
    """Close all descriptors of `fds`, also those after one that fails and after an interrupt. Raises the last OSError."""
    try:
        while fds:
            close_one(fds)
    finally:
        if fds:
            close_all(fds)


@contextmanager
def opening(make: Callable[_P, _Made], *arguments: _P.args, **named: _P.kwargs) -> Iterator[_Made]:
    """A context manager: the image, node or edge make(*arguments), which is closed at the end, wherever an interrupt strikes.
    (In `with lamina.open(...)` it may strike between the last step of `open` and the first of the block, or between the block
    and the first step of `close`. The image is then left to its finalizer.)"""
    made = make(*arguments, **named)
    try:
        try:
            yield made
        finally:
            made.close()
    except Exception:
        raise
    except BaseException:  # an interrupt, perhaps of `close`
        made.close()
        raise

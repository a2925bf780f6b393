"""Checks that a target is not one of the files that the job reads, under any name; and, for reports about images, that it is
no file of another kind."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from .errors import OptionError
from .node import Node, StorageNode

_HINT = "name another target"


def refuse_own(top: Node, path: str, *, what: str = "source") -> None:
    """Raise OptionError if the file at `path` exists and is a file of the graph `top`. `what`: the role of the graph, for
    the message."""
    try:
        target = _identity(os.stat(path))
    except (OSError, ValueError):
        return  # the file does not exist, or opening it raises a better error
    for file, beneath in _files(top):
        if _identity_of(file) == target:
            relation = f"this is a backing file of the {what}" if beneath else f"this is the {what} itself"
            raise OptionError(f"{relation}, which would be overwritten", path=path, hint=_HINT)


def refuse_other(path: str, beginning: bytes, what: str) -> None:
    """Raise OptionError if the file at `path` is a regular file with content that does not begin with `beginning` (in
    lower-case letters): a report replaces nothing but an older one. `what`: what it would have to be, for the message."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return  # refused, or not replaced, when it is written
        with open(path, "rb") as file:
            head = file.read(len(beginning))
    except (OSError, ValueError):
        return  # there is none, or writing it raises a better error
    if head and head.lower() != beginning:
        raise OptionError(
            f"this file exists and is no {what}, so it is not overwritten",
            path=path,
            hint="name another file, or delete it first",
        )


def is_same_file(first: str, second: str) -> bool:
    """Whether two paths lead to one file, through links of either kind, or would if it existed."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return os.path.realpath(first) == os.path.realpath(second)


def refuse_shared(source: Node, target: Node) -> None:
    """Raise OptionError if a file of the graph `target`, other than a backing file, is also a file of `source`."""
    for file, beneath in _files(target):
        if beneath:
            continue
        if file.path is not None:
            refuse_own(source, file.path)
        elif file.far and any(other.far and other.filename == file.filename for other, _ in _files(source)):
            raise OptionError("this is the source itself", path=file.filename, hint=_HINT)  # the same export


def refuse_stream(top: Node, fd: int, name: str) -> None:
    """Raise OptionError if the descriptor `fd`, named `name`, is a file of the graph `top`."""
    found = _identity(os.fstat(fd))
    if any(_identity_of(file) == found for file, _ in _files(top)):
        raise OptionError("this is the source itself, which would be overwritten", path=name, hint=_HINT)


def refuse_input(fd: int, target: int | str, name: str) -> None:
    """Raise OptionError if the descriptor `fd`, from which a job reads, is the same regular file or block device as `target`,
    a path or descriptor named `name`."""
    try:
        source, found = os.fstat(fd), os.stat(target)
    except (OSError, ValueError):
        return  # opening or reading it raises a better error
    stored = stat.S_ISREG(source.st_mode) or stat.S_ISBLK(source.st_mode)
    if stored and _identity(source) == _identity(found):
        raise OptionError("this is the source itself, which would be overwritten", path=name, hint=_HINT)


def _files(top: Node, beneath: bool = False) -> Iterator[tuple[StorageNode, bool]]:
    """The storage nodes of a graph, and whether each belongs to a backing file."""
    if isinstance(top, StorageNode):
        yield top, beneath
    for role, child in top.children.items():
        yield from _files(child.node, beneath or role == "backing")


def _identity_of(file: StorageNode) -> tuple[int, int] | None:
    """The identity of a storage node. For a block device it does not depend on the name with which it was opened."""
    try:
        status = os.stat(file.path) if file.path is not None else None
    except OSError:
        status = None
    if status is not None and stat.S_ISBLK(status.st_mode) and (status.st_dev, status.st_ino) == file.identity:
        return _identity(status)
    return file.identity


def _identity(status: os.stat_result) -> tuple[int, int]:
    """An identity that does not depend on the name of the file."""
    return (-1, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)

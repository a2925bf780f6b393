"""Which files a job reads: it does not write over one of them, under whatever name. Used by `convert` and `copy`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from .errors import OptionError
from .node import Node, StorageNode

_HINT = "name another target"


def refuse_own(top: Node, path: str, *, what: str = "source") -> None:
    """OptionError where the file at `path`, if there is one, is among those that the graph `top` lies in. `what`: what the
    graph is to the user."""
    try:
        target = _identity(os.stat(path))
    except OSError:
        return  # nothing is there, or whoever opens it says what is wrong with it
    for file, beneath in _files(top):
        if _identity_of(file) == target:
            relation = f"the {what} is built on this file" if beneath else f"this is the {what} itself"
            raise OptionError(f"{relation}, which would be written over", path=path, hint=_HINT)


def refuse_shared(source: Node, target: Node) -> None:
    """OptionError where a file that requests to `target` write (so none of its backing files) is one that `source` reads."""
    for file, beneath in _files(target):
        if beneath:
            continue
        if file.path is not None:
            refuse_own(source, file.path)
        elif file.far and any(other.far and other.filename == file.filename for other, _ in _files(source)):
            raise OptionError("this is the source itself", path=file.filename, hint=_HINT)  # the same export


def refuse_stream(top: Node, fd: int, name: str) -> None:
    """OptionError where the descriptor `fd`, called `name`, is one of the files that the graph `top` lies in."""
    found = _identity(os.fstat(fd))
    if any(_identity_of(file) == found for file, _ in _files(top)):
        raise OptionError("this is the source itself, which would be written over", path=name, hint=_HINT)


def refuse_input(fd: int, target: int | str, name: str) -> None:
    """OptionError where the descriptor `fd`, from which a job reads, is open on the regular file or block device that
    `target` is, a path or a descriptor, which is called `name`."""
    try:
        source, found = os.fstat(fd), os.stat(target)
    except (OSError, ValueError):
        return  # whoever reads or opens it says what is wrong with it
    stored = stat.S_ISREG(source.st_mode) or stat.S_ISBLK(source.st_mode)
    if stored and _identity(source) == _identity(found):
        raise OptionError("this is the source itself, which would be written over", path=name, hint=_HINT)


def _files(top: Node, beneath: bool = False) -> Iterator[tuple[StorageNode, bool]]:
    """The storage of a graph, and of each whether it belongs to a backing file."""
    if isinstance(top, StorageNode):
        yield top, beneath
    for role, child in top.children.items():
        yield from _files(child.node, beneath or role == "backing")


def _identity_of(file: StorageNode) -> tuple[int, int] | None:
    """As `_identity`. A device that is opened under another of its names is the same device."""
    try:
        status = os.stat(file.path) if file.path is not None else None
    except OSError:
        status = None
    if status is not None and stat.S_ISBLK(status.st_mode) and (status.st_dev, status.st_ino) == file.identity:
        return _identity(status)
    return file.identity


def _identity(status: os.stat_result) -> tuple[int, int]:
    """What tells files from each other, whatever they are called."""
    return (-1, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)

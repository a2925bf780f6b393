"""The SELinux label of the sockets that a server listens on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..capabilities import O_CLOEXEC
from ..errors import BlockIOError

#: What the calling thread writes here labels the sockets that it makes from then on; nothing written ends that.
_NEW_SOCKETS = "/proc/thread-self/attr/sockcreate"


@contextmanager
def new_sockets_labelled(label: str | None) -> Iterator[None]:
    """The sockets that this thread makes inside have this label of SELinux; None: the usual one. Raises BlockIOError where
    the system has no SELinux, or its policy does not permit the label."""
    if label is None:
        yield
        return
    _set(label)
    try:
        yield
    finally:
        _set("")


def _set(label: str) -> None:
    try:
        fd = os.open(_NEW_SOCKETS, os.O_WRONLY | O_CLOEXEC)
        try:
            os.write(fd, os.fsencode(label))
        finally:
            os.close(fd)
    except OSError as error:
        raise BlockIOError.from_os(
            error,
            "sockets cannot have a label of SELinux",
            path=_NEW_SOCKETS,
            hint="omit --selinux-label where SELinux is not in use, or give a label that its policy permits",
        ) from error

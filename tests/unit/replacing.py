"""For the tests of files that are replaced: a system without O_TMPFILE, processes of other users, failures half-way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from lamina.atomic_file import AtomicFile

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only the administrator can make files of other users")
NOBODY = 65534
OTHER = 12345


def no_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)


def as_user(user: int, groups: list[int], run: Callable[[], int]) -> int:
    """The exit status of a process of that user that runs `run`."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            os.setgroups(groups)
            os.setgid(user)
            os.setuid(user)
            status = run()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fail(file: AtomicFile, error: BaseException) -> None:
    """Half-way."""
    file.begun = True
    os.pwrite(file.fd, b"half", 0)
    raise error

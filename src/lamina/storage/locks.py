"""File locks compatible with QEMU, which prevent conflicting use of an image file by two processes.

A lock is an open-file-description lock on one byte of the file; the content of the byte does not matter. All locks are shared
(read) locks, so taking one never conflicts with QEMU; conflicts are found by a *query* afterwards. For each permission p the
lock on byte 100 + p means "this process uses p", and the lock on byte 200 + p means "other processes must not use p".

    p  permission          100 + p  200 + p
    0  consistent read         100      200
    1  write                   101      201
    2  write unchanged         102      202
    3  resize                  103      203

The locks of each program, observed in /proc/locks (qemu-io 7.2 and 10.0 agree):

    opened as                                      uses        denies others
    qcow2 read-write                               0 1 3       1 3
    qcow2 read-only                                0           1 3
    backing file, of any overlay                   0           1 3
    blkdebug over qcow2 read-write                 0 1 3       1 3
    raw read-write by qemu-io                      0 1         -
    raw read-only by qemu-io                       0           -
    read-only with -U                              0           -
    Lamina read-write, any format                  0 1 3       1 3
    Lamina read-only, any format                   0           1 3
    Lamina with force-share                        nothing     nothing

Several readers may open a file at the same time; a writer excludes all others, and a reader excludes writers. Storage does
not know the format above it, so a raw disk is protected in the same way: Lamina is stricter than qemu-io there, but not
stricter than qemu-img convert.

Locks belong to the open file description: a duplicate of the descriptor (dup, fork) shares them; a second open of the file,
even in this process, does not. The kernel releases them when the last duplicate is closed. This module never reads or writes
the file.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Collection

from ..capabilities import LINUX, fcntl
from ..errors import BlockIOError, Hint, Locked

CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)

_USED, _UNSHARED = 100, 200
_NAMES = ("read", "write", "rewrite", "resize")

#: struct flock of 64-bit file offsets: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi0q")
_GETLK: int | None = getattr(fcntl, "F_OFD_GETLK", None) if LINUX else None
_SETLK: int | None = getattr(fcntl, "F_OFD_SETLK", None) if LINUX else None


def acquire(
    fd: int,
    *,
    writing: bool,
    path: str,
    required: bool = False,
    taken: Collection[int] = (),
    withheld: Collection[int] = (),
) -> bool:
    """Take the locks of a reader or writer on `fd`, until `fd` is closed. `taken` and `withheld`: further permissions that
    this process uses, and that it denies others.

    Raises Locked for a conflicting lock; the caller then closes `fd`. Without support by the file system the function logs a
    warning ("lamina") and returns False, or with `required` raises BlockIOError; without support by the system it does the
    same, and logs nothing.
    """
    if _SETLK is None and not required:
        return False
    used = sorted({CONSISTENT_READ, WRITE, RESIZE, *taken} if writing else {CONSISTENT_READ, *taken})
    unshared = sorted({WRITE, RESIZE, *withheld})
    try:
        # All locks are taken before the query, so that of two processes that start together at least one sees the other.
        for permission in used:
            _lock(fd, _USED + permission)
        for permission in unshared:
            _lock(fd, _UNSHARED + permission)
        for permission in used:
            if _held(fd, _UNSHARED + permission):
                reason = (
                    f"another process, or another image in this one, denies others to {_NAMES[permission]} this file"
                )
                raise _locked(path, reason, writing)
        for permission in unshared:
            if _held(fd, _USED + permission):
                reason = f"another process, or another image in this one, has it open to {_NAMES[permission]}"
                raise _locked(path, reason, writing)
    except OSError as error:
        if isinstance(error, Locked):
            raise
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _locked(path, "another program holds an exclusive lock on this file", writing) from error
        if required:
            raise BlockIOError.from_os(
                error, "cannot lock the file", path=path, hint="locking=off opens it without locks"
            ) from error
        import logging

        logging.getLogger("lamina").warning(
            "%s: cannot lock the file (%s); other programs may change it while it is open",
            path,
            os.strerror(error.errno or errno.EIO),
        )
        return False
    return True


def pass_on(
    old: int, new: int, *, writing: bool, path: str, taken: Collection[int] = (), withheld: Collection[int] = ()
) -> None:
    """Take the locks of a writer, or those of a reader, on `new`, where `old`, another open of the same file by this process,
    has the others. One of the two has at least those of a reader at any moment. Raises Locked where another open of the file
    is in the way. Close `old` afterwards, or `new` if this fails."""
    used = {CONSISTENT_READ, WRITE, RESIZE, *taken} if writing else {CONSISTENT_READ, *taken}
    if writing:
        try:
            acquire(old, writing=True, path=path, taken=taken, withheld=withheld)
        except BaseException:
            for permission in {WRITE, RESIZE}.difference(taken):
                _lock(old, _USED + permission, fcntl.F_UNLCK)
            raise
    try:
        for permission in used:
            _lock(new, _USED + permission)
        for permission in {WRITE, RESIZE, *withheld}:
            _lock(new, _UNSHARED + permission)
    except OSError as error:
        raise BlockIOError.from_os(error, "cannot lock the file", path=path, operation="reopen") from error


def in_use_for_writing(fd: int) -> bool:
    """Whether another open file description holds the lock of a writer. False if the kernel cannot tell."""
    try:
        return _GETLK is not None and _held(fd, _USED + WRITE)
    except OSError:
        return False


def _lock(fd: int, byte: int, kind: int | None = None) -> None:
    if _SETLK is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.fcntl(fd, _SETLK, _FLOCK.pack(fcntl.F_RDLCK if kind is None else kind, os.SEEK_SET, byte, 1, 0))


def _held(fd: int, byte: int) -> bool:
    """Whether another open file description holds a lock on `byte`."""
    assert _GETLK is not None
    # The query is for an exclusive lock, which conflicts with any lock of another open file description.
    result = fcntl.fcntl(fd, _GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(result)[0] != fcntl.F_UNLCK)


def _locked(path: str, message: str, writing: bool) -> Locked:
    hint = "close it there first"
    if not writing:
        also = ", or read it while it may change"
        hint = Hint(f"{hint}{also} (force_share=True)", command=f"{hint}{also} with force-share=on (-U)")
    return Locked(message, path=path, operation="open", hint=hint)

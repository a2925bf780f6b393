"""Image locks, understood by QEMU: they stop two programs from using one file in ways that exclude each other.

A lock is one byte of the file, far from any meaning of its content, held with an open-file-description lock. All locks
are shared (read) locks, so taking one never fails against QEMU; whether somebody stands in the way is then *asked*. For
each permission p the byte 100 + p says "I use p", and the byte 200 + p says "nobody else may use p".

    p  permission          100 + p  200 + p
    0  consistent read         100      200
    1  write                   101      201
    2  write unchanged         102      202
    3  resize                  103      203

What programs take, observed in /proc/locks (qemu-io 7.2 and 10.0 are alike):

    open as                                        uses        lets no other use
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

So any number of readers coexist, a writer is alone, and a reader is safe from writers. Storage does not know which
format lies over it, and a raw disk deserves the same: here Lamina is stricter than qemu-io, not than qemu-img convert.

Locks belong to the open file description: a copy of the descriptor (dup, fork) shares them, a second open of the same
file, in this process too, does not. They end when the last copy is closed. No name of this module does I/O on the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Collection

from ..errors import BlockIOError, Locked

CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)

_USED, _UNSHARED = 100, 200
_NAMES = ("read", "write", "rewrite", "resize")

#: struct flock of 64-bit file offsets: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi0q")
_GETLK = getattr(fcntl, "F_OFD_GETLK", None)
_SETLK = getattr(fcntl, "F_OFD_SETLK", None)


def acquire(
    fd: int,
    *,
    writing: bool,
    path: str,
    required: bool = False,
    taken: Collection[int] = (),
    withheld: Collection[int] = (),
) -> bool:
    """Take the locks of a reader, or of a writer, on `fd` and hold them until it is closed. `taken` and `withheld`:
    permissions that are used, and kept from others, besides those.

    Raises Locked if another open of the file excludes this one; close `fd` then. Returns False, after a warning in the
    log "lamina", where the file system has no such locks; with `required` that raises BlockIOError instead.
    """
    used = sorted({CONSISTENT_READ, WRITE, RESIZE, *taken} if writing else {CONSISTENT_READ, *taken})
    unshared = sorted({WRITE, RESIZE, *withheld})
    try:
        # Locks first and questions after: of two that start at once, at least one sees the other.
        for permission in used:
            _lock(fd, _USED + permission)
        for permission in unshared:
            _lock(fd, _UNSHARED + permission)
        for permission in used:
            if _held(fd, _UNSHARED + permission):
                raise _locked(
                    path, f"another open of this file does not share the right to {_NAMES[permission]}", writing
                )
        for permission in unshared:
            if _held(fd, _USED + permission):
                raise _locked(path, f"another open of this file may {_NAMES[permission]} it", writing)
    except OSError as error:
        if isinstance(error, Locked):
            raise
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _locked(path, "another program holds an exclusive lock on this file", writing) from error
        if required:
            raise BlockIOError.from_os(
                error, "cannot lock it", path=path, hint="locking=off goes on without"
            ) from error
        import logging

        logging.getLogger("lamina").warning(
            "%s: cannot be locked (%s); nothing keeps other programs from changing it meanwhile",
            path,
            os.strerror(error.errno or errno.EIO),
        )
        return False
    return True


def in_use_for_writing(fd: int) -> bool:
    """Whether another open of the file holds the lock of a writer. False where that cannot be asked."""
    try:
        return _GETLK is not None and _held(fd, _USED + WRITE)
    except OSError:
        return False


def _lock(fd: int, byte: int) -> None:
    if _SETLK is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.fcntl(fd, _SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def _held(fd: int, byte: int) -> bool:
    """Whether another open file description holds a lock on `byte`."""
    assert _GETLK is not None
    # Asked as if for an exclusive lock: any lock of another would stand in its way.
    answer = fcntl.fcntl(fd, _GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _locked(path: str, message: str, writing: bool) -> Locked:
    hint = (
        "close it there first" if writing else "close it there first, or read it as it changes with force-share=on (-U)"
    )
    return Locked(message, path=path, operation="open", hint=hint)

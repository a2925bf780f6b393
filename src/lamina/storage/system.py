"""Calls of the system on ranges of files that Python does not have, or does not finish: fallocate, discard, sharing blocks
of two files (FICLONERANGE), copying between two (copy_file_range). Used by `FileStorage`. Descriptors in, errnos out."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Any

_BLKDISCARD = 0x1277
#: _IOW(0x94, 13, struct file_clone_range): source, where in it, how long, where to.
_FICLONERANGE = 0x4020940D
_FILE_CLONE_RANGE = struct.Struct("qQQQ")

#: What a system says that has no such operation (for this file).
MISSING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)
#: The same of an operation between two files. (EBADF: their file system cannot. EPERM: a sandbox, or a file that cannot be
#: changed at all, which the write that is tried next says better.)
_MISSING_BETWEEN = (*MISSING, errno.EXDEV, errno.ETXTBSY, errno.EBADF, errno.EPERM)

_fallocate_function: Any = None


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """fallocate of the C library (Python has only posix_fallocate): 0, or the errno. Releases the GIL."""
    global _fallocate_function
    import ctypes

    if _fallocate_function is None:
        libc = ctypes.CDLL(None, use_errno=True)
        function = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
        if function is None:
            return errno.ENOSYS
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        _fallocate_function = function
    while _fallocate_function(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            return number
    return 0


def discard_device(fd: int, offset: int, length: int) -> bool:
    """Tell a block device that it may forget these bytes. False if it has no such operation."""
    try:
        fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))
    except OSError as error:
        if error.errno in MISSING:
            return False
        raise
    return True


def share(fd: int, offset: int, source: int, source_offset: int, length: int) -> bool:
    """Let these bytes of `fd` be the same blocks on the disk as those of `source`, until one of them is written. False, and
    nothing was done, if the file system cannot: for these files at all, or because the range is not made of whole blocks
    (the end of `source` counts as the end of a block)."""
    try:
        fcntl.ioctl(fd, _FICLONERANGE, _FILE_CLONE_RANGE.pack(source, source_offset, length, offset))
    except OSError as error:
        if error.errno in _MISSING_BETWEEN:
            return False
        raise
    return True


def copy(fd: int, offset: int, source: int, source_offset: int, length: int) -> int:
    """Have the system copy bytes from `source` to `fd`. Returns how many it did, from the first: fewer than `length` where
    `source` ends, or from where the system cannot."""
    done = 0
    while done < length and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, fd, length - done, source_offset + done, offset + done)
        except OSError as error:
            if error.errno in _MISSING_BETWEEN:
                break
            raise
        if not count:
            break
        done += count
    return done

"""System calls on ranges of files, for `FileStorage`: fallocate, discard, shared blocks (FICLONERANGE), copy_file_range.
Parameters are descriptors; errors are OSError or error numbers."""

from __future__ import annotations

import errno
import os
import struct
from typing import Any

from ..capabilities import LINUX, fcntl

_BLKDISCARD = 0x1277
#: _IOW(0x94, 13, struct file_clone_range): source, source offset, length, offset.
_FICLONERANGE = 0x4020940D
_FILE_CLONE_RANGE = struct.Struct("qQQQ")

#: Errors of an operation that the kernel or the file system does not support.
MISSING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)
#: The same for operations between two files. (EBADF: no support by the file system. EPERM: a sandbox, or an immutable file,
#: for which the write that the caller tries next raises a better error.)
_MISSING_BETWEEN = (*MISSING, errno.EXDEV, errno.ETXTBSY, errno.EBADF, errno.EPERM)

_fallocate_function: Any = None


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """fallocate of the C library (Python has only posix_fallocate). Returns 0 or the error number. Releases the GIL."""
    if not LINUX:
        return errno.ENOSYS
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
    """Discard a range of a block device. Returns False if the device does not support that."""
    try:
        fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))
    except OSError as error:
        if error.errno in MISSING:
            return False
        raise
    return True


def share(fd: int, offset: int, source: int, source_offset: int, length: int) -> bool:
    """Make a range of `fd` share the blocks of a range of `source` (copy-on-write). Returns False, without changes, if the
    file system does not support that for these files, or if the range does not consist of complete blocks (the last block of
    `source` may be incomplete)."""
    if not LINUX:
        return False
    try:
        fcntl.ioctl(fd, _FICLONERANGE, _FILE_CLONE_RANGE.pack(source, source_offset, length, offset))
    except OSError as error:
        if error.errno in _MISSING_BETWEEN:
            return False
        raise
    return True


def copy(fd: int, offset: int, source: int, source_offset: int, length: int) -> int:
    """Copy bytes from `source` to `fd` in the kernel. Returns the number of copied bytes, less than `length` at the end of
    `source` or where the kernel cannot copy."""
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

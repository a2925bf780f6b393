"""What the operating systems do not all have, and what stands for it where it is missing: flags of files, positioned reads
and writes, waits, ids of users. Base layer. (`nbd.sockets` is the same for sockets, `storage.system` for ranges of files.)

All other modules take these names from here, so that none asks for the name of the system. Linux has everything. CPython on
macOS lacks direct I/O, files without names, /proc, extended attributes, locks of open file descriptions and fdatasync; on
Windows also fcntl, positioned reads, descriptors of folders and the flags of open. docs/systems.md tells what follows.
"""

from __future__ import annotations

import _thread
import os
import sys
from collections.abc import Callable, Sequence
from errno import EINVAL, ENOTSUP, ENOTTY, EOPNOTSUPP
from typing import Any, Final

try:
    import fcntl as fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Requests of ioctl, fallocate and /proc have these numbers and names on Linux alone.
LINUX: Final = sys.platform.startswith("linux")

# Flags of os.open; 0 where the system has no such flag.
#: Not inherited by child processes; on Windows also without a translation of line ends.
O_CLOEXEC: Final[int] = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0) | getattr(os, "O_BINARY", 0)
O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)
O_DIRECTORY: Final[int] = getattr(os, "O_DIRECTORY", 0)
O_NOCTTY: Final[int] = getattr(os, "O_NOCTTY", 0)
O_NOFOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0)
O_NONBLOCK: Final[int] = getattr(os, "O_NONBLOCK", 0)
#: Needs only the right to search a directory, as an ordinary open does; other systems need the right to read it.
O_PATH: Final[int] = getattr(os, "O_PATH", os.O_RDONLY)
O_TMPFILE: Final[int] = getattr(os, "O_TMPFILE", 0)

#: Whether lseek finds holes.
SEEK_HOLES: Final = hasattr(os, "SEEK_DATA") and hasattr(os, "SEEK_HOLE")
#: Whether a name can be relative to the descriptor of a folder. Without it folders have no descriptors.
FOLDERS: Final = os.open in os.supports_dir_fd
#: Whether a file that is open can be renamed, replaced and removed.
MOVES_OPEN_FILES: Final = sys.platform != "win32"
#: The flag of a write that is flushed at once; 0: the system has none.
RWF_DSYNC: Final[int] = getattr(os, "RWF_DSYNC", 0)

_FULLFSYNC: Final[int | None] = getattr(fcntl, "F_FULLFSYNC", None)


# -- files

#: Held by a read or write that moves the position of a descriptor, which all descriptors of the same open file share.
_position = _thread.allocate_lock()


def pread(fd: int, length: int, offset: int) -> bytes:
    """os.pread."""
    if hasattr(os, "pread"):
        return os.pread(fd, length, offset)
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, length)


def pwrite(fd: int, data: bytes | memoryview, offset: int) -> int:
    """os.pwrite."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def _preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """os.preadv, of the first buffer alone: a short read, which every caller continues."""
    data = pread(fd, len(buffers[0]), offset)
    buffers[0][: len(data)] = data
    return len(data)


def _pwritev(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
    """os.pwritev, of the first buffer alone. There are no flags where this is used."""
    return pwrite(fd, buffers[0], offset)


#: os.preadv and os.pwritev; a caller gives one buffer. (macOS has them since 11.)
preadv: Callable[..., int] = getattr(os, "preadv", _preadv)
pwritev: Callable[..., int] = getattr(os, "pwritev", _pwritev)


def read_into(fd: int, view: memoryview) -> int:
    """Read the next bytes of a pipe or file into `view`: their number, 0 at the end."""
    if hasattr(os, "readv"):
        return os.readv(fd, [view])
    data = os.read(fd, len(view))
    view[: len(data)] = data
    return len(data)


def flush_file(fd: int) -> None:
    """os.fsync, to the medium itself: on macOS that alone leaves the bytes in the cache of the drive."""
    if _FULLFSYNC is not None:
        try:
            fcntl.fcntl(fd, _FULLFSYNC)
        except OSError as error:
            if error.errno not in (EINVAL, ENOTSUP, ENOTTY, EOPNOTSUPP):  # of a file system without it
                raise
        else:
            return
    os.fsync(fd)


def flush_data(fd: int) -> None:
    """os.fdatasync: the bytes, and the metadata that are needed to read them."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        flush_file(fd)


def allocated(status: os.stat_result) -> int:
    """The bytes that a file takes; its length where the system does not tell."""
    blocks: int | None = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else blocks * 512


def set_permissions(fd: int, mode: int) -> None:
    """os.fchmod, where files have permissions of users."""
    if hasattr(os, "fchmod"):
        os.fchmod(fd, mode)


# -- waits


def set_blocking(fd: int) -> None:
    """Let the descriptor, which O_NONBLOCK opened, wait."""
    if O_NONBLOCK:
        os.set_blocking(fd, True)


def waits(fd: int) -> bool:
    """Whether a read of the descriptor waits for bytes."""
    return not O_NONBLOCK or os.get_blocking(fd)


def wait_for(fd: int, seconds: float | None, *, to_write: bool = False) -> bool:
    """Wait until bytes can be read (or written), or there is an end or error to be found; at most for `seconds`. False: for
    so long there was nothing. Where only sockets can be waited for, True at once: the read itself waits."""
    import select

    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(fd, select.POLLOUT if to_write else select.POLLIN)
        return bool(poll.poll(None if seconds is None else max(0, seconds) * 1000))
    one: list[int] = [fd]
    try:
        return any(select.select([] if to_write else one, one if to_write else [], one, seconds))
    except OSError:
        return True


# -- users and processes


def user() -> int:
    """The effective user id of this process. 0 where users have no numbers: as the owner that `os.stat` reports there."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def has_rights_of_another() -> bool:
    """Whether the process has more rights than the user who started it (set-user-id)."""
    return hasattr(os, "getuid") and (os.getuid() != os.geteuid() or os.getgid() != os.getegid())


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def after_fork_in_child(function: Callable[[], Any]) -> None:
    """os.register_at_fork, where processes can be forked."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)

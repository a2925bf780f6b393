"""Opening of files for the driver `file`: the accepted types of files, and the path of a descriptor."""

from __future__ import annotations

import errno
import os
import stat

from ..capabilities import LINUX, O_CLOEXEC, O_NOCTTY, O_NONBLOCK, set_blocking
from ..descriptors import open_into
from ..errors import BlockIOError, Hint, LaminaError, OptionError

_TYPES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device, which Lamina opens on Linux alone",
}


def path_of(fd: int, filename: str) -> str:
    """The real path of the file of `fd`, from /proc, since `filename` may denote another file by now."""
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # no /proc
        path = ""
    return path if path.startswith("/") and not path.endswith(" (deleted)") else os.path.realpath(filename)


def open_file(into: list[int], filename: str, writing: bool) -> int:
    """Open the file, add its descriptor to `into` (see `descriptors`), and return it."""
    flags = (os.O_RDWR if writing else os.O_RDONLY) | O_CLOEXEC | O_NOCTTY
    try:
        # Checked before the file is opened, since opening a FIFO or a device may block or have side effects.
        require_file(os.stat(filename).st_mode, filename)
        fd = open_into(into, filename, flags | O_NONBLOCK)
        set_blocking(fd)
    except OSError as error:
        if isinstance(error, LaminaError):
            raise
        hint: str | None = None
        if error.errno == errno.ENOENT:
            hint = "check the name, or create it first"
        elif writing and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
            hint = Hint(
                "get write permission, or open it read-only (read_only=True)",
                command="get write permission, or open it read-only (-r)",
            )
        raise BlockIOError.from_os(error, "cannot be opened", path=filename, operation="open", hint=hint) from error
    except ValueError as error:
        raise OptionError(f"not a valid file name: {error}", path=filename) from error
    return fd


def open_again(into: list[int], fd: int, path: str, filename: str, mode: int) -> int:
    """Open the file of `fd` once more, whatever its name denotes by now. The new descriptor is added to
    `into`."""
    flags = mode | O_CLOEXEC | O_NOCTTY | O_NONBLOCK
    try:
        same = f"/proc/self/fd/{fd}"
        again = open_into(into, same if os.path.exists(same) else path, flags)
        set_blocking(again)
    except OSError as error:
        hint = "get write permission, or go on reading" if mode & os.O_RDWR else None
        raise BlockIOError.from_os(error, "cannot be reopened", path=filename, operation="reopen", hint=hint) from error
    if not os.path.samestat(os.fstat(again), os.fstat(fd)):  # without /proc the name decides
        raise BlockIOError("the file was replaced", path=filename, operation="reopen", hint="open the new one")
    return again


def require_file(mode: int, filename: str) -> None:
    if stat.S_ISREG(mode) or (stat.S_ISBLK(mode) and LINUX):
        return
    kind = _TYPES.get(stat.S_IFMT(mode), "not a file")
    raise BlockIOError(
        f"it is {kind}",
        errno=errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL,
        path=filename,
        operation="open",
        hint="name a regular file or a block device",
    )

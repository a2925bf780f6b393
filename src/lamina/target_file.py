"""The existing file that a new file replaces: its lock, its attributes, and the reasons why a rename would lose properties.

Base layer; used by `atomic_file` and by jobs that rename their own file to an existing name.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable

from .capabilities import (
    FOLDERS,
    LINUX,
    MOVES_OPEN_FILES,
    O_CLOEXEC,
    O_DIRECTORY,
    O_NOCTTY,
    O_NOFOLLOW,
    O_NONBLOCK,
    O_PATH,
    fcntl,
    set_blocking,
    set_permissions,
    user,
)
from .descriptors import close_all, open_into
from .errors import BlockIOError, LaminaError

#: A function that locks the target, called with its descriptor and path. The lock must last as long as the descriptor.
Lock = Callable[[int, str], None]

#: Errors of a folder in which files may not be created, although an existing file may be writable.
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_PERMISSIONS = 0o777

_ACL = "system.posix_acl_access"
#: Extended attributes that the new file inherits from the target. Others grant privileges (security.capability), describe
#: the old content (security.ima), or belong to a file system (trusted.overlay).
_KEPT = (_ACL, "security.selinux", "security.SMACK64", "user.")

_FS_IOC_GETFLAGS = 0x8000_6601 | struct.calcsize("l") << 16
_FS_IOC_SETFLAGS = 0x4000_6602 | struct.calcsize("l") << 16
_NO_COPY_ON_WRITE = 0x0080_0000
_CAP_FOWNER = 1 << 3


class Target:
    """The file that a new file replaces. It is opened and locked until `close`, which must follow the rename, so that other
    programs find the lock when they open the file."""

    def __init__(self, path: str, lock: Lock | None = None) -> None:
        """Open the file at `path` (a real path: links are not followed) for writing and lock it. Raises BlockIOError,
        NotFound, and the errors of `lock`."""
        self.path = path
        self.fd = self._folder = -1
        self._fds: list[int] = []  # both of them, while they are open
        try:
            # Checked before the file is opened, since opening a FIFO or a device may block or have side effects.
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
                directory = stat.S_ISDIR(status.st_mode)
                raise BlockIOError(
                    "it is a directory" if directory else "it is neither a regular file nor a block device",
                    errno=errno.EISDIR if directory else errno.EINVAL,
                    path=path,
                    hint="name a file in it" if directory else "name another file",
                )
            flags = os.O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY
            self.fd = open_into(self._fds, path, flags)
            set_blocking(self.fd)
            self.status = os.fstat(self.fd)
            # Checked again: on an overlay file system, opening a file for writing may replace it by a copy.
            status = os.lstat(path)
            if not os.path.samestat(status, self.status) or not (self.is_device or stat.S_ISREG(status.st_mode)):
                raise self._changed()
            self._folder = open_folder(self._fds, os.path.dirname(path))
            if lock is not None:
                lock(self.fd, path)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, LaminaError):
                hint = "get write permission, or name another file" if error.errno in NOT_ALLOWED else None
                raise BlockIOError.from_os(error, "cannot write the existing file", path=path, hint=hint) from error
            raise

    @property
    def is_device(self) -> bool:
        return stat.S_ISBLK(self.status.st_mode)

    def obstacle(self) -> str | None:
        """The reason why a rename would lose a property of this file, or None. The caller checks whether a file can be
        created in the folder and can get the attributes of this one (`give_attributes`)."""
        status = self.status
        if self.is_device:
            return "it is a block device"
        if status.st_nlink > 1:
            return f"the file has {status.st_nlink} names (hard links)"
        mount, parent = _mount(self.fd), _mount(self._folder)
        if mount is not None and parent is not None and mount != parent:
            return "it is a mount point"
        if self._folder < 0:
            return None  # a system without sticky bits
        folder, me = os.fstat(self._folder), user()
        if folder.st_mode & stat.S_ISVTX and me not in (status.st_uid, folder.st_uid) and not _may_act_as_owner(me):
            return "it belongs to another user, in a folder with the sticky bit"
        return None

    def give_attributes(self, fd: int) -> str | None:
        """Copy the owner, permissions, extended attributes and no-copy-on-write flag of this file to the new, empty file
        `fd`, which no other user may open yet. Set-user-id, set-group-id and sticky bits are never copied. Returns the
        reason of a failure, or None."""
        old, new = self.status, os.fstat(fd)
        if _flags(self.fd) & _NO_COPY_ON_WRITE and not _set_flag(fd, _NO_COPY_ON_WRITE):
            return "its no-copy-on-write flag cannot be set on a new file"
        owner = old.st_uid if old.st_uid != new.st_uid else -1
        group = old.st_gid if old.st_gid != new.st_gid else -1
        if owner != -1 or group != -1:
            try:
                os.fchown(fd, owner, group)
            except OSError:
                return f"its {'owner' if owner != -1 else 'group'} cannot be set on a new file"
        wanted, given = _attributes(self.fd), _attributes(fd)
        try:
            for name in given.keys() - wanted.keys():
                os.removexattr(fd, name)  # inherited from the folder
            set_permissions(fd, old.st_mode & _PERMISSIONS)
            for name, value in wanted.items():
                if given.get(name) != value:
                    os.setxattr(fd, name, value)
        except OSError:
            return "its extended attributes cannot be set on a new file"
        return None

    def drop_privileges(self) -> None:
        """Remove set-user-id, set-group-id and sticky bits before the file is written in place, since the new content must
        not have these privileges. (The kernel removes them as well, but not if root writes.) Raises BlockIOError."""
        if not self.is_device and self.status.st_mode & ~_PERMISSIONS & 0o7777:
            try:
                set_permissions(self.fd, self.status.st_mode & _PERMISSIONS)
            except OSError as error:
                raise BlockIOError.from_os(
                    error, "cannot remove its set-user-id, set-group-id or sticky bit", path=self.path
                ) from error

    def replace(self, name: str) -> None:
        """Rename the file `name` of the same folder to this file's name. Raises OSError, and BlockIOError if another file has
        that name by now."""
        own_name = os.path.basename(self.path)
        folder = at(self._folder)
        if folder is None:
            own_name = self.path
            name = os.path.join(os.path.dirname(self.path), name)
        now = os.stat(own_name, dir_fd=folder, follow_symlinks=False)
        if not os.path.samestat(now, self.status):
            raise self._changed()
        if not MOVES_OPEN_FILES:
            self.close()  # the folder has no descriptor there
        os.replace(name, own_name, src_dir_fd=folder, dst_dir_fd=folder)

    def close(self) -> None:
        """Close the file, which releases the lock. May be called again."""
        self.fd = self._folder = -1
        close_all(self._fds)

    def _changed(self) -> BlockIOError:
        hint = "nothing was changed; try again when that program has finished"
        return BlockIOError(
            "another program replaced this file meanwhile", errno=errno.ESTALE, path=self.path, hint=hint
        )


def real_path(path: str) -> str:
    """The path, without symbolic links, of an existing or new file. Raises BlockIOError for the name of a folder (`x/`) and
    where the kernel refuses to follow a link (of another user in a folder with the sticky bit), a check that would not apply
    to the resolved path. Raises ValueError for an invalid path."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise BlockIOError.from_os(error, "cannot create the file", path=path) from error
    except OSError:
        if os.path.basename(path) in ("", ".", ".."):
            hint = "name a file in it"
            raise BlockIOError("it is the name of a folder", errno=errno.EISDIR, path=path, hint=hint) from None
    return os.path.realpath(path)


def open_folder(fds: list[int], path: str) -> int:
    """A descriptor of the folder `path`, which stays valid if the folder is renamed, and is added to `fds` (`descriptors`).
    -1 where folders have none. Raises OSError."""
    if not FOLDERS:
        return -1
    return open_into(fds, path or ".", O_PATH | O_DIRECTORY | O_CLOEXEC)


def at(folder: int) -> int | None:
    """The argument `dir_fd` for names in the folder with this descriptor; None without one, when names are whole paths."""
    return folder if folder >= 0 else None


def _mount(fd: int) -> bytes | None:
    """The id of the mount through which a descriptor was opened; None if the system does not provide it."""
    try:
        return _line(f"/proc/self/fdinfo/{fd}", b"mnt_id:")
    except (OSError, ValueError):
        return None


def _line(path: str, key: bytes) -> bytes:
    """The value after `key` in a file of /proc. Raises OSError, ValueError."""
    fds: list[int] = []
    try:
        text = os.read(open_into(fds, path, os.O_RDONLY | O_CLOEXEC), 1 << 14)
    finally:
        for fd in fds:
            os.close(fd)
    for line in text.splitlines():
        if line.startswith(key):
            return line[len(key) :]
    raise ValueError(f"{path} has no {key!r}")


def _may_act_as_owner(user: int) -> bool:
    """Whether this process has the capability CAP_FOWNER, and so the rights of every file's owner."""
    try:
        return bool(int(_line("/proc/self/status", b"CapEff:"), 16) & _CAP_FOWNER)
    except (OSError, ValueError):
        return user == 0


def _attributes(fd: int) -> dict[str, bytes]:
    """The extended attributes that a new file inherits. (CPython has no functions for those of macOS.)"""
    if not hasattr(os, "listxattr"):
        return {}
    try:
        return {name: os.getxattr(fd, name) for name in os.listxattr(fd) if name.startswith(_KEPT)}
    except OSError:
        return {}  # the file system has no extended attributes


def _flags(fd: int) -> int:
    if not LINUX:
        return 0
    try:
        return int(struct.unpack("i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(4)))[0])
    except OSError:
        return 0  # a file system without such flags


def _set_flag(fd: int, flag: int) -> bool:
    if _flags(fd) & flag:
        return True
    try:
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("i", _flags(fd) | flag))
    except OSError:
        return False
    return True

"""The file that a new one is to replace: held, so that no other program begins to use it; its owner, permissions and
attributes given to the new file; and the reasons why a rename would lose something. Ground floor; used by `atomic_file`,
and by jobs that rename a file of their own to a name in use.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable

from .errors import BlockIOError, LaminaError

#: What may lock the file that is replaced: called with its descriptor and path. The lock must last as long as the descriptor.
Lock = Callable[[int, str], None]

#: What says that no file may be made in a folder, though one that is there may be written.
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_PERMISSIONS = 0o777

_ACL = "system.posix_acl_access"
#: Extended attributes that a new file gets from the one that it replaces. Others carry privileges (security.capability),
#: describe the old content (security.ima), or belong to a file system (trusted.overlay).
_KEPT = (_ACL, "security.selinux", "security.SMACK64", "user.")

_FS_IOC_GETFLAGS = 0x8000_6601 | struct.calcsize("l") << 16
_FS_IOC_SETFLAGS = 0x4000_6602 | struct.calcsize("l") << 16
_NO_COPY_ON_WRITE = 0x0080_0000
_CAP_FOWNER = 1 << 3


class Target:
    """The file that a new one is to replace: opened, locked, and held until `close`, which must come after the rename. A
    program that opens it meanwhile meets the lock."""

    def __init__(self, path: str, lock: Lock | None = None) -> None:
        """Open what is at `path` (a real path: links are not followed) for writing and lock it. Raises what `lock` raises,
        BlockIOError, and OptionError; NotFound if there is none."""
        self.path = path
        self.fd = self._folder = -1
        try:
            # Looked at before it is opened: opening a FIFO or a device can block, or do something.
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
                directory = stat.S_ISDIR(status.st_mode)
                raise BlockIOError(
                    "it is a directory" if directory else "it is neither a regular file nor a block device",
                    errno=errno.EISDIR if directory else errno.EINVAL,
                    path=path,
                    hint="name a file in it" if directory else "name another",
                )
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
            self.fd = os.open(path, flags)
            os.set_blocking(self.fd, True)
            self.status = os.fstat(self.fd)
            # Looked at again: where one file system lies over another, opening a file for writing may make it another one.
            status = os.lstat(path)
            if not os.path.samestat(status, self.status) or not (self.is_device or stat.S_ISREG(status.st_mode)):
                raise self._changed()
            self._folder = open_folder(os.path.dirname(path))
            if lock is not None:
                lock(self.fd, path)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, LaminaError):
                hint = "ask for the right to write it, or name another" if error.errno in NOT_ALLOWED else None
                raise BlockIOError.from_os(error, "the file there cannot be written", path=path, hint=hint) from error
            raise

    @property
    def is_device(self) -> bool:
        return stat.S_ISBLK(self.status.st_mode)

    def obstacle(self) -> str | None:
        """Why a rename would not keep what this file is, or None. Whether a new file can be made in the folder, and made like
        this one (`give_attributes`), is for the caller to try."""
        status = self.status
        if self.is_device:
            return "it is a block device"
        if status.st_nlink > 1:
            return f"the file has {status.st_nlink} names (hard links)"
        mount, around = _mount(self.fd), _mount(self._folder)
        if mount is not None and around is not None and mount != around:
            return "it is a mount point"
        folder = os.fstat(self._folder)
        user = os.geteuid()
        if folder.st_mode & stat.S_ISVTX and user not in (status.st_uid, folder.st_uid) and not _may_act_as_owner(user):
            return "it belongs to another user, in a folder with the sticky bit"
        return None

    def give_attributes(self, fd: int) -> str | None:
        """Give the new, empty file `fd`, which nobody else may open yet, the owner, permissions, extended attributes and
        no-copy-on-write flag of this one; never the set-user-id, set-group-id and sticky bits. Returns why it cannot be made
        like this one, or None."""
        old, new = self.status, os.fstat(fd)
        if _flags(self.fd) & _NO_COPY_ON_WRITE and not _set_flag(fd, _NO_COPY_ON_WRITE):
            return "its no-copy-on-write flag cannot be given to a new file"
        user = old.st_uid if old.st_uid != new.st_uid else -1
        group = old.st_gid if old.st_gid != new.st_gid else -1
        if user != -1 or group != -1:
            try:
                os.fchown(fd, user, group)
            except OSError:
                return f"its {'owner' if user != -1 else 'group'} cannot be given to a new file"
        wanted, given = _attributes(self.fd), _attributes(fd)
        try:
            for name in given.keys() - wanted.keys():
                os.removexattr(fd, name)  # what the folder gives to new files
            os.fchmod(fd, old.st_mode & _PERMISSIONS)
            for name, value in wanted.items():
                if given.get(name) != value:
                    os.setxattr(fd, name, value)
        except OSError:
            return "its extended attributes cannot be given to a new file"
        return None

    def drop_privileges(self) -> None:
        """Before it is written in place: its new content must not run with the rights that the old one had. (The system takes
        these bits away by itself, but not where the administrator writes.) Raises BlockIOError."""
        if not self.is_device and self.status.st_mode & ~_PERMISSIONS & 0o7777:
            try:
                os.fchmod(self.fd, self.status.st_mode & _PERMISSIONS)
            except OSError as error:
                raise BlockIOError.from_os(
                    error, "its set-user-id, set-group-id or sticky bit cannot be taken away", path=self.path
                ) from error

    def replace(self, name: str) -> None:
        """Rename the file `name`, of the same folder, to this one. Refuses if another file has taken this one's place since
        it was opened. Raises OSError."""
        here = os.path.basename(self.path)
        now = os.stat(here, dir_fd=self._folder, follow_symlinks=False)
        if not os.path.samestat(now, self.status):
            raise self._changed()
        os.replace(name, here, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def close(self) -> None:
        """Give the lock back."""
        for name in ("_folder", "fd"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)

    def _changed(self) -> BlockIOError:
        hint = "nothing was changed; try again when that program is done"
        return BlockIOError(
            "another program replaced this file meanwhile", errno=errno.ESTALE, path=self.path, hint=hint
        )


def real_path(path: str) -> str:
    """The path without links of the file that is at `path`, or will be. BlockIOError where it can only be a folder (`x/`),
    and where the system refuses to follow a link on the way (one of another user in a folder with the sticky bit): whoever
    opens the path without links would not be stopped. ValueError where it is no path."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise BlockIOError.from_os(error, "cannot create a file there", path=path) from error
    except OSError:
        if os.path.basename(path) in ("", ".", ".."):
            raise BlockIOError("it names a folder", errno=errno.EISDIR, path=path, hint="name a file in it") from None
    return os.path.realpath(path)


def open_folder(path: str) -> int:
    """A descriptor by which names in the folder `path` are reached, whatever it is called meanwhile. Raises OSError."""
    return os.open(path or ".", getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)


def _mount(fd: int) -> bytes | None:
    """The number of the mount that a descriptor was opened through; None where the system does not tell."""
    try:
        return _line(f"/proc/self/fdinfo/{fd}", b"mnt_id:")
    except (OSError, ValueError):
        return None


def _line(path: str, key: bytes) -> bytes:
    """What stands behind `key` in a file of the system that describes something. Raises OSError, ValueError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(fd, 1 << 14)
    finally:
        os.close(fd)
    for line in text.splitlines():
        if line.startswith(key):
            return line[len(key) :]
    raise ValueError(f"{path} has no {key!r}")


def _may_act_as_owner(user: int) -> bool:
    """Whether this process has the right to do what only owners may (CAP_FOWNER)."""
    try:
        return bool(int(_line("/proc/self/status", b"CapEff:"), 16) & _CAP_FOWNER)
    except (OSError, ValueError):
        return user == 0


def _attributes(fd: int) -> dict[str, bytes]:
    """The extended attributes that a new file takes over."""
    try:
        return {name: os.getxattr(fd, name) for name in os.listxattr(fd) if name.startswith(_KEPT)}
    except OSError:
        return {}  # none, where the file system has none


def _flags(fd: int) -> int:
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

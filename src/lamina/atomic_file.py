"""Files that appear under their name when they are whole, and not before.

Ground floor: it imports nothing but errors, and knows nothing of images; `creation` adds the locks of images and says what is
done on standard error. It stands for `tempfile`, too, whose import alone is a tenth of what a short command costs.

A new file has no name while it is written (O_TMPFILE), where the file system has that: whatever ends the process leaves
nothing. Elsewhere, and for the moment in which a file is replaced, it is called `temporary_name(TARGET)`, and the process
that writes it holds a lock on it (flock): the next `AtomicFile` of that target removes what a killed process has left.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Collection
from contextlib import suppress
from types import TracebackType
from typing import Self
from zlib import crc32

from .errors import BlockIOError, LaminaError, Locked, OptionError, tell_too
from .target_file import NOT_ALLOWED, Lock, Target, open_folder, real_path

#: Of a file that is written in place, so many bytes from the start are written last. The headers of all formats begin there.
HEADER_BYTES = 4096

_PREFIX = ".lamina-new-"
_LONGEST_NAME = 255
#: What open says where there is no O_TMPFILE. (EISDIR, ENOENT: a kernel that does not know it. EINVAL: some file systems.)
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS)
#: What a system says that has no such operation for this file.
_MISSING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)


def temporary_name(name: str) -> str:
    """What a file of this name is called, in the same folder, while it is not whole. A name that leaves no room for the
    prefix is cut, and told apart by a checksum."""
    whole = _PREFIX + name
    if len(os.fsencode(whole)) <= _LONGEST_NAME:
        return whole
    return os.fsdecode(os.fsencode(whole)[:200]) + f"-{crc32(os.fsencode(name)):08x}"


class AtomicFile:
    """A new file at a path, or a new content of the file that is there. A context manager: write to the descriptor `fd`;
    leaving without an error gives the file its name, an error leaves nothing of it. No name leads to `fd` meanwhile that a
    program could want; messages name `path`.

    A file that is there already is held (`Target`) from the beginning to the end and replaced in one step. The new file has
    the owner, permissions and extended attributes of the old one, but never set-user-id, set-group-id or sticky bits. Where
    a rename would lose what the file is (`Target.obstacle`), and on a block device, `in_place` is true: `fd` is open on the
    file itself, with its old content. The first HEADER_BYTES bytes are then to be put into `header`, and are written at the
    end, so that a half-written file is never taken for a whole one; `begun` is to be set before the old content changes.

    `durable`: file and name are on stable storage at the end: the file first, then the name, so that a power cut leaves the
    old file or the new one. Where a file is replaced that is so in any case. `mode`: the permissions of a file of a new name,
    of which the system takes the bits of the umask. `lock`: see `Target`. `tell`: called with a line of text before anything
    is written in place, to say so. One thread at a time. In a process that was forked meanwhile nothing of it does anything.
    """

    # Of the class, so that one whose making was interrupted can be put away, too.
    fd = -1
    _folder = -1
    _old: Target | None = None
    _named = False  # the temporary name may be in use, by us
    _process = -1

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durable: bool = False,
        mode: int = 0o666,
        lock: Lock | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.durable = durable
        self.in_place = False
        #: Whether it is a block device, which keeps its length and what nobody overwrites.
        self.is_device = False
        #: In place: the old content is gone.
        self.begun = False
        self.header = bytearray()
        self._mode, self._lock, self._tell = mode, lock, tell
        self._name = self._temporary = ""
        self._process = os.getpid()
        #: As the caller names it.
        self.path = os.fspath(path)
        try:
            #: The path without links: where the file is, or will be.
            self.target = real_path(self.path)
        except ValueError as error:  # NUL, or a character that no file name can have
            raise OptionError(f"this cannot be a file name: {error}", path=self.path) from error

    @property
    def replaces(self) -> bool:
        """Whether a file was there before."""
        return self._old is not None

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException as error:
            self._discard(error)
            if isinstance(error, OSError) and not isinstance(error, LaminaError):
                raise BlockIOError.from_os(error, "cannot create a file there", path=self.path) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None and self._process == os.getpid():
                self._finish()
        except BaseException as problem:
            error = problem
            if isinstance(problem, OSError) and not isinstance(problem, LaminaError):
                raise BlockIOError.from_os(
                    problem, "the new file is whole, but cannot be put there", path=self.path
                ) from problem
            raise
        finally:
            self._discard(error)

    def __del__(self) -> None:
        # An interrupt that came before the first line of __exit__.
        self._discard(None)

    # -- at the beginning

    def _open(self) -> None:
        folder, self._name = os.path.split(self.target)
        try:
            self._old = Target(self.target, self._lock)
        except FileNotFoundError:
            self._old = None
        old = self._old
        if old is not None:
            self.is_device = old.is_device
            reason = old.obstacle()
            if reason is not None:
                self._open_in_place(old, reason)
                return
        self._folder = open_folder(folder)
        self._temporary = temporary_name(self._name)
        try:
            self._remove_unfinished()
            self._create(self._mode if old is None else 0o600)
        except OSError as error:
            if old is None or error.errno not in NOT_ALLOWED or isinstance(error, LaminaError):
                raise
            reason = f"no file can be made in its folder ({os.strerror(error.errno)})"
        else:
            reason = old.give_attributes(self.fd) if old is not None else None
        if old is not None and reason is not None:
            if self._named:
                self._remove_ours()
            self._close_new()
            self._open_in_place(old, reason)

    def _open_in_place(self, old: Target, reason: str) -> None:
        self.fd, self.in_place, self.header = os.dup(old.fd), True, bytearray(HEADER_BYTES)
        if not self.is_device and self._tell is not None:
            self._tell(f"written in place, since {reason}: a failure half-way loses the old content")
        old.drop_privileges()

    def _create(self, mode: int) -> None:
        """Make the new file, without a name where that can be. Raises OSError."""
        flags = os.O_RDWR | os.O_CLOEXEC
        if hasattr(os, "O_TMPFILE"):
            try:
                self.fd = os.open(".", flags | os.O_TMPFILE, mode, dir_fd=self._folder)
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
            else:
                if os.path.lexists(_path_of(self.fd)):  # by which it gets its name
                    _say_in_use(self.fd)
                    return
                self._close_new()
        while True:
            self._named = True
            self.fd = os.open(
                self._temporary, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=self._folder
            )
            _say_in_use(self.fd)
            if _is_at(self.fd, self._folder, self._temporary):
                return
            self._close_new()  # another run took it for left over, before it was locked

    # -- at the end

    def _finish(self) -> None:
        if self.in_place:
            self._finish_in_place()
            return
        durable = self.durable or self._old is not None
        if durable:
            os.fsync(self.fd)
        if self._old is not None:
            if not self._named:
                self._remove_unfinished()
                self._named = True
                self._link(self._temporary)
            self._old.replace(self._temporary)
        elif self._named:
            if _exists(self._folder, self._name):
                raise self._taken()
            os.replace(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        else:
            try:
                self._link(self._name)
            except FileExistsError as error:
                raise self._taken() from error
        self._named = False
        if durable:
            sync_folder(".", self._folder)  # whatever it is called by now

    def _finish_in_place(self) -> None:
        if not self.begun:
            return
        os.fsync(self.fd)
        length = HEADER_BYTES if self.is_device else min(os.fstat(self.fd).st_size, HEADER_BYTES)
        view = memoryview(self.header)[:length]
        at = 0
        while at < length:
            at += os.pwrite(self.fd, view[at:], at)
        os.fsync(self.fd)
        self.begun = False

    def _link(self, name: str) -> None:
        os.link(_path_of(self.fd), name, src_dir_fd=self._folder, dst_dir_fd=self._folder, follow_symlinks=True)

    def _taken(self) -> BlockIOError:
        return BlockIOError(
            "another program made a file of this name meanwhile",
            errno=errno.EEXIST,
            path=self.path,
            hint="it is left alone; do it again to replace it",
        )

    # -- in any case

    def _discard(self, error: BaseException | None) -> None:
        """Put away what is there still. What cannot be put away is told with `error`, if there is one."""
        left = None
        try:
            if isinstance(error, KeyboardInterrupt):
                tell_too(error, self._outcome())
            if self._process == os.getpid():
                if self.in_place and self.begun and not self.is_device and self.fd >= 0:
                    left = "the old content is lost"
                    os.ftruncate(self.fd, 0)
                elif self._named:
                    left = f"remove {os.path.join(os.path.dirname(self.target), self._temporary)}, which is left there"
                    self._remove_ours()
                    left = None
        except OSError:
            if left is None or error is None:
                raise
        finally:
            self._close_new()
            fd, self._folder = self._folder, -1
            if fd >= 0:
                os.close(fd)
            old, self._old = self._old, None
            if old is not None:
                old.close()
        if left is not None and isinstance(error, LaminaError):
            tell_too(error, left)

    def _outcome(self) -> str:
        """What an interrupt leaves at the target."""
        if self.in_place:
            return f"the old content of {self.path} is lost" if self.begun else f"nothing was changed at {self.path}"
        with suppress(OSError):
            if self.fd >= 0 and os.path.samestat(os.stat(self.target), os.fstat(self.fd)):
                return f"{self.path} is there, whole"
        return f"nothing was changed at {self.path}"

    def _remove_ours(self) -> None:
        if self.fd >= 0:
            if _is_at(self.fd, self._folder, self._temporary):
                os.unlink(self._temporary, dir_fd=self._folder)
        elif self._folder >= 0:
            # Interrupted as it was made, or before: then nobody holds its lock.
            with suppress(LaminaError):  # another's, or in use: not what this made
                self._remove_unfinished()
        self._named = False

    def _remove_unfinished(self) -> None:
        """Remove what a run that was killed has left: it belonged to this user or, by then, to the owner of the target."""
        owners = {os.geteuid()} | ({self._old.status.st_uid} if self._old is not None else set())
        _remove_unfinished(self._folder, self._temporary, owners)

    def _close_new(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def write_file(path: str | os.PathLike[str], data: bytes, *, durable: bool = False, mode: int = 0o666) -> None:
    """Make `data` the content of the file at `path`, in one step (see `AtomicFile`). Raises BlockIOError, OptionError."""
    with AtomicFile(path, durable=durable, mode=mode) as file:
        if file.in_place:
            file.begun = True
            os.ftruncate(file.fd, 0)
            os.ftruncate(file.fd, len(data))
            file.header[: len(data)] = data[:HEADER_BYTES]
        view, at = memoryview(data), HEADER_BYTES if file.in_place else 0
        while at < len(data):
            at += os.pwrite(file.fd, view[at:], at)


def sync_folder(path: str, folder: int | None = None) -> None:
    """The names in this folder are on stable storage on return. `folder`: a descriptor of the one that `path` is relative to.
    Raises OSError."""
    try:
        fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    except PermissionError:
        os.sync()  # a folder that may be written and not read
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _MISSING:  # file systems whose folders have no such thing
            raise
    finally:
        os.close(fd)


def _remove_unfinished(folder: int, name: str, owners: Collection[int]) -> None:
    """Remove the temporary file `name` if a process that was killed has left it. Raises Locked if a process writes it, and
    BlockIOError where it is not certain that it is left over: its owner is not one of `owners`, it is no regular file, has
    several names, or cannot be locked."""
    try:
        fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=folder)
    except FileNotFoundError:
        return
    except OSError as error:
        if not _exists(folder, name):  # the folder may not be searched, or it is gone
            raise
        raise _in_the_way(folder, name) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_uid not in owners:
            raise _in_the_way(folder, name)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "wait until that program is done"
            raise Locked("another program is making this file", path=_in_folder(folder, name), hint=hint) from error
        except OSError as error:
            raise _in_the_way(folder, name) from error
        if _is_at(fd, folder, name):
            os.unlink(name, dir_fd=folder)
    finally:
        os.close(fd)


def _in_the_way(folder: int, name: str) -> BlockIOError:
    return BlockIOError(
        "this file is in the way of a new one, and is not known to be left over",
        errno=errno.EEXIST,
        path=_in_folder(folder, name),
        hint="remove it",
    )


def _in_folder(folder: int, name: str) -> str:
    try:
        return os.path.join(os.readlink(_path_of(folder)), name)
    except OSError:
        return name


def _say_in_use(fd: int) -> None:
    """Hold the lock that says "a living process writes this file", where there are such locks. (Another run that looks at the
    file may hold it for a moment, and then removes the file.)"""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(fd: int, folder: int, name: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _path_of(fd: int) -> str:
    return f"/proc/self/fd/{fd}"

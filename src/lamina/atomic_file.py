"""Atomic creation and replacement of files: a file gets its name only when its content is complete.

Base layer; the module does not know images. `creation` adds image locks and prints warnings on standard error. `tempfile` is
not used, since its import takes a tenth of the time of a short command.

A new file has no name while it is written (O_TMPFILE), if the file system supports that, so a killed process leaves nothing
behind. Otherwise, and for a moment when a file is replaced, the new file is named `temporary_name(TARGET)`, and the writing
process holds a lock on it (flock). The next `AtomicFile` of the target removes the temporary file of a killed process.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self
from zlib import crc32

from .capabilities import (
    FOLDERS,
    MOVES_OPEN_FILES,
    O_CLOEXEC,
    O_DIRECTORY,
    O_NOCTTY,
    O_NOFOLLOW,
    O_NONBLOCK,
    O_TMPFILE,
    fcntl,
    flush_file,
    pwrite,
    user,
)
from .descriptors import close_all, duplicate_into, open_into
from .errors import BlockIOError, LaminaError, Locked, OptionError, append_hint
from .target_file import NOT_ALLOWED, Lock, Target, at, open_folder, real_path

#: The first bytes of a file that is written in place; they are written last. The header of every format is there.
HEADER_BYTES = 4096

_PREFIX = ".lamina-new-"
_LONGEST_NAME = 255
#: Errors of open without support for O_TMPFILE. (EISDIR, ENOENT: an old kernel. EINVAL: some file systems.)
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS)
#: Errors of an operation that the file system does not support.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)


def temporary_name(name: str) -> str:
    """The name, in the same folder, of the temporary file for the target `name`. A name that would exceed the limit of the
    file system is truncated and gets a checksum."""
    temporary = _PREFIX + name
    if len(os.fsencode(temporary)) <= _LONGEST_NAME:
        return temporary
    return os.fsdecode(os.fsencode(temporary)[:200]) + f"-{crc32(os.fsencode(name)):08x}"


class AtomicFile:
    """A new file at a path, or a replacement of the existing file. A context manager: the caller writes to the descriptor
    `fd`. At the end of the block the file gets its name; after an error it is removed. Messages contain `path`.

    An existing file is opened and locked (`Target`) for the whole block and replaced by a rename. The new file gets the
    owner, permissions and extended attributes of the old one, but never set-user-id, set-group-id or sticky bits. Where a
    rename would lose properties of the file (`Target.obstacle`), and for a block device, `in_place` is true: `fd` is the
    existing file with its old content. The caller then stores the first HEADER_BYTES bytes in `header`, which are written at
    the end, so that an incomplete file is never taken for an image, and sets `begun` before it changes the old content.

    `durable`: the file and then its name are on stable storage at the end, so that a power cut leaves the old file or the
    new one. A replacement is always durable. `mode`: the permissions of a file with a new name, without the bits of the
    umask. `lock`: see `Target`. `tell`: called with a warning, one line, before a file is written in place. Not thread-safe.
    In a forked child process all methods do nothing.
    """

    # Class attributes, so that `__del__` works for an instance whose `__init__` was interrupted.
    fd = -1
    _folder = -1
    _old: Target | None = None
    _named = False  # the temporary file of this instance may exist
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
        #: Whether the target is a block device, whose length is fixed and whose other bytes stay.
        self.is_device = False
        #: Whether the old content was changed in place.
        self.begun = False
        self.header = bytearray()
        self._mode, self._lock, self._tell = mode, lock, tell
        self._name = self._temporary = ""
        self._fds: list[int] = []  # `fd`, while it is open
        self._folders: list[int] = []  # likewise
        self._process = os.getpid()
        #: The path as the caller wrote it.
        self.path = os.fspath(path)
        try:
            #: The path without symbolic links.
            self.target = real_path(self.path)
        except ValueError as error:  # NUL, or a character without an encoding
            raise OptionError(f"not a valid file name: {error}", path=self.path) from error

    @property
    def replaces(self) -> bool:
        """Whether the target existed before."""
        return self._old is not None

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException as error:
            self._clean_up(error)
            if isinstance(error, OSError) and not isinstance(error, LaminaError):
                raise BlockIOError.from_os(error, "cannot create the file", path=self.path) from error
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
                    problem, "the new file is complete, but cannot be renamed to its target", path=self.path
                ) from problem
            raise
        finally:
            try:
                self._clean_up(error)
            finally:
                self.abandon()

    def __del__(self) -> None:
        # For an interrupt between the last line of the block and the first of __exit__.
        if self._process >= 0:
            self.abandon()

    def abandon(self) -> None:
        """Remove what is left of a file that did not get its name, and close the descriptors. Does nothing after `__exit__`,
        unless an interrupt struck there."""
        if self._fds or self._folders or self._old is not None or self._named:
            self._clean_up(None)

    # -- begin

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
        self._folder = open_folder(self._folders, folder)
        self._temporary = temporary_name(self._name)
        if self._folder < 0:
            self._name, self._temporary = self.target, os.path.join(folder, self._temporary)
        try:
            self._remove_unfinished()
            self._create(self._mode if old is None else 0o600)
        except OSError as error:
            if old is None or error.errno not in NOT_ALLOWED or isinstance(error, LaminaError):
                raise
            reason = f"no file can be created in its folder ({os.strerror(error.errno)})"
        else:
            reason = old.give_attributes(self.fd) if old is not None else None
        if old is not None and reason is not None:
            if self._named:
                self._remove_temporary()
            self._close_new()
            self._open_in_place(old, reason)

    def _open_in_place(self, old: Target, reason: str) -> None:
        self.fd = duplicate_into(self._fds, old.fd)
        self.in_place, self.header = True, bytearray(HEADER_BYTES)
        if not self.is_device and self._tell is not None:
            self._tell(f"written in place, since {reason}: a failure before the end loses the old content")
        old.drop_privileges()

    def _create(self, mode: int) -> None:
        """Create the new file, without a name if the file system supports that. Raises OSError."""
        flags = os.O_RDWR | O_CLOEXEC
        if O_TMPFILE:
            try:
                self.fd = open_into(self._fds, ".", flags | O_TMPFILE, mode, folder=self._folder)
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
            else:
                if os.path.lexists(_path_of(self.fd)):  # this path is needed to give the file its name
                    _mark_in_use(self.fd)
                    return
                self._close_new()
        while True:
            self._named = True
            new = flags | os.O_CREAT | os.O_EXCL | O_NOFOLLOW
            self.fd = open_into(self._fds, self._temporary, new, mode, folder=at(self._folder))
            _mark_in_use(self.fd)
            if _is_at(self.fd, self._folder, self._temporary):
                return
            self._close_new()  # another process removed the file before it was locked

    # -- end

    def _finish(self) -> None:
        if self.in_place:
            self._finish_in_place()
            return
        durable = self.durable or self._old is not None
        if durable:
            flush_file(self.fd)
        if not MOVES_OPEN_FILES:
            self._close_new()
        if self._old is not None:
            if not self._named:
                self._remove_unfinished()
                self._named = True
                self._link(self._temporary)
            self._old.replace(os.path.basename(self._temporary))
        elif self._named:
            self._rename_to_free_name()
        else:
            try:
                self._link(self._name)
            except FileExistsError as error:
                raise self._name_in_use() from error
        self._named = False
        if durable:
            # By its descriptor, since the folder may have been renamed.
            sync_folder("." if self._folder >= 0 else os.path.dirname(self.target), at(self._folder))

    def _rename_to_free_name(self) -> None:
        # A second link, since a rename would replace a file that another program creates at the last moment.
        try:
            os.link(self._temporary, self._name, src_dir_fd=at(self._folder), dst_dir_fd=at(self._folder))
        except FileExistsError as error:
            raise self._name_in_use() from error
        except OSError as error:  # a file system without hard links
            if _exists(self._folder, self._name):
                raise self._name_in_use() from error
            os.replace(self._temporary, self._name, src_dir_fd=at(self._folder), dst_dir_fd=at(self._folder))
        else:
            os.unlink(self._temporary, dir_fd=at(self._folder))

    def _finish_in_place(self) -> None:
        if not self.begun:
            return
        flush_file(self.fd)
        length = HEADER_BYTES if self.is_device else min(os.fstat(self.fd).st_size, HEADER_BYTES)
        view = memoryview(self.header)[:length]
        at = 0
        while at < length:
            at += pwrite(self.fd, view[at:], at)
        flush_file(self.fd)
        self.begun = False

    def _link(self, name: str) -> None:
        os.link(_path_of(self.fd), name, src_dir_fd=self._folder, dst_dir_fd=self._folder, follow_symlinks=True)

    def _name_in_use(self) -> BlockIOError:
        return BlockIOError(
            "another program created a file of this name meanwhile",
            errno=errno.EEXIST,
            path=self.path,
            hint="that file is unchanged; run the command again to replace it",
        )

    # -- clean-up

    def _clean_up(self, error: BaseException | None) -> None:
        """Remove the temporary file and close all descriptors. `error` gets a hint about the state of the target."""
        try:
            try:
                left = self._remove(error)
            except Exception:
                raise
            except BaseException:  # an interrupt
                self._remove(None)
                raise
        finally:
            try:
                self._close()
            finally:
                self._close()  # completes what an interrupt stopped, and else does nothing
        if left is not None and isinstance(error, LaminaError):
            append_hint(error, left)

    def _remove(self, error: BaseException | None) -> str | None:
        """Remove the temporary file, or what was written in place. Returns what is lost, or left to be removed."""
        left = None
        try:
            if isinstance(error, KeyboardInterrupt):
                append_hint(error, self._outcome())
            if self._process == os.getpid():
                if self.in_place and self.begun and not self.is_device and self.fd >= 0:
                    left = "the old content is lost"
                    os.ftruncate(self.fd, 0)
                elif self._named:
                    left = f"remove the temporary file {os.path.join(os.path.dirname(self.target), self._temporary)}"
                    self._remove_temporary()
                    left = None
        except OSError:
            self._named = False
            if left is None or error is None:
                raise
        return left

    def _close(self) -> None:
        """Close all descriptors. May be called again."""
        try:
            self._close_new()
            self._folder = -1
            close_all(self._folders)
        finally:
            if self._old is not None:
                self._old.close()
            self._old = None

    def _outcome(self) -> str:
        """The state of the target after an interrupt."""
        if self.in_place:
            return f"the old content of {self.path} is lost" if self.begun else f"nothing was changed at {self.path}"
        with suppress(OSError):
            if self.fd >= 0 and os.path.samestat(os.stat(self.target), os.fstat(self.fd)):
                return f"{self.path} is complete"
        return f"nothing was changed at {self.path}"

    def _remove_temporary(self) -> None:
        if self.fd >= 0:
            mine = _is_at(self.fd, self._folder, self._temporary)
            if not MOVES_OPEN_FILES:
                self._close_new()
            if mine:
                os.unlink(self._temporary, dir_fd=at(self._folder))
        elif self._folder >= 0 or not FOLDERS:
            # Creation was interrupted, so no process holds the lock.
            with suppress(LaminaError):  # the file of another user or process
                self._remove_unfinished()
        self._named = False

    def _remove_unfinished(self) -> None:
        """Remove the temporary file of a killed process, whose owner is this user or already the owner of the target."""
        owners = {user()} | ({self._old.status.st_uid} if self._old is not None else set())
        _remove_unfinished(self._folder, self._temporary, owners)

    def _close_new(self) -> None:
        self.fd = -1
        close_all(self._fds)


@contextmanager
def making(file: AtomicFile) -> Iterator[AtomicFile]:
    """`with file`, which also removes what is left if an interrupt strikes between the end of the block and `__exit__`."""
    try:
        with file:
            yield file
    finally:
        file.abandon()


def write_file(path: str | os.PathLike[str], data: bytes, *, durable: bool = False, mode: int = 0o666) -> None:
    """Write `data` to the file at `path` atomically (see `AtomicFile`). Raises BlockIOError, OptionError."""
    with making(AtomicFile(path, durable=durable, mode=mode)) as file:
        try:
            if file.in_place:
                file.begun = True
                os.ftruncate(file.fd, 0)
                os.ftruncate(file.fd, len(data))
                file.header[: len(data)] = data[:HEADER_BYTES]
            view, at = memoryview(data), HEADER_BYTES if file.in_place else 0
            while at < len(data):
                at += pwrite(file.fd, view[at:], at)
        except OSError as error:
            raise BlockIOError.from_os(error, "the file cannot be written", path=file.path) from error


def sync_folder(path: str, folder: int | None = None) -> None:
    """Flush the names of a folder to stable storage. `folder`: the descriptor to which `path` is relative. Raises OSError."""
    if not FOLDERS:
        return  # a system whose file system keeps names by itself
    fds: list[int] = []
    try:
        try:
            fd = open_into(fds, path or ".", os.O_RDONLY | O_DIRECTORY | O_CLOEXEC, folder=folder)
        except PermissionError:
            os.sync()  # the folder may be written but not read
            return
        try:
            flush_file(fd)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:  # some file systems cannot flush folders
                raise
    finally:
        for fd in fds:
            os.close(fd)


def _remove_unfinished(folder: int, name: str, owners: Collection[int]) -> None:
    """Remove the temporary file `name` of a killed process. Raises Locked if a process is writing it, and BlockIOError if it
    may be something else: its owner is not in `owners`, it is no regular file, has several links, or cannot be locked."""
    fds: list[int] = []
    try:
        try:
            fd = open_into(fds, name, os.O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, folder=at(folder))
        except FileNotFoundError:
            return
        except OSError as error:
            if not _exists(folder, name):  # the folder cannot be searched or was removed
                raise
            raise _not_temporary(folder, name) from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_uid not in owners:
            raise _not_temporary(folder, name)
        try:
            if fcntl is not None:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _being_written(folder, name) from error
        except OSError as error:
            raise _not_temporary(folder, name) from error
        if _is_at(fd, folder, name):
            if not MOVES_OPEN_FILES:
                close_all(fds)
            try:
                os.unlink(name, dir_fd=at(folder))
            except PermissionError as error:
                if MOVES_OPEN_FILES:
                    raise
                raise _being_written(folder, name) from error
    finally:
        for fd in fds:
            os.close(fd)


def _being_written(folder: int, name: str) -> Locked:
    hint = "wait until that program has finished"
    return Locked("another program is writing this file", path=_in_folder(folder, name), hint=hint)


def _not_temporary(folder: int, name: str) -> BlockIOError:
    return BlockIOError(
        "this file has the name of a temporary file, but may not be one",
        errno=errno.EEXIST,
        path=_in_folder(folder, name),
        hint="remove or rename it",
    )


def _in_folder(folder: int, name: str) -> str:
    try:
        return os.path.join(os.readlink(_path_of(folder)), name) if folder >= 0 else name
    except OSError:
        return name


def _mark_in_use(fd: int) -> None:
    """Take the lock that marks the file as being written, if the file system has such locks. (Another process that checks the
    file may hold the lock for a moment; it then removes the file.)"""
    if fcntl is None:
        return  # where an open file cannot be removed, that is the lock
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(fd: int, folder: int, name: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=at(folder), follow_symlinks=False))
    except FileNotFoundError:
        return False


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=at(folder), follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _path_of(fd: int) -> str:
    return f"/proc/self/fd/{fd}"

"""The exports of a server, and the rules by which a client sees them: single exports, and folders of images.

The server opens an image of a folder when a client that may see it requests it by name. All clients of the image share it,
and the last one closes it. A client uses one export at a time.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from ...capabilities import FOLDERS, O_CLOEXEC, O_DIRECTORY, O_NOCTTY, O_NOFOLLOW, O_NONBLOCK, set_blocking
from ...errors import BlockIOError, LaminaError, OptionError, printable
from ...image import Image
from ...node import Node, StorageNode
from .. import wire
from ..tls import allowed
from .export import Export
from .negotiation import Refused

log = logging.getLogger("lamina.nbd")

#: What opening a name says that is none, or that became a link meanwhile.
_NOT_THERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO)


class RestrictedExport:
    """An export that only some clients see. `tls_only`: clients that use TLS; `allow`: clients whose certificate has one of
    these names (None: all clients)."""

    def __init__(self, export: Export, *, tls_only: bool = False, allow: Collection[str] | None = None) -> None:
        self.export = export
        self.tls_only = tls_only
        self.allow = allow

    def shown_to(self, secure: bool, names: Sequence[str]) -> bool:
        """Whether a client sees it: over TLS or not, with the names of its certificate."""
        return (secure or not self.tls_only) and (self.allow is None or allowed(names, self.allow))


class Folder:
    """The regular files of the folder `path` as exports, by their names. Links, folders, FIFOs, sockets, devices, and names
    that begin with a dot are none.

    A name that a client sends is looked up in the folder itself and opened without following links; what the descriptor
    turns out to be is judged, not what the name meant a moment before. How the image in it is opened is said by one of:

    `open_fd(path, fd)` gives the image in the file that the descriptor `fd` is open on, and opens nothing by the name
    `path`, which is absolute and for messages. The folder closes `fd`; a function that keeps it
    duplicates it, as `graph.open_graph(..., fd=fd)` does.

    `open(path)` opens it by its absolute path. If another file has that path meanwhile, the image is closed again and the
    client refused.

    `writable`: clients may write. `snapshot`: what they write is kept in memory, so that files are opened for reading only.
    `write_through`: as for `Export`.

    Thread-safe. A file that is slow to open or close delays only clients of this file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        open: Callable[[str], Image] | None = None,
        *,
        open_fd: Callable[[str, int], Image] | None = None,
        writable: bool = False,
        snapshot: bool = False,
        write_through: bool = False,
    ) -> None:
        if (open is None) == (open_fd is None):
            raise OptionError("a folder is opened in one way", hint="give open_fd, or open")
        if not FOLDERS:
            raise OptionError("a folder cannot be served on this system", hint="name the images one by one")
        self.path: Path = Path(path)
        self._place = os.path.abspath(path)
        self._open, self._open_fd = open, open_fd
        self._writable, self._write_through = writable, write_through
        self._access = os.O_RDWR if writable and not snapshot else os.O_RDONLY
        self._mutex = threading.Lock()  # of the table alone: nothing is opened or closed while it is held
        self._entries: dict[str, _Entry] = {}

    def names(self) -> list[str]:
        """The names of all files, sorted. BlockIOError if the folder cannot be read."""
        try:
            with os.scandir(self._place) as entries:
                return sorted(
                    entry.name for entry in entries if _is_name(entry.name) and entry.is_file(follow_symlinks=False)
                )
        except OSError as error:
            raise BlockIOError.from_os(error, "the folder cannot be read", path=self._place) from error

    def acquire(self, name: str) -> Export | None:
        """The export of that name, opened; None if there is none. Give it back with `release`. Raises the LaminaError of
        opening the image."""
        if not _is_name(name):
            return None
        with self._mutex:
            entry = self._entries.setdefault(name, _Entry())
            entry.users += 1
        try:
            with entry.lock:  # only clients of this image wait
                if entry.export is None:
                    entry.export = self._opened(name)
                if entry.export is not None:
                    return entry.export
        except BaseException:
            self._leave(name, entry)
            raise
        self._leave(name, entry)
        return None

    def release(self, name: str) -> None:
        """A client does not need it any more. The last one closes the image; that may raise a LaminaError."""
        entry = self._entries[name]
        with entry.lock:
            with self._mutex:
                entry.users -= 1
                last = not entry.users
            try:
                # Closed before the name is free: two that have one file open for writing exclude each other.
                if last and entry.export is not None:
                    export, entry.export = entry.export, None
                    export.image.close()
            finally:
                self._forget(name, entry)

    def _leave(self, name: str, entry: _Entry) -> None:
        with self._mutex:
            entry.users -= 1
        self._forget(name, entry)

    def _forget(self, name: str, entry: _Entry) -> None:
        with self._mutex:
            if not entry.users and self._entries.get(name) is entry:
                del self._entries[name]

    def _opened(self, name: str) -> Export | None:
        """The export of that file, opened; None if it is none that is served."""
        path = os.path.join(self._place, name)
        try:
            folder = os.open(self._place, os.O_RDONLY | O_DIRECTORY | O_CLOEXEC)
            try:
                fd = self._judged(name, folder)
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise BlockIOError.from_os(error, "cannot be opened", path=path, operation="open") from error
        if fd is None:
            return None
        try:
            image = self._image(path, fd)
        finally:
            os.close(fd)  # the image has a duplicate
        try:
            return Export(image, name, writable=self._writable, write_through=self._write_through)
        except BaseException:
            image.close()
            raise

    def _judged(self, name: str, folder: int) -> int | None:
        """A descriptor of the regular file `name` in the open `folder`; None if it is something else."""
        # Looked at before it is opened: to open a device or a FIFO can do something, or wait.
        if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            return None
        flags = self._access | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC
        fd = os.open(name, flags, dir_fd=folder)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            set_blocking(fd)
            return fd
        os.close(fd)
        return None

    def _image(self, path: str, fd: int) -> Image:
        if self._open_fd is not None:
            return self._open_fd(path, fd)
        assert self._open is not None
        image = self._open(path)
        found, status = _identity(image.node), os.fstat(fd)
        if found is not None and found != (status.st_dev, status.st_ino):
            image.close()
            raise BlockIOError("the file was replaced while it was opened", path=path, operation="open")
        return image


class _Entry:
    """A file of a folder that clients have, or are about to have. `users` counts those; `lock` is held to open or close."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.export: Export | None = None


def _identity(node: Node) -> tuple[int, int] | None:
    """Device and inode of the file that the image is in; None if it is in no file."""
    while not isinstance(node, StorageNode):
        child = node.children.get("file") or node.children.get("image")
        if child is None:
            return None
        node = child.node
    return node.identity


def _is_name(name: str) -> bool:
    """Whether a file of this name is served, if it is a regular file."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        return False
    try:
        return len(name.encode()) <= 255
    except UnicodeError:
        return False


class VisibleExports:
    """What one client may see at this point of its connection. `close` gives back what it had opened."""

    def __init__(
        self,
        restricted: Iterable[RestrictedExport],
        folder: Folder | None,
        *,
        secure: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        self._all = list(restricted)
        self._folder = folder
        self._secure, self._names = secure, names
        self._held: tuple[str, Export] | None = None  # the one file of the folder that this client has

    def secured(self, names: Sequence[str]) -> VisibleExports:
        """The view of the same client, now under TLS and with these names in its certificate."""
        self.close()
        return VisibleExports(self._all, self._folder, secure=True, names=names)

    def names(self) -> list[tuple[str, str]]:
        """(name, description) of every export."""
        shown = [each.export for each in self._all if each.shown_to(self._secure, self._names)]
        found = [(export.name, export.description) for export in shown]
        if self._folder is not None:
            found += [(name, "") for name in self._folder.names()]
        return found

    def find(self, name: str) -> Export:
        """The export of that name. "" is the only one, where there is but one. Raises Refused, or the LaminaError of opening
        a file in a folder."""
        for each in self._all:
            if each.export.name == name or (not name and len(self._all) == 1 and self._folder is None):
                if each.shown_to(self._secure, self._names):
                    return each.export
                if each.tls_only and not self._secure:
                    raise Refused(wire.REP_ERR_TLS_REQD, "this export needs TLS")
                break  # a client that may not see it gets the same error as for an unknown name
        else:
            if self._folder is not None:
                return self._in_folder(self._folder, name)
        raise Refused(wire.REP_ERR_UNKNOWN, f'there is no export "{printable(name[:200])}"')

    def _in_folder(self, folder: Folder, name: str) -> Export:
        if self._held is not None:
            if self._held[0] == name:
                return self._held[1]
            self.release()
        export = folder.acquire(name)
        if export is None:
            raise Refused(wire.REP_ERR_UNKNOWN, f'there is no export "{printable(name[:200])}"')
        self._held = (name, export)
        return export

    def release(self) -> None:
        """Give back what `find` opened last. Called again it does nothing."""
        held, self._held = self._held, None
        if held is None or self._folder is None:
            return
        try:
            self._folder.release(held[0])
        except LaminaError as error:
            log.error("%s: closing failed: %s", printable(held[0]), error)

    def close(self) -> None:
        """Give back what this client had opened."""
        self.release()


def check_names(restricted: Sequence[RestrictedExport]) -> None:
    """LaminaError if two exports have one name, or a name cannot be sent."""
    seen: set[str] = set()
    for each in restricted:
        name = each.export.name
        if name in seen:
            raise OptionError(f'two exports are named "{printable(name)}"', hint="give each a name of its own")
        seen.add(name)
        for text in (name, each.export.description):
            # (A lone surrogate, which has no form in UTF-8, becomes "?" by "replace".)
            if (
                "\0" in text
                or len(encoded := text.encode(errors="replace")) > wire.MAX_STRING
                or encoded.decode() != text
            ):
                raise OptionError("names and descriptions are UTF-8 of at most 4096 bytes, without NUL")

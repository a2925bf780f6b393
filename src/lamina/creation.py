"""New images, in files that get their name when they are complete (`atomic_file`): no reader ever sees a partial image.

An existing file that cannot be replaced, or a block device, is overwritten in place: the first bytes, which contain the
headers of all formats, are buffered and written last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .atomic_file import HEADER_BYTES, AtomicFile, making, sync_folder
from .capabilities import O_CLOEXEC, O_NOFOLLOW
from .descriptors import close_all, open_into, opening
from .detection import HEAD_BYTES, TAIL_BYTES
from .errors import BlockIOError, NotSupported, OptionError, printable
from .format import Format, lookup_format
from .graph import Opener
from .limits import DEFAULT_BUDGET, MIB, Budget
from .node import NO_FALLBACK, FilterNode
from .options import path_in
from .parameters import checked
from .policy import Policy
from .request import Child

if TYPE_CHECKING:
    from .extents import HostFile


def create_driver(name: str) -> type[Format]:
    """The format driver `name`, if it can create images; otherwise UnsupportedFeature, or OptionError if it is not a
    format."""
    kind = lookup_format(name)
    kind.creation_schema()
    return kind


@checked
def create(
    path: str | os.PathLike[str],
    format: str,
    size: int | str | None = None,
    *,
    budget: Budget = DEFAULT_BUDGET,
    **options: Any,
) -> None:
    """Create an image of `size` bytes, a number or a text such as "10G", at `path`. `options` are those of the format, by
    name (`cluster_size=65536`, `backing_file="base.qcow2"`, `backing_fmt="qcow2"`); `lamina create -f FORMAT -o help`
    lists them. `budget` bounds the cost of the backing images, which are opened for checks.

    The file gets its name when it is complete. It replaces an existing file (see `AtomicFile`) unless another program has
    that file open. The new image is on stable storage when this returns. Raises OptionError, LimitExceeded, Locked,
    BlockIOError.
    """
    kind = create_driver(format)
    values = kind.creation_schema().parse({**options, **({} if size is None else {"size": size})})
    target = path_in(path)
    kind.prepare_create(values, target, budget)
    if values.get("size") is None:
        raise OptionError("the size is not given", path=target, hint="give it in bytes, or with a suffix: 10G")
    with made_beside(kind, values, target), new_file(target, durable=True) as file:
        write_image(kind, file, values)


def new_file(target: str, *, durable: bool = False) -> AbstractContextManager[AtomicFile]:
    """The file of a new image at `target`, a context manager; `open_new` opens it. Meanwhile no other program can open, as an
    image, the file that it replaces or writes in place. `durable` as for `AtomicFile`."""
    return making(AtomicFile(target, durable=durable, lock=lock_for_writing, tell=lambda text: tell(target, text)))


@contextmanager
def made_beside(kind: type[Format], values: Mapping[str, Any], target: str) -> Iterator[None]:
    """Create the files beside a new image (`Format.side_files`), empty, with names that are on stable storage; an exception
    deletes them, unless the new image is at `target` already. OptionError if one of them exists."""
    made: list[str] = []
    fds: list[int] = []  # of the first of these files, as many as were created
    before = _identity(target)
    try:
        for path in kind.side_files(values):
            made.append(path)
            try:
                open_into(fds, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0o666)
            except FileExistsError as error:
                text = "this file is to be created for the guest data of the image, and exists already"
                raise OptionError(text, path=path, hint="delete it first, or name another one") from error
            except OSError as error:
                raise BlockIOError.from_os(error, "cannot create this file", path=path) from error
            sync_folder(os.path.dirname(path))
        yield
    except BaseException:
        statuses = [os.fstat(fd) for fd in fds]
        close_all(fds)  # there are systems on which an open file cannot be removed
        for path, status in zip(made, statuses, strict=False) if _identity(target) == before else ():
            with suppress(OSError):
                if os.path.samestat(os.lstat(path), status):
                    os.unlink(path)
        raise
    finally:
        for fd in fds:
            os.close(fd)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def lock_for_writing(fd: int, path: str) -> None:
    """Take the file locks of a writer on `fd`, a descriptor of the file at `path`; they last until it is closed. Raises
    Locked if another program uses the file."""
    # File locks belong to the open file description, not to the duplicate descriptor of this node.
    with opening(Opener(read_only=False, fd=fd).open, {"driver": "file", "filename": path}):
        pass


def tell(path: str, text: str) -> None:
    """Print a warning about a new image to standard error, unless the log "lamina" has another handler."""
    import logging

    logging.getLogger("lamina").warning("%s: %s", printable(path), text)


class Unsynced(FilterNode):
    """A filter over the file of an image that is being created. A flush does nothing: no reader sees the file before it is
    complete, so the order of its parts on disk does not matter. At the end the file as a whole is flushed, or not."""

    driver = "unsynced"
    _allocates = True

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        # A file system is faster to write into blocks that it has allocated at once than to allocate them page by page: on
        # ext4 1.7 GiB take 0.19 s instead of 0.31.
        if self._allocates and len(view) >= MIB:
            try:
                self.image.zero(offset, len(view), NO_FALLBACK)
            except NotSupported:
                self._allocates = False
        self.image.write(offset, view, flags)

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        self.image.copy_from(offset, source, source_offset, length, flags)

    def flush(self) -> None:
        pass


class HeaderLast(Unsynced):
    """A filter over a file that is written in place: the first bytes go to the header of `file` in memory, and read as zero
    in the file itself until it is complete."""

    driver = "header-last"

    def __init__(self, image: Child, file: AtomicFile) -> None:
        super().__init__(image)
        self._file = file

    def begin(self) -> None:
        """Delete as much of the old content as could be taken for an image. It is gone when this returns, also after a power
        cut."""
        if self._file.begun:
            return
        self._file.begun = True
        if self.growable:
            self.image.truncate(0)
        else:
            size = self.image.size
            head, tail = min(HEAD_BYTES, size), min(TAIL_BYTES, size)
            self.image.write(0, memoryview(bytes(head)))
            self.image.write(size - tail, memoryview(bytes(tail)))
        self.image.flush()

    def read_into(self, offset: int, view: memoryview) -> None:
        self.image.read_into(offset, view)
        if offset < HEADER_BYTES:
            count = min(HEADER_BYTES - offset, len(view))
            view[:count] = self._file.header[offset : offset + count]

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.begin()
        if offset < HEADER_BYTES:
            count = min(HEADER_BYTES - offset, len(view))
            self._file.header[offset : offset + count] = view[:count]
            self.image.write(offset, memoryview(bytes(count)))  # the file gets its full length
            offset, view = offset + count, view[count:]
        if len(view):
            super().write(offset, view, flags)

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        if offset < HEADER_BYTES:
            raise self.refuse("copy from a file here")
        self.begin()
        super().copy_from(offset, source, source_offset, length, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.begin()
        if offset < HEADER_BYTES:
            end = min(offset + length, HEADER_BYTES)
            self._file.header[offset:end] = bytes(end - offset)
        self.image.zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.begin()
        start = max(offset, HEADER_BYTES)
        if start < offset + length:
            self.image.discard(start, offset + length - start)

    def truncate(self, size: int) -> None:
        self.begin()
        if size < HEADER_BYTES:
            self._file.header[size:] = bytes(HEADER_BYTES - size)
        self.image.truncate(size)

    def reads_zero(self, offset: int, length: int) -> bool:
        if offset < HEADER_BYTES and any(self._file.header[offset : offset + length]):
            return False
        return self.image.reads_zero(offset, length)


def open_new(file: AtomicFile) -> Child:
    """The storage of the image that is being created in `file`, for writing, without flushes. It may be opened again after it
    was closed. If the image is written in place, the old content remains until the first change."""
    # The policy applies to names inside images, and there are none here.
    opener = Opener(read_only=False, policy=Policy.none(), fd=file.fd)
    return _opened(opener, file.path, lambda storage: HeaderLast(storage, file) if file.in_place else Unsynced(storage))


def open_unsynced(path: str) -> Child:
    """The same for a file at `path` that is not an `AtomicFile`: it keeps its name although it is incomplete."""
    opener = Opener(read_only=False, policy=Policy.none())
    return _opened(opener, path, Unsynced)


def _opened(opener: Opener, path: str, above: Callable[[Child], Unsynced]) -> Child:
    """The edge to the node that `above` makes over the file at `path`, which is closed if an interrupt prevents it."""
    storage = opener.child("file", {"driver": "file", "filename": path}, grows=True)
    try:
        return Child(above(storage), "file", grows=True)
    except BaseException:
        storage.close()
        raise


def begin(storage: Child) -> None:
    """Delete the old content of the storage that `open_new` returned, or, on a block device, the part of it that could be
    taken for an image."""
    if isinstance(storage.node, HeaderLast):
        storage.node.begin()


def write_image(kind: type[Format], file: AtomicFile, values: Mapping[str, Any]) -> None:
    """Create an image in `file`. `values` as parsed by `kind.creation_schema()`."""
    with opening(open_new, file) as storage:
        kind.create(storage, values["size"], values)
        begin(storage)  # for an image without a single write

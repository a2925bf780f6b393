"""New images, in files that get their name when they are complete (`atomic_file`): no reader ever sees half an image.

An existing file that cannot be replaced, or a block device, is overwritten in place: the first bytes, which hold the headers
of all formats, are buffered and written last.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .atomic_file import HEADER_BYTES, AtomicFile
from .detect import HEAD_BYTES, TAIL_BYTES
from .errors import NotSupported, OptionError, printable
from .format import Format, lookup_format
from .graph import Opener
from .limits import DEFAULT_BUDGET, MIB, Budget
from .node import NO_FALLBACK, FilterNode
from .options import path_in
from .policy import Policy
from .request import Child

if TYPE_CHECKING:
    from .extents import HostFile


def create_driver(name: str) -> type[Format]:
    """The format driver `name`, if it makes images; else UnsupportedFeature, or OptionError where `name` is no format."""
    kind = lookup_format(name)
    kind.creation_schema()
    return kind


def create(
    path: str | os.PathLike[str],
    format: str,
    size: int | None = None,
    *,
    budget: Budget = DEFAULT_BUDGET,
    **options: Any,
) -> None:
    """Make a new image of `size` bytes at `path`. `options` are those of the format, by name (`cluster_size=65536`,
    `backing_file="base.qcow2"`, `backing_fmt="qcow2"`); `lamina create -f FORMAT -o help` lists them. `budget` bounds the
    cost of the backing images, which are opened for checks.

    The file appears under its name only when it is whole; a file that is there already is replaced (`AtomicFile` says how),
    unless another program has it open. The new image is on stable storage when this returns. Raises OptionError,
    LimitExceeded, Locked, BlockIOError.
    """
    kind = create_driver(format)
    values = kind.creation_schema().parse({**options, **({} if size is None else {"size": size})})
    target = path_in(path)
    kind.prepare_create(values, target, budget)
    if values.get("size") is None:
        raise OptionError("the size is not given", path=target, hint="give it in bytes, or with a suffix: 10G")
    with new_file(target, durable=True) as file:
        write_image(kind, file, values)


def new_file(target: str, *, durable: bool = False) -> AtomicFile:
    """The file of a new image at `target`, a context manager; `open_new` opens it. Meanwhile no other program can open a file
    that it replaces (or writes in place) as an image. `durable` as for `AtomicFile`."""
    return AtomicFile(target, durable=durable, lock=lock_for_writing, tell=lambda text: tell(target, text))


def lock_for_writing(fd: int, path: str) -> None:
    """Take the locks of a writer of images on `fd`, a descriptor of the file at `path`; they last as long as it is open.
    Raises Locked if another program uses the file."""
    # Locks belong to what was opened, not to the copy of the descriptor that this node has.
    Opener(read_only=False, fd=fd).open({"driver": "file", "filename": path}).close()


def tell(path: str, text: str) -> None:
    """Say something about a new image that is no error: on standard error, unless the log "lamina" goes elsewhere."""
    import logging

    logging.getLogger("lamina").warning("%s: %s", printable(path), text)


class Unsynced(FilterNode):
    """Lies over the file of an image that is being made: until it is whole nobody sees it, so that making parts of it
    durable, one before the other, protects nothing. The file as a whole is made durable, or left to the system."""

    driver = "unsynced"
    _allocates = True

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        # A file system writes into blocks that it has allocated in one step faster than it finds one page after the other
        # a place: on ext4 1.7 GiB take 0.19 s instead of 0.31.
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
    """Lies over a file that is written in place: the first bytes are kept in the header of `file`, and are zero in the file
    until it is whole."""

    driver = "header-last"

    def __init__(self, image: Child, file: AtomicFile) -> None:
        super().__init__(image)
        self._file = file

    def begin(self) -> None:
        """The old content is gone when this returns, also after a power cut: as much of it as could be taken for an image."""
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
            self.image.write(offset, memoryview(bytes(count)))  # so that the file is as long as it would be
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
    """The storage of the image that is being made in `file`, for writing, without syncs. May be opened again once it is
    closed. Where the image is written in place the old content is kept until the first change."""
    # The policy is for names inside images: here is none.
    opener = Opener(read_only=False, policy=Policy.none(), fd=file.fd)
    storage = opener.child("file", {"driver": "file", "filename": file.path}, grows=True)
    over = HeaderLast(storage, file) if file.in_place else Unsynced(storage)
    return Child(over, "file", grows=True)


def open_unsynced(path: str) -> Child:
    """The same of a file at `path` that is no `AtomicFile`: one that stays, under its name, though it is not whole."""
    opener = Opener(read_only=False, policy=Policy.none())
    storage = opener.child("file", {"driver": "file", "filename": path}, grows=True)
    return Child(Unsynced(storage), "file", grows=True)


def begin(storage: Child) -> None:
    """From here on the storage that `open_new` gave has none of its old content, or on a block device none that could be
    taken for an image."""
    if isinstance(storage.node, HeaderLast):
        storage.node.begin()


def write_image(kind: type[Format], file: AtomicFile, values: Mapping[str, Any]) -> None:
    """Lay an image out in `file`. `values` as parsed by `kind.creation_schema()`."""
    storage = open_new(file)
    try:
        kind.create(storage, values["size"], values)
        begin(storage)  # where nothing was to be written
    finally:
        storage.close()

"""New images: made aside under another name and renamed when they are whole, so that nobody ever sees half of one."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import registry
from .beside import open_beside
from .errors import BlockIOError, NotSupported, OptionError, UnsupportedFeature
from .graph import Opener
from .limits import MIB
from .node import NO_FALLBACK, FilterNode
from .options import path_in
from .policy import Policy
from .request import Child

if TYPE_CHECKING:
    from .extents import HostFile
    from .node import Node


class Aside:
    """A file that is written beside its final name. Use as a context manager: `path` is where to write; leaving without an
    error renames it to `target`, an error removes it. A block device, and any other target that is not a regular file, is
    written in place, since it cannot be replaced. An existing file is replaced, and keeps its permissions."""

    def __init__(self, target: str) -> None:
        self.target = os.path.realpath(target)
        self.in_place = False
        try:
            status = os.stat(self.target)
        except FileNotFoundError:
            self._mode: int | None = None
        except OSError as error:
            raise BlockIOError.from_os(error, "cannot create the image", path=target) from error
        else:
            if stat.S_ISDIR(status.st_mode):
                raise BlockIOError("it is a directory", errno=21, path=target, hint="name a file in it")
            self.in_place = not stat.S_ISREG(status.st_mode)
            self._mode = stat.S_IMODE(status.st_mode)
        self.path = self.target
        if self.in_place:
            return
        if self._mode is not None:
            self._refuse_locked()
        try:
            fd, self.path = open_beside(self.target)
        except OSError as error:
            raise BlockIOError.from_os(error, "cannot create a file there", path=target) from error
        if self._mode is None:
            mask = os.umask(0)
            os.umask(mask)
            self._mode = 0o666 & ~mask
        os.fchmod(fd, self._mode)
        os.close(fd)

    def _refuse_locked(self) -> None:
        """What another program has open for writing is not replaced under it."""
        Opener(read_only=False).open({"driver": "file", "filename": self.target}).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.in_place:
            return
        try:
            if kind is None:
                os.replace(self.path, self.target)
            else:
                os.unlink(self.path)
        except OSError as problem:
            raise BlockIOError.from_os(
                problem, "the new image was made but cannot be put there", path=self.target
            ) from problem


def create_driver(name: str) -> type[Node]:
    """The format driver `name`, if it can make images."""
    kind: type[Node] = registry.lookup(name)
    if not hasattr(kind, "create"):
        raise UnsupportedFeature(f"images of format {name} cannot be created", hint="try qcow2 or raw")
    return kind


def create(path: str | os.PathLike[str], format: str, size: int | None = None, **options: Any) -> None:
    """Make a new image of `size` bytes at `path`. `options` are those of the format, by name (`cluster_size=65536`,
    `backing_file="base.qcow2"`, `backing_fmt="qcow2"`); `lamina create -f FORMAT -o help` lists them.

    The file appears under its name only when it is whole; a file that is there already is replaced, unless another program
    has it open. Raises OptionError, LimitExceeded, Locked, BlockIOError.
    """
    kind: Any = create_driver(format)
    values = kind.create_schema.parse({**options, **({} if size is None else {"size": size})})
    prepare = getattr(kind, "prepare_create", None)
    target = path_in(path)
    if prepare is not None:
        prepare(values, target)
    if values.get("size") is None:
        raise OptionError("the size is not given", path=target, hint="give it in bytes, or with a suffix: 10G")
    with Aside(target) as aside:
        write_image(kind, aside.path, values)


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


def open_aside(path: str) -> Child:
    """The storage of an image that is being made at `path`, for writing, without syncs."""
    opener = Opener(read_only=False, policy=Policy.none())
    storage = opener.child("file", {"driver": "file", "filename": path}, grows=True)
    return Child(Unsynced(storage), "file", grows=True)


def write_image(kind: Any, path: str, values: Mapping[str, Any], *, durable: bool = True) -> None:
    """Lay an image out in the file at `path`, which exists. `values` as parsed by `kind.create_schema`. `durable`: it is
    on stable storage before this returns."""
    storage = open_aside(path)
    try:
        kind.create(storage, values["size"], values)
        if durable:
            storage.node.children["image"].flush()
    finally:
        storage.close()

"""The file system `lamina` of fsspec: disks inside images as files, for pandas, dask and everything else that reads URLs.

    fsspec.open("lamina://disk.qcow2?format=qcow2&partition=1")

The package registers it under the name `lamina` (entry point `fsspec.specs`). A path names an image file, and with
`partition` a part of its disk. Files are read only. No image stays open between two operations.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn
from urllib.parse import unquote

try:
    from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
except ImportError as error:
    raise ImportError("lamina.fsspec needs the package fsspec: pip install 'lamina[fsspec]'") from error

from .api import open as open_image
from .errors import BlockIOError, NotFound, OptionError, ReadOnly
from .filters.partition import find, partitions
from .image import Image
from .limits import DEFAULT_BUDGET, KIB, Budget
from .node import StorageNode
from .options import is_encodable, shown
from .own_files import refuse_own
from .policy import Policy

#: Options that the query of a path may have; the same ones may be storage options.
_IN_QUERY = ("format", "references", "partition")
#: Options of every file system of fsspec.
_OF_FSSPEC = {"asynchronous", "listings_expiry_time", "loop", "max_paths", "protocol", "use_listings_cache"}
_HINT = f"the options are {', '.join(_IN_QUERY)}"
#: The number of a partition.
_NUMBER = re.compile(r"[1-9][0-9]{0,4}")
#: A percent sign that begins no escape.
_BARE_PERCENT = re.compile(r"%(?![0-9a-fA-F]{2})")


class _Place(NamedTuple):
    """What a path names: an image, the whole disk in it (`partition` is None) or one partition, and how to open it."""

    filename: str
    format: str | None
    references: Policy | None
    partition: int | None


class ImageFileSystem(AbstractFileSystem):  # type: ignore[misc,unused-ignore]
    """Disk images as files of fsspec.

    A path is the name of an image file, percent-encoded as in every URL, and perhaps a query: `disk.qcow2?partition=1`. It
    names the guest's disk, or that partition (numbers as those of the filter `partition`). Options of the query are
    `format`, `references` (in the notation of a command line: `none`, `same-dir`, ...) and `partition`. Any other one raises
    OptionError.

    Storage options: `format` and `references` are those of all paths, and a query cannot give them anew (OptionError); so a
    program that gives both may take paths from others. `force_share` and `budget` as for `lamina.open`. The format is never
    guessed: without it OptionError is raised, and "probe" asks for detection.

    Files are opened for reading, and everything that would change one raises ReadOnly (a PermissionError). `ls` of a disk
    lists the disk and its partitions. Raises the errors of `lamina.open`; NotFound (a FileNotFoundError) for a missing file
    or partition.
    """

    protocol: ClassVar[str] = "lamina"
    root_marker: ClassVar[str] = ""

    def __init__(
        self,
        *,
        format: str | None = None,
        references: Policy | str | None = None,
        force_share: bool = False,
        budget: Budget = DEFAULT_BUDGET,
        **of_fsspec: Any,
    ) -> None:
        if unknown := sorted(of_fsspec.keys() - _OF_FSSPEC):
            raise OptionError(
                f"there is no storage option {shown(unknown[0])}",
                hint="they are format, references, force_share, budget",
            )
        super().__init__(**of_fsspec)
        self._format = format
        self._references = Policy.parse(references) if isinstance(references, str) else references
        self._force_share = force_share
        self._budget = budget

    # -- paths

    def _place(self, path: str) -> _Place:
        """What this path names. Raises OptionError."""
        name, mark, query = self._strip_protocol(path).partition("?")
        given: dict[str, str] = {}
        for item in query.split("&") if mark else ():
            key, _, value = item.partition("=")
            if key not in _IN_QUERY or not value:
                raise OptionError(f"the query of {shown(path)} has {shown(item)}", hint=_HINT)
            if key in given:
                raise OptionError(f"{key} is given twice in {shown(path)}", hint="give it once")
            given[key] = _decoded(value, path)
        for key, known in (("format", self._format), ("references", self._references)):
            if known is not None and key in given:
                raise OptionError(
                    f"{shown(path)} gives {key}, which is a storage option already", hint="give it in one place"
                )
        number = given.get("partition")
        if number is not None and not _NUMBER.fullmatch(number):
            raise OptionError(f"partition is {shown(number)} in {shown(path)}", hint="it is a number from 1 on")
        references = self._references
        return _Place(
            _decoded(name, path),
            given.get("format", self._format),
            Policy.parse(given["references"]) if "references" in given else references,
            None if number is None else int(number),
        )

    @contextmanager
    def _opened(self, path: str) -> Iterator[tuple[Image, int, int]]:
        """The image, and the offset and length in its disk of what the path names."""
        image, start, size = self._enter(self._place(path))
        try:
            try:
                yield image, start, size
            finally:
                image.close()
        finally:
            image.close()  # completes what an interrupt stopped, and else does nothing

    def _enter(self, place: _Place) -> tuple[Image, int, int]:
        image = open_image(
            Path(place.filename),
            format=place.format,
            references=place.references,
            force_share=self._force_share,
            budget=self._budget,
        )
        try:
            if place.partition is None:
                return image, 0, image.size
            try:
                return image, *find(image.root.edge, place.partition)
            except OptionError as error:
                raise NotFound(error.message, path=error.path, hint=error.hint) from error
        except BaseException:
            image.close()
            raise

    # -- what fsspec asks

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """`name`, `size` in bytes, `type` ("file"), `format`, `mtime` (the last change of a file of the image, in seconds)
        and `version`, which changes when one of these files does."""
        with self._opened(path) as (image, _start, size):
            return self._told(self._strip_protocol(path), size, image)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """The disk and its partitions, by the paths that open them; a partition alone for the path of one. Raises
        CorruptImage for an inconsistent partition table."""
        path = self._strip_protocol(path)
        with self._opened(path) as (image, _start, size):
            found = [self._told(path, size, image)]
            if self._place(path).partition is None:
                mark = "&" if "?" in path else "?"
                for number, (_offset, length) in partitions(image.root.edge).items():
                    found.append(self._told(f"{path}{mark}partition={number}", length, image))
        return found if detail else [one["name"] for one in found]

    def exists(self, path: str, **_: Any) -> bool:
        """Whether the image, and the partition if the path names one, exists. Other errors than NotFound are raised."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def modified(self, path: str) -> datetime:
        """The last change of a file of the image."""
        return datetime.fromtimestamp(self.info(path)["mtime"], UTC)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """The bytes from `start` to `end`, which are limited to the file and may be negative, as those of a slice."""
        with self._opened(path) as opened:
            return _slice(opened, start, end)

    def cat_ranges(
        self,
        paths: list[str],
        starts: int | list[int | None] | None,
        ends: int | list[int | None] | None,
        max_gap: int | None = None,
        on_error: str = "return",
        **_: Any,
    ) -> list[Any]:
        """The bytes of each range; each image is opened once. With `on_error` "return", an error stands in the place of the
        bytes. `max_gap` has no use here."""
        many = len(paths)
        low = starts if isinstance(starts, list) else [starts] * many
        high = ends if isinstance(ends, list) else [ends] * many
        if len(low) != many or len(high) != many:
            raise OptionError(f"there are {many} paths, {len(low)} starts and {len(high)} ends")
        found: list[Any] = [None] * many
        for path in dict.fromkeys(paths):
            places = [number for number in range(many) if paths[number] == path]
            try:
                with self._opened(path) as opened:
                    for number in places:
                        found[number] = _slice(opened, low[number], high[number])
            except Exception as error:
                if on_error != "return":
                    raise
                for number in places:
                    found[number] = error if found[number] is None else found[number]
        return found

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **options: Any) -> ImageFile:
        if mode != "rb":
            _refuse(f"open as {mode!r}", path)
        return ImageFile(self, path, block_size, **options)

    def glob(self, path: str, maxdepth: int | None = None, **options: Any) -> Any:
        """The path itself, if it exists: names are exact, and `?` begins the query."""
        path = self._strip_protocol(path)
        found = {path: self.info(path)} if self.exists(path) else {}
        return found if options.get("detail") else list(found)

    def expand_path(self, path: Any, recursive: bool = False, maxdepth: int | None = None, **_: Any) -> list[str]:
        """These paths, since names are exact."""
        paths = [path] if isinstance(path, str | os.PathLike) else path
        return sorted({self._strip_protocol(one) for one in paths})

    def get(self, rpath: Any, lpath: Any, **options: Any) -> None:
        """Copy out of an image to the local file `lpath`, or into that folder; lists as for every file system."""
        if isinstance(rpath, str) and isinstance(lpath, str | os.PathLike):
            target = os.fspath(lpath)
            if os.path.isdir(target) or target.endswith("/"):
                target = os.path.join(target, os.path.basename(self._strip_protocol(rpath)))
            rpath, lpath = [self._strip_protocol(rpath)], [target]
        super().get(rpath, lpath, **options)

    def get_file(self, rpath: str, lpath: Any = None, *arguments: Any, **options: Any) -> None:
        """Copy to one local file, or to a file object. OptionError if it is a file of the image or of its backing files."""
        if isinstance(lpath, str | os.PathLike):
            with self._opened(rpath) as (image, _start, _size):
                refuse_own(image.node, os.fspath(lpath))
        super().get_file(rpath, lpath, *arguments, **options)

    def _told(self, path: str, size: int, image: Image) -> dict[str, Any]:
        files = sorted(_files(image))
        return {
            "name": path,
            "size": size,
            "type": "file",
            "format": image.format,
            "mtime": max((changed / 1e9 for *_, changed in files), default=0.0),
            "version": sha256(repr(files).encode("utf-8", "surrogateescape")).hexdigest(),
        }

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> NoReturn:
        _refuse("make a directory", path)

    def makedirs(self, path: str, exist_ok: bool = False) -> NoReturn:
        _refuse("make a directory", path)

    def rmdir(self, path: str) -> NoReturn:
        _refuse("remove", path)

    def rm_file(self, path: str) -> NoReturn:
        _refuse("remove", path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> NoReturn:
        _refuse("remove", str(path))

    def mv(self, path1: Any, path2: Any, recursive: bool = False, maxdepth: int | None = None, **_: Any) -> NoReturn:
        _refuse("move", str(path1))

    def cp_file(self, path1: str, path2: str, **_: Any) -> NoReturn:
        _refuse("copy to", path2)

    def touch(self, path: str, truncate: bool = True, **_: Any) -> NoReturn:
        _refuse("change", path)


class ImageFile(AbstractBufferedFile):  # type: ignore[misc,unused-ignore]
    """A disk or partition, opened for reading: a seekable binary file, which reads ahead `block_size` bytes. The image is
    open until `close`. Pickling stores the path and the storage options."""

    DEFAULT_BLOCK_SIZE: ClassVar[int] = 256 * KIB

    def __init__(
        self, fs: ImageFileSystem, path: str, block_size: int | None = None, size: int | None = None, **options: Any
    ) -> None:
        """`size` is not used: the image knows it. `options`: `cache_type` and the like, of fsspec."""
        known = {"autocommit", "cache_options", "cache_type"}
        if unknown := sorted(options.keys() - known):
            raise OptionError(f"there is no option {shown(unknown[0])} for opening a file", hint=_HINT)
        self._image, self._start, length = fs._enter(fs._place(path))
        try:
            super().__init__(fs, path, "rb", block_size or "default", size=length, **options)
            self.details = fs._told(path, length, self._image)
        except BaseException:
            self._image.close()
            raise

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._image.read(self._start + start, end - start)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.fs, self.path, self.blocksize, self.loc)

    def close(self) -> None:
        """Close the image. A second call does nothing, unless it completes an interrupted one."""
        try:
            if not self.closed:
                super().close()
        finally:
            try:
                self._image.close()
            finally:
                self._image.close()


def _reopened(fs: ImageFileSystem, path: str, block_size: int, position: int) -> ImageFile:
    """A pickled file, opened again."""
    file = ImageFile(fs, path, block_size)
    file.seek(position)
    return file


def _slice(opened: tuple[Image, int, int], start: int | None, end: int | None) -> bytes:
    image, offset, size = opened
    low, high, _ = slice(start, end).indices(size)
    return image.read(offset + low, max(high - low, 0))


def _files(image: Image) -> Iterator[tuple[str, int, int, int]]:
    """The files in which the image is stored, and those below it: path, inode, size, and time of the last change in
    nanoseconds."""
    for node in image.node.beneath():
        if isinstance(node, StorageNode) and node.path is not None:
            try:
                status = os.stat(node.path)
            except OSError as error:
                raise BlockIOError.from_os(error, path=node.path, operation="stat") from error
            yield node.path, status.st_ino, status.st_size, status.st_mtime_ns


def _decoded(text: str, path: str) -> str:
    if _BARE_PERCENT.search(text):
        raise OptionError(
            f"{shown(path)} has a % that begins no escape", hint="quote the name (urllib.parse.quote), or write %25"
        )
    found = unquote(text, errors="surrogateescape")
    if not found or "\0" in found or not is_encodable(found):
        raise OptionError(f"{shown(path)} names no file", hint="write lamina://PATH?format=FORMAT")
    return found


def _refuse(what: str, path: str) -> NoReturn:
    raise ReadOnly(
        f"fsspec reads images, and cannot {what}", path=path, hint="write with lamina.open(..., read_only=False)"
    )

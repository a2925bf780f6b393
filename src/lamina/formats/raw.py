"""The format `raw`: the disk consists of the bytes of its storage, or of a range of it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import NotSupported, OptionError
from ..format import Format
from ..limits import MIB, Limits, align_up
from ..node import FUA, MAY_UNMAP, NO_FALLBACK, plain
from ..request import sizes_changed
from ..results import ImageInfo
from ..schema import Option, Schema
from ..window import shifted_limits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..explanation import Explainer
    from ..extents import Extents, HostFile
    from ..graph import Opener
    from ..job_results import MeasureResult
    from ..pending import Pending
    from ..request import Child
    from ..status import Status
    from .raw_guessed import Guard

_ZEROS = memoryview(bytes(MIB))


class Raw(Format):
    """Byte `x` of the disk is byte `offset + x` of the child `file`. With a `size` the disk has that length and cannot be
    resized; otherwise it ends at the end of the file. Stateless and thread-safe."""

    driver: ClassVar[str] = "raw"
    schema: ClassVar[Schema] = Schema(
        "raw",
        [
            Option("file", "node", "the storage", required=True),
            Option("offset", "size", "the start of the disk in the file, in bytes", default=0),
            Option("size", "size", "the length of the disk in bytes (default: up to the end of the file)"),
            Option("guessed", "bool", "refuse writes that make the disk look like another format", default=False),
            Option(
                "round-size-up",
                "size",
                "without a size: a multiple of this, a power of two; zeros follow the end",
                default=1,
            ),
        ],
    )
    create_schema: ClassVar[Schema] = Schema(
        "raw",
        [
            Option("size", "size", "the length of the disk in bytes"),
            Option(
                "preallocation",
                "enum",
                "storage that the file has from the beginning: reserved (falloc), or written (full)",
                default="off",
                choices=("off", "falloc", "full"),
            ),
        ],
    )
    _guard: Guard | None = None  # of a disk whose format was only guessed
    # The edge to the storage emulates FUA.
    supported_flags = FUA

    def __init__(
        self,
        file: Child,
        *,
        offset: int = 0,
        size: int | None = None,
        round_up: int = 1,
        guessed: bool = False,
        name: str | None = None,
        read_only: bool = False,
    ) -> None:
        """The disk in `file`, an edge that this node owns from now on. Raises OptionError if the range is not inside it."""
        super().__init__(name=name, read_only=read_only)
        available = file.size
        if offset > available:
            raise OptionError(
                f"the offset {offset} is past the end of the file at {available}",
                path=file.node.filename,
                hint="choose a smaller offset",
            )
        if size is not None and size > available - offset:
            raise OptionError(
                f"{size} bytes at offset {offset} exceed the end of the file at {available}",
                path=file.node.filename,
                hint=f"choose a size of at most {available - offset}, or omit it",
            )
        self.file = file
        self.children: dict[str, Child] = {"file": file}
        self._offset = offset
        self._window = size
        self._unit = round_up
        if guessed:
            from .raw_guessed import Guard

            self._guard = Guard(file)

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        offset, size = options.get("offset") or 0, options.get("size")
        child = opener.child("file", options["file"], grows=not offset and size is None)
        unit = options.get("round-size-up") or 1
        return cls(
            child,
            offset=offset,
            size=size,
            round_up=unit,
            guessed=bool(options.get("guessed")),
            name=opener.name,
            read_only=opener.read_only,
        )

    @classmethod
    def create(cls, storage: Child, size: int, values: Mapping[str, Any]) -> None:
        """Make `storage` a raw disk of `size` bytes, which reads as zeros in empty storage. A device of fixed length stays as
        it is; OptionError if it is too small."""
        if storage.node.growable:
            storage.truncate(size)
            _allocate(storage, 0, size, values.get("preallocation", "off"))
        elif size > storage.size:
            raise OptionError(
                f"a disk of {size} bytes does not fit into the {storage.size} bytes of this device",
                path=storage.node.filename,
                hint="choose a smaller size",
            )

    @classmethod
    def file_of(cls, disk: Child, values: Mapping[str, Any]) -> Raw:
        return cls(disk, read_only=True)

    @classmethod
    def measure(cls, size: int, values: Mapping[str, Any], *_: object) -> MeasureResult:
        from ..job_results import MeasureResult

        return MeasureResult(size, size)

    @classmethod
    def inspect(cls, storage: Child, values: Mapping[str, Any]) -> ImageInfo:
        """There is no header: the disk has the length of its file, or of the range in `values`."""
        unit = values.get("round-size-up") or 1
        disk = cls(storage, offset=values.get("offset") or 0, size=values.get("size"), round_up=unit)
        return ImageInfo(virtual_size=disk.size)

    @classmethod
    def explain(cls, storage: Child, values: Mapping[str, Any]) -> Explainer:
        from .raw_explain import RawExplainer

        start = values.get("offset") or 0
        return RawExplainer(storage, start, cls(storage, offset=start, size=values.get("size")).size)

    @property
    def size(self) -> int:
        # Not negative, even if the file was truncated after the open.
        if self._window is not None:
            return self._window
        return align_up(max(self.file.node.size - self._offset, 0), self._unit)

    @property
    def faithful(self) -> bool:
        return not self._offset and self._window is None and self._unit == 1

    @property
    def immutable(self) -> bool:
        return self.read_only and self.file.node.immutable

    @property
    def limits(self) -> Limits:
        """Those of the storage, if they divide the offset of the disk."""
        return shifted_limits(self.file.node.limits, self._offset)

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        base = self.file.node.host_base
        return None if base is None else (base[0], base[1] + self._offset)

    @plain
    def read_into(self, offset: int, view: memoryview) -> None:
        file = self.file
        if file.event is not None:
            file.event("read_aio")
        file.read_into(self._offset + offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        if self._guard is None:
            self._write(offset, view, flags)
            return
        with self._guard.writing(offset, view, self.size):
            self._write(offset, view, flags)

    def _write(self, offset: int, view: memoryview, flags: int) -> None:
        file = self.file
        if file.event is not None:
            file.event("write_aio")
        file.write(self._offset + offset, view, flags)

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        if self._guard is not None:
            raise self.refuse("copy from a file here")  # the caller writes the bytes
        self.file.copy_from(self._offset + offset, source, source_offset, length, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.file.zero(self._offset + offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        inside = min(length, self.file.node.size - self._offset - offset)
        if inside > 0:
            self.file.discard(self._offset + offset, inside)

    def flush(self) -> None:
        self.file.tell("flush_to_os")
        self.file.tell("flush_to_disk")
        self.file.flush()

    def reopen(self, read_only: bool) -> None:
        self.reopen_over([self.file], read_only)

    def truncate(self, size: int) -> None:
        if self._window is not None:
            raise NotSupported(
                "its size is fixed by the option size",
                path=self.filename,
                operation="truncate",
                hint="open it without that option",
            )
        with nullcontext() if self._guard is None else self._guard.resizing(size):
            self.file.truncate(self._offset + size)

    def resize(self, size: int, preallocation: str) -> None:
        if preallocation == "metadata":
            raise OptionError("a raw disk has no metadata", path=self.filename, hint="choose falloc or full")
        old = self.size
        try:
            self.truncate(size)
        finally:
            sizes_changed()
        _allocate(self.file, self._offset + old, self._offset + size, preallocation)

    def free_zeros(self, offset: int, length: int) -> int:
        self.file.zero(self._offset + offset, length, MAY_UNMAP | NO_FALLBACK)
        return length

    def extents(self, offset: int, length: int) -> Extents:
        inside = min(length, self.file.node.size - self._offset - offset)
        if inside < length:
            return self._past_the_end(offset, inside, length)
        found = self.file.extents(self._offset + offset, length)
        return found.shift(-self._offset) if self._offset else found

    def _past_the_end(self, offset: int, inside: int, length: int) -> Extents:
        """The extents of a request that ends in the zeros after the end of the file, of which `inside` bytes are stored."""
        from ..extents import Extents

        if inside <= 0:
            base = self.host_base
            file, at = (None, None) if base is None else (base[0], base[1] + offset)
            return Extents.single(offset, length, zero=True, present=True, file=file, offset=at)
        found = self.extents(offset, inside)
        if found.end < offset + inside:
            return found
        return Extents.concat([found, self._past_the_end(offset + inside, 0, length - inside)])

    # Started requests are passed on, for far storage. With an observer of events below, requests complete at once.

    def start_read(self, offset: int, view: memoryview) -> Pending:
        if self.file.event is not None:
            return super().start_read(offset, view)
        return self.file.start_read(self._offset + offset, view)

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        if self.file.event is not None or self._guard is not None:
            return super().start_write(offset, view, flags)
        return self.file.start_write(self._offset + offset, view, flags)

    def start_zero(self, offset: int, length: int, flags: int = 0) -> Pending:
        return self.file.start_zero(self._offset + offset, length, flags)

    def zero_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        if self._unit > 1:
            return super().zero_runs(offset, length)
        return self.file.zero_runs(self._offset + offset, length)

    def start_zero_runs(self, offset: int, length: int) -> Pending:
        if self._unit > 1:
            return super().start_zero_runs(offset, length)
        return self.file.start_zero_runs(self._offset + offset, length)

    def first_extents(self, offset: int, length: int, most: int) -> list[Status]:
        if self._unit > 1:
            return super().first_extents(offset, length, most)
        return self.file.first_extents(self._offset + offset, length, most)

    def reads_zero(self, offset: int, length: int) -> bool:
        return self.file.reads_zero(self._offset + offset, length)


def _allocate(file: Child, begin: int, end: int, how: str) -> None:
    """Give the bytes between `begin` and `end`, which read as zeros, storage: "falloc" reserves it, "full" writes it."""
    if how == "falloc" and begin < end:
        file.zero(begin, end - begin)
    for at in range(begin, end, len(_ZEROS)) if how == "full" else ():
        file.write(at, _ZEROS[: min(len(_ZEROS), end - at)])

"""A storage in memory that records all its operations in order, for the power-loss harness."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING, Any

from ..node import FUA, MAY_UNMAP, StorageNode
from .persistence import Record, apply

if TYPE_CHECKING:
    from ..extents import Extents


class Marks:
    """The marks that the code under test sets. Labels may be any objects; a state lists them in their order."""

    def __init__(self, storage: Recorder) -> None:
        self._storage = storage

    def begin(self, label: Any) -> None:
        """From now on the effects of this step may be found after a power cut."""
        self._storage.note(Record("begin", label=label))

    def durable(self, label: Any) -> None:
        """From now on the effects of this step must be found after a power cut: call it when a flush has returned."""
        self._storage.note(Record("durable", label=label))


class Recorder(StorageNode):
    """Storage in memory, and the `log` of its operations. A node like any other; also `read` and `as_file` for code that does
    not use nodes. Thread-safe: operations run one at a time, and the log has their order."""

    driver = "recorder"
    supported_flags = FUA

    def __init__(self, content: bytes = b"") -> None:
        super().__init__()
        self.start: bytes = bytes(content)
        self.content: bytearray = bytearray(content)
        self.log: list[Record] = []
        self.marks: Marks = Marks(self)
        self._mutex = threading.Lock()

    def note(self, record: Record) -> None:
        """Add `record` to the log and apply it."""
        with self._mutex:
            self.log.append(record)
            if record.kind in ("write", "zero", "discard", "truncate"):
                apply(self.content, record)

    def reopen(self, read_only: bool) -> None:
        self.read_only = read_only

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def growable(self) -> bool:
        return True

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at `offset`, fewer at the end."""
        with self._mutex:
            return bytes(self.content[offset : offset + length])

    def read_into(self, offset: int, view: memoryview) -> None:
        with self._mutex:
            view[:] = self.content[offset : offset + len(view)]

    def write(self, offset: int, view: bytes | bytearray | memoryview, flags: int = 0) -> None:
        self.note(Record("write", offset, len(view), bytes(view), bool(flags & FUA)))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.note(Record("zero", offset, length, fua=bool(flags & FUA), unmap=bool(flags & MAY_UNMAP)))

    def discard(self, offset: int, length: int) -> None:
        self.note(Record("discard", offset, length))

    def truncate(self, size: int) -> None:
        self.note(Record("truncate", size))

    def flush(self) -> None:
        which = object()
        self.note(Record("flush_start", label=which))
        self.note(Record("flush_done", label=which))

    def extents(self, offset: int, length: int) -> Extents:
        from ..extents import Extents

        return Extents.single(offset, length, data=True, present=True, file=self, offset=offset)

    def as_file(self) -> RecordedFile:
        """A file object over this storage, at offset 0."""
        return RecordedFile(self)


class RecordedFile(io.RawIOBase):
    """A `Recorder` as a raw binary file. `flush` does nothing, as for a raw file; `sync` corresponds to `os.fsync`, which
    needs a descriptor: the code under test must accept a function that syncs its file."""

    def __init__(self, storage: Recorder) -> None:
        self.storage = storage
        self._at = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.storage.size}[whence] + offset
        if at < 0:
            raise ValueError(f"seek to {at}, before the start")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        data = self.storage.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def write(self, data: Any) -> int:
        if data:
            self.storage.write(self._at, data)
            self._at += len(data)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        size = self._at if size is None else size
        self.storage.truncate(size)
        return size

    def sync(self) -> None:
        """Return when all bytes of earlier writes are on stable storage."""
        self.storage.flush()

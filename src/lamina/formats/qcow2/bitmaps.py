"""Persistent dirty bitmaps: loaded from the image, marked before each write, and stored when the image is closed.

A bitmap that is being changed is marked "in use" in the image, before the first byte of the disk changes: should the image
not be closed properly, nobody takes it for one that knows all writes. What is stored then goes into free clusters, which a
write of the bitmaps extension publishes. After "Bitmaps" of the published specification.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from ...errors import Hint, LimitExceeded, OptionError, ReadOnly, printable
from ...limits import align_up, is_power_of_two
from ...options import shown
from . import bitmap_directory as directory
from . import layout as q
from .bitmap_directory import AUTO, IN_USE, Entry

if TYPE_CHECKING:
    from ...bitmap import DirtyBitmap
    from .tables import Tables

#: Books memory of the budget: all bytes that bitmaps keep.
Book = Callable[[int], None]


class StoredBitmap:
    """One bitmap of an image: a byte of memory for each granule, 1 where it is dirty. To mark is one step, without a lock."""

    def __init__(
        self,
        entry: Entry,
        size: int,
        marks: bytearray | None,
        load: Callable[[Entry], bytearray],
        mutex: threading.Lock,
    ) -> None:
        self.entry = entry
        self.name = entry.name
        self.granularity = 1 << entry.granularity_bits if entry.granularity_bits < 64 else 0
        #: Whether it records writes.
        self.enabled = bool(entry.flags & AUTO)
        #: Whether it was not saved after its last change, or uses what is unknown here: its bits are not to be trusted.
        self.inconsistent = not entry.usable
        #: Whether the image holds other bits, or another state, than this.
        self.changed = False
        self.size = size
        self._marks, self._load, self._mutex = marks, load, mutex

    @property
    def marks(self) -> bytearray:
        """A byte for each granule. Loaded when it is first needed."""
        if self.inconsistent:
            raise OptionError(
                f"the bitmap {printable(self.name)} is inconsistent: it was not saved after its last change",
                hint="remove it; the next backup has to be a full one",
            )
        if self._marks is None:
            with self._mutex:
                if self._marks is None:  # else another thread loaded it, and may have marked it
                    self._marks = self._load(self.entry)
        return self._marks

    def mark(self, offset: int, length: int) -> None:
        """These bytes are about to change."""
        bits = self.entry.granularity_bits
        marks = self.marks
        first, stop = offset >> bits, min((offset + length - 1 >> bits) + 1, len(marks))
        if first < stop:
            marks[first:stop] = b"\1" * (stop - first)

    def dirty(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        marks, bits = self.marks, self.entry.granularity_bits
        at, stop = begin >> bits, min(-(-end >> bits), len(marks))
        while begin < end and (first := marks.find(1, at, stop)) >= 0:
            at = marks.find(0, first, stop)
            at = stop if at < 0 else at
            yield max(first << bits, begin), min(at << bits, end)

    def resize(self, size: int) -> None:
        """The disk has `size` bytes from now on. What is added was not written."""
        marks, count = self.marks, -(-size >> self.entry.granularity_bits)
        if count > len(marks):
            marks.extend(bytes(count - len(marks)))
        else:
            del marks[count:]
        self.size, self.changed = size, True


class Bitmaps:
    """All bitmaps of one image. `begin` and `mark` may be called by any number of threads; the other methods while no request
    of the disk runs."""

    def __init__(self, tables: Tables, book: Book) -> None:
        self._tables = tables
        self._book = book
        self._mutex = threading.Lock()
        file, header = tables.file, tables.header
        self.all: dict[str, StoredBitmap] = {}
        for entry in directory.read(file, header):
            self.all[entry.name] = StoredBitmap(entry, header.size, None, self._load, self._mutex)
        #: Whether the image says of the bitmaps that change that they are in use.
        self._begun = False
        self._kept = 0

    def _load(self, entry: Entry) -> bytearray:
        from ...numeric import np

        file, header = self._tables.file, self._tables.header
        count = -(-header.size >> entry.granularity_bits)
        if entry.table_size < directory.table_entries(header.size, entry.granularity_bits, header.cluster_bits):
            raise OptionError(f"the bitmap {printable(entry.name)} is too short for the disk", path=file.node.filename)
        self._keep(count)
        marks = bytearray(count)
        view = np.frombuffer(marks, np.uint8)
        per_cluster = header.cluster_size * 8
        for number, value in enumerate(directory.read_table(file, header, entry)):
            first = number * per_cluster
            last = min(first + per_cluster, count)
            if first >= count:
                break
            if value == 1:
                view[first:last] = 1
            elif value:
                raw = bytearray(header.cluster_size)
                file.read_into(value, memoryview(raw))
                view[first:last] = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")[: last - first]
        del view
        return marks

    def _keep(self, count: int) -> None:
        self._book(self._kept + count)
        self._kept += count

    # -- requests

    @property
    def records(self) -> bool:
        """Whether some bitmap records writes."""
        return any(one.enabled and not one.inconsistent for one in self.all.values())

    def mark(self, offset: int, length: int) -> None:
        """These bytes are about to change: called before they do, so that no write is missed, also none that fails."""
        if length <= 0:
            return
        recording = [one for one in self.all.values() if one.enabled and not one.inconsistent]
        if not recording:
            return
        for one in recording:
            one.changed = True
            one.mark(offset, length)
        if not self._begun:
            self.begin()

    def begin(self) -> None:
        """See to it that the image says of the changed bitmaps that they are in use."""
        self._tables.changing(self._tables.require_apart)
        with self._mutex:
            if self._begun:
                return
            file, header = self._tables.file, self._tables.header
            where = directory.extension(header)
            if where is not None:  # else the image says of no bitmap that it is right
                at = where[1]
                for one in self.all.values():
                    if one.entry.table_size and (one.changed or one.enabled) and not one.inconsistent:
                        flags = q.BITMAP_ENTRY.pack_field("flags", one.entry.flags | IN_USE)
                        file.write(at + q.BITMAP_ENTRY["flags"].offset, memoryview(flags))
                    at += len(one.entry.to_bytes())
                file.flush()
            self._begun = True

    # -- changes of bitmaps

    def get(self, name: str) -> StoredBitmap:
        """The bitmap of that name. OptionError if there is none."""
        found = self.all.get(name)
        if found is None:
            raise OptionError(
                f"the image has no bitmap {shown(name)}",
                path=self._tables.file.node.filename,
                hint=f"it has {', '.join(map(printable, self.all))}"
                if self.all
                else Hint("lamina.info lists them", command="lamina info lists them"),
            )
        return found

    def add(self, name: str, granularity: int, *, enabled: bool) -> None:
        path, header = self._tables.file.node.filename, self._tables.header
        bits = granularity.bit_length() - 1
        low, high = directory.MIN_GRANULARITY_BITS, directory.MAX_GRANULARITY_BITS
        if not is_power_of_two(granularity) or not low <= bits <= high:
            raise OptionError(
                f"a granularity of {granularity} bytes is not a power of two from {1 << low} to {1 << high}", path=path
            )
        if name in self.all:
            raise OptionError(f"the image has a bitmap {shown(name)} already", path=path, hint="choose another name")
        if not name or len(name.encode("utf-8", "surrogateescape")) > directory.MAX_NAME or "\0" in name:
            raise OptionError("the name of a bitmap is empty, or too long", path=path, hint="at most 1023 bytes")
        if header.version < 3:
            raise OptionError("version 2 has no bitmaps", path=path, hint="use compat=1.1")
        if len(self.all) == directory.MAX_BITMAPS:
            raise LimitExceeded(f"an image has no more than {directory.MAX_BITMAPS} bitmaps", path=path)
        if directory.table_entries(header.size, bits, header.cluster_bits) > directory.MAX_TABLE:
            raise OptionError("the granularity is too fine for a disk of this size", path=path)
        self._require_bytes(header.size)
        count = -(-header.size >> bits)
        self._keep(count)
        entry = Entry(0, 0, AUTO if enabled else 0, directory.DIRTY_TRACKING, bits, name)
        one = StoredBitmap(entry, header.size, bytearray(count), self._load, self._mutex)
        one.changed = True
        self.all[name] = one

    def remove(self, name: str) -> None:
        """Remove it at once: the image must not keep it as one that knows all writes. After an error before the image lost
        it, it goes on to record."""
        self.get(name)
        self._store_all({other: one for other, one in self.all.items() if other != name})

    def clear(self, name: str) -> None:
        one = self.get(name)
        marks = one.marks
        self._begin_change(one)
        marks[:] = bytes(len(marks))

    def enable(self, name: str, enabled: bool) -> None:
        one = self.get(name)
        one.marks  # noqa: B018 - an inconsistent one is refused
        self._begin_change(one)
        one.enabled = enabled

    def merge(self, name: str, sources: Iterable[DirtyBitmap]) -> None:
        one = self.get(name)
        marks = bytearray(one.marks)  # all of them, or none
        bits = one.entry.granularity_bits
        for source in sources:
            for begin, end in source.dirty(0, one.size):
                first, last = begin >> bits, end - 1 >> bits
                marks[first : last + 1] = b"\1" * (last - first + 1)
        self._begin_change(one)
        one.marks[:] = marks

    def _begin_change(self, *bitmaps: StoredBitmap) -> None:
        """These bitmaps are about to change. The image says so first: after an error they are as before."""
        for one in bitmaps:
            one.changed = True
        self._begun = False
        self.begin()

    def resize(self, size: int) -> None:
        """The disk has `size` bytes from now on."""
        self._begin_change(*self.all.values())
        for one in self.all.values():
            one.resize(size)

    def require_all_usable(self, size: int) -> None:
        """Raise OptionError if a bitmap cannot follow a change of the size of the disk to `size`."""
        if self.all:
            self._require_bytes(size)
        for one in self.all.values():
            one.marks  # noqa: B018 - it says so

    def _require_bytes(self, size: int) -> None:
        # The table of such a bitmap would have no entries, or one too many: QEMU opens the image with neither.
        if not size:
            raise OptionError(
                "a disk of size 0 has no bitmaps",
                path=self._tables.file.node.filename,
                hint="remove them first, or choose a size",
            )

    # -- to disk

    def store(self) -> None:
        """Bring all bitmaps to disk: from now on they are not in use. After an error all of them are as before, and the image
        says of none that it is right (see `Tables.publish_bitmaps`)."""
        self._store_all(self.all)

    def _store_all(self, bitmaps: dict[str, StoredBitmap]) -> None:
        """Let the image have these bitmaps, and no others."""
        self._tables.changing(self._store, bitmaps)

    def _store(self, bitmaps: dict[str, StoredBitmap]) -> None:
        tables = self._tables
        header, file = tables.header, tables.file
        old = directory.read(file, header)
        names = [entry.name for entry in old]
        if not (self._begun or names != list(bitmaps) or any(one.changed for one in bitmaps.values())):
            self.all = bitmaps
            return
        if not tables.writable:
            raise ReadOnly("the bitmaps of the image cannot be stored", path=file.node.filename)
        tables.require_apart()  # while the image has the old ones: what they point to is given back
        old_place = directory.extension(header)
        entries, kept = [], set()
        for one in bitmaps.values():
            if one.changed and not one.inconsistent:
                entries.append(self._store_bits(one))
            else:
                entries.append(one.entry)
                kept.add(one.entry.table_offset)
        raw = b"".join(entry.to_bytes() for entry in entries)
        if len(raw) > directory.MAX_DIRECTORY:
            raise LimitExceeded("the bitmap directory is too long", path=file.node.filename)
        offset = 0
        if raw:
            offset = tables.allocate_metadata(align_up(len(raw), header.cluster_size))
            file.write(offset, memoryview(raw))
        self._begun = False  # first: after an error the next change says again that they are in use
        tables.publish_bitmaps(len(entries), offset, len(raw))
        for one, entry in zip(bitmaps.values(), entries, strict=True):
            one.entry, one.changed = entry, False
        self.all = bitmaps
        tables.unsure_bitmaps = False
        if old_place is not None:
            tables.give_back(old_place[1], old_place[2])
        for entry in old:
            if entry.table_offset not in kept:
                for value in directory.read_table(file, header, entry):
                    if value > 1:
                        tables.give_back(value, header.cluster_size)
                tables.give_back(entry.table_offset, 8 * entry.table_size)

    def _store_bits(self, one: StoredBitmap) -> Entry:
        """Write the bits and the table of this bitmap to new clusters; the entry that points to them."""
        from ...numeric import np

        tables = self._tables
        header, file = tables.header, tables.file
        if one.size != header.size:  # a change of the size was interrupted
            one.resize(header.size)
        packed = np.packbits(np.frombuffer(one.marks, np.uint8), bitorder="little").tobytes()
        values = []
        for at in range(0, len(packed), header.cluster_size):
            part = packed[at : at + header.cluster_size]
            if not any(part):
                values.append(0)
            else:
                values.append(tables.allocate_metadata(header.cluster_size))
                file.write(values[-1], memoryview(part.ljust(header.cluster_size, b"\0")))
        offset = tables.allocate_metadata(align_up(8 * len(values), header.cluster_size)) if values else 0
        if values:
            file.write(offset, memoryview(b"".join(value.to_bytes(8, "big") for value in values)))
        flags = one.entry.flags & directory.EXTRA_COMPATIBLE | (AUTO if one.enabled else 0)
        return one.entry._replace(table_offset=offset, table_size=len(values), flags=flags)

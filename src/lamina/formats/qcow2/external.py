"""The node of an image with an external data file: the guest data is in a file of its own, the image file has the tables.

After "External data file bit" and "Raw external data bit" of the published specification. A cluster has the same offset in
the data file as on the disk, so nothing is allocated there, and nothing counted. A part of the disk that became zero or was
discarded is discarded in the data file, after the tables say so: a power cut leaves clusters that read as before, or as zero.

If the data file is *raw*, it reads as the disk does without the tables. So that this holds after a power cut as well, all
clusters are allocated from the beginning, and the tables stay as they are: what becomes zero does so in the data file alone.

Storage may execute a discard late, after a write of the same bytes, up to the next flush. A cluster has one place only, so
a write to what was discarded waits for a flush of the data file.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from ...errors import FormatError, Hint, NotSupported, OptionError
from ...format_node import FormatNode, To
from ...limits import align_down, align_up
from ...node import MAY_UNMAP, Node
from ...references import Reference
from ...request import Child

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...format_node import Reservation
    from ...graph import Opener
    from ...limits import Limits
    from ...results import Snapshot
    from .bitmaps import Bitmaps
    from .header import Header
    from .tables import Tables


def open_data_file(file: Child, header: Header, given: Any, opener: Opener) -> Child:
    """The edge to the data file of the image in `file`. `given`: the options of the user for it."""
    reference = Reference(header.data_file, "data-file", "data file", kind="storage", writable=True)
    found = opener.reference(file, reference, given)
    if found is not None:
        return found
    if not (opener.no_references or (opener.unopened is not None and file.node in opener.unopened)):
        raise FormatError(
            "the guest data is in an external data file, and the image does not name it",
            path=file.node.filename,
            hint="name it in the options (data-file.filename=...)",
        )
    return Child(_NotOpened(file.node.filename, header.size), "data-file")


#: More ranges of holes are not remembered, but flushed.
_MOST_HOLES = 256


class _NotOpened(Node):
    """In place of the data file of an image that was opened for its tables alone."""

    driver = "not-opened"

    def __init__(self, image: str, size: int) -> None:
        super().__init__(read_only=True)
        self._image, self._size = image, size

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, view: memoryview) -> None:
        raise OptionError("the image was opened without its data file", path=self._image, operation="read")


@cache
def class_of(kind: type[FormatNode]) -> Any:
    """The class of the node: `kind`, of an encrypted or another image, with this mixin."""
    return type(kind.__name__, (External, kind), {"__doc__": External.__doc__, "faithful": kind.faithful})


class External(FormatNode):
    """What distinguishes the node of an image with an external data file; mixed into the driver."""

    header: Header
    tables: Tables
    #: The edge to the data file.
    data: Child
    _recording: Bitmaps | None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Ranges (begin, end) of the data file that became holes since its last flush. Changed under the lock of the tables.
        self._holes: list[tuple[int, int]] = []

    @property
    def _raw(self) -> bool:
        """Whether the data file reads as the disk does. That of an image that is encrypted, or has a backing file, does not,
        whatever its header says."""
        header = self.header
        if header.crypt_method or header.backing_file is not None or self.backing is not None:
            return False
        return header.raw_external_data

    @property
    def limits(self) -> Limits:
        below = self.data.node.limits.request_alignment
        found = super().limits
        return found._replace(request_alignment=max(found.request_alignment, below))

    def reserve(self, offset: int, length: int) -> Reservation:
        if self._holes:
            self._require_no_holes(offset, offset + length)
        found = super().reserve(offset, length)
        # The last cluster of the disk may be incomplete, and so is that of the data file: it is as long as the disk.
        found.tail = min(found.tail, max(self.size - found.offset - found.length, 0))
        return found

    def drop(self, offset: int, length: int, to: To, *, keep: bool = False) -> None:
        inside = min(length, max(self.size - offset, 0))
        if self._raw and to is not To.BELOW:
            if self._recording is not None:
                self._recording.mark(offset, length)
            if inside:
                self._make_holes(self.data.zero, offset, inside, 0 if keep else MAY_UNMAP)
            return
        super().drop(offset, length, to, keep=keep)
        stored = min(inside, max(self.data.size - offset, 0))
        if not keep and to is not To.BELOW and stored:
            if self.header.crypt_method:
                self.tables.flush()  # zeros do not decrypt to zeros: after a power cut no table may call the hole data
            self._make_holes(self.data.discard, offset, stored)

    def _make_holes(self, work: Callable[..., None], offset: int, length: int, *arguments: int) -> None:
        """work(offset, length, *arguments), which discards or zeroes this range of the data file."""
        lock = self.tables.lock
        with lock:
            self.tables.given_back += 1
        try:
            work(offset, length, *arguments)
        finally:
            with lock:
                self._holes.append((offset, offset + length))
                if len(self._holes) > _MOST_HOLES:
                    self._flush_data()

    def _require_no_holes(self, begin: int, end: int) -> None:
        """Flush the data file if a part of this range, rounded out to clusters, became a hole since its last flush."""
        size = self.header.cluster_size
        begin, end = align_down(begin, size), align_up(end, size)
        with self.tables.lock:
            if any(low < end and begin < high for low, high in self._holes):
                self._flush_data()

    def _flush_data(self) -> None:
        self.data.flush()
        self._holes = []

    def flush(self) -> None:
        before = self._holes
        count = len(before)
        super().flush()
        with self.tables.lock:
            if self._holes is before:  # else it began anew
                self._holes = before[count:]

    def truncate(self, size: int) -> None:
        data, old = self.data, self.size
        if size > old:
            if not data.node.growable and data.size < size:
                raise OptionError(
                    f"the data file has {data.size} bytes and cannot grow to {size}",
                    path=data.node.filename,
                    operation="truncate",
                )
            if self._raw and data.size > old:
                data.zero(old, min(data.size, size) - old)
            if data.size < size:
                data.truncate(size)
        super().truncate(size)
        if size > old and self._raw:
            from .preallocation import preallocate

            preallocate(self.tables, "external", align_up(old, self.header.cluster_size))
            self.flush()
        if size < old and data.node.growable and data.size > size:
            data.truncate(size)

    def stop_writing(self) -> None:
        super().stop_writing()
        self.data.flush()

    # -- what such an image cannot have

    def create_snapshot(self, name: str, vm_state: bytes | bytearray | memoryview = b"") -> Snapshot:
        self._refuse_snapshots()

    def apply_snapshot(self, id: str) -> None:
        self._refuse_snapshots()

    def delete_snapshot(self, id: str) -> None:
        self._refuse_snapshots()

    def _refuse_snapshots(self) -> NoReturn:
        raise NotSupported(
            "an image with an external data file has no internal snapshots",
            path=self.filename,
            operation="snapshot",
            hint=Hint(
                "create an overlay over it instead: backing_file=...",
                command="create an overlay over it instead (lamina create -b)",
            ),
        )

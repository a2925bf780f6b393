"""The map of an image file: what each of its parts is, in columns, for pictures of the file.

A format makes it in one walk over its tables (`Explainer.file_map`), where `explain` would take one walk for each offset.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from .numeric import NDArray, np

if TYPE_CHECKING:
    from .explanation import Part

#: What a part of a file can be, by the numbers in the column `kind`, with the key in `palette.STRUCTURE` and what that means.
KINDS: Final[tuple[tuple[str, str, str], ...]] = (
    ("free", "free", "Nothing refers to it, and its reference count is 0."),
    ("header", "header", "The header, with its extensions and names."),
    ("L1 table", "mapping tables", "Points to the L2 tables of the disk."),
    ("L2 table", "mapping tables", "Says where each cluster of the disk lies."),
    ("refcount table", "reference counts", "Points to the refcount blocks."),
    ("refcount block", "reference counts", "Counts the references to clusters of the file."),
    ("snapshot table", "snapshots", "Lists the internal snapshots."),
    ("L1 table of a snapshot", "snapshots", "Points to the L2 tables of an internal snapshot."),
    ("encryption header", "encryption", "The key slots of the encrypted disk."),
    ("bitmaps", "bitmaps", "Directory, tables or bits of dirty bitmaps."),
    ("guest data", "data", "Data of the disk of now."),
    ("compressed guest data", "compressed data", "Compressed data of the disk of now, or of snapshots."),
    ("shared guest data", "shared data", "Data with several references: of the disk of now and of snapshots."),
    ("guest data of snapshots", "snapshot data", "Data that snapshots alone refer to."),
    ("leaked", "leaked", "Nothing refers to it, but its reference count is not 0: the space is lost until a repair."),
    ("in conflict", "overlap", "Uses that exclude each other, or more references than are counted: the image is damaged."),
    ("unknown", "unknown", "Not read, or outside of all that is known."),
)  # fmt: skip
#: The numbers of the kinds by name.
NUMBER: Final = {name: number for number, (name, _, _) in enumerate(KINDS)}


class Route(NamedTuple):
    """How a reader finds a byte of the disk: entry `offset // span` of the L1 table at `l1` leads to an L2 table, which has
    an entry of `width` bytes for each `unit` bytes of the disk. `entry` and `table`: the number and the target of each L1
    entry that leads to an L2 table inside the file."""

    l1: int
    span: int
    unit: int
    width: int
    entry: NDArray[np.int64]
    table: NDArray[np.int64]


class FileMap(NamedTuple):
    """The parts of a file, in order and without gaps; neighbours differ. All columns have one row for each part. `start`:
    its first byte; the last part ends at `size`. `kind`: an index of `KINDS`. `references`: how many references the tables
    contain, -1 if nobody counts. `cluster`: the unit of references, 0 if there is none. `problems` says what could not be
    read."""

    size: int
    start: NDArray[np.int64]
    kind: NDArray[np.uint8]
    references: NDArray[np.int64]
    cluster: int = 0
    problems: tuple[str, ...] = ()

    @property
    def length(self) -> NDArray[np.int64]:
        """The bytes of each part."""
        return np.diff(self.start, append=self.size)

    def bytes_of(self) -> dict[str, int]:
        """The bytes of each kind that occurs, in the order of `KINDS`."""
        sums = np.bincount(self.kind, weights=self.length, minlength=len(KINDS)).tolist()
        return {name: int(total) for (name, _, _), total in zip(KINDS, sums, strict=True) if total}


def of_regions(parts: Iterable[Part], size: int) -> FileMap:
    """The map of a file of which only these structures are known; the rest is unknown."""
    start: list[int] = []
    kind: list[int] = []
    at = 0
    for part in sorted(parts, key=lambda one: one.offset):
        stop = min(part.offset + part.length, size)
        if stop <= at:
            continue
        if part.offset > at:
            start.append(at)
            kind.append(NUMBER["unknown"])
        start.append(max(part.offset, at))
        kind.append(NUMBER.get(part.structure, NUMBER["unknown"]))
        at = stop
    if at < size:
        start.append(at)
        kind.append(NUMBER["unknown"])
    columns = np.array(start, np.int64), np.array(kind, np.uint8)
    return FileMap(size, *columns, np.full(len(start), -1, np.int64))

"""The results of work on whole images (`lamina.convert`, `copy`, `commit`, ...): what was done, in bytes.

They have the form of all results (see `results`): immutable, typed, and `to_json` is the same as a dict of JSON types.
What is None is left out of the JSON. (A module of its own: most programs need none of them.)
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


class ConvertResult(NamedTuple):
    """What `lamina.convert` did."""

    source: str  #: the file name of the source
    target: str
    format: str  #: of the target
    size: int  #: the length of the disk
    read: int  #: bytes read from the source
    written: int  #: bytes of data written to the target, before compression
    zeroed: int  #: bytes that were made zero without writing data
    copied: int  #: bytes that the operating system copied or shared, without reading them here
    unreadable: int  #: bytes that could not be read, and are zeros in the target (`salvage`)

    def to_json(self) -> dict[str, Any]:
        return _json(self)


class CopyResult(NamedTuple):
    """What `lamina.copy` did."""

    source: str
    target: str
    size: int  #: the length of the source
    read: int
    written: int  #: bytes of data
    zeroed: int  #: bytes that were made zero without writing data
    skipped: int  #: bytes that read as zero in the target before, and were left as they are
    resumed: int  #: the offset at which this run began
    flushed: bool  #: whether the target is on stable storage
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return _json(self) | {"seconds": round(self.seconds, 3)}


class CompareResult(NamedTuple):
    """What `lamina.compare` found: whether two disks are identical, and if not, the first thing in which they differ."""

    first: str  #: the file name of the first image
    second: str
    first_size: int  #: the length of its disk
    second_size: int
    identical: bool
    #: What differs: the sizes, the status of a byte (both only in a strict comparison), or a byte.
    difference: Literal["size", "status", "content"] | None = None
    offset: int | None = None  #: of the first byte that differs

    def to_json(self) -> dict[str, Any]:
        return _json(self)


class CommitResult(NamedTuple):
    """What `lamina.commit` did."""

    image: str  #: the file name of the overlay
    base: str  #: the file name of the backing file that got its data
    size: int  #: the length of the overlay's disk
    read: int  #: bytes read from the overlay
    written: int  #: bytes of data written to the backing file
    zeroed: int  #: bytes that were made zero there without writing data
    emptied: bool  #: whether the overlay gave up what it owned

    def to_json(self) -> dict[str, Any]:
        return _json(self)


class RebaseResult(NamedTuple):
    """What `lamina.rebase` did."""

    image: str  #: the file name of the overlay
    size: int  #: the length of its disk
    read: int  #: bytes of the overlay that were read through its old backing file
    written: int  #: bytes of data that the overlay took over
    zeroed: int  #: bytes that it took over as zeros
    backing: str | None = None  #: the name of the new backing file in the image; None: it has none
    backing_format: str | None = None

    def to_json(self) -> dict[str, Any]:
        return _json(self)


class ResizeResult(NamedTuple):
    """What `lamina.resize` did: the length of the disk before and after."""

    image: str
    old_size: int
    new_size: int

    def to_json(self) -> dict[str, Any]:
        return _json(self)


class MeasureResult(NamedTuple):
    """The length of the file of a new image in bytes (`lamina.measure`): `required` for the data that its source stores now,
    and `fully_allocated` for data in the whole disk. `bitmaps`: what the dirty bitmaps of the source take in addition."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None

    def to_json(self) -> dict[str, int]:
        sizes = {"required": self.required, "fully-allocated": self.fully_allocated}
        return sizes if self.bitmaps is None else {"bitmaps": self.bitmaps, **sizes}


def _json(result: Any) -> dict[str, Any]:
    """The fields of a result that are not None, with hyphens in their names."""
    return {name.replace("_", "-"): value for name, value in result._asdict().items() if value is not None}

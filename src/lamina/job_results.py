"""The results of work on whole images (`lamina.convert`, `copy`, `commit`, ...): what was done, in bytes.

They have the form of all results (see `results`): immutable, typed, and `to_json` is the same as a dict of JSON types.
What is None is left out of the JSON. (A module of its own: most programs need none of them.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from .json_forms import BenchResultJson, CompactResultJson


class ConvertResult(NamedTuple):
    """What `lamina.convert` did."""

    source: str  #: the file name of the source
    target: str  #: the file name of the target
    format: str  #: the format of the target
    size: int  #: the length of the disk
    read: int  #: bytes read from the source
    written: int  #: bytes of data written to the target, before compression
    zeroed: int  #: bytes that were made zero without writing data
    copied: int  #: bytes that the operating system copied or shared, without reading them here
    unreadable: int  #: bytes that could not be read, and are zeros in the target (`salvage`)

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict of JSON types."""
        return _json(self)


class CopyResult(NamedTuple):
    """What `lamina.copy` did."""

    source: str  #: the name of the source
    target: str  #: the name of the target
    size: int  #: the length of the source
    read: int  #: bytes read from the source
    written: int  #: bytes of data written to the target
    zeroed: int  #: bytes that were made zero there without writing data
    skipped: int  #: bytes that read as zero there before, and were left as they are
    resumed: int  #: the offset at which this run began
    flushed: bool  #: whether the target is on stable storage
    seconds: float  #: how long it took

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict of JSON types."""
        return _json(self) | {"seconds": round(self.seconds, 3)}


class CompareResult(NamedTuple):
    """What `lamina.compare` found: whether two disks are identical, and if not, the first thing in which they differ."""

    first: str  #: the file name of the first image
    second: str  #: the file name of the second image
    first_size: int  #: the length of the first disk
    second_size: int  #: the length of the second disk
    identical: bool  #: whether nothing differs
    #: What differs: the sizes, the status of a byte (both only in a strict comparison), or a byte.
    difference: Literal["size", "status", "content"] | None = None
    offset: int | None = None  #: the first byte that differs

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict of JSON types."""
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
        """The fields as a dict of JSON types."""
        return _json(self)


class RebaseResult(NamedTuple):
    """What `lamina.rebase` did."""

    image: str  #: the file name of the overlay
    size: int  #: the length of its disk
    read: int  #: bytes of the overlay that were read through its old backing file
    written: int  #: bytes of data that the overlay took over
    zeroed: int  #: bytes that it took over as zeros
    backing: str | None = None  #: the name of the new backing file in the image; None: it has none
    backing_format: str | None = None  #: the format of that file

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict of JSON types."""
        return _json(self)


class FlattenResult(NamedTuple):
    """What `lamina.flatten` did."""

    image: str  #: the file name of the image
    size: int  #: the length of its disk
    read: int  #: bytes of the backing files that were read
    written: int  #: bytes of data that the image took over
    zeroed: int  #: bytes that it took over as zeros
    backing: str | None = None  #: the file name of its backing file until now; None: it had none, and is as it was

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict of JSON types."""
        return _json(self)


class CompactResult(NamedTuple):
    """What `lamina.compact` did. The files are those of the image itself: backing files do not change."""

    image: str  #: the file name of the image
    leaks: int  #: the number of leaked clusters that were freed
    zeroed: int  #: the bytes of the disk that were zeros, and whose storage was freed
    length: tuple[int, int]  #: the length of the files, before and after
    #: The bytes that the files take up, before and after; None if that is not known, as of a device.
    allocated: tuple[int | None, int | None]

    @property
    def given_back(self) -> int:
        """The bytes that the files take up less than before, as far as that is known, or by which they are shorter."""
        before, after = self.allocated if None not in self.allocated else self.length
        return (before or 0) - (after or 0)

    def to_json(self) -> CompactResultJson:
        """By the names that the command prints, with `given_back`."""
        return {
            "filename": self.image,
            "given-back": self.given_back,
            "freed-leaks": self.leaks,
            "freed-zeros": self.zeroed,
            "length": {"before": self.length[0], "after": self.length[1]},
            "allocated": {"before": self.allocated[0], "after": self.allocated[1]},
        }


class BenchResult(NamedTuple):
    """What `lamina.bench` measured. Durations are nanoseconds, and the length of the whole run includes its flushes."""

    image: str  #: the file name of the image
    operation: Literal["read", "write"]  #: what the requests were
    requests: int  #: their number
    depth: int  #: the most that were in flight
    size: int  #: the bytes of each
    offset: int  #: where the first one was
    step: int  #: the bytes from the start of one to that of the next
    flushes: int  #: the number of flushes
    duration: int  #: of the whole run
    shortest: int  #: the duration of the shortest request
    mean: int  #: that of a request in the mean
    longest: int  #: that of the longest
    #: 50, 90, 95, 99 and 99.9 -> the duration that so many percent of the requests did not exceed; at most 1.6 % too large,
    #: and never too small. Not to be changed.
    percentiles: Mapping[float, int]

    @property
    def requests_per_second(self) -> float:
        """The rate of requests."""
        return self.requests * 1e9 / max(self.duration, 1)

    @property
    def bytes_per_second(self) -> float:
        """The rate of bytes."""
        return self.requests_per_second * self.size

    def to_json(self) -> BenchResultJson:
        """By the names that the command prints."""
        return {
            "filename": self.image,
            "operation": self.operation,
            "count": self.requests,
            "depth": self.depth,
            "buffer-size": self.size,
            "offset": self.offset,
            "step-size": self.step,
            "flushes": self.flushes,
            "seconds": self.duration / 1e9,
            "requests-per-second": round(self.requests_per_second, 1),
            "bytes-per-second": round(self.bytes_per_second),
            "latency-ns": {
                "minimum": self.shortest,
                "mean": self.mean,
                "maximum": self.longest,
                "percentiles": {str(percent): duration for percent, duration in self.percentiles.items()},
            },
        }


class ResizeResult(NamedTuple):
    """What `lamina.resize` did."""

    image: str  #: the file name of the image
    old_size: int  #: the length of the disk before
    new_size: int  #: its length now

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict of JSON types."""
        return _json(self)


class MeasureResult(NamedTuple):
    """How long the file of a new image would be, in bytes (`lamina.measure`)."""

    required: int  #: for the data that the source stores now
    fully_allocated: int  #: for data in the whole disk
    bitmaps: int | None = None  #: what the dirty bitmaps of the source take in addition

    def to_json(self) -> dict[str, int]:
        """By the names of `qemu-img measure --output=json`; without `bitmaps` if there are none."""
        sizes = {"required": self.required, "fully-allocated": self.fully_allocated}
        return sizes if self.bitmaps is None else {"bitmaps": self.bitmaps, **sizes}


def _json(result: Any) -> dict[str, Any]:
    """The fields of a result that are not None, with hyphens in their names."""
    return {name.replace("_", "-"): value for name, value in result._asdict().items() if value is not None}

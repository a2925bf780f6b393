"""What the bytes of an image file are: the results of `lamina.explain` and `lamina.explain_guest`, and what a format
implements for them.

A format derives an `Explainer` from its tables and returns it from `Format.explain`. The functions themselves are in
`inspection`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from .file_map import FileMap, Route
    from .json_forms import ExplanationJson, GuestJson, OverviewJson, PartJson, StepJson

#: Structures that every format has.
DATA, FREE, LEAKED, UNREFERENCED, UNKNOWN = "guest data", "free", "leaked", "unreferenced", "unknown"
#: The field of bytes inside a structure that no field uses.
UNUSED = "unused"


class Guest(NamedTuple):
    """A range of a guest disk that a part of the file serves: `length` bytes from `offset` on. `status`: "data", "zero",
    "unallocated" (the layer below decides), "compressed", "machine state" (then `offset` is one in that state), or "past
    the end of the disk". `snapshot`: the id of an internal snapshot; None: the disk of now. `exact`: the offset of the
    asked byte; None if no single byte of the disk corresponds to it."""

    offset: int
    length: int
    status: str
    snapshot: str | None = None
    exact: int | None = None

    def to_json(self) -> GuestJson:
        """Its fields."""
        return cast("GuestJson", self._asdict())


class Part(NamedTuple):
    """What `length` bytes from `offset` of the file on are. `structure`: what they belong to; `owner`: to which one
    ("snapshot 1", "bitmap b0"), if there are several; `field`: the field or entry, `value` its number in the file, or its
    text; `text`: what that means, and `details` the same for programs. `more`: the number of further guest ranges that are
    left out."""

    structure: str
    offset: int
    length: int
    owner: str | None = None
    field: str | None = None
    value: int | str | None = None
    text: str = ""
    details: Mapping[str, Any] = {}
    guest: tuple[Guest, ...] = ()
    more: int = 0

    def to_json(self) -> PartJson:
        """Its fields, without those that are None or empty; `more` as "more-guest-ranges"."""
        found = {
            key: value for key, value in self._asdict().items() if value not in (None, "", {}, ()) and key != "more"
        }
        found |= {"details": dict(self.details)} if self.details else {}
        found["guest"] = [one.to_json() for one in self.guest]
        return cast("PartJson", found | ({"more-guest-ranges": self.more} if self.more else {}))


class Explanation(NamedTuple):
    """What the byte at `offset` of the file is. `parts` has one member, or several if structures of a damaged image overlap.
    `cluster`: the number of its cluster, and `refcount` how many references the image counts; None where that is not known or
    the format has no such thing. `problems`: what could not be read, so that more may be there."""

    offset: int
    parts: tuple[Part, ...]
    cluster: int | None = None
    refcount: int | None = None
    problems: tuple[str, ...] = ()

    def to_json(self) -> ExplanationJson:
        """Its fields."""
        found = self._asdict() | {"parts": [one.to_json() for one in self.parts], "problems": list(self.problems)}
        return cast("ExplanationJson", found)


class Step(NamedTuple):
    """Where one layer of a chain has a byte of the guest. `status` as in `Guest`. `parts`: the fields and table entries
    that say so, in the order in which a reader follows them. `host`: the offset of the byte in `file`, None if it is stored
    nowhere, or compressed; `length`: the number of bytes from there on of which the same holds. `stored`: (offset, length)
    of compressed data."""

    depth: int
    format: str
    filename: str
    offset: int
    length: int
    status: str
    parts: tuple[Part, ...] = ()
    host: int | None = None
    file: str | None = None
    stored: tuple[int, int] | None = None
    problems: tuple[str, ...] = ()

    @property
    def below(self) -> bool:
        """Whether the layer below decides about the byte."""
        return self.status == "unallocated"

    def to_json(self) -> StepJson:
        """Its fields; `stored` with the keys "offset" and "length"."""
        found = self._asdict() | {"parts": [one.to_json() for one in self.parts], "problems": list(self.problems)}
        stored = None if self.stored is None else dict(zip(("offset", "length"), self.stored, strict=True))
        return cast("StepJson", found | {"stored": stored})


class Overview(NamedTuple):
    """The structures of an image file that the header leads to, and the fields of the header."""

    header: tuple[Part, ...] = ()
    regions: tuple[Part, ...] = ()
    problems: tuple[str, ...] = ()

    def to_json(self) -> OverviewJson:
        """Its fields."""
        return {
            "header": [one.to_json() for one in self.header],
            "regions": [one.to_json() for one in self.regions],
            "problems": list(self.problems),
        }


class Explainer:
    """The base of what a format says about its file, which stays open and unchanged meanwhile. For one thread."""

    @property
    def disk_size(self) -> int:
        """The length of the disk."""
        raise NotImplementedError

    def overview(self) -> Overview:
        """The fields of the header, and the structures to which it leads."""
        raise NotImplementedError

    def at(self, offset: int) -> Explanation:
        """What the byte at `offset` of the file is, which is inside the file."""
        raise NotImplementedError

    def guest(self, offset: int) -> Step:
        """Where the byte at `offset` of the disk is in this layer. OptionError if the disk ends before it."""
        raise NotImplementedError

    def file_map(self, size: int) -> FileMap:
        """What each part of the file is, which has `size` bytes. By default only the structures of `overview` are known."""
        from .file_map import of_regions

        return of_regions(self.overview().regions, size)

    def route(self) -> Route | None:
        """How a reader finds a byte of the disk; None if there are no tables, or if they cannot be read."""
        return None

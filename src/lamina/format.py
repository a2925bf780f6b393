"""The contract of a format: what a driver can do with images of its format, declared in one place.

`Format` is the base of every format driver. Each operation below has a default that refuses with `UnsupportedFeature`, so a
caller never asks a driver what it has: it calls, and a driver that has nothing says so. A driver overrides what it can do,
and nothing else. `raw` derives from `Format` itself; a format that maps its disk derives from `format_node.FormatNode`, which
derives from `Format`. Reads, writes and block status are the contract of a node (`node.py`), which holds for formats too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from . import registry
from .errors import OptionError, UnsupportedFeature
from .limits import DEFAULT_BUDGET, Budget
from .node import Node
from .schema import Schema

if TYPE_CHECKING:
    from .bitmap import DirtyBitmap
    from .extents import Extents
    from .report import CheckReport
    from .request import Child
    from .results import ImageInfo

#: Which findings of a check `Format.repair` mends.
Repair = Literal["leaks", "all"]


class Measure(NamedTuple):
    """How long the file of a new image would be, in bytes: `required` for the data that its source stores now, and
    `fully_allocated` when the whole disk is written."""

    required: int
    fully_allocated: int

    def to_json(self) -> dict[str, int]:
        return {"required": self.required, "fully-allocated": self.fully_allocated}


class Snapshot(NamedTuple):
    """One internal snapshot: a state of the disk that the image keeps. `size` is that of the disk then, and `vm_state` the
    length of a saved machine state, both in bytes; `date` is in seconds since 1970, `vm_clock` in nanoseconds."""

    id: str
    name: str
    size: int
    vm_state: int = 0
    date: float = 0
    vm_clock: int = 0


class Format(Node):
    """A layout of a disk in storage. What a driver does not override here is refused with UnsupportedFeature.

    The class methods take the storage of an image, empty or not, as an edge (`request.Child`); they leave it open, and keep
    no reference to it. `values` are options that a schema has parsed. `prepare_create` apart, no class method opens another
    file. The other methods concern an opened image; those that change it need it opened for writing, and what they changed
    is on stable storage after the next `flush`. Any of them may be called beside reads and writes of other threads.
    """

    #: The options of a new image; None: the driver makes none.
    create_schema: ClassVar[Schema | None] = None
    #: The options that `amend` changes; None: there are none.
    amend_schema: ClassVar[Schema | None] = None

    @classmethod
    def refusal(cls, lacks: str, hint: str | None = None) -> UnsupportedFeature:
        """The error for an operation that the format, or its driver, does not have."""
        return UnsupportedFeature(f"the format {cls.driver} {lacks}", hint=hint)

    # -- new images

    @classmethod
    def creation_schema(cls) -> Schema:
        """The options of a new image. Raises UnsupportedFeature where the driver makes none."""
        if cls.create_schema is None:
            raise cls.refusal("is not one that new images can have", hint="try qcow2 or raw")
        return cls.create_schema

    @classmethod
    def prepare_create(cls, values: dict[str, Any], target: str, budget: Budget = DEFAULT_BUDGET) -> None:
        """Check combinations of options, and the files that options name, before the image at the path `target` is created;
        complete `values` (for example with the size of a backing file). `budget` bounds the images that the driver opens for
        these checks. Raises OptionError, LimitExceeded, and the errors of opening those files. The default checks nothing."""

    @classmethod
    def create(cls, storage: Child, size: int, values: Mapping[str, Any]) -> None:
        """Lay an image of a disk of `size` bytes, which reads as zeros, out in `storage`, which is empty."""
        raise cls.refusal("is not one that new images can have", hint="try qcow2 or raw")

    @classmethod
    def measure(cls, size: int, values: Mapping[str, Any], stored: Iterable[Extents] | None = None) -> Measure:
        """How long the file of a new image of `size` bytes would be, where `stored` (contiguous answers for the whole disk,
        in order) is what its source holds; None: nothing. Nothing is made."""
        raise cls.refusal("cannot be measured")

    # -- images that exist

    @classmethod
    def inspect(cls, storage: Child, values: Mapping[str, Any]) -> ImageInfo:
        """What the header in `storage` says; the caller adds the fields that concern the file. `values`: the options of
        `open`, as far as they were given. It works for images that use features which `open` refuses: `unsupported` lists
        those. Raises FormatError if there is no header."""
        raise cls.refusal("has no header that could be described")

    def check(self) -> CheckReport:
        """Compare the structures of the image with one another, and change nothing. Findings are returned, however broken the
        image is; raised is only what keeps the check from being done at all."""
        raise self._at(self.refusal("has nothing to check"))

    def repair(self, what: Repair) -> CheckReport:
        """Check the image and mend it: with "leaks" only space that nobody uses is freed, which changes no byte that can be
        read; with "all" contradictions are resolved, too. The report lists what was found. To repair again finds nothing
        new, also after a power cut in the middle."""
        raise self._at(self.refusal("cannot be repaired"))

    def amend(self, values: Mapping[str, Any]) -> None:
        """Change options of the image in place, as `amend_schema` parsed them: an option that is None stays as it is. Either
        all of them are changed, or none."""
        raise self._at(self.refusal("has no options that could be changed later"))

    # -- internal snapshots

    def snapshots(self) -> Sequence[Snapshot]:
        """The snapshots that the image keeps, in its order."""
        raise self._at(self.refusal("has no internal snapshots"))

    def create_snapshot(self, name: str) -> Snapshot:
        """Keep the disk of now under `name`, with an id that is free."""
        raise self._at(self.refusal("has no internal snapshots"))

    def apply_snapshot(self, id: str) -> None:
        """Make the disk read as it did when that snapshot was made. No request runs beside this one."""
        raise self._at(self.refusal("has no internal snapshots"))

    def delete_snapshot(self, id: str) -> None:
        """Give up that snapshot; the disk reads as before."""
        raise self._at(self.refusal("has no internal snapshots"))

    # -- persistent dirty bitmaps (`Node.bitmaps` has those that exist)

    def add_bitmap(self, name: str, granularity: int, *, enabled: bool = True) -> None:
        """Add an empty bitmap, a bit for each `granularity` bytes (a power of two); one that is enabled records writes."""
        raise self._at(self.refusal("keeps no dirty bitmaps"))

    def remove_bitmap(self, name: str) -> None:
        """Remove this bitmap, from the file as well."""
        raise self._at(self.refusal("keeps no dirty bitmaps"))

    def clear_bitmap(self, name: str) -> None:
        """Forget all writes that this bitmap recorded."""
        raise self._at(self.refusal("keeps no dirty bitmaps"))

    def enable_bitmap(self, name: str, enabled: bool) -> None:
        """Let this bitmap record writes from now on, or none."""
        raise self._at(self.refusal("keeps no dirty bitmaps"))

    def merge_bitmaps(self, name: str, sources: Iterable[DirtyBitmap]) -> None:
        """Add to this bitmap what `sources`, of this image or of others, recorded."""
        raise self._at(self.refusal("keeps no dirty bitmaps"))

    def _at(self, error: UnsupportedFeature) -> UnsupportedFeature:
        error.path = self.filename
        return error


def lookup_format(name: str, *, from_image: bool = False) -> type[Format]:
    """The format driver that `name` means, imported. Raises what `registry.lookup` does, and OptionError for a driver outside
    Lamina that does not derive from `Format`."""
    kind = registry.lookup(name, "format", from_image=from_image)
    if not issubclass(kind, Format):
        raise OptionError(
            f"the driver {name} does not keep the contract of a format: its class does not derive from lamina.format.Format",
            hint="see docs/drivers-outside-the-tree.md",
        )
    return kind

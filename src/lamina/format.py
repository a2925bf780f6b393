"""The contract of a format: the operations of a driver on images of its format, declared in one place.

`Format` is the base of every format driver. Each operation below has a default that refuses with `UnsupportedFeature`, so a
caller never asks a driver which operations it has: it calls one, and the driver may refuse. A driver overrides the operations
that it supports, and no others. `raw` derives from `Format` itself; a format that maps its disk derives from
`format_node.FormatNode`, which derives from `Format`. Reads, writes and block status are in the contract of a node
(`node.py`), which applies to formats as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from . import registry
from .errors import OptionError, UnsupportedFeature
from .limits import DEFAULT_BUDGET, Budget
from .node import Node
from .schema import Schema

if TYPE_CHECKING:
    from .bitmap import DirtyBitmap
    from .explanation import Explainer
    from .extents import Extents
    from .job_results import MeasureResult
    from .report import CheckReport
    from .request import Child
    from .results import ImageInfo, Snapshot
    from .workers import Workers

#: The findings of a check that `Format.repair` repairs.
Repair = Literal["leaks", "all"]


class Format(Node):
    """A layout of a disk in storage. Operations that a driver does not override raise UnsupportedFeature.

    The class methods take the storage of an image, empty or not, as an edge (`request.Child`); they leave it open, and keep
    no reference to it. `values` are options that a schema has parsed. No class method opens another file, except
    `prepare_create`. The other methods belong to an opened image. Those that change it need an image that was opened for
    writing, and their changes are on stable storage after the next `flush`. A change that raises an error is done whole or
    not at all. It is done where the error is one of giving back what the change made free: the image then shows it. All of
    them may run at the same time as reads and writes of other threads, unless they say otherwise.
    """

    #: The options of a new image; None: the driver creates no images.
    create_schema: ClassVar[Schema | None] = None
    #: The options that `amend` can change; None: there are none.
    amend_schema: ClassVar[Schema | None] = None
    #: Whether images of the format may have dirty bitmaps.
    keeps_bitmaps: ClassVar[bool] = False
    #: Whether the image gets another backing file later, over which it reads the same: zeros that it is given meanwhile must
    #: read as zeros over any, and no bitmap records what it is given.
    backing_changes = False
    #: Whether the format was detected, and not given.
    probed = False
    #: The threads that encode and decode, after the first long request (see `coding`).
    coders: Workers | None = None

    @property
    def takes_bitmaps(self) -> bool:
        """Whether this image may have dirty bitmaps."""
        return self.keeps_bitmaps

    @classmethod
    def refusal(cls, lacks: str, hint: str | None = None) -> UnsupportedFeature:
        """The error for an operation that the format, or its driver, does not have."""
        return UnsupportedFeature(f"the format {cls.driver} {lacks}", hint=hint)

    # -- new images

    @classmethod
    def creation_schema(cls) -> Schema:
        """The options of a new image. Raises UnsupportedFeature if the driver creates no images."""
        if cls.create_schema is None:
            raise cls.refusal("does not support the creation of images", hint="try qcow2 or raw")
        return cls.create_schema

    @classmethod
    def prepare_create(cls, values: dict[str, Any], target: str, budget: Budget = DEFAULT_BUDGET) -> None:
        """Check combinations of options, and the files that options name, before the image at the path `target` is created;
        complete `values` (for example with the size of a backing file). `budget` bounds the images that the driver opens for
        these checks. Raises OptionError, LimitExceeded, and the errors of opening those files. The default checks nothing."""

    @classmethod
    def create(cls, storage: Child, size: int, values: Mapping[str, Any]) -> None:
        """Create an image of a disk of `size` bytes, which reads as zeros, in `storage`, which is empty."""
        raise cls.refusal("does not support the creation of images", hint="try qcow2 or raw")

    @classmethod
    def file_of(cls, disk: Child, values: Mapping[str, Any]) -> Node:
        """A node that reads as the file of a new image with the disk `disk`: its bytes are computed as they are read. So they
        can be written in order, without a seek. The node is read-only, and owns the edge `disk`, except after an error.
        UnsupportedFeature where an image with these options is not made in one pass."""
        raise cls.refusal("has images that are not written in one pass", hint="write the image to a file")

    @classmethod
    def side_files(cls, values: Mapping[str, Any]) -> Sequence[str]:
        """The paths of the files beside the image that belong to it, and that `create` fills: they are created, empty, before
        it is called, and deleted if the image is not completed. None of them may exist. By default there are none."""
        return ()

    @classmethod
    def options_to_open(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The options with which `open` opens an image that `create` made with `values`: the secret of an encrypted one. By
        default none is needed."""
        return {}

    @classmethod
    def measure(
        cls,
        size: int,
        values: Mapping[str, Any],
        stored: Iterable[Extents] | None = None,
        bitmaps: Mapping[str, DirtyBitmap] | None = None,
    ) -> MeasureResult:
        """The length of the file of a new image of `size` bytes. `stored` is the status of its source (consecutive extents of
        the whole disk, split at multiples of the largest cluster); None: the source is empty. `bitmaps`: those of the source,
        if it may have some. No file is created."""
        raise cls.refusal("does not support the measurement of images")

    # -- images that exist

    @classmethod
    def inspect(cls, storage: Child, values: Mapping[str, Any]) -> ImageInfo:
        """Describe the header in `storage`; the caller adds the fields about the file. `values`: the given options of `open`.
        This works for images with features that `open` refuses; `unsupported` lists these. Raises FormatError if there is no
        header."""
        raise cls.refusal("has no header that `info` could describe")

    @classmethod
    def explain(cls, storage: Child, values: Mapping[str, Any]) -> Explainer:
        """What can say of each byte of the file in `storage` what it is, also of a damaged image. `values` as for `inspect`.
        Raises FormatError if the file is no image of the format."""
        raise cls.refusal("does not explain its bytes")

    def check(self) -> CheckReport:
        """Compare the structures of the image with one another without a change. The report contains all findings, however
        damaged the image is; an error means that the check itself was not possible."""
        raise self._at(self.refusal("has nothing to check"))

    def repair(self, what: Repair) -> CheckReport:
        """Check the image and repair it. "leaks" frees leaked space alone, which changes no readable byte; "all" also
        resolves contradictions. The report lists the findings. A second repair finds nothing new, even after a power cut
        during the first one."""
        raise self._at(self.refusal("cannot be repaired"))

    def require_amendable(self, values: Mapping[str, Any]) -> None:
        """Raise what `amend` would refuse, for work that must not begin in vain."""
        raise self._at(self.refusal("has no options that can be changed later"))

    def amend(self, values: Mapping[str, Any]) -> None:
        """Change options of the image in place, as parsed by `amend_schema`; an option that is None stays unchanged. What the
        format does not have, or contradicts itself, is refused before anything changes. Each option then changes whole or
        not at all, one after the other: after any other error, those before it have changed, and the call can be repeated.
        (The name of a backing file and its format are one option.)"""
        raise self._at(self.refusal("has no options that can be changed later"))

    def resize(self, size: int, preallocation: str) -> None:
        """As `truncate`, and allocate what is added: "metadata" maps it, "falloc" gives it storage, "full" writes zeros. No
        request runs at the same time. If storage runs out, the disk has its new size, and a part of it is not allocated.
        OptionError, before anything changes, for a way that the format does not have."""
        raise self._at(self.refusal("cannot allocate what a change of the size adds"))

    def make_empty(self) -> None:
        """Give up everything that this layer owns: the disk then reads as its backing file, which reads as the disk does now,
        up to its end. No request runs at the same time. After an error, or a power cut, some blocks are given up."""
        raise self._at(self.refusal("cannot be emptied"))

    # -- storage that is not needed

    def free_zeros(self, offset: int, length: int) -> int:
        """Free the storage of these blocks, as far as that makes the image smaller, and return the number of their bytes.
        They read as zero, and still do afterwards, so no bitmap records anything. The range consists of whole blocks
        (`limits.zero_alignment`), but for the end of the disk. No request runs at the same time. Raises NotSupported before
        any change if the format cannot represent the result."""
        raise self._at(self.refusal("stores zeros like other bytes"))

    def pack(self) -> Iterator[int]:
        """Move what the end of the file stores into free space before it, so that `trim` can make the file shorter. Each step
        of the iterator moves some, and gives the number of bytes. No request runs during a step; between two steps other
        users may read and write. No byte of the disk changes. ENOSPC where the file system has no storage for a copy."""
        return iter(())

    def trim(self) -> None:
        """Give back what nothing in the file uses: its end, and holes in place of free space. No request runs at the same
        time, and no byte of the disk changes."""
        raise self._at(self.refusal("has no free space"))

    # -- internal snapshots

    def snapshots(self) -> Sequence[Snapshot]:
        """The snapshots of the image, in its order."""
        raise self._at(self.refusal("has no internal snapshots"))

    def create_snapshot(self, name: str, vm_state: bytes | bytearray | memoryview = b"") -> Snapshot:
        """Save the current state of the disk under `name`, with a free id, and with it `vm_state`, the state of the machine
        that uses the disk. No request runs at the same time."""
        raise self._at(self.refusal("has no internal snapshots"))

    def read_vm_state(self, offset: int, length: int) -> bytes:
        """These bytes of the machine state of the snapshot that is open; `Snapshot.vm_state` is the length of all."""
        raise self._at(self.refusal("has no internal snapshots"))

    def apply_snapshot(self, id: str) -> None:
        """Restore the disk to the state of that snapshot. No request runs at the same time."""
        raise self._at(self.refusal("has no internal snapshots"))

    def delete_snapshot(self, id: str) -> None:
        """Delete that snapshot; the disk itself does not change."""
        raise self._at(self.refusal("has no internal snapshots"))

    # -- persistent dirty bitmaps (`Node.bitmaps` contains the existing ones)

    @property
    def inconsistent_bitmaps(self) -> Sequence[str]:
        """The names of the bitmaps that were not stored after their last change. By default there are none."""
        return ()

    def add_bitmap(self, name: str, granularity: int, *, enabled: bool = True) -> None:
        """Add an empty bitmap with a bit for each `granularity` bytes (a power of two); an enabled bitmap records writes."""
        raise self._at(self.refusal("keeps no dirty bitmaps"))

    def remove_bitmap(self, name: str) -> None:
        """Remove this bitmap, and delete it from the file."""
        raise self._at(self.refusal("keeps no dirty bitmaps"))

    def clear_bitmap(self, name: str) -> None:
        """Clear all recorded writes of this bitmap."""
        raise self._at(self.refusal("keeps no dirty bitmaps"))

    def enable_bitmap(self, name: str, enabled: bool) -> None:
        """Make this bitmap record writes from now on, or stop it."""
        raise self._at(self.refusal("keeps no dirty bitmaps"))

    def merge_bitmaps(self, name: str, sources: Iterable[DirtyBitmap]) -> None:
        """Add to this bitmap the recorded writes of `sources`, which belong to this image or to others."""
        raise self._at(self.refusal("keeps no dirty bitmaps"))

    def close(self) -> None:
        try:
            super().close()
        finally:
            if self.coders is not None:
                self.coders.close()

    def _at(self, error: UnsupportedFeature) -> UnsupportedFeature:
        error.path = self.filename
        return error


def lookup_format(name: str, *, from_image: bool = False) -> type[Format]:
    """The class of the format driver `name`, imported. Raises the errors of `registry.lookup`, and OptionError for a driver
    outside Lamina that does not derive from `Format`."""
    kind = registry.lookup(name, "format", from_image=from_image)
    if not issubclass(kind, Format):
        raise OptionError(
            f"the class of the driver {name} does not derive from lamina.format.Format, the contract of a format",
            hint="see docs/drivers-outside-the-tree.md",
        )
    return kind


def layers_of(top: Node) -> list[Node]:
    """The layers of the graph below `top`, from the top of its chain: the nodes to which the depths of extents refer. It ends
    at a filter over several images, each of which may have layers of its own."""
    found: list[Node] = []
    node: Node | None = top
    while node is not None:
        if isinstance(node, Format):
            found.append(node)
            node = node.children["backing"].node if "backing" in node.children else None
        else:
            node = below_filter(node)
    return found


def below_filter(node: Node) -> Node | None:
    """The node whose layers a filter shows: its image (`logwrites` also has a log), or its only child. None for storage, and
    for a filter over several images."""
    children = node.children
    child = children.get("image") or (next(iter(children.values())) if len(children) == 1 else None)
    return None if child is None else child.node

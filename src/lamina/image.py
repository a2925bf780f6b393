"""The user's interface to an opened image: reads and writes by byte, and the exact status.

An `Image` is a root of a graph (see `root.py`). Its operations are requests; it adds only the conveniences of Python: buffers
of any kind, `bytes` as results, context management, and a file object."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from .buffers import byte_view
from .edit import Edit
from .errors import Closed, LimitExceeded, OptionError, UnsupportedFeature
from .format import Format, layers_of
from .graph import Opener
from .limits import DEFAULT_BUDGET, Budget
from .node import COMPRESS, FUA, MAY_UNMAP, NO_FALLBACK, Node, check_size
from .options import parse_size, shown
from .policy import Policy
from .root import Graph, Root

if TYPE_CHECKING:
    from collections.abc import Buffer, Callable, Iterable, Iterator, Mapping  # type: ignore[attr-defined,unused-ignore]  # Python 3.12

    from .bitmap import DirtyBitmap
    from .disk_file import DiskFile
    from .extents import Extents
    from .layers import Layer
    from .results import Snapshot


_Result = TypeVar("_Result")
_Kind = TypeVar("_Kind", bound=Node)
#: Reads up to this length allocate their buffer before they check that they are inside the disk.
_MODEST = 1 << 20


class Image:
    """A virtual disk. Offsets and lengths are bytes; sizes are exact. Safe for any number of threads, `close` included.

    Errors are `LaminaError`s: OutOfRange for a request outside the disk, ReadOnly, BlockIOError (an OSError with errno) from
    storage, CorruptImage for contradictions in the tables of a format.
    """

    def __init__(self, node: Node | Root, *, budget: Budget = DEFAULT_BUDGET) -> None:
        """Create a user of `node`, which may have other users."""
        self._root: Root | None = node if isinstance(node, Root) else Root(node)
        #: The budget of the graph; jobs that read from the image apply its `max_output`.
        self.budget = budget
        self._rows = budget.rows

    @property
    def root(self) -> Root:
        """The root through which requests reach the graph."""
        if self._root is None:
            raise Closed("this image was closed")
        return self._root

    @property
    def node(self) -> Node:
        """The node on top of the graph."""
        return self.root.node

    @property
    def graph(self) -> Graph:
        """The graph of its nodes, which it may share with other images, exports and jobs."""
        return self.root.graph

    @property
    def closed(self) -> bool:
        """Whether `close` has completed."""
        return self._root is None or self._root.closed

    @property
    def size(self) -> int:
        """The length of the disk in bytes."""
        return self.root.node.size

    @property
    def filename(self) -> str:
        """The name of the node on top in messages: a path if there is one."""
        return self.root.node.filename

    @property
    def format(self) -> str:
        """The name of the driver on top."""
        return self.root.node.driver

    @property
    def read_only(self) -> bool:
        """Whether this image refuses changes."""
        return self.root.read_only

    @property
    def alignment(self) -> int:
        """The request alignment of the top node, to which the command `map` rounds."""
        return self.root.node.limits.request_alignment

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the disk from the top down: the image, its backing file, the backing file of that, ... Layer `n` is
        the one that `Extents.depth` calls `n`. An edit of the graph waits meanwhile."""
        from .layers import chain_of

        return self.graph.exclusively("describes the layers", chain_of, self.node)

    def find(self, kind: type[_Kind], name: str | None = None) -> _Kind:
        """The node of the class `kind`, on top of this image or anywhere below it: `image.find(Stats).snapshot()`. `name`, a
        `node-name`, chooses one of several. Raises OptionError if there is none, or more than one. The node is good until
        the image is closed or an edit takes it out."""
        nodes: list[Node] = self.graph.exclusively("looks for a node", list, self.node.beneath())
        found = [node for node in nodes if isinstance(node, kind) and name in (None, node.name)]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(node.name for node in found)
            raise OptionError(
                f"{len(found)} nodes are of the class {kind.__name__}", path=self.filename, hint=f"name one: {names}"
            )
        known = ", ".join(f"{node.name} ({type(node).__name__})" for node in nodes)
        wanted = "" if name is None else f" called {shown(name)}"
        raise OptionError(
            f"no node of the class {kind.__name__}{wanted}", path=self.filename, hint=f"the nodes are {known}"
        )

    def read(self, offset: int, length: int) -> bytes:
        """The `length` bytes at `offset`. Raises OutOfRange, before it allocates memory, if they are not inside the disk."""
        root = self.root
        if not 0 <= length <= _MODEST:
            root.require_inside(offset, length, "read")
        buffer = bytearray(length)
        root.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` (any writable contiguous buffer) with the bytes at `offset`."""
        self.root.read_into(offset, byte_view(buffer))

    def write(self, offset: int, data: Buffer, *, fua: bool = False, compress: bool = False) -> None:
        """Make the bytes at `offset` equal to `data`; with `fua` they are on stable storage before it returns. `compress`:
        store whole clusters compressed where that makes them smaller; UnsupportedFeature if the format cannot compress."""
        flags = FUA if fua else 0
        if compress:
            if not self.root.node.supported_flags & COMPRESS:
                hint = "write without compression, or use a format with compression: qcow2"
                raise UnsupportedFeature("it does not compress written data", path=self.filename, hint=hint)
            flags |= COMPRESS
        self.root.write(offset, byte_view(data), flags)

    def zero(self, offset: int, length: int, *, unmap: bool = False, fast: bool = False, fua: bool = False) -> None:
        """Make the bytes read as zero. `unmap`: their storage may be freed. `fast`: raise NotSupported, before any change,
        instead of writing zeros."""
        flags = (MAY_UNMAP if unmap else 0) | (NO_FALLBACK if fast else 0) | (FUA if fua else 0)
        self.root.zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        """The caller no longer needs these bytes; storage of whole blocks may be freed. The format decides how they read
        afterwards, but they never read as bytes of another file or of an older layer."""
        self.root.discard(offset, length)

    def flush(self) -> None:
        """Return when all bytes of earlier writes are on stable storage."""
        self.root.flush()

    def truncate(self, size: int | str, preallocation: str = "off") -> None:
        """Change the size of the disk, in bytes, or a text such as "10G". Added bytes read as zero; bytes past the new
        end are lost. `preallocation` allocates what is added: "metadata", "falloc" or "full", as for a new image; if
        storage runs out, the disk has its new size all the same. OptionError for another word, or one that the format
        does not have."""
        if isinstance(size, str):
            if size.lstrip().startswith("+"):
                raise OptionError(
                    f"{shown(size)} is a difference", hint="give the size itself; lamina.resize takes both"
                )
            size = parse_size(size)
        if preallocation == "off":
            self.root.truncate(size)
            return
        if preallocation not in ("metadata", "falloc", "full"):
            raise OptionError(
                f"preallocation is {shown(preallocation)}", hint="it is one of off, metadata, falloc, full"
            )
        self._change("changes the size of the disk", self._format().resize, check_size(size), preallocation)

    # -- internal snapshots, of formats that have them

    def snapshots(self) -> tuple[Snapshot, ...]:
        """The internal snapshots of the image, in its order. UnsupportedFeature if its format has none."""
        return tuple(self._format().snapshots())

    def create_snapshot(self, name: str, vm_state: bytes | bytearray | memoryview = b"") -> Snapshot:
        """Keep the disk of now under `name`, and with it the state of the machine that uses it, if given. It is on stable
        storage when this returns; other requests wait meanwhile. OptionError if there is a snapshot with that name."""
        return self._change("takes a snapshot", self._format().create_snapshot, name, vm_state)

    def read_vm_state(self, offset: int, length: int) -> bytes:
        """These bytes of the machine state of the snapshot that is open (`snapshot-id`); `Snapshot.vm_state` is the length of
        all. OptionError if they are not inside."""
        return self._format().read_vm_state(offset, length)

    def apply_snapshot(self, id: str) -> None:
        """Make the disk read as when the snapshot with this id was taken, with the size of then. What was written since is
        lost."""
        self._change("applies a snapshot", self._format().apply_snapshot, id)

    def delete_snapshot(self, id: str) -> None:
        """Give up the snapshot with this id, and the space that only it uses."""
        self._change("deletes a snapshot", self._format().delete_snapshot, id)

    # -- persistent dirty bitmaps, and options that change in place, of formats that have them

    @property
    def bitmaps(self) -> Mapping[str, DirtyBitmap]:
        """The dirty bitmaps by name, each a view of the present state. Inconsistent ones are missing (`lamina.info` lists
        them): they were not stored after their last change."""
        return self.node.bitmaps

    def add_bitmap(self, name: str, granularity: int = 65536, *, enabled: bool = True) -> None:
        """Add an empty bitmap with a bit for each `granularity` bytes (a power of two). An enabled one records writes from
        now on. Bitmaps are stored when the image is closed; until then the file says that they are inconsistent."""
        self._change("adds a bitmap", partial(self._format().add_bitmap, enabled=enabled), name, granularity)

    def remove_bitmap(self, name: str) -> None:
        """Remove a bitmap, inconsistent or not, from the file."""
        self._change("removes a bitmap", self._format().remove_bitmap, name)

    def clear_bitmap(self, name: str) -> None:
        """Make a bitmap forget the writes that it has recorded."""
        self._change("clears a bitmap", self._format().clear_bitmap, name)

    def enable_bitmap(self, name: str, enabled: bool = True) -> None:
        """Make a bitmap record writes from now on, or stop it."""
        self._change("enables a bitmap", self._format().enable_bitmap, name, enabled)

    def merge_bitmaps(self, name: str, sources: Iterable[DirtyBitmap]) -> None:
        """Add what `sources` have recorded to a bitmap: bitmaps of this image, of another one, or of memory."""
        self._change("merges bitmaps", self._format().merge_bitmaps, name, tuple(sources))

    def amend(self, **options: Any) -> None:
        """Change options of the image in place; see `lamina create` for their names. qcow2 changes `size`, `refcount_bits`,
        `lazy_refcounts`, `compat`, `encrypt` (a key slot), and the names `backing_file`, `backing_fmt` and `data_file` in the
        image, which it opens the next time. Raises OptionError for others, before anything changes."""
        node = self._format()
        if node.amend_schema is None:
            raise node.refusal("has no options that can be changed later")
        self._change("changes options of the image", node.amend, node.amend_schema.parse(options))

    def _change(self, what: str, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """work(*arguments), while no request of the graph runs."""
        self.root.edge.require_writable("change")
        return self.root.alone(what, work, *arguments)

    def _format(self) -> Format:
        node = self.node
        if not isinstance(node, Format):
            hint = "open the image below it"
            raise UnsupportedFeature(
                f"the filter {node.driver} has no snapshots, bitmaps or options to change", hint=hint
            )
        return node

    def extents(self, offset: int = 0, length: int | None = None) -> Extents:
        """The exact status of these bytes (up to the end by default), as columns; see `lamina.extents.Extents`. A consumer
        that needs a granularity rounds them with `.align(A)`. Raises LimitExceeded for more extents than `Budget.rows`;
        `windows` returns them in parts. Other threads may write between two parts."""
        if length is None:
            length = max(self.size - offset, 0)
        found = self.root.extents(offset, length)
        pieces, rows = [found], len(found)
        while rows <= self._rows and found.end < offset + length:
            found = self.root.extents(found.end, offset + length - found.end)
            _append(pieces, found)
            rows += len(found)
        if rows > self._rows:
            raise LimitExceeded(
                f"there are more than {self._rows} extents from {offset} to {found.end}",
                path=self.filename,
                hint="query shorter ranges (windows() does), or raise rows in the budget",
            )
        return found.concat(pieces)

    def windows(self, offset: int = 0, length: int | None = None) -> Iterator[Extents]:
        """The result of `extents` in parts of a few megabytes at most, whatever the image contains."""
        yield from self.root.windows(offset, max(self.size - offset, 0) if length is None else length)

    def share(self, node: Node | str | None = None, *, read_only: bool = False) -> Image:
        """Another image on the same node, or on another node of the graph, given by itself or by its `node-name`. Both images
        see the same bytes and the same edits; they are closed separately, in any order, and the last one closes the files.
        `read_only`: the new image refuses changes. An image on a child of another node (a backing file, the storage of a
        format) always does."""
        root = self.root.share(node, read_only=read_only)
        try:
            return Image(root, budget=self.budget)
        except BaseException:
            root.give_up()
            raise

    def edit(self, *, references: Policy | None = None) -> Edit:
        """Change the graph while it is in use: `with image.edit() as edit: edit.insert("blkdebug", {"align": 4096})`.
        Requests of other threads wait for its end. `references` as in `lamina.open`."""
        return Edit(self.root, Opener(policy=references, budget=self.budget, read_only=self.read_only))

    def reopen(self, *, read_only: bool) -> None:
        """Make the image read-only or writable without closing it. The descriptors and locks of its files are exchanged while
        no request runs, and no other process can lock the files in between. Other images on the node keep their mode: the
        files become read-only when the last writable image does. Raises NotSupported if a driver cannot do it, or the errors
        of `lamina.open` (Locked, CorruptImage, ...); the image is unchanged then."""
        self.root.reopen(read_only)

    def as_file(self) -> DiskFile:
        """The disk as a seekable raw file (`io.RawIOBase`) with a position of its own, for code that expects a file. Closing
        it leaves the image open. Once either is closed, its operations raise ValueError; see `DiskFile`."""
        from .disk_file import DiskFile

        return DiskFile(self)

    def close(self) -> None:
        """Write buffered data to the files and close them; only `flush` brings data to stable storage. Thread-safe.
        Requests in progress complete first; new requests raise Closed. A second call does nothing, unless it completes an
        interrupted `close`. Raises LaminaError inside a request of this image (in a signal handler, for example), or inside
        this thread's own `with image.edit()`.

        An image that is not closed is closed when nothing refers to it any more, or at the end of the program, with a
        ResourceWarning that names the line that opened it. After a fork, a close in the child only closes descriptors."""
        root = self._root
        if root is not None:
            try:
                root.close()
            finally:
                if root.closed:
                    self._root = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            self.close()  # completes what an interrupt stopped, and else does nothing

    def _repr_html_(self) -> str:
        """What notebooks show: a picture of the disk, and its layers. The status is queried for half a second at most; the
        picture says where it ends then. Never raises: an error is shown."""
        from .picture.notebook import of_image
        from .picture.tables import guarded

        return guarded(partial(of_image, self, layers_of))

    def __repr__(self) -> str:
        return f"<Image {self._root.node!r}>" if self._root else "<Image closed>"


def _append(pieces: list[Extents], found: Extents) -> None:
    """Add a part that begins at the end of the last one; if their adjacent rows are equal, they are merged."""
    last = pieces[-1]
    seam, first = int(last.start[-1]), int(found.length[0]) + found.begin
    joined = found.concat([last.clip(seam, last.end), found.clip(found.begin, first)]).coalesce()
    if len(joined) > 1:
        pieces.append(found)
        return
    parts = [last.clip(last.begin, seam), joined, found.clip(first, found.end)]
    pieces[-1:] = [part for part in parts if len(part)]

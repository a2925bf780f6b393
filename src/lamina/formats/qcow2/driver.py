"""The qcow2 node: its options, its children, and the hooks of the contract, which `Tables` implements."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self
from weakref import ref

from ...errors import CorruptImage, LaminaError, NotSupported, OptionError
from ...format_node import Columns, FormatNode, Mapping, Reservation, To
from ...graph import rebook
from ...limits import MAX_SIZE, Limits
from ...node import COMPRESS, NO_FALLBACK, require_writable
from ...references import Reference
from ...request import Child, sizes_changed
from ...schema import Option, Schema
from . import create as _create
from . import layout as q
from .amend_node import Amendable
from .bitmap_node import WithBitmaps
from .caches import OPTIONS, Caches
from .creation_node import Creatable
from .encrypted import Encrypted
from .header import Header
from .snapshot_node import WithSnapshots
from .trim_node import Trimmable

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Mapping as Options

    from ...coding import Encoded
    from ...explanation import Explainer
    from ...extents import HostFile
    from ...format import Repair
    from ...graph import Opener
    from ...report import CheckReport
    from ...results import ImageInfo
    from .compression import Compression
    from .tables import Tables


#: Clusters that a request zeroes or discards with the tables locked once, about 20 ms; then other requests get the lock.
_STEP_CLUSTERS = 1 << 15
#: What must be as it was when an image that was open for reading is opened for writing.
_SAME = ("l1_table_offset", "l1_size", "size", "extensions", "autoclear_features")


_ENCRYPT = Schema(
    "encrypt",
    [
        Option("format", "enum", "the kind of encryption; the image says it too", choices=("aes", "luks")),
        Option("key-secret", "any", "the passphrase: the id of a secret (--object), or a lamina.Secret"),
    ],
)


class Qcow2(WithSnapshots, WithBitmaps, Amendable, Creatable, Trimmable):
    """An image of format qcow2, version 2 or 3, over the child `file` and, if it has one, the child `backing`."""

    driver: ClassVar[str] = "qcow2"
    schema: ClassVar[Schema] = Schema(
        "qcow2",
        [
            Option("file", "node", "storage of the image", required=True),
            Option("backing", "node", "backing node, in place of the backing file in the header"),
            Option("data-file", "node", "storage of the guest data, in place of the data file in the header"),
            Option("snapshot-id", "str", "open the internal snapshot with this id, for reading"),
            Option("snapshot-name", "str", "open the internal snapshot with this name, for reading"),
            Option(
                "compression-level",
                "int",
                "the effort to compress what is written: 1 to 9, by default 3; with zstd 1 to 22, by default 2",
                minimum=1,
                maximum=22,
            ),
            Option("discard-no-unref", "bool", "what is discarded or zeroed keeps its clusters", default=False),
            *OPTIONS,
            Option("encrypt", "dict", "how to read an encrypted image", items=_ENCRYPT),
        ],
    )
    #: Whether clusters that are discarded or zeroed stay allocated, so that the image does not become fragmented.
    keeps_clusters = False
    #: Whether the tables are loaded. A node whose opening failed has none.
    _loaded = False
    tables: Tables
    _compression: Compression

    def __init__(
        self,
        file: Child,
        header: Header,
        *,
        read_only: bool,
        caches: Caches,
        name: str | None = None,
        data: Child | None = None,
    ) -> None:
        """`data`: the edge to the external data file, if there is one."""
        super().__init__(name=name, read_only=read_only)
        self.children["file"] = self.file = self.data = file
        if data is not None:
            self.children["data-file"] = self.data = data
        self.header = header
        self._cluster_size = header.cluster_size
        self._caches = caches
        self._load_tables(not read_only)
        self.supported_flags = COMPRESS if self._compression.compresses else 0

    def _load_tables(self, writable: bool) -> None:
        # What describes an image, or makes one, needs none of these: they take 3 ms of the 50 of `lamina info`.
        from . import allocation
        from .compression import Compression
        from .tables import Tables

        owner = ref(self)  # weak: a closed image is freed at once, not by the garbage collector

        def stop_writing() -> None:
            if (node := owner()) is not None:
                node.read_only = True

        def book(count: int) -> None:
            if (node := owner()) is not None:
                node._book(node.kept_bytes, count)

        self.tables = Tables(
            self.file,
            self.header,
            caches=self._caches,
            writable=writable,
            data=self.data,
            on_corrupt=stop_writing,
            book=book,
        )
        self._loaded = True
        self._map_one = self.tables.mappings.map_one  # called for every read
        self._compression = Compression(self.tables)
        self._changes: Any = allocation
        if self.header.extended_l2:
            from . import subclusters

            self._changes = subclusters

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        file = opener.child("file", options["file"], grows=True)
        header = Header.read(file)
        path = file.node.filename
        header.require_openable(path, writable=not (opener.read_only or opener.repair))
        header.require_l1(path, writable=not opener.read_only)
        if not (opener.read_only or opener.repair):
            header.require_refcounts(path)
        keeps_clusters = bool(options.get("discard-no-unref"))
        if keeps_clusters and header.version < 3:
            raise OptionError("version 2 has no zero flag, and discard-no-unref needs it", path=path)
        id, name, vm_state = options.get("snapshot-id"), options.get("snapshot-name"), 0
        if id is not None or name is not None:
            if not opener.read_only:
                raise OptionError("a snapshot can only be read", path=path, hint="open it read-only")
            from . import snapshot_table

            entry = snapshot_table.find(snapshot_table.read(file, header), id, name, path)
            snapshot_table.require_usable(entry, file, header)
            header, vm_state = header.at_snapshot(entry), entry.vm_state
        from .l1_table import stored_bytes

        stored = stored_bytes(file, header.l1_table_offset, header.l1_size)
        opener.book(stored, "the L1 table", path)
        kind: Any = EncryptedQcow2 if header.crypt_method else cls
        data: Child | None = None
        if header.external_data:
            from .external import class_of, open_data_file

            data = open_data_file(file, header, options.get("data-file", {}), opener)
            kind = class_of(kind)
        elif "data-file" in options:
            raise OptionError("a data file is given, and the image has none", path=path)
        caches = Caches.given(options, Caches.of(opener.cache_bytes))
        opener.book(max(sum(caches) - opener.cache_bytes, 0), "a cache of tables larger than that of the budget", path)
        node: Self = kind(file, header, read_only=opener.read_only, caches=caches, name=opener.name, data=data)
        node.vm_state, node.keeps_clusters = vm_state, keeps_clusters
        node._compression.set_level(options.get("compression-level"))
        node.of_snapshot = id is not None or name is not None
        node.unlock(options.get("encrypt"), opener)
        named = Reference(header.backing_file, "backing", "backing file", format=header.backing_format)
        backing = opener.reference(file, named, options.get("backing", {}))
        if backing is not None:
            node.children["backing"] = backing
        if not (opener.read_only or opener.repair):
            node._begin()
        if not header.l1_inside:
            node.warn("%s: the L1 table is past the end of the file; what it maps reads as zero", path)
        if header.lost_refcounts is not None and opener.read_only:
            node.warn(
                "%s: the refcount table is not inside the file; the image can only be read until it is repaired", path
            )
        return node

    def _begin(self) -> None:
        """The image is open for writing. One that was not closed since its reference counts may be out of date is repaired,
        as the dirty bit asks for."""
        if self.header.incompatible_features & q.DIRTY:
            self.repair("all")
            if self.header.incompatible_features & q.DIRTY:
                raise CorruptImage(
                    "the image was not closed properly, and cannot be repaired",
                    path=self.filename,
                    hint="open it read-only, and copy what is left",
                )
        self._take_bitmaps()
        self._clear_autoclear_features()

    def unlock(self, given: Options[str, Any] | None, opener: Opener) -> None:
        """Take the passphrase that the options give; here there is nothing that needs one."""
        if given:
            raise OptionError("a passphrase is given, and the image is not encrypted", path=self.filename)

    @classmethod
    def inspect(cls, storage: Child, values: Options[str, Any]) -> ImageInfo:
        return _create.describe(storage, Header.read(storage))

    @classmethod
    def explain(cls, storage: Child, values: Options[str, Any]) -> Explainer:
        from .explain import Qcow2Explainer

        return Qcow2Explainer(storage, values)

    def rewrite(self, work: Callable[..., Any], *arguments: Any) -> Any:
        require_writable(self, "snapshot")
        try:
            return self.ranges.exclusive(0, MAX_SIZE, self._rewritten, work, *arguments)
        finally:
            sizes_changed()

    def _rewritten(self, work: Callable[..., Any], *arguments: Any) -> Any:
        tables = self.tables
        tables.settle()
        tables.file.flush()
        kept = self.kept_bytes
        try:
            result, freed = tables.changing(work, tables, partial(self._book, kept), *arguments)
            tables.given_back += 1  # before storage becomes a hole
            for offset, length in freed:
                self.file.discard(offset, length)
            self.file.flush()  # before these clusters are written again: a discard that is late would destroy that
            return result
        finally:
            self.kept_bytes = kept
            self._map_one = tables.mappings.map_one

    def _book(self, kept: int, count: int) -> None:
        rebook(self, kept + count, "the reference counts of all clusters")

    def set_width(self, bits: int) -> None:
        from .compression import Compression
        from .refcount_width import set_width

        self.rewrite(set_width, bits)
        level = self._compression.level
        self._compression = Compression(self.tables)
        self._compression.set_level(level)
        self.supported_flags = COMPRESS if self._compression.compresses else 0

    def check(self) -> CheckReport:
        from .check import check

        if not self.read_only:
            self.flush()
            self.tables.settle()  # what waits to be freed is counted, and nothing refers to it
        return check(self.file, self.header)

    def repair(self, what: Repair) -> CheckReport:
        from .repair import repair

        require_writable(self, "repair")
        self.flush()
        recording = self._recording
        if (
            recording is not None
            and not self.header.has_bitmaps
            and any(one.entry.table_size for one in recording.all.values())
        ):
            recording.store()  # else the clusters of bitmaps that could not be stored would be leaks
        report = rest = self.check()
        for _ in range(2):  # an entry of flags alone names the header, until the first repair has cleared it
            if rest.leaks or (what == "all" and rest.corruptions):
                self.rewrite(repair, what)
                rest = self.check()
        marks = q.DIRTY | q.CORRUPT
        mended = what == "all" and not rest.corruptions and not rest.check_errors
        if mended and self.header.incompatible_features & marks:
            self.header.incompatible_features &= ~marks
            self.header.store(self.file, "incompatible_features")
            self.file.flush()
        return report

    # -- properties

    @property
    def faithful(self) -> bool:
        return not self.of_snapshot

    @property
    def size(self) -> int:
        return self.header.size

    @property
    def serialise(self) -> int:
        return self._cluster_size

    @property
    def limits(self) -> Limits:
        size = self._cluster_size
        step = _STEP_CLUSTERS * size
        return Limits(
            zero_alignment=size >> self.tables.mappings.layout.units_bits,
            max_zero=step,
            discard_alignment=size,
            max_discard=step,
            compress_alignment=size if self._compression.compresses else 0,
        )

    # -- the mapping

    def map(self, offset: int, length: int) -> Mapping:
        found = self._map_one(offset, length)
        if found is not None:
            return found
        tables = self.tables
        with tables.lock:
            tables.require_outside_changes()
            return tables.mappings.map(offset, length)

    @property
    def given_back(self) -> int:
        return self.tables.given_back

    def map_columns(self, offset: int, length: int) -> Columns:
        tables = self.tables
        with tables.lock:
            tables.require_outside_changes()
            return tables.mappings.map_columns(offset, length)

    def load(self, mapping: Mapping, offset: int, view: memoryview) -> None:
        self._compression.read_into(mapping.token, offset & self._cluster_size - 1, view)

    def load_parts(self, parts: list[Encoded]) -> None:
        self._compression.read_parts(
            [(part.mapping.token, part.offset & self._cluster_size - 1, part.view) for part in parts]
        )

    def reserve(self, offset: int, length: int) -> Reservation:
        tables = self.tables
        found: Reservation = tables.changing(self._changes.reserve, tables, offset, length)
        return found

    def commit(self, reservation: Reservation) -> None:
        if reservation.token is not None:
            self.tables.changing(self._changes.commit, self.tables, *reservation.token)

    def abandon(self, reservation: Reservation) -> None:
        if reservation.token is not None:
            self.tables.changing(self._changes.abandon, self.tables, *reservation.token)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        if self._recording is not None and not self.backing_changes:
            self._recording.mark(offset, len(view))
        if flags & COMPRESS:
            self._compression.write(self, offset, view)
        else:
            FormatNode.write(self, offset, view)

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        if self._recording is not None and not self.backing_changes:
            self._recording.mark(offset, length)
        super().copy_from(offset, source, source_offset, length, flags)

    def drop(self, offset: int, length: int, to: To, *, keep: bool = False) -> None:
        if self._recording is not None and not self.backing_changes:
            self._recording.mark(offset, length)
        backed = self.backed
        if self.header.version < 3 and to is not To.BELOW and backed:
            # Version 2 has no zero flag: a dropped cluster shows the bytes of the backing file.
            what = "zero" if to is To.ZERO else "discard"
            raise NotSupported(
                f"version 2 cannot {what} clusters over a backing file", node=self.name, operation=what, offset=offset
            )
        keep = keep or (self.keeps_clusters and to is not To.BELOW)
        self.tables.changing(self._changes.drop, self.tables, offset, length, to, keep, backed)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        if self.header.extended_l2 and not flags & NO_FALLBACK:
            self._changes.expand_ends(self, offset, length)
        FormatNode.zero(self, offset, length, flags)

    def truncate(self, size: int) -> None:
        from .resize import resize

        recording, old = self._recording, self.size
        if recording is not None and size != old:
            recording.require_all_usable(size)
            recording.resize(max(size, old))  # first: a write to what is added must find its bits
        try:
            self._recording = None  # what a change of the size clears was not written
            resize(self, self.tables, size)
        finally:
            self._recording = recording
        if size < old:
            self.shrink_file()
        if recording is not None and size < old:
            recording.resize(size)

    # -- flush, and the modes of access

    def flush(self) -> None:
        self.tables.flush()

    def reopen(self, read_only: bool) -> None:
        self.reopen_over([self.file] if self.data is self.file else [self.file, self.data], read_only)
        self.tables.writable = not read_only
        if read_only:  # not before: where it stays writable after an error, bitmaps go on to record
            self._recording = None

    def begin_writing(self) -> None:
        """As in `open`. The tables are loaded again, since those of a read-only image may share memory."""
        header, known = Header.read(self.file), self.header
        header.require_openable(self.filename, writable=True)
        header.require_l1(self.filename, writable=True)
        header.require_refcounts(self.filename)
        if header.values(*_SAME) != known.values(*_SAME):
            raise LaminaError(
                "another process changed the image, which was open without locks",
                path=self.filename,
                hint="close it and open it again",
            )
        self._load_tables(True)
        self._begin()

    def stop_writing(self) -> None:
        self.settle()
        self.file.flush()

    def _clear_autoclear_features(self) -> None:
        # They say that all writers kept certain structures up to date, as this driver does for bitmaps and raw data files.
        known = q.AUTOCLEAR["bitmaps"] if self._recording is not None else 0
        known |= q.AUTOCLEAR["raw external data"] if self.header.external_data else 0
        kept = self.header.autoclear_features & known
        if self.header.autoclear_features != kept:
            self.header.autoclear_features = kept
            self.header.store(self.file, "autoclear_features")

    def settle(self) -> None:
        try:
            if self._recording is not None and self.tables.writable:
                self._recording.store()
        finally:  # bitmaps need space of their own: where there is none, the disk is written all the same
            self.tables.settle()

    def after_fork(self) -> None:
        super().after_fork()
        if self._loaded:
            self.tables.changes = False  # the thread that was changing them exists only in the parent process


class EncryptedQcow2(Encrypted, Qcow2):
    """An image whose guest data is encrypted."""

    faithful = Qcow2.faithful

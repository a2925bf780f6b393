"""The qcow2 header: reading and writing. Each field is checked against its limit before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import CorruptImage, FormatError, Hint, LimitExceeded, UnsupportedFeature, printable
from ...limits import MAX_SIZE, align_up
from . import layout as q

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ...layout import Structure
    from ...request import Child
    from .snapshot_table import Entry


class Header:
    """The checked header of an image. Units are bytes. Change a field, then `store` it.

    The attributes have the names of the fields in `layout`; fields that a header may lack have defaults. (This is no
    dataclass, since the import of `dataclasses` takes a tenth of the time of `lamina info`.)
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int = 4
    header_length: int = 72
    crypt_method: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    compression_type: int = 0
    backing_file: str | None = None
    #: Whether the L1 table is inside the file.
    l1_inside: bool = True
    #: Where the header places the refcount table (offset, bytes), if that is not inside the file: then this header has none.
    lost_refcounts: tuple[int, int] | None = None
    #: (type, data) of all extensions, in order, including unknown ones.
    extensions: list[tuple[int, bytes]]

    def __init__(self, **fields: Any) -> None:
        self.extensions = []
        self.__dict__.update(fields)

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries have 16 bytes, with a bitmap of subclusters."""
        return bool(self.incompatible_features & q.EXTENDED_L2)

    @property
    def external_data(self) -> bool:
        """Whether an external data file contains the guest data."""
        return bool(self.incompatible_features & q.DATA_FILE)

    @property
    def raw_external_data(self) -> bool:
        """Whether the external data file reads as the disk does, without the tables."""
        return self.external_data and bool(self.autoclear_features & q.AUTOCLEAR["raw external data"])

    @property
    def l1_covers_bits(self) -> int:
        """An L1 entry covers 1 << `l1_covers_bits` bytes of the disk: an L2 table is one cluster."""
        return 2 * self.cluster_bits - (4 if self.extended_l2 else 3)

    def l1_entries(self, size: int) -> int:
        """The number of L1 entries for a disk of `size` bytes."""
        return -(-size >> self.l1_covers_bits) if size >= 0 else 0

    def extension(self, kind: int) -> bytes | None:
        """The data of the first extension of this type."""
        return next((data for type_, data in self.extensions if type_ == kind), None)

    @property
    def backing_format(self) -> str | None:
        data = self.extension(q.EXT_BACKING_FORMAT)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    @property
    def data_file(self) -> str | None:
        data = self.extension(q.EXT_DATA_FILE)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    @property
    def encryption_header(self) -> tuple[int, int] | None:
        """The offset and length of the LUKS header, unchecked; None if there is none."""
        data = self.extension(q.EXT_ENCRYPTION) if self.crypt_method == 2 else None
        if data is None or len(data) < q.ENCRYPTION_POINTER.size:
            return None
        pointer = q.ENCRYPTION_POINTER.unpack(data)
        return pointer.offset, pointer.length

    @property
    def has_bitmaps(self) -> bool:
        """Whether the header vouches for a bitmap directory, which may be broken all the same."""
        return bool(self.autoclear_features & q.AUTOCLEAR["bitmaps"])

    def at_snapshot(self, entry: Entry) -> Header:
        """The header with the disk as it was when this snapshot was taken."""
        size = self.size if entry.disk_size is None else entry.disk_size
        return self.but({"l1_table_offset": entry.l1_table_offset, "l1_size": entry.l1_size, "size": size})

    def but(self, values: Mapping[str, Any]) -> Header:
        """A copy with other values in these fields."""
        return Header(**{**self.__dict__, **values})

    def require_openable(self, path: str, *, writable: bool) -> None:
        """Raise UnsupportedFeature if the image uses a feature that is not implemented, or CorruptImage if it needs a repair
        before writes."""
        if missing := self.unsupported():
            raise UnsupportedFeature(
                f"the image uses {', '.join(missing)}", path=path, hint="this version cannot open it"
            )
        if writable and self.incompatible_features & q.CORRUPT:
            raise CorruptImage(
                "the image is marked corrupt: it can only be read", path=path, hint="repair it, or open it read-only"
            )

    def require_refcounts(self, path: str) -> None:
        """Raise CorruptImage if the image has lost its refcounts: nothing can be allocated before they are repaired."""
        if self.lost_refcounts is not None:
            offset, length = self.lost_refcounts
            raise CorruptImage(
                f"the refcount table of {length} bytes at {offset:#x} is not inside the file: the image can only be read",
                path=path,
                hint=Hint('repair it: lamina.check(repair="all")', command="repair it (lamina check -r all)"),
            )

    def require_l1(self, path: str, *, writable: bool) -> None:
        """Raise CorruptImage if the L1 table is not inside the file, and the image is to be written: its clusters there read
        as zero, but the file may as well have lost its end."""
        if writable and not self.l1_inside:
            raise CorruptImage(
                f"l1_table_offset {self.l1_table_offset:#x}: the L1 table of {self.l1_size * 8} bytes is not inside the"
                " file: the image can only be read",
                path=path,
                hint="if the file is whole, convert it to a new image",
            )

    def unsupported(self) -> list[str]:
        """The names of the features of this image that are not implemented."""
        found = []
        if self.crypt_method not in q.CRYPT_METHODS:
            found.append("unknown encryption")
        if self.external_data and self.nb_snapshots:
            found.append("internal snapshots beside an external data file")
        if self.external_data and self.size > q.MAX_HOST_OFFSET - self.cluster_size:
            found.append("a disk that no external data file can hold")
        if self.compression_type not in q.COMPRESSION_TYPES:
            found.append("unknown compression type")
        unknown = q.INCOMPATIBLE.unknown(self.incompatible_features)
        names = self._feature_names() if unknown else {}
        found += [names.get((0, bit), f"unknown incompatible feature {bit}") for bit in range(64) if unknown >> bit & 1]
        return found

    def _feature_names(self) -> dict[tuple[int, int], str]:
        table = self.extension(q.EXT_FEATURE_NAMES) or b""
        names = {}
        for at in range(0, len(table) - q.FEATURE_NAME_SIZE + 1, q.FEATURE_NAME_SIZE):
            name = table[at + 2 : at + q.FEATURE_NAME_SIZE].rstrip(b"\0").decode("utf-8", "replace")
            names[(table[at], table[at + 1])] = printable(
                name
            )  # the author of the image chose it, and messages show it
        return names

    # -- reading

    @classmethod
    def read(cls, storage: Child) -> Header:
        """The header of the image in `storage`. Raises FormatError, CorruptImage, LimitExceeded or UnsupportedFeature, with
        the name of the field; never for the features in `unsupported`."""
        try:
            return cls._parse(storage)
        except FormatError as error:
            error.path = error.path or storage.node.filename
            raise

    @classmethod
    def _parse(cls, storage: Child) -> Header:
        file_size = storage.node.size
        first = bytearray(min(file_size, 1 << q.MIN_CLUSTER_BITS))
        storage.read_into(0, memoryview(first))
        if bytes(first[:4]) != q.MAGIC:
            raise FormatError(
                "this is not a qcow2 image: the magic number is missing",
                hint=Hint("check the format", command="check the format (-f)"),
            )
        raw = q.HEADER_V2.unpack(first)
        if raw.version not in (2, 3):
            raise UnsupportedFeature(f"qcow2 version {raw.version} is not supported; versions 2 and 3 are")
        _within("cluster_bits", raw.cluster_bits, q.MIN_CLUSTER_BITS, q.MAX_CLUSTER_BITS)
        cluster_size = 1 << raw.cluster_bits
        values: dict[str, Any] = raw._asdict()
        if raw.version == 3:
            values = q.HEADER_V3.unpack(first)._asdict()
            _within("header_length", values["header_length"], q.HEADER_V3.size, cluster_size)
            if values["header_length"] > file_size:
                raise CorruptImage(f"header_length is {values['header_length']}, but the file has {file_size} bytes")
            _within("refcount_order", values["refcount_order"], 0, q.MAX_REFCOUNT_ORDER)
        else:
            values["header_length"] = q.HEADER_V2.size
        del values["magic"]
        name_at, name_size = values.pop("backing_file_offset"), values.pop("backing_file_size")
        header = cls(**values)
        cluster = bytearray(min(file_size, cluster_size))
        storage.read_into(0, memoryview(cluster))
        if header.header_length > q.COMPRESSION_TYPE_OFFSET:
            header.compression_type = cluster[q.COMPRESSION_TYPE_OFFSET]
        if header.extended_l2 and raw.cluster_bits < q.MIN_EXTENDED_CLUSTER_BITS:
            size, least = cluster_size, 1 << q.MIN_EXTENDED_CLUSTER_BITS
            raise CorruptImage(f"clusters of {size} bytes have no extended L2 entries, only those of {least} or more")
        if bool(header.incompatible_features & q.COMPRESSION_TYPE) != bool(header.compression_type):
            raise CorruptImage(f"compression_type {header.compression_type} and its feature bit contradict each other")
        end = cluster_size
        if name_at:
            if name_size > q.MAX_BACKING_NAME:
                raise LimitExceeded(f"backing_file_size is {name_size}, above the limit of {q.MAX_BACKING_NAME}")
            if name_at < header.header_length or name_at + name_size > min(cluster_size, file_size):
                raise CorruptImage("the name of the backing file is not inside the first cluster", offset=name_at)
            name = cluster[name_at : name_at + name_size].partition(b"\0")[0]  # some programs store the NUL as well
            header.backing_file = name.decode("utf-8", "surrogateescape") or None
            end = name_at
        header.extensions = extensions_in(cluster, header.header_length, min(end, len(cluster)))
        header._check_tables(file_size)
        return header

    def _check_tables(self, file_size: int) -> None:
        if self.size > MAX_SIZE:
            raise LimitExceeded(f"size is {self.size}, above the limit of {MAX_SIZE}")
        if self.l1_size * 8 > q.MAX_L1_BYTES:
            raise LimitExceeded(f"l1_size is {self.l1_size}, above the limit of {q.MAX_L1_BYTES // 8}")
        needed = self.l1_entries(self.size)
        if needed > self.l1_size:
            raise CorruptImage(f"l1_size is {self.l1_size}, too small for a disk of {self.size} bytes")
        # The end of the file may come first: some programs store no zeros there. `require_openable` says more.
        self._check_table("l1_table_offset", self.l1_table_offset, self.l1_size * 8, q.MAX_HOST_OFFSET)
        self.l1_inside = self.l1_table_offset + self.l1_size * 8 <= align_up(file_size, self.cluster_size)
        limit = q.MAX_REFTABLE_BYTES >> self.cluster_bits
        if self.refcount_table_clusters > max(limit, 1):
            raise LimitExceeded(
                f"refcount_table_clusters is {self.refcount_table_clusters}, above the limit of {limit}"
            )
        length = self.refcount_table_clusters << self.cluster_bits
        if self.refcount_table_offset:
            self._check_table("refcount_table_offset", self.refcount_table_offset, length, q.MAX_HOST_OFFSET)
        end = self.refcount_table_offset + length
        if not (self.refcount_table_offset and length and end <= align_up(file_size, self.cluster_size)):
            self.lost_refcounts = (self.refcount_table_offset, length)
            self.refcount_table_offset = self.refcount_table_clusters = 0
        if self.nb_snapshots > q.MAX_SNAPSHOTS:
            raise LimitExceeded(f"nb_snapshots is {self.nb_snapshots}, above the limit of {q.MAX_SNAPSHOTS}")
        if self.nb_snapshots:
            self._check_table("snapshots_offset", self.snapshots_offset, 40 * self.nb_snapshots, file_size)

    def _check_table(self, name: str, offset: int, length: int, file_size: int) -> None:
        """Check that a table begins at a cluster boundary after the header, and is inside the file, whose last cluster may be
        short."""
        if not length:
            return
        if offset % self.cluster_size:
            raise CorruptImage(f"{name} {offset:#x} is not a multiple of the cluster size {self.cluster_size}")
        if not offset:
            raise CorruptImage(f"{name} is 0: the table would overlap the header")
        if offset + length > align_up(file_size, self.cluster_size):
            raise CorruptImage(f"{name} {offset:#x}: the table of {length} bytes is not inside the file")

    # -- writing

    def to_bytes(self) -> bytes:
        """The first bytes of the image: header, extensions, name of the backing file. LimitExceeded if they do not fit into a
        cluster."""
        name = (self.backing_file or "").encode("utf-8", "surrogateescape")
        name_at = len(self.fixed_bytes(0, 0)) if name else 0
        whole = self.fixed_bytes(name_at, len(name)) + name
        if len(whole) > self.cluster_size:
            raise LimitExceeded(
                f"the header and the backing file name need {len(whole)} bytes, but a cluster has {self.cluster_size}",
                hint="use a shorter name or larger clusters",
            )
        return whole

    def fixed_bytes(self, name_at: int, name_size: int) -> bytes:
        """The header and its extensions, with a backing file whose name of `name_size` bytes is at `name_at`."""
        extensions = b"".join(
            q.EXTENSION.pack(type=kind, length=len(data)) + data.ljust(align_up(len(data), 8), b"\0")
            for kind, data in self.extensions
        ) + q.EXTENSION.pack(type=q.EXT_END, length=0)
        values = {f.name: getattr(self, f.name) for f in self._structure.fields if hasattr(self, f.name)}
        values |= {"backing_file_offset": name_at, "backing_file_size": name_size}
        fixed: bytes = self._structure.pack(**values)
        if self.header_length > q.COMPRESSION_TYPE_OFFSET:
            fixed += bytes([self.compression_type])
        return fixed.ljust(self.header_length, b"\0") + extensions

    def used_bytes(self, cluster: bytearray) -> int:
        """The end of what this header uses of the first cluster, which has these bytes: extensions, and the name."""
        stored = q.HEADER_V2.unpack(cluster)
        name_end = stored.backing_file_offset + stored.backing_file_size if stored.backing_file_offset else 0
        return max(self._extension_at(-1) + q.EXTENSION.size, name_end)

    # -- extensions of an image that is open

    def set_bitmaps(self, storage: Child, count: int, offset: int, size: int) -> None:
        """Let the bitmaps extension point to this directory; without bitmaps there is none. Everything that the directory
        points to is on stable storage. Wherever the power is cut, the header holds the old directory, or the new one, or says
        that its bitmaps are out of date. After an error call `forget_bitmaps`. LimitExceeded where the first cluster has no
        space for the extension."""
        kinds = [kind for kind, _ in self.extensions]
        index = kinds.index(q.EXT_BITMAPS) if q.EXT_BITMAPS in kinds else -1
        if not count:
            if index >= 0:
                self._set_bitmaps_bit(storage, on=False)
                self._remove_extension(storage, index)
            return
        data = q.BITMAPS.pack(nb_bitmaps=count, bitmap_directory_size=size, bitmap_directory_offset=offset)
        at = self._extension_at(index) + q.EXTENSION.size
        if index >= 0 and len(self.extensions[index][1]) != len(data):
            self._set_bitmaps_bit(storage, on=False)
            self._remove_extension(storage, index)
            index = -1
        if index < 0:
            self._append_extension(storage, q.EXT_BITMAPS, data)
        else:
            if at // q.SECTOR != (at + len(data) - 1) // q.SECTOR:  # a write of two sectors may be torn
                self._set_bitmaps_bit(storage, on=False)
            storage.write(at, memoryview(data))
            storage.flush()
            self.extensions[index] = (q.EXT_BITMAPS, data)
        self._set_bitmaps_bit(storage, on=True)

    def forget_bitmaps(self, storage: Child) -> None:
        """After an error of `set_bitmaps`: let the file say that its bitmaps are out of date, and take its extensions."""
        self._set_bitmaps_bit(storage, on=False)
        self.extensions = Header.read(storage).extensions

    def _set_bitmaps_bit(self, storage: Child, *, on: bool) -> None:
        """Say whether the bitmaps are up to date. After an error the file may say either, and this header that they are."""
        bit = q.AUTOCLEAR["bitmaps"]
        if on or self.autoclear_features & bit:
            self.autoclear_features |= bit
            new = self.autoclear_features if on else self.autoclear_features & ~bit
            field = self._structure["autoclear_features"]
            storage.write(field.offset, memoryview(self._structure.pack_field(field.name, new)))
            storage.flush()
            self.autoclear_features = new

    def _extension_at(self, index: int) -> int:
        """Where the extension with this index begins in the file, or for the number of all the end of their list."""
        before = self.extensions[:index] if index >= 0 else self.extensions
        return self.header_length + sum(q.EXTENSION.size + align_up(len(data), 8) for _, data in before)

    def _append_extension(self, storage: Child, kind: int, data: bytes) -> None:
        """Add an extension to the end of the list, in steps of which each leaves a list that ends."""
        cluster = bytearray(self.cluster_size)
        storage.read_into(0, memoryview(cluster))
        old = q.HEADER_V2.unpack(cluster)
        end = self._extension_at(-1)
        needed = align_up(end + 2 * q.EXTENSION.size + align_up(len(data), 8), 8)
        if any(cluster[end : end + 4]):
            raise CorruptImage("the list of header extensions has no end", path=storage.node.filename)
        name_at, name_size = old.backing_file_offset, old.backing_file_size
        name = bytes(cluster[name_at : name_at + name_size]) if name_at else b""
        moved = align_up(max(needed, name_at + name_size), 8)
        moves = 0 < name_at < needed  # also an empty name: the list of extensions ends where it begins
        fits = moved + name_size if moves else needed
        if fits > self.cluster_size:
            raise LimitExceeded(
                "the first cluster has no space for another header extension",
                path=storage.node.filename,
                hint="use larger clusters, or a shorter name of the backing file",
            )
        if moves:  # it lies where the extension goes: it moves first
            if name:
                storage.write(moved, memoryview(name))
                storage.flush()
            storage.write(
                q.HEADER_V2["backing_file_offset"].offset,
                memoryview(q.HEADER_V2.pack_field("backing_file_offset", moved)),
            )
            storage.flush()
        rest = data.ljust(align_up(len(data), 8), b"\0") + q.EXTENSION.pack(type=q.EXT_END, length=0)
        storage.write(end + q.EXTENSION.size, memoryview(rest))
        storage.flush()
        storage.write(end, memoryview(q.EXTENSION.pack(type=kind, length=len(data))))  # in place of the end
        storage.flush()
        self.extensions.append((kind, data))

    def _remove_extension(self, storage: Child, index: int) -> None:
        at, (_, data) = self._extension_at(index), self.extensions[index]
        last = index == len(self.extensions) - 1
        # In the middle of the list it stays, as one that nobody knows.
        kind, length = (q.EXT_END, 0) if last else (q.EXT_UNUSED, len(data))
        storage.write(at, memoryview(q.EXTENSION.pack(type=kind, length=length)))
        storage.flush()
        if last:
            del self.extensions[index]
        else:
            self.extensions[index] = (kind, data)

    @property
    def _structure(self) -> Structure:
        return q.HEADER_V2 if self.version == 2 else q.HEADER_V3

    def values(self, *names: str) -> dict[str, Any]:
        """These fields."""
        return {name: getattr(self, name) for name in names}

    def set(self, values: Mapping[str, Any]) -> None:
        """Change these fields, all in one step that no interrupt divides."""
        self.__dict__.update(values)

    def require_fields(self, names: Iterable[str]) -> None:
        """Raise KeyError for a field that a header of this version does not have: an error of the caller."""
        for name in names:
            self._structure[name]

    def store(self, storage: Child, *names: str) -> None:
        """Write these fields, which are adjacent in the header, in one request of less than a sector."""
        fields = sorted((self._structure[name].offset, name) for name in names)
        packed = b"".join(self._structure.pack_field(name, getattr(self, name)) for _, name in fields)
        storage.write(fields[0][0], memoryview(packed))


def _within(name: str, value: int, low: int, high: int) -> None:
    if value < low:
        raise FormatError(f"{name} is {value}, below the minimum of {low}")
    if value > high:
        raise LimitExceeded(f"{name} is {value}, above the limit of {high}")


def extensions_in(cluster: bytearray, at: int, end: int) -> list[tuple[int, bytes]]:
    """(type, data) of the extensions in these bytes of the first cluster."""
    found: list[tuple[int, bytes]] = []
    while at + q.EXTENSION.size <= end:
        head = q.EXTENSION.unpack(cluster, at)
        at += q.EXTENSION.size
        if head.type == q.EXT_END:
            break
        if head.length > end - at:
            raise CorruptImage(f"header extension {head.type:#010x} of {head.length} bytes exceeds the header")
        if len(found) == q.MAX_EXTENSIONS:
            raise LimitExceeded(f"more than {q.MAX_EXTENSIONS} header extensions")
        found.append((head.type, bytes(cluster[at : at + head.length])))
        at += align_up(head.length, 8)
    return found

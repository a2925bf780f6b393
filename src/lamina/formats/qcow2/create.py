"""Creating qcow2 images, and describing them for `lamina info`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ...descriptors import opening
from ...errors import FormatError, Hint, LaminaError, LimitExceeded, OptionError, join_hints
from ...limits import DEFAULT_BUDGET, KIB, MIB, Budget, align_up, is_power_of_two
from ...options import stored_name
from ...own_files import is_same_file
from ...results import ImageInfo, Snapshot
from ...schema import Option, Schema
from . import layout as q
from .header import Header

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...request import Child
    from .tables import Tables

_ENCRYPT = Schema(
    "encrypt",
    [
        Option("format", "enum", "luks; the legacy aes is only read", required=True, choices=("luks", "aes")),
        Option("key-secret", "any", "the passphrase: the id of a secret (--object), or a lamina.Secret"),
        Option("cipher-alg", "str", "cipher and bits of its key", default="aes-256"),
        Option("cipher-mode", "enum", "mode of the cipher", default="xts", choices=("xts", "cbc", "ecb")),
        Option("ivgen-alg", "enum", "source of the IVs", default="plain64", choices=("plain", "plain64", "essiv")),
        Option("ivgen-hash-alg", "str", "hash of essiv"),
        Option("hash-alg", "str", "hash of PBKDF2 and of the splitter", default="sha256"),
        Option("iter-time", "int", "milliseconds that unlocking takes", default=2000, minimum=1, maximum=60_000),
    ],
)
SCHEMA = Schema(
    "qcow2",
    [
        Option("size", "size", "size of the virtual disk"),
        Option(
            "cluster_size", "size", "unit of allocation, a power of two", default=64 * KIB, minimum=512, maximum=2 * MIB
        ),
        Option("compat", "enum", "version: 0.10 (v2) or 1.1 (v3)", default="1.1", choices=("0.10", "1.1", "v2", "v3")),
        Option("extended_l2", "bool", "allocate in subclusters, 32 to a cluster of 16 KiB or more", default=False),
        Option("refcount_bits", "int", "width of a reference count: 1, 2, 4 ... 64", default=16, minimum=1, maximum=64),
        Option(
            "compression_type", "enum", "algorithm of compressed clusters", default="zlib", choices=("zlib", "zstd")
        ),
        Option("backing_file", "str", "path of the backing file, relative to the folder of the new image"),
        Option("backing_fmt", "str", "format of the backing file; never detected"),
        Option(
            "preallocation",
            "enum",
            "clusters that exist from the beginning: mapped (metadata), with storage (falloc), or written (full)",
            default="off",
            choices=("off", "metadata", "falloc", "full"),
        ),
        Option("data_file", "str", "name of an external data file for the guest data, which must not exist yet"),
        Option("data_file_raw", "bool", "the data file reads as the disk does, without the tables", default=False),
        Option("data_file_keep", "bool", "the data file exists: its bytes become those of the disk", default=False),
        Option("lazy_refcounts", "bool", "let other programs update reference counts late", default=False),
        Option("encrypt", "dict", "encrypt the data of the guest", items=_ENCRYPT),
        Option("backing_unchecked", "bool", "do not open the backing file now (-u)", default=False),
    ],
)


def prepare(values: dict[str, Any], target: str, budget: Budget = DEFAULT_BUDGET) -> None:
    """Check combinations of options, and the backing file, before the image is created. Completes `values`."""
    if not is_power_of_two(values["cluster_size"]):
        raise OptionError(f"cluster_size {values['cluster_size']} is not a power of two", path=target)
    if not is_power_of_two(values["refcount_bits"]):
        raise OptionError(f"refcount_bits {values['refcount_bits']} is not a power of two", path=target)
    if _version(values) == 2 and values["refcount_bits"] != 16:
        raise OptionError(
            "version 2 (compat 0.10) has reference counts of 16 bits only", path=target, hint="use compat=1.1"
        )
    if _version(values) == 2 and values["compression_type"] != "zlib":
        raise OptionError("version 2 (compat 0.10) has zlib compression only", path=target, hint="use compat=1.1")
    if values["extended_l2"]:
        least = 1 << q.MIN_EXTENDED_CLUSTER_BITS
        if _version(values) == 2:
            raise OptionError("version 2 (compat 0.10) has no extended L2 entries", path=target, hint="use compat=1.1")
        if values["cluster_size"] < least:
            raise OptionError(
                f"extended L2 entries need clusters of {least} bytes or more",
                path=target,
                hint="use a larger cluster_size",
            )
    if _version(values) == 2 and values["lazy_refcounts"]:
        raise OptionError("version 2 (compat 0.10) has no lazy refcounts", path=target, hint="use compat=1.1")
    hides = values.get("backing_file") or values.get("encrypt") is not None
    if values["preallocation"] != "off" and hides and not values["extended_l2"]:
        raise OptionError(
            "clusters that exist already would hide the backing file, or read as anything under encryption",
            path=target,
            hint="omit preallocation, or use extended_l2",
        )
    if values.get("encrypt") is not None:
        _prepare_encryption(values["encrypt"], target)
    if values.get("data_file") or values["data_file_raw"] or values["data_file_keep"]:
        from .create_external import prepare as prepare_data_file

        if _version(values) == 2:
            raise OptionError("version 2 (compat 0.10) has no external data files", path=target, hint="use compat=1.1")
        prepare_data_file(values, target)
    name = values.get("backing_file")
    if not name:
        if values.get("backing_fmt"):
            raise OptionError("a backing format is given, but no backing file", path=target)
        _round_size(values, target)
        return
    name = values["backing_file"] = stored_name(name)
    if len(name.encode("utf-8", "surrogateescape")) > q.MAX_BACKING_NAME:
        raise LimitExceeded(f"the name of the backing file is longer than {q.MAX_BACKING_NAME} bytes", path=target)
    if not values.get("backing_fmt"):
        raise OptionError(
            f"the format of the backing file {name} is not given",
            path=target,
            hint=Hint('give it: backing_fmt="qcow2", "raw", ...', command="give it (-F qcow2, -F raw)"),
        )
    # Where the target is a link, names inside the new image are relative to the folder of the file itself.
    where = os.path.join(os.path.dirname(os.path.realpath(target)), name)
    if is_same_file(target, where):
        raise OptionError("the backing file is the new image itself", path=target, hint="name another file")
    if not values.get("backing_unchecked"):
        _check_backing(values, where, target, budget)
    _round_size(values, target)


def _prepare_encryption(values: Mapping[str, Any], target: str) -> None:
    from ...crypto.secret import reveal
    from .encryption import settings_of

    if values["format"] == "aes":
        raise OptionError(
            "new images have no legacy AES encryption: anybody can undo it", path=target, hint="use encrypt.format=luks"
        )
    settings_of(values)
    reveal(values.get("key-secret"))


def _round_size(values: dict[str, Any], target: str) -> None:
    """Round the size up to whole sectors: QEMU drops an incomplete last sector."""
    size = values.get("size")
    if size is not None and size % q.SECTOR:
        from ...creation import tell

        values["size"] = align_up(size, q.SECTOR)
        tell(
            target,
            f"the size {size} is rounded up to {values['size']}, since a qcow2 disk consists of sectors of {q.SECTOR} bytes",
        )


def _check_backing(values: dict[str, Any], where: str, target: str, budget: Budget) -> None:
    from ...graph import open_graph

    # The user gives this name, so the policy for references does not apply. The size is known without its backing file.
    spec = {"driver": values["backing_fmt"], "file": {"filename": where}}
    try:
        with opening(open_graph, spec, budget=budget, no_references=True) as node:
            if values.get("size") is None:
                values["size"] = node.size
    except LaminaError as error:
        error.hint = error.hint or Hint(
            "backing_unchecked=True names a backing file without opening it",
            command="use -u to name a backing file without opening it",
        )
        raise
    if not os.path.lexists(target):
        return
    # The target must not be a file deeper in the chain either. Locks do not matter for this check.
    with ExitStack() as stack:
        try:
            node = stack.enter_context(opening(open_graph, spec, budget=budget, force_share=True))
        except LimitExceeded as error:
            skip = Hint("backing_unchecked=True skips this check", command="use -u to skip this check")
            error.hint = join_hints(error.hint, skip, by=", or ")
            raise
        except LaminaError:
            return  # a backing file that cannot be opened is allowed
        from ...own_files import refuse_own

        refuse_own(node, target, what="backing file")


def header_of(values: Mapping[str, Any], size: int) -> Header:
    """The header of a new image for a disk of `size` bytes; it says that the disk is empty and has no L1 table, and that the
    refcount table is the second cluster. LimitExceeded if the disk is too large."""
    cluster_size = values["cluster_size"]
    bits = cluster_size.bit_length() - 1
    version = _version(values)
    header = Header(
        version=version,
        cluster_bits=bits,
        size=0,
        l1_size=0,
        l1_table_offset=0,
        refcount_table_offset=cluster_size,
        refcount_table_clusters=1,
        refcount_order=values["refcount_bits"].bit_length() - 1,
        header_length=q.HEADER_V2.size if version == 2 else q.COMPRESSION_TYPE_OFFSET + 8,
        backing_file=values.get("backing_file") or None,
    )
    if values["compression_type"] == "zstd":
        header.compression_type, header.incompatible_features = 1, q.COMPRESSION_TYPE
    if values["extended_l2"]:
        header.incompatible_features |= q.EXTENDED_L2
    if header.l1_entries(size) * 8 > q.MAX_L1_BYTES:
        raise LimitExceeded(
            f"a disk of {size} bytes is too large for clusters of {cluster_size} bytes",
            hint="use a larger cluster_size",
        )
    if values["lazy_refcounts"]:
        header.compatible_features = q.LAZY_REFCOUNTS
    if values.get("data_file"):
        header.incompatible_features |= q.DATA_FILE
        header.autoclear_features = q.AUTOCLEAR["raw external data"] if values["data_file_raw"] else 0
        header.extensions.append((q.EXT_DATA_FILE, values["data_file"].encode("utf-8", "surrogateescape")))
    if values.get("backing_fmt"):
        header.extensions.append((q.EXT_BACKING_FORMAT, values["backing_fmt"].encode()))
    return header


def create(storage: Child, size: int, values: Mapping[str, Any]) -> None:
    """Create an image of `size` bytes in `storage`, which is empty. `values` as parsed by SCHEMA."""
    from .caches import Caches
    from .tables import Tables

    header, cluster_size = header_of(values, size), values["cluster_size"]
    if storage.node.growable:
        storage.truncate(0)
    elif storage.size < 3 * cluster_size:
        raise OptionError(
            f"a new image needs {3 * cluster_size} bytes or more, but the storage has {storage.size}",
            path=storage.node.filename,
            hint="use a larger device, or a smaller cluster_size",
        )
    # An empty disk first: the header, a refcount table, and a refcount block with the counts of these three clusters.
    first = bytearray(3 * cluster_size)
    whole = header.to_bytes()
    first[: len(whole)] = whole
    first[cluster_size : cluster_size + 8] = (2 * cluster_size).to_bytes(8, "big")
    counts = _three_used(header.refcount_bits)
    first[2 * cluster_size : 2 * cluster_size + len(counts)] = counts
    storage.write(0, memoryview(first))
    if header.external_data:
        from .create_external import open_data_file

        with open_data_file(values, size) as data:
            _fill(Tables(storage, header, caches=Caches.of(MIB), writable=True, data=data), size, values)
    else:
        _fill(Tables(storage, header, caches=Caches.of(MIB), writable=True), size, values)


def _fill(tables: Tables, size: int, values: Mapping[str, Any]) -> None:
    """Give the empty image of `tables` its size, preallocated clusters, and a header for its encryption."""
    from .resize import grow_l1

    storage, header = tables.file, tables.header
    if size:
        grow_l1(tables, size)
        tables.flush()
        tables.set_size(size)
        how = values["preallocation"]
        if how == "off" and (values["data_file_keep"] or header.raw_external_data):
            how = "external"
        if how != "off":
            from .preallocation import preallocate

            preallocate(tables, how)
    if values.get("encrypt") is not None:
        from .encryption import add_luks

        add_luks(tables, values["encrypt"])
        tables.flush()
        storage.write(0, memoryview(header.to_bytes()))
    tables.settle()  # a refcount table that grew leaves its old one
    storage.flush()


def options_to_open(values: Mapping[str, Any]) -> dict[str, Any]:
    """As `Format.options_to_open`."""
    found: dict[str, Any] = {}
    if (encrypt := values.get("encrypt")) is not None:
        found["encrypt"] = {"key-secret": encrypt["key-secret"]}
    if values.get("data_file"):
        if values["data_file_keep"]:
            raise OptionError(
                "the data file would be overwritten, and is to be kept",
                path=values["data_file_path"],
                hint="create the image alone, or name a new data file",
            )
        found["data-file"] = {"driver": "file", "filename": values["data_file_path"]}
    return found


def _three_used(refcount_bits: int) -> bytes:
    """The first bytes of a refcount block, with three counts of 1."""
    if refcount_bits >= 8:
        return (1).to_bytes(refcount_bits // 8, "big") * 3
    packed = sum(1 << at * refcount_bits for at in range(3))
    return packed.to_bytes(2, "little")


def _version(values: Mapping[str, Any]) -> int:
    return 2 if values["compat"] in ("0.10", "v2") else 3


def describe(storage: Child, header: Header) -> ImageInfo:
    """The result of `lamina info` for the image in `storage`, from its header; see `Format.inspect`."""
    data: dict[str, Any] = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "compression-type": q.COMPRESSION_TYPES.get(header.compression_type, str(header.compression_type)),
    }
    if header.version > 2:
        data["lazy-refcounts"] = bool(header.compatible_features & q.LAZY_REFCOUNTS)
    data["refcount-bits"] = header.refcount_bits
    if header.version > 2:
        data["corrupt"] = bool(header.incompatible_features & q.CORRUPT)
        data["extended-l2"] = bool(header.incompatible_features & q.EXTENDED_L2)
        if header.data_file is not None:
            data["data-file"] = header.data_file
        if header.external_data:
            data["data-file-raw"] = header.raw_external_data
    if header.crypt_method in (1, 2):
        from .encryption import describe as describe_encryption

        data["encrypt"] = describe_encryption(storage, header)
    snapshots: tuple[Snapshot, ...] = ()
    unsupported = header.unsupported()
    if header.nb_snapshots:
        from . import snapshot_table

        try:
            snapshots = tuple(entry.result(header.size) for entry in snapshot_table.read(storage, header))
        except FormatError as error:  # also a broken image is described
            unsupported.append(f"its snapshots ({error.message})")
    if header.has_bitmaps:
        from . import bitmap_directory

        try:
            bitmaps = [entry.to_json() for entry in bitmap_directory.read(storage, header)]
            if bitmaps:
                data["bitmaps"] = bitmaps
        except FormatError as error:
            unsupported.append(f"its bitmaps ({error.message})")
    return ImageInfo(
        virtual_size=header.size,
        cluster_size=header.cluster_size,
        encrypted=True if header.crypt_method else None,
        dirty=bool(header.incompatible_features & q.DIRTY),
        backing_filename=header.backing_file,
        backing_format=None if header.backing_file is None else header.backing_format,
        snapshots=snapshots,
        format_specific={"type": "qcow2", "data": data},
        unsupported=tuple(unsupported),
    )

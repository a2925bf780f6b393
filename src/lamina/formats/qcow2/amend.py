"""Options of an image that change in place: size, width of the reference counts, lazy refcounts, and key slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import OptionError
from ...format_node import To
from ...limits import MIB, is_power_of_two
from ...options import stored_name
from ...schema import Option, Schema
from ...status import ZERO
from . import layout as q

if TYPE_CHECKING:
    from ...format_node import FormatNode
    from ...request import Child
    from .header import Header

SCHEMA = Schema(
    "qcow2",
    [
        Option("size", "size", "size of the virtual disk"),
        Option("compat", "enum", "version: 0.10 (v2) or 1.1 (v3)", choices=("0.10", "1.1", "v2", "v3")),
        Option("backing_file", "str", "name of the backing file in the image, empty for none; opened the next time"),
        Option("backing_fmt", "str", "format of the backing file"),
        Option("data_file", "str", "name of the external data file in the image; opened the next time"),
        Option("data_file_raw", "bool", "off: the data file need not read as the disk does any more"),
        Option("refcount_bits", "int", "width of a reference count: 1, 2, 4 ... 64", minimum=1, maximum=64),
        Option("lazy_refcounts", "bool", "whether writers may update reference counts late"),
        Option(
            "encrypt",
            "dict",
            "a key slot of an encrypted image",
            items=Schema(
                "encrypt",
                [
                    Option(
                        "state", "enum", "add a passphrase, or erase one", required=True, choices=("active", "inactive")
                    ),
                    Option("new-secret", "any", "the passphrase to add"),
                    Option("old-secret", "any", "the passphrase to erase, from each of its slots"),
                    Option("keyslot", "int", "the slot", minimum=0, maximum=7),
                    Option("iter-time", "int", "milliseconds that unlocking takes", default=2000, minimum=1),
                    Option("force", "bool", "erase the last slot, too: the disk is lost", default=False),
                ],
            ),
        ),
    ],
)


def require_possible(header: Header, values: Mapping[str, Any], path: str, *, bitmaps: bool) -> None:
    """Raise OptionError where one of these changes cannot be, before any of them is made. `bitmaps`: the node has
    some, stored or not."""
    bits = values.get("refcount_bits")
    if bits is not None and not is_power_of_two(bits):
        raise OptionError(f"refcount_bits {bits} is not a power of two", path=path)
    try:
        header_changes(header, values)
        version = header.but({} if bits is None else {"refcount_order": bits.bit_length() - 1})
        version_changes(version, values.get("compat"))
    except OptionError as error:
        error.path = path
        raise
    if _is_version_2(header, values.get("compat")) and (bits not in (None, 16) or values.get("lazy_refcounts")):
        raise OptionError("version 2 has counts of 16 bits, and none that are lazy", path=path)
    if _is_version_2(header, values.get("compat")) and bitmaps:
        raise OptionError("version 2 has no dirty bitmaps", path=path, hint="remove them first")
    if values.get("encrypt") is not None and header.crypt_method != 2:
        raise OptionError("only an image encrypted with LUKS has key slots", path=path)


def header_changes(header: Header, values: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of the header that these options change, but for the version. Raises OptionError for contradictions."""
    found: dict[str, Any] = {}
    extensions = list(header.extensions)
    name, kind = values.get("backing_file"), values.get("backing_fmt")
    if name or kind is not None:
        name = header.backing_file if name is None else stored_name(name)
        kind = header.backing_format if kind is None else kind
        if not name or not kind:
            raise OptionError("a backing file and its format belong together", hint="give backing_file and backing_fmt")
        if len(name.encode("utf-8", "surrogateescape")) > q.MAX_BACKING_NAME:
            raise OptionError(f"the name of the backing file is longer than {q.MAX_BACKING_NAME} bytes")
        if header.raw_external_data:
            raise OptionError("a raw data file hides a backing file", hint="amend data_file_raw=off first")
        found["backing_file"] = name
        extensions = _with(extensions, q.EXT_BACKING_FORMAT, kind)
    elif name == "":
        found["backing_file"] = None
        extensions = _with(extensions, q.EXT_BACKING_FORMAT, None)
    if values.get("data_file") is not None or values.get("data_file_raw") is not None:
        if not header.external_data and (values.get("data_file") is not None or values["data_file_raw"]):
            raise OptionError("the image has no external data file", hint="convert it to one that has")
        if values.get("data_file_raw") and not header.raw_external_data:
            raise OptionError("a data file cannot become raw", hint="convert the image to a new one")
        if values.get("data_file_raw") is False and header.external_data:
            found["autoclear_features"] = header.autoclear_features & ~q.AUTOCLEAR["raw external data"]
        if values.get("data_file") == "":
            raise OptionError("the name of the data file is empty", hint="give its name")
        if values.get("data_file"):
            extensions = _with(extensions, q.EXT_DATA_FILE, stored_name(values["data_file"]))
    if extensions != header.extensions:
        found["extensions"] = extensions
    return found


def _with(extensions: list[tuple[int, bytes]], kind: int, text: str | None) -> list[tuple[int, bytes]]:
    """These extensions with one of this type with this text in place of all others of the type; None: with none."""
    rest = [extension for extension in extensions if extension[0] != kind]
    return rest if text is None else [(kind, text.encode("utf-8", "surrogateescape")), *rest]


def version_changes(header: Header, compat: str | None) -> dict[str, Any]:
    """The attributes of the header that change with its version. Raises OptionError where version 2 lacks a feature."""
    old, new = header.version == 2, _is_version_2(header, compat)
    if old == new:
        return {}
    if old:
        return {"version": 3, "header_length": q.COMPRESSION_TYPE_OFFSET + 8}
    lacks = {
        "reference counts of another width than 16": header.refcount_bits != 16,
        "extended L2 entries": header.extended_l2,
        "an external data file": header.external_data,
        "another compression than zlib": header.compression_type,
        "internal snapshots whose clusters may be zero": header.nb_snapshots,
        "dirty bitmaps": header.extension(q.EXT_BITMAPS) is not None,
        "unknown features": q.INCOMPATIBLE.unknown(header.incompatible_features) or header.autoclear_features,
    }
    if found := [what for what, there in lacks.items() if there]:
        raise OptionError(f"version 2 has no {found[0]}", hint="convert the image to a new one")
    extensions = [one for one in header.extensions if one[0] != q.EXT_FEATURE_NAMES]
    return {
        "version": 2,
        "header_length": q.HEADER_V2.size,
        "compatible_features": 0,
        "incompatible_features": 0,
        "autoclear_features": 0,
        "extensions": extensions,
    }


def _is_version_2(header: Header, compat: str | None) -> bool:
    return header.version == 2 if compat is None else compat in ("0.10", "v2")


def drop_zero_flags(node: FormatNode, backed: bool) -> None:
    """Let no cluster of the disk have the flag ZERO, which version 2 lacks. What reads as zero still does. `backed`: the
    image has a backing file, which may be another one than that of `node`, or not be open."""
    step = 1 << 30
    for begin in range(0, node.size, step):
        length = min(step, node.size - begin)
        while length > 0:
            columns = node.map_columns(begin, length)
            rows = zip(columns.start.tolist(), columns.length.tolist(), columns.flags.tolist(), strict=True)
            for start, run, flags in rows:
                if not flags & ZERO:
                    continue
                if not backed:
                    node.drop(start, run, To.BELOW)
                else:
                    for at in range(start, start + run, MIB):
                        node.write(at, memoryview(bytes(min(MIB, start + run - at))))
            end = int(columns.start[-1] + columns.length[-1])
            begin, length = end, begin + length - end


def amend_key_slot(file: Child, header: Header, key: bytes, values: Mapping[str, Any]) -> None:
    """Add or erase a passphrase of the image in `file`, as `encrypt` of SCHEMA says. `key`: the master key."""
    from ...crypto.secret import reveal
    from .encryption import luks_header

    luks, slot, path = luks_header(file, header), values.get("keyslot"), file.node.filename
    if values["state"] == "active":
        luks.add_key(key, reveal(values.get("new-secret")), slot=slot, iter_time=values["iter-time"])
        return
    if values.get("old-secret") is not None:
        slots = luks.slots_of(reveal(values["old-secret"]))
        if not slots:
            raise OptionError("no key slot opens with the passphrase that is to be erased", path=path)
    elif slot is not None:
        slots = [slot]
    else:
        raise OptionError("neither a slot nor its passphrase is given", path=path, hint="give keyslot")
    for number in slots:
        luks.erase_slot(number, force=values["force"])

"""The texts of `qemu-img info` and `qemu-img snapshot -l`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import printable
from ...limits import align_up
from ...options import format_size
from ..info import nested, snapshot_table
from .ordered import dump, ordered
from .tool import SECTOR

if TYPE_CHECKING:
    from ...results import ImageInfo
    from .img import ImageTool

#: The version from which on `info` describes the nodes below.
_WITH_CHILDREN = (8, 0)


def as_json(found: Sequence[ImageInfo], tool: ImageTool, chain: bool) -> str:
    """The description of an image, or of a `chain`, as JSON."""
    records = [_record(one, tool) for one in found]
    return dump(records if chain else records[0])


def as_text(found: Sequence[ImageInfo], tool: ImageTool) -> str:
    """The same for people."""
    return "\n".join("".join(f"{line}\n" for line in _lines(one, tool)) for one in found)


def _record(one: ImageInfo, tool: ImageTool) -> dict[str, Any]:
    told: dict[str, Any] = dict(one.to_json())
    for key in ("format-probed", "unsupported"):
        told.pop(key, None)
    for snapshot in told.get("snapshots", ()):
        del snapshot["disk-size"]
        snapshot.setdefault("icount", 0)
    if not told.get("encrypted"):
        told.pop("encrypted", None)
    if "format-specific" in told:
        told["format-specific"] = _specific(told["format-specific"], tool)
    if (length := _file_length(one, tool)) is not None:
        told["children"] = [{"name": "file", "info": _file_record(one, length)}]
    return told


def _specific(found: Mapping[str, Any], tool: ImageTool) -> dict[str, Any]:
    """The details of the format, without those that only Lamina tells."""
    data = dict(found["data"])
    if tool.version >= _WITH_CHILDREN and data.get("encrypt", {}).get("format") == "luks":
        data["encrypt"] = {"detached-header": False, **data["encrypt"]}
    return {"type": found["type"], "data": data}


def _file_length(one: ImageInfo, tool: ImageTool) -> int | None:
    """The length of the file of the image as the tool shows it; None if it shows none."""
    if tool.version < _WITH_CHILDREN or one.file_size is None:
        return None
    return align_up(one.file_size, SECTOR)


def _file_record(one: ImageInfo, length: int) -> dict[str, Any]:
    told = {
        "children": [],
        "virtual-size": length,
        "filename": one.filename,
        "format": "file",
        "format-specific": {"type": "file", "data": {}},
        "dirty-flag": False,
    }
    return told if one.actual_size is None else told | {"actual-size": one.actual_size}


def _lines(one: ImageInfo, tool: ImageTool) -> Iterator[str]:
    yield f"image: {printable(one.filename)}"
    yield f"file format: {one.format}"
    if one.virtual_size is not None:
        yield f"virtual size: {format_size(one.virtual_size)} ({one.virtual_size} bytes)"
    size = "unavailable" if one.actual_size is None else format_size(one.actual_size)
    yield f"disk size: {size}"
    if one.encrypted:
        yield "encrypted: yes"
    if one.cluster_size is not None:
        yield f"cluster_size: {one.cluster_size}"
    if one.dirty:
        yield "cleanly shut down: no"
    if one.backing_filename is not None:
        full = one.full_backing_filename
        actual = f" (actual path: {printable(full)})" if full is not None and full != one.backing_filename else ""
        yield f"backing file: {printable(one.backing_filename)}{actual}"
    if one.backing_format is not None:
        yield f"backing file format: {printable(one.backing_format)}"
    if one.snapshots:
        yield "Snapshot list:"
        yield from snapshot_table(one.snapshots)
    if one.format_specific is not None:
        data = ordered(_specific(one.format_specific, tool))["data"]
        if data:
            yield "Format specific information:"
            yield from nested(data, 1)
    if (length := _file_length(one, tool)) is not None:
        yield "Child node '/file':"
        yield f"    filename: {printable(one.filename)}"
        yield "    protocol type: file"
        yield f"    file length: {format_size(length)} ({length} bytes)"
        yield f"    disk size: {size}"

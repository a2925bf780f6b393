"""Another header for an image in place: version, extensions and the name of the backing file, published by one write.

The first sector is written at once, and a disk writes a sector atomically. So the new header and its extensions end inside
it; the name of the backing file may be stored after it, in bytes that the old header does not use, and is on stable storage
before the first sector points to it. The table of feature names, which only messages use, is left out where it keeps the
rest from fitting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import LimitExceeded
from ...limits import align_up
from . import layout as q

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...request import Child
    from .header import Header


def rewrite(header: Header, storage: Child, changes: Mapping[str, Any]) -> None:
    """Change these attributes of `header`, of the image in `storage`. After a power cut or an error the file has the old
    header, or the new one. LimitExceeded, before anything changes, if the new one does not fit."""
    old = _first_cluster(header, storage)
    content, new = _fitting(header, old, storage, changes)
    if content[q.SECTOR :] != old[q.SECTOR :]:
        storage.write(q.SECTOR, memoryview(content)[q.SECTOR :])
        storage.flush()
    storage.write(0, memoryview(content)[: q.SECTOR])
    storage.flush()
    header.set({**changes, "extensions": new.extensions})


def require_room(header: Header, storage: Child, changes: Mapping[str, Any]) -> None:
    """LimitExceeded if the header with these changes does not fit."""
    _fitting(header, _first_cluster(header, storage), storage, changes)


def _first_cluster(header: Header, storage: Child) -> bytearray:
    old = bytearray(header.cluster_size)
    storage.read_into(0, memoryview(old))
    return old


def _fitting(header: Header, old: bytearray, storage: Child, changes: Mapping[str, Any]) -> tuple[bytearray, Header]:
    """The first cluster with the changed header, and that header."""
    new = header.but(changes)
    content = _content(old, header, new)
    if content is None:
        new = new.but({"extensions": [one for one in new.extensions if one[0] != q.EXT_FEATURE_NAMES]})
        content = _content(old, header, new)
    if content is None:
        raise LimitExceeded(
            "the new header does not fit into the first sector",
            path=storage.node.filename,
            hint="convert the image to a new one",
        )
    return content, new


def _content(old: bytearray, header: Header, new: Header) -> bytearray | None:
    """The first cluster with the header `new`, in place of `header`; None if it cannot be written in two steps. What the old
    header used behind the first sector stays there."""
    name = (new.backing_file or "").encode("utf-8", "surrogateescape")
    name_at = end = len(new.fixed_bytes(0, 0))
    if end > q.SECTOR:
        return None
    if name_at + len(name) > q.SECTOR:
        before = q.HEADER_V2.unpack(old)
        at, length = before.backing_file_offset, before.backing_file_size
        if at < q.SECTOR or bytes(old[at : at + length]) != name:
            at = align_up(max(q.SECTOR, header.used_bytes(old)), 8)
        name_at = at
    if name and name_at + len(name) > len(old):
        return None
    content = old[:]
    content[: q.SECTOR] = new.fixed_bytes(name_at if name else 0, len(name)).ljust(q.SECTOR, b"\0")
    content[name_at : name_at + len(name)] = name
    known = min(new.header_length, q.COMPRESSION_TYPE_OFFSET + 1)
    if new.version == header.version:  # fields that other programs added
        content[known : new.header_length] = old[known : new.header_length]
    return content

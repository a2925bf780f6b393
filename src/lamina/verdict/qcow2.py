"""The verdict on qcow2: its header, by the same code that opens images, and the header of its encryption."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ..formats.qcow2 import layout as q
from ..formats.qcow2.header import Header
from ..limits import KIB, Budget, align_up
from .content import Content
from .result import Findings

#: Bytes of all header extensions together. Images have some hundred of them; an extension may be as long as a cluster.
_MAX_EXTENSIONS: Final = 64 * KIB


def wanted(head: memoryview) -> Iterator[tuple[int, int]]:
    """The parts of the file besides its beginning that `judge` reads."""
    for kind, at, length in _extensions(head):
        if kind == q.EXT_ENCRYPTION and length >= q.ENCRYPTION_POINTER.size and at + length <= len(head):
            from ..crypto.luks1 import HEADER_BYTES

            yield q.ENCRYPTION_POINTER.unpack(head, at).offset, HEADER_BYTES


def judge(content: Content, found: Findings, budget: Budget) -> None:
    """Raises FormatError if the header is not that of a usable image."""
    head = content.read(0, 2 * _MAX_EXTENSIONS)  # where it ends, those before have more than that already
    total = sum(q.EXTENSION.size + length for _, _, length in _extensions(memoryview(head)))
    if total > _MAX_EXTENSIONS:
        found.exceed(f"the header extensions have {total} bytes, above the limit of {_MAX_EXTENSIONS}")
        return
    storage = content.storage()
    try:
        header = Header.read(storage)
        if q.HEADER_V2.unpack(head).backing_file_offset and header.backing_file is None:
            found.refuse("it has a backing file without a name")
        _judge(header, found, budget)
        if header.crypt_method == 2:
            from ..formats.qcow2.encryption import (
                luks_header,  # it imports hashes: a quarter of the time of `lamina inspect`
            )

            luks_header(storage, header)
    finally:
        storage.close()


def _judge(header: Header, found: Findings, budget: Budget) -> None:
    found.virtual_size = header.size
    found.features += _features(header)
    if header.backing_file is not None:
        found.refer("backing file", header.backing_file)
    if header.data_file is not None:
        found.refer("data file", header.data_file)
    elif header.external_data:
        found.refuse("its data is in another file")
    for feature in header.unsupported():
        found.refuse(f"it uses {feature}")
    if header.incompatible_features & q.CORRUPT:
        found.refuse("it is marked corrupt")
    if not header.l1_inside:
        found.refuse("its L1 table is not inside the file")
    if header.lost_refcounts is not None:
        found.refuse("its refcount table is not inside the file")
    kept = header.l1_size * 8 + (header.refcount_table_clusters << header.cluster_bits)
    if kept > budget.memory:
        found.exceed(f"its tables need {kept} bytes of memory, above the limit of {budget.memory}")


def _features(header: Header) -> Iterator[str]:
    yield f"version {header.version}"
    for flags, value in (
        (q.INCOMPATIBLE, header.incompatible_features),
        (q.COMPATIBLE, header.compatible_features),
        (q.AUTOCLEAR, header.autoclear_features),
    ):
        yield from flags.names(value)
    if header.compression_type:
        yield f"compression {q.COMPRESSION_TYPES.get(header.compression_type, 'unknown')}"
    if header.crypt_method:
        yield f"encryption {q.CRYPT_METHODS.get(header.crypt_method, 'unknown')}"
    if header.nb_snapshots:
        yield f"snapshots: {header.nb_snapshots}"


def _extensions(head: memoryview) -> Iterator[tuple[int, int, int]]:
    """(type, offset of the data, length) of the header extensions, without a look at what is in them."""
    if len(head) < q.HEADER_V3.size:
        return
    header = q.HEADER_V3.unpack(head)
    at = header.header_length if header.version == 3 else q.HEADER_V2.size
    for _ in range(q.MAX_EXTENSIONS):
        if at + q.EXTENSION.size > len(head):
            return
        one = q.EXTENSION.unpack(head, at)
        if one.type == q.EXT_END:
            return
        at += q.EXTENSION.size
        yield one.type, at, one.length
        at += align_up(one.length, 8)

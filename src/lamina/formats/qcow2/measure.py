"""The length of the file of a new qcow2 image, by the sizes of its structures; no file is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...errors import LimitExceeded
from ...job_results import MeasureResult
from ...limits import align_up
from . import layout as q
from .bitmap_directory import Entry

if TYPE_CHECKING:
    from ...bitmap import DirtyBitmap
    from ...extents import Extents


def measure(
    size: int,
    values: Mapping[str, Any],
    stored: Iterable[Extents] | None,
    bitmaps: Mapping[str, DirtyBitmap] | None,
) -> MeasureResult:
    """As `Format.measure`. All tables for a full disk are counted: its clusters may be written one day."""
    cluster = values["cluster_size"]
    size = align_up(size, q.SECTOR)
    clusters = -(-size // cluster)
    whole = _metadata(clusters, cluster, values)
    used = 0
    if values.get("data_file"):
        clusters = used = 0  # they lie elsewhere
    elif values.get("preallocation") in ("falloc", "full"):
        used = clusters
    elif stored is not None:
        used = sum(_clusters_with_data(found, cluster) for found in stored)
    kept = None if bitmaps is None or values["compat"] in ("0.10", "v2") else _bitmaps(size, cluster, bitmaps)
    return MeasureResult((whole + used) * cluster, (whole + clusters) * cluster, kept)


def _bitmaps(size: int, cluster: int, bitmaps: Mapping[str, DirtyBitmap]) -> int:
    """The bytes of these bitmaps, their tables and the directory."""
    found = directory = 0
    for name, bitmap in bitmaps.items():
        bits = -(-size // bitmap.granularity)
        data = align_up(align_up(bits, 8) // 8, cluster) // cluster
        found += data + -(-data * 8 // cluster)
        directory += len(Entry(0, 0, 0, 0, 0, name).to_bytes())
    return (found + -(-directory // cluster)) * cluster


def _metadata(clusters: int, cluster: int, values: Mapping[str, Any]) -> int:
    """The clusters with structures of an image of so many data clusters, with the counts of all of them."""
    entry = 16 if values["extended_l2"] else 8
    tables = -(-clusters // (cluster // entry))
    if tables * 8 > q.MAX_L1_BYTES:
        raise LimitExceeded(
            "the disk is too large for an image with clusters of this size", hint="use a larger cluster_size"
        )
    fixed = 1 + tables + -(-tables * 8 // cluster)  # the header, L2 tables, the L1 table
    if values.get("encrypt"):
        from ...crypto.luks1 import Luks1
        from .encryption import settings_of

        fixed += align_up(Luks1.layout(settings_of(values["encrypt"]).key_bytes)[1], cluster) // cluster
    counted = fixed + (0 if values.get("data_file") else clusters)
    return fixed + sum(refcount_clusters(counted, cluster, values["refcount_bits"]))


def refcount_clusters(counted: int, cluster: int, bits: int) -> tuple[int, int]:
    """The refcount blocks, and the clusters of their table, for so many other clusters."""
    per_block = cluster * 8 // bits
    blocks = table = 0
    while True:  # the blocks and their table are counted, too
        before = blocks, table
        blocks = -(-(counted + blocks + table) // per_block)
        table = -(-blocks * 8 // cluster)
        if (blocks, table) == before:
            return blocks, table


def _clusters_with_data(found: Extents, cluster: int) -> int:
    """The number of whole clusters of this part of the disk, which begins with one, in which anything is not zero."""
    rounded = found.align(cluster)
    lengths: list[int] = rounded.length[~rounded.zero].tolist()
    return sum(-(-length // cluster) for length in lengths)

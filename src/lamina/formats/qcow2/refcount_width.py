"""Another width for all reference counts of an image: every refcount block is written anew, and published by one write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ...errors import LimitExceeded
from ...numeric import np
from . import snapshot_table
from .rewrite import L1Place, Rewrite

if TYPE_CHECKING:
    from .tables import Tables


def set_width(tables: Tables, book: Callable[[int], None], bits: int) -> tuple[None, Iterator[tuple[int, int]]]:
    """Give all reference counts this width. Returns None and the parts of the file that are free now."""
    header = tables.header
    change = _Widened(tables, book, bits)
    entries = snapshot_table.read(tables.file, header)
    active = L1Place(header.l1_table_offset, header.l1_size)
    found = change.entries_of(active)
    change.release(active.offset, 8 * active.entries)
    change.publish(found, entries, entries, size=header.size)
    return None, change.freed()


class _Widened(Rewrite):
    """A rewrite of all refcount blocks with another width."""

    def __init__(self, tables: Tables, book: Callable[[int], None], bits: int) -> None:
        self._new_bits = bits
        super().__init__(tables, book)

    def _prepare(self) -> None:
        super()._prepare()
        old = self._table[self._table != 0] >> self._bits
        self._bits_of_counts = self._new_bits
        self._most = (1 << self._new_bits) - 1
        self._per_block = self._cluster * 8 // self._new_bits
        if int(self._counts.max(initial=0)) > self._most:
            raise LimitExceeded(
                f"a cluster has more references than {self._new_bits} bits count",
                path=self._path,
                hint="delete snapshots, or choose wider counts",
            )
        rest = -len(self._counts) % self._per_block
        self._free = np.append(self._free, np.arange(len(self._counts), len(self._counts) + rest))
        zeros = np.zeros(rest, self._counts.dtype)
        self._counts, self._before = np.append(self._counts, zeros), np.append(self._before, zeros)
        self._change(old, -1)

    def _release_counts(self) -> None:
        super()._release_counts()
        self._table = np.zeros(0, np.int64)

    def _changed_blocks(self) -> list[int]:
        return np.flatnonzero(self._counts.reshape(-1, self._per_block).any(axis=1)).tolist()

    def _header_values(self) -> dict[str, int]:
        header = self._header
        kept = header.values("incompatible_features", "compatible_features", "autoclear_features")
        return kept | {"refcount_order": self._new_bits.bit_length() - 1}

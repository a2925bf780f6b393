"""The rounding of extents to blocks, in columns, for `Extents.align`. Pure functions; a few passes over the columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .numeric import NDArray, np
from .status import ZERO

if TYPE_CHECKING:
    from .extents import Extents


class Mixed(NamedTuple):
    """The blocks that several extents overlap: a row each, in columns. `rest_start` and `rest_stop` have a row for each of
    the extents: its part outside these blocks, of length 0 for an extent inside one."""

    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    flags: NDArray[np.uint8]
    depth: NDArray[np.int32]
    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    rest_start: NDArray[np.int64]
    rest_stop: NDArray[np.int64]


def follows(extents: Extents) -> NDArray[np.bool_]:
    """For each row but the first: whether its bytes follow those of the previous row in the same host file."""
    offset, file = extents.offset, extents.file
    found: NDArray[np.bool_] = offset[1:] == offset[:-1] + extents.length[:-1]  # False for two offsets of -1
    found &= file[1:] == file[:-1]
    return found


def mixed_blocks(extents: Extents, alignment: int) -> Mixed | None:
    """What rounding to blocks of `alignment` changes; None if it changes nothing. Only *mixed* blocks change: those with the
    start of an extent inside them."""
    inner = np.flatnonzero(extents.start[1:] & (alignment - 1)) + 1  # the rows that start inside a block
    if not len(inner):
        return None
    base = extents.start[inner] & -alignment
    # Not base + alignment, which overflows 64 bits for the last block below 2**63.
    top = base + np.minimum(extents.end - base, alignment)
    bottom = np.maximum(base, extents.begin)

    heads = np.flatnonzero(np.concatenate(([True], base[1:] != base[:-1])))  # in `inner`, the first of each block
    tails = np.append(heads[1:], len(inner)) - 1
    first, last = inner[heads] - 1, inner[tails]  # the two or more rows that overlap a block
    # A row may overlap two blocks, so the groups overlap. reduceat gets the bounds first, last + 1, first, ...: every other
    # result belongs to a group, and the results between are discarded.
    bounds = np.column_stack((first, last + 1)).ravel()
    bounds = bounds[bounds < len(extents)]  # the last group ends with the rows
    # ZERO is inverted before and after, so that "or" acts as "and" on it. An absent row gets 2**32 added to its depth, so
    # that the minimum selects it only if no row of the block is present; the mask removes the sum again.
    flags = (np.bitwise_or.reduceat(extents.flags ^ ZERO, bounds)[::2] ^ ZERO).astype(np.uint8)
    ranks = extents.depth + np.where(extents.present, 0, 1 << 32)
    depth = (np.minimum.reduceat(ranks, bounds)[::2] & 0xFFFFFFFF).astype(np.int32)
    breaks = np.concatenate(([0], np.cumsum(~follows(extents))))
    kept = breaks[first] == breaks[last]
    file = np.where(kept, extents.file[first], np.int32(-1))
    offset = np.where(kept, extents.offset[first] + (bottom[heads] - extents.start[first]), -1)

    start, stop = extents.start.copy(), extents.start + extents.length
    start[inner] = top
    stop[inner - 1] = bottom
    return Mixed(bottom[heads], top[heads], flags, depth, file, offset, start, stop)

"""Which parts of a buffer hold something: zeros are told from data block by block, without numpy, whose import takes longer
than a small copy."""

from __future__ import annotations

from ..limits import MIB

_ZEROS = bytes(1 * MIB)


def stored_parts(view: memoryview, at: int, granule: int, smallest: int) -> list[tuple[int, int]]:
    """The parts (start, end) of `view` that are not zero, in order. Zeros count in whole blocks of `granule` bytes on the
    grid of the disk, where `view` begins at `at`, and in runs of at least `smallest` bytes, or that reach an end of the
    view."""
    length = len(view)
    parts: list[tuple[int, int]] = []
    stored = 0  # where the part begins that is not decided yet
    for lo, hi in _zero_runs(view, at, granule):
        if hi - lo < smallest and lo > 0 and hi < length:
            continue
        if lo > stored:
            parts.append((stored, lo))
        stored = hi
    if stored < length:
        parts.append((stored, length))
    return parts


def is_all_zero(view: memoryview) -> bool:
    """Whether every byte of `view` is zero."""
    return all(_ZEROS.startswith(view[at : at + len(_ZEROS)]) for at in range(0, len(view), len(_ZEROS)))


def _zero_runs(view: memoryview, at: int, granule: int) -> list[tuple[int, int]]:
    length = len(view)
    if is_all_zero(view):
        return [(0, length)] if length else []
    head = min(-at % granule, length)
    tail = head + (length - head) // granule * granule
    runs: list[tuple[int, int]] = []
    if head and is_all_zero(view[:head]):
        runs.append((0, head))
    # Most blocks that hold something say so in their first byte: only the others are looked at. (8 us for 256 KiB of random
    # bytes, where a comparison of every block takes 22.)
    firsts = bytes(view[head:tail:granule])
    number = firsts.find(0)
    while number >= 0:
        lo = head + number * granule
        if is_all_zero(view[lo : lo + granule]):
            _append(runs, lo, lo + granule)
        number = firsts.find(0, number + 1)
    if tail < length and is_all_zero(view[tail:]):
        _append(runs, tail, length)
    return runs


def _append(runs: list[tuple[int, int]], lo: int, hi: int) -> None:
    if runs and runs[-1][1] == lo:
        runs[-1] = (runs[-1][0], hi)
    else:
        runs.append((lo, hi))

"""Which parts of a large buffer hold something, with numpy: what `convert` writes. (`zero_blocks` does without it.)"""

from __future__ import annotations

from ..limits import MIB
from ..numeric import np

#: No buffer is longer.
_ZEROS = bytes(2 * MIB)


def stored_runs(view: memoryview, at: int, granule: int, smallest_hole: int) -> list[tuple[int, int]]:
    """The parts (start, end) of `view` that are not zero, in order. Zeros count in whole blocks of `granule` bytes (a
    power of two, at least 8) on the grid of the disk, where `view` begins at `at`, and in runs of at least
    `smallest_hole`."""
    length = len(view)
    if not granule:
        return [(0, length)]
    head = min(-at % granule, length)
    whole = (length - head) // granule
    tail = head + whole * granule
    bounds: list[tuple[int, int]] = []
    if head and _ZEROS.startswith(view[:head]):
        bounds.append((0, head))
    if whole:
        words = np.frombuffer(view[head:tail], np.uint64).reshape(whole, granule // 8)
        # Three words rule out almost every block that holds something; only the others are looked at in full.
        suspects = np.flatnonzero((words[:, 0] | words[:, granule // 16] | words[:, -1]) == 0)
        for number in suspects.tolist():
            lo = head + number * granule
            if _ZEROS.startswith(view[lo : lo + granule]):
                if bounds and bounds[-1][1] == lo:
                    bounds[-1] = (bounds[-1][0], lo + granule)
                else:
                    bounds.append((lo, lo + granule))
    if tail < length and _ZEROS.startswith(view[tail:]):
        if bounds and bounds[-1][1] == tail:
            bounds[-1] = (bounds[-1][0], length)
        else:
            bounds.append((tail, length))
    # A run that reaches the end of the view may go on beyond it: it counts as long enough.
    holes = [(lo, hi) for lo, hi in bounds if hi - lo >= smallest_hole or lo == 0 or hi == length]
    return between(holes, length)


def between(parts: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """What `parts`, in order, leave of `length` bytes."""
    rest = []
    at = 0
    for lo, hi in parts:
        if at < lo:
            rest.append((at, lo))
        at = hi
    if at < length:
        rest.append((at, length))
    return rest

"""The search for zeros in a buffer, for the request path, for servers, and for jobs.

It needs no numpy, whose import takes longer than a small copy, and is as fast as a search with numpy: `startswith` compares
buffers with zeros by one memcmp, and only blocks that may be zero are compared (see `_zero_runs`).
"""

from __future__ import annotations

#: The number of zeros in one comparison. (Python compares two memoryviews item by item.)
_STEP = 1 << 18
_ZEROS = bytes(_STEP)
#: The bytes of each block that are tested before whole blocks are compared, in eighths of its length; and the last byte.
_SAMPLES = (1, 2, 3, 4, 5, 6, 7)
#: If at most this number of blocks begin with a zero byte, their other bytes are not tested.
_FEW = 16


def is_zero(view: memoryview) -> bool:
    """Whether all bytes of `view` are zero."""
    if len(view) <= _STEP:
        return _ZEROS.startswith(view)
    return all(_ZEROS.startswith(view[at : at + _STEP]) for at in range(0, len(view), _STEP))


def fill_zero(view: memoryview) -> None:
    """Set every byte of `view` to zero."""
    length = len(view)
    view[:] = _ZEROS[:length] if length <= _STEP else bytes(length)


def stored_parts(view: memoryview, at: int, granule: int, smallest: int) -> list[tuple[int, int]]:
    """The parts (start, end) of `view` that are not zero, in order. Zeros count as whole blocks of `granule` bytes on the
    grid of the disk, where `view` begins at `at`, and in runs of at least `smallest` bytes. The bytes before the first and
    after the last such block count as one block each. A run at an end of the view may continue outside, so it counts as long
    enough. `granule` 0: there is no search, and no zero part."""
    length = len(view)
    if not granule:
        return [(0, length)] if length else []
    parts: list[tuple[int, int]] = []
    stored = 0  # the start of the undecided part
    for lo, hi in _zero_runs(view, at, granule):
        if hi - lo < smallest and lo > 0 and hi < length:
            continue
        if lo > stored:
            parts.append((stored, lo))
        stored = hi
    if stored < length:
        parts.append((stored, length))
    return parts


def between(parts: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The gaps between `parts`, which are in order, in `length` bytes."""
    rest = []
    at = 0
    for lo, hi in parts:
        if at < lo:
            rest.append((at, lo))
        at = hi
    if at < length:
        rest.append((at, length))
    return rest


def _zero_runs(view: memoryview, start: int, granule: int) -> list[tuple[int, int]]:
    length = len(view)
    if is_zero(view):
        return [(0, length)] if length else []
    head = min(-start % granule, length)
    count = (length - head) // granule
    tail = head + count * granule
    runs: list[tuple[int, int]] = []
    if head and is_zero(view[:head]):
        runs.append((0, head))
    maybe, zeros = _may_be_zero(view[head:tail], granule, count), _ZEROS.startswith
    first = maybe.find(0)
    while first >= 0:
        last = first + 1
        while last < count and not maybe[last]:
            last += 1
        lo, hi = head + first * granule, head + last * granule
        if hi - lo <= _STEP and zeros(view[lo:hi]):  # the usual case, without a function call
            if runs and runs[-1][1] == lo:
                lo = runs.pop()[0]
            runs.append((lo, hi))
        elif last - first > 1 or granule > _STEP:
            # Blocks that are not zero differ early, so the second test of each block is cheap.
            step = hi - lo if is_zero(view[lo:hi]) else granule
            for at in range(lo, hi, step):
                if step > granule or is_zero(view[at : at + step]):
                    _append(runs, at, at + step)
        first = maybe.find(0, last)
    if tail < length and is_zero(view[tail:]):
        _append(runs, tail, length)
    return runs


def _may_be_zero(blocks: memoryview, granule: int, count: int) -> bytes:
    """A byte for each block, not zero if the block is not zero. Some bytes of all blocks become the digits of one large
    number, so that a single operation tests all blocks."""
    found = bytes(blocks[::granule])
    if found.count(0) <= _FEW:
        return found
    digits = int.from_bytes(found, "little")
    for offset in {granule * eighth // 8 for eighth in _SAMPLES} | {granule - 1}:
        digits |= int.from_bytes(blocks[offset::granule], "little")
    return digits.to_bytes(count, "little")


def _append(runs: list[tuple[int, int]], lo: int, hi: int) -> None:
    if runs and runs[-1][1] == lo:
        runs[-1] = (runs[-1][0], hi)
    else:
        runs.append((lo, hi))

"""Columns of whole numbers as text: variable-length integers, compressed with deflate, in base64.

The page contains an inflater of its own, so it needs nothing of the browser. A number takes seven bits in each byte, the
lowest first; all bytes of a number but the last one have the highest bit set.
"""

from __future__ import annotations

import base64
import zlib

from ..numeric import NDArray, np

_BITS = 7


def text_of(*columns: NDArray[np.int64]) -> str:
    """The columns, none of which has a negative number, one after the other."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = [deflate.compress(varints(column)) for column in columns]
    return base64.b64encode(b"".join([*packed, deflate.flush()])).decode("ascii")


def varints(column: NDArray[np.int64]) -> bytes:
    """The bytes of all numbers in a column."""
    values = np.asarray(column, np.int64)
    if not len(values):
        return b""
    if values.min() < 0:
        raise ValueError("a column has a negative number")
    size = np.ones(len(values), np.int64)
    most = int(values.max())
    for step in range(1, 10):
        if most >> _BITS * step == 0:
            break
        size += values >> _BITS * step != 0
    ends = np.cumsum(size)
    found = np.zeros(int(ends[-1]), np.uint8)
    for step in range(int(size.max())):
        which = np.flatnonzero(size > step)
        more = np.where(size[which] > step + 1, 128, 0)
        found[(ends - size)[which] + step] = (values[which] >> _BITS * step & 127) + more
    return found.tobytes()


def zigzag(column: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of either sign as numbers without one: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    return column << 1 ^ column >> 63

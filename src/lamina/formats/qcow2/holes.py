"""Detection of tables in holes of the image file, where a write can fail on a full disk.

Before a request succeeds, the driver fills every hole that the next flush will write to. A flush therefore writes only to
storage that the file system has already allocated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...request import Child

#: The smallest block size of file systems. Holes are no smaller.
_BLOCK = 1024
_EMPTY = bytes(_BLOCK)


def has_hole(file: Child, offset: int, content: bytes | bytearray) -> bool:
    """Whether a part of the table at `offset` of `file`, which has this content, is known to lie in a hole."""
    for at in range(0, len(content), _BLOCK):
        part = content[at : at + _BLOCK]
        if _EMPTY.startswith(part) and file.reads_zero(offset + at, len(part)):
            return True
    return False

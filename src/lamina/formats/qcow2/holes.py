"""Whether a table of the image lies in a hole of its file, where writing to it can fail on a full disk.

Before a request succeeds, zeros are written to every hole that the flush which follows will write to. So a flush only writes
over storage that the file system has allocated already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...request import Child

#: The smallest block of the file systems in use. (Below it no file system keeps holes.)
_BLOCK = 1024
_EMPTY = bytes(_BLOCK)


def has_hole(file: Child, offset: int, content: bytes | bytearray) -> bool:
    """Whether a part of this table, which lies at `offset` of `file` with this content, is known to be a hole there."""
    for at in range(0, len(content), _BLOCK):
        part = content[at : at + _BLOCK]
        if _EMPTY.startswith(part) and file.reads_zero(offset + at, len(part)):
            return True
    return False

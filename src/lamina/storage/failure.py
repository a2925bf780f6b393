"""The errors of a file, from those of the operating system."""

from __future__ import annotations

import errno
from typing import Any

from ..errors import BlockIOError, Closed, LaminaError

_HINTS = {
    errno.ENOSPC: "free some space on that file system, then try again",
    errno.EDQUOT: "free some space within the quota, then try again",
    errno.EFBIG: "the file system or a limit of this process allows no file of that size",
}


def failure(
    error: OSError, operation: str, path: str, offset: int | None, length: int | None, *, closed: bool
) -> LaminaError:
    """What to raise for `error`, of an operation on the open file `path`; Closed if that was `closed` meanwhile."""
    context: dict[str, Any] = {"path": path, "operation": operation, "offset": offset, "length": length}
    if closed:
        return Closed("the file is closed", **context)
    return BlockIOError.from_os(error, hint=_HINTS.get(error.errno or 0), **context)

"""What can go wrong, as one family of exceptions.

Every exception that Lamina raises on purpose is a `LaminaError`, and also the builtin that a caller who does not know
Lamina would catch (`OSError`, `ValueError`, `PermissionError`). The text is one line: what, where, and what to do now.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any


class LaminaError(Exception):
    """The base of all errors of this library.

    `message` says what went wrong, without the place. The place is in `path` (a file or a URI), `node` (a node's name),
    `operation` ("read", "write", ...), `offset` and `length` (bytes, in the terms of that node); `hint` says what to do.
    Each of these may be None. `str()` puts them into one line.
    """

    #: The errno that a protocol (NBD) or an exit status can carry for this error.
    errno: int | None = _errno.EIO

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        node: str | None = None,
        operation: str | None = None,
        offset: int | None = None,
        length: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.node = node
        self.operation = operation
        self.offset = offset
        self.length = length
        self.hint = hint

    def __str__(self) -> str:
        where = self.path or self.node
        text = f"{printable(where)}: {self.message}" if where else self.message
        place = []
        if self.operation:
            place.append(self.operation)
        if self.offset is not None:
            place.append(f"offset {self.offset}")
        if self.length is not None:
            place.append(f"length {self.length}")
        if place:
            text += f" ({', '.join(place)})"
        if self.hint:
            text += f"; {self.hint}"
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, dict(self.__dict__)))


def _rebuild(kind: type[LaminaError], message: str, state: dict[str, Any]) -> LaminaError:
    error = kind.__new__(kind, message)
    error.args = (message,)
    error.__dict__.update(state)
    return error


class OptionError(LaminaError, ValueError):
    """An option that is unknown, of the wrong type, missing, or in conflict with another."""

    errno = _errno.EINVAL


class FormatError(LaminaError, ValueError):
    """The bytes are not a usable image of the format they were opened as."""

    errno = _errno.EINVAL


class CorruptImage(FormatError):
    """A structure inside the image contradicts itself or points where it must not."""

    errno = _errno.EIO


class UnsupportedFeature(FormatError):
    """The image, or the caller, asks for a feature that exists but that this version of Lamina does not have."""

    errno = _errno.ENOTSUP


class LimitExceeded(FormatError):
    """A length or count is above the limit that bounds what an image or a peer may make us allocate."""

    errno = _errno.EFBIG


class PolicyError(LaminaError, PermissionError):
    """A name found inside an image was not granted by the policy that the image was opened with."""

    errno = _errno.EPERM


class BlockIOError(LaminaError, OSError):
    """An operation on storage failed; `errno` says how, in the numbers of the operating system."""

    def __init__(self, message: str, *, errno: int = _errno.EIO, **place: Any) -> None:
        LaminaError.__init__(self, message, **place)
        self.errno = errno
        self.strerror = message

    @classmethod
    def from_os(cls, error: OSError, message: str | None = None, **place: Any) -> BlockIOError:
        """The Lamina error that stands for `error` of the operating system (keep it as the cause: `raise ... from`)."""
        number = error.errno or _errno.EIO
        kind: type[BlockIOError] = NotFound if number == _errno.ENOENT and issubclass(NotFound, cls) else cls
        reason = os.strerror(number)
        return kind(f"{message}: {reason}" if message else reason, errno=number, **place)


class NotFound(BlockIOError, FileNotFoundError):
    """A file that should be opened does not exist."""

    def __init__(self, message: str, *, errno: int = _errno.ENOENT, **place: Any) -> None:
        super().__init__(message, errno=errno, **place)


class NotSupported(BlockIOError):
    """A node cannot do this operation (ENOTSUP); the request path falls back to another one where that is allowed."""

    def __init__(self, message: str, *, errno: int = _errno.ENOTSUP, **place: Any) -> None:
        super().__init__(message, errno=errno, **place)


class OutOfRange(LaminaError, ValueError):
    """A request that lies outside the node, or with a negative offset or length."""

    errno = _errno.EINVAL


class ReadOnly(LaminaError, PermissionError):
    """A change was asked of a node that was opened read-only."""

    errno = _errno.EPERM


class Locked(LaminaError, BlockingIOError):
    """Another program, or another open image of this one, holds a lock that excludes this use."""

    errno = _errno.EAGAIN


class Closed(LaminaError, ValueError):
    """The node or image was closed before this operation."""

    errno = _errno.EBADF


class Cancelled(LaminaError):
    """A job was stopped before it was done; what it left behind was removed."""

    errno = _errno.ECANCELED


def tell_too(error: BaseException | None, words: str) -> None:
    """Let `error` tell `words`, too: behind its hint, or, of an interrupt, as a note, which the command line shows."""
    if isinstance(error, LaminaError):
        error.hint = f"{error.hint}; {words}" if error.hint else words
    elif isinstance(error, KeyboardInterrupt):
        error.add_note(words)


def printable(text: str) -> str:
    """`text` with control characters escaped: names found inside images must not drive a terminal."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text
    )

"""The exceptions of Lamina, one family.

Every exception that Lamina raises on purpose is a `LaminaError`. Most also derive from the builtin exception that a caller
without knowledge of Lamina would catch (`OSError`, `ValueError`, `PermissionError`). The text is one line: the problem, the
file or node, and the next step.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING, Any


class Hint(str):
    """A hint that names options: in the words of the library, as text, and in those of the command line, as `command`. A
    plain text serves both."""

    command: str

    def __new__(cls, library: str, *, command: str) -> Hint:
        made = super().__new__(cls, library)
        made.command = command
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, str]]:
        return (str(self),), {"command": self.command}


def command_hint(hint: str | None) -> str | None:
    """The hint in the words of the command line."""
    return hint.command if isinstance(hint, Hint) else hint


def join_hints(first: str | None, second: str, *, by: str = "; ") -> str:
    """Both hints, one after the other."""
    if not first:
        return second
    joined = f"{first}{by}{second}"
    if not isinstance(first, Hint) and not isinstance(second, Hint):
        return joined
    return Hint(joined, command=f"{command_hint(first)}{by}{command_hint(second)}")


class LaminaError(Exception):
    """The base of all errors of this library.

    `message` states the problem only. The other attributes, each of which may be None, locate it: `path` (a file or a URI),
    `node` (the name of a node), `operation` ("read", "write", ...), `offset` and `length` (bytes of that node). `hint` is
    the next step for the user, in the words of the library (see `Hint`). `str()` joins them in one line.
    """

    #: The errno that stands for this error in a protocol (NBD) or an exit status.
    errno: int | None = _errno.EIO

    if TYPE_CHECKING:
        filename: Any
        strerror: str | None
    else:
        # As of an OSError, which many of the errors are. `path` may be set after the error was raised.

        @property
        def filename(self) -> Any:
            """The same as `path`."""
            return self.path

        @property
        def strerror(self) -> str | None:
            """The same as `message`."""
            return self.message

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
        return self._line(self.hint)

    def command_text(self) -> str:
        """As `str()`, with the hint in the words of the command line."""
        return self._line(command_hint(self.hint))

    def _line(self, hint: str | None) -> str:
        where = self.path or self.node
        text = f"{printable(where)}: {self.message}" if where else self.message
        details = []
        if self.operation:
            details.append(self.operation)
        if self.offset is not None:
            details.append(f"offset {self.offset}")
        if self.length is not None:
            details.append(f"length {self.length}")
        if details:
            text += f" ({', '.join(details)})"
        if hint:
            text += f"; {hint}"
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, dict(self.__dict__)))


def _rebuild(kind: type[LaminaError], message: str, state: dict[str, Any]) -> LaminaError:
    error = kind.__new__(kind, message)
    error.args = (message,)
    error.__dict__.update(state)
    return error


class OptionError(LaminaError, ValueError):
    """An option that is unknown, of the wrong type, missing, or in conflict with another. For an argument of a wrong type it
    is a TypeError as well."""

    errno: int | None = _errno.EINVAL


class OptionTypeError(OptionError, TypeError):
    """An argument of a function that is of a wrong type: callers know it as OptionError, or as TypeError."""


class UsageError(OptionError):
    """A command line that no command can make sense of: an unknown option, a missing name."""


class FormatError(LaminaError, ValueError):
    """The file is not a usable image of the format with which it was opened."""

    errno: int | None = _errno.EINVAL


class CorruptImage(FormatError):
    """A structure inside the image is inconsistent or holds an invalid reference."""

    errno: int | None = _errno.EIO


class UnsupportedFeature(FormatError):
    """The image or the caller needs a feature of the format that this version of Lamina does not implement."""

    errno: int | None = _errno.ENOTSUP


class LimitExceeded(FormatError):
    """A length or count from an image or a peer exceeds the limit that bounds allocations."""

    errno: int | None = _errno.EFBIG


class PolicyError(LaminaError, PermissionError):
    """The policy of the opened image does not grant a file name that the image contains."""

    errno: int | None = _errno.EPERM


class BlockIOError(LaminaError, OSError):
    """An operation on storage failed; `errno` is the error number of the operating system."""

    def __init__(self, message: str, *, errno: int = _errno.EIO, **context: Any) -> None:
        LaminaError.__init__(self, message, **context)
        self.errno: int | None = errno

    @classmethod
    def from_os(cls, error: OSError, message: str | None = None, **context: Any) -> BlockIOError:
        """Convert `error` of the operating system to an error of this class. Callers keep `error` as the cause
        (`raise ... from`). `context`: keyword arguments of `LaminaError`."""
        number = error.errno or _errno.EIO
        kind: type[BlockIOError] = NotFound if number == _errno.ENOENT and issubclass(NotFound, cls) else cls
        reason = os.strerror(number)
        return kind(f"{message}: {reason}" if message else reason, errno=number, **context)


class NotFound(BlockIOError, FileNotFoundError):
    """The file to be opened does not exist."""

    def __init__(self, message: str, *, errno: int = _errno.ENOENT, **context: Any) -> None:
        super().__init__(message, errno=errno, **context)


class NotSupported(BlockIOError):
    """A node does not support an operation (ENOTSUP). The request path uses another operation instead where it may."""

    def __init__(self, message: str, *, errno: int = _errno.ENOTSUP, **context: Any) -> None:
        super().__init__(message, errno=errno, **context)


class OutOfRange(LaminaError, ValueError):
    """A request exceeds the bounds of the node, or has a negative offset or length."""

    errno: int | None = _errno.EINVAL


class ReadOnly(LaminaError, PermissionError):
    """A request would change a node that was opened read-only."""

    errno: int | None = _errno.EPERM


class Locked(LaminaError, BlockingIOError):
    """Another process, or another image in this process, holds a conflicting lock on the file."""

    errno: int | None = _errno.EAGAIN


class Closed(LaminaError, ValueError):
    """The operation needs a node or image that is already closed."""

    errno: int | None = _errno.EBADF


class Cancelled(LaminaError):
    """A job was stopped before it was complete. The job has removed its incomplete output."""

    errno: int | None = _errno.ECANCELED


def append_hint(error: BaseException | None, text: str) -> None:
    """Append `text` to the hint of a `LaminaError`. A KeyboardInterrupt gets it as a note, which the command line prints;
    other exceptions are left unchanged."""
    if isinstance(error, LaminaError):
        error.hint = join_hints(error.hint, text)
    elif isinstance(error, KeyboardInterrupt):
        error.add_note(command_hint(text) or "")


def printable_hint(hint: str | None) -> str | None:
    """`printable` for a hint."""
    if isinstance(hint, Hint):
        return Hint(printable(hint), command=printable(hint.command))
    return hint and printable(hint)


def printable(text: str) -> str:
    """`text` with control characters escaped, since names inside images could contain terminal escape sequences."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text
    )

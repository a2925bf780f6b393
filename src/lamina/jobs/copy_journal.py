"""How far a copy is, in a file: so that one that was interrupted goes on where it was.

The promise: everything before the position in a journal was read from the source that the journal names, written to its
target, and is on stable storage there. Whether the source is still the same cannot be known; its size is compared, and of a
file that it was not replaced or changed since. The job writes a new file under a temporary name
(`PartialFile`) and renames it when it is complete.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any, Self

from ..atomic_file import sync_folder, write_file
from ..capabilities import O_CLOEXEC, O_NOCTTY, O_NOFOLLOW, O_NONBLOCK
from ..errors import BlockIOError, FormatError, Hint, LaminaError, OptionError

if TYPE_CHECKING:
    from ..target_file import Target

_VERSION = 1
#: A journal is a few names and numbers.
_LONGEST = 64 << 10


class Journal:
    """The journal at `path` of one copy, which `facts` describe: names, sizes and identities, as JSON has them. Only one
    process may use it at a time."""

    def __init__(self, path: str, facts: dict[str, Any]) -> None:
        self.path = path
        self.position = 0
        self.facts = facts

    @classmethod
    def resume(cls, path: str) -> Self | None:
        """The journal that is at `path`, or None. FormatError if that is none."""
        try:
            with open(os.open(path, os.O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC), "rb") as file:
                # A FIFO could be waited for without end.
                regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
                data = file.read(_LONGEST + 1) if regular else b""
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BlockIOError.from_os(error, "cannot read the journal of a copy", path=path) from error
        import json  # here and below: most copies have no journal

        try:
            found = json.loads(data) if len(data) <= _LONGEST else {}
            good = found["lamina-copy"] == _VERSION and isinstance(found["facts"], dict)
            if not good or type(found["position"]) is not int or found["position"] < 0:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            hint = "name another file, or remove this one to copy from the start"
            raise FormatError("this is no journal of a copy", path=path, hint=hint) from error
        journal = cls(path, found["facts"])
        journal.position = found["position"]
        return journal

    def expect(self, facts: dict[str, Any]) -> None:
        """OptionError unless this is the journal of the copy that `facts` describe."""
        for key in self.facts.keys() | facts.keys():
            if self.facts.get(key) != facts.get(key):
                raise OptionError(
                    f"the journal is of another copy: its {key.replace('-', ' ')} was {self.facts.get(key)!r}, "
                    f"and is {facts.get(key)!r}",
                    path=self.path,
                    hint="remove the journal to copy from the start",
                )

    def record(self, position: int) -> None:
        """Everything before `position` is durable in the target. When this returns, that is durable too."""
        import json

        text = json.dumps({"lamina-copy": _VERSION, "position": position, "facts": self.facts}, indent=2) + "\n"
        try:
            write_file(self.path, text.encode(), durable=True, mode=0o600)
        except OSError as error:
            raise BlockIOError.from_os(error, "cannot write the journal of the copy", path=self.path) from error
        self.position = position

    def remove(self) -> None:
        """The copy is whole."""
        try:
            os.unlink(os.path.realpath(self.path))  # a link stays, as it was made
        except OSError as error:
            raise BlockIOError.from_os(error, "the copy is whole, but its journal stays", path=self.path) from error


class PartialFile:
    """The file `TARGET.partial` that becomes `target` when it is whole, and stays when it is not. Unlike an `AtomicFile` it
    is found again, by its name: `identity` says that it is the same file."""

    def __init__(self, target: str, identity: list[int] | None, replaces: Target | None = None) -> None:
        """Make the file, or with the `identity` that a journal has of it find it again. `replaces`: the file that is at
        `target`, whose owner, permissions and attributes the new one gets; it is the caller's, and held until after `finish`.
        OptionError if something is in the way, the file is another one, or a rename would lose what `replaces` is;
        BlockIOError."""
        self.target: str = os.path.realpath(target)
        self.path = f"{self.target}.partial"
        self._replaces = replaces
        reason = replaces.obstacle() if replaces is not None else None
        if reason is not None:
            raise self._not_replaced(reason)
        try:
            if identity is None:
                self._make()
            status = os.lstat(self.path)
        except FileExistsError as error:
            hint = "remove it, or name the journal of the copy that left it"
            raise OptionError("this file is in the way of the copy", path=self.path, hint=hint) from error
        except OSError as error:
            if isinstance(error, LaminaError):
                raise
            what = "cannot create a file there" if identity is None else "what was copied before is gone"
            start_over = None if identity is None else "remove the journal to copy from the start"
            raise BlockIOError.from_os(error, what, path=self.path, hint=start_over) from error
        self.identity = [status.st_dev, status.st_ino]
        if identity is not None:
            self.expect((status.st_dev, status.st_ino), identity)

    def expect(self, found: tuple[int, int] | None, identity: list[int] | None = None) -> None:
        """OptionError unless the file of this (device, inode) is the one that the journal, or this object, speaks of."""
        if found is None or [*found] != (identity or self.identity):
            hint = "remove both it and the journal to copy from the start"
            raise OptionError("this is not the file that the journal speaks of", path=self.path, hint=hint)

    def _make(self) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | O_CLOEXEC | O_NOFOLLOW
        fd = os.open(self.path, flags, 0o600 if self._replaces is not None else 0o666)
        try:
            reason = self._replaces.give_attributes(fd) if self._replaces is not None else None
            if reason is not None:
                raise self._not_replaced(reason)
        except BaseException:
            os.unlink(self.path)
            raise
        finally:
            os.close(fd)

    def _not_replaced(self, reason: str) -> OptionError:
        hint = Hint(
            "omit the journal, and it is written in place",
            command="leave --resume-file out, and it is written in place",
        )
        return OptionError(f"this file cannot be replaced by the copy: {reason}", path=self.target, hint=hint)

    def discard(self) -> None:
        """Nothing was copied, and no journal speaks of it."""
        try:
            os.unlink(self.path)
        except OSError as error:
            raise BlockIOError.from_os(error, "an empty file is left there", path=self.path) from error

    def finish(self) -> None:
        """It is whole, and durable: give it its name. A file that another program has put there meanwhile is left alone."""
        try:
            if self._replaces is not None:
                self._replaces.replace(os.path.basename(self.path))
            else:
                self._take_name()
            sync_folder(os.path.dirname(self.target))
        except FileExistsError as error:
            hint = "it is left alone; move it away, or the copy to another name"
            what = f"another program made a file of this name meanwhile; the copy is whole, and is {self.path}"
            raise BlockIOError.from_os(error, what, path=self.target, hint=hint) from error
        except OSError as error:
            if isinstance(error, LaminaError):
                raise
            raise BlockIOError.from_os(error, "the copy is whole but cannot be put there", path=self.target) from error

    def _take_name(self) -> None:
        try:
            os.link(self.path, self.target, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError:
            # No hard links there: looked at, and then renamed.
            if os.path.lexists(self.target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            os.replace(self.path, self.target)
        else:
            os.unlink(self.path)

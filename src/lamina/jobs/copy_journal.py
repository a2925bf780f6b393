"""How far a copy is, in a file: so that one that was interrupted goes on where it was.

The promise: everything before the position in a journal was read from the source that the journal names, written to its
target, and is on stable storage there. Whether the source is still the same cannot be known; its size is compared, and of a
file that it was not replaced or changed since. A new file is made beside its name (`Partial`) and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Self

from ..atomic_file import sync_folder, write_file
from ..errors import BlockIOError, FormatError, OptionError

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
            with open(path, "rb") as file:
                data = file.read(_LONGEST + 1)
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
            os.unlink(self.path)
        except OSError as error:
            raise BlockIOError.from_os(error, "the copy is whole, but its journal stays", path=self.path) from error


class Partial:
    """The file `TARGET.partial` that becomes `target` when it is whole, and stays when it is not. Unlike an `AtomicFile` it
    is found again, by its name: `identity` says that it is the same file."""

    def __init__(self, target: str, identity: list[int] | None) -> None:
        """Make the file, or with the `identity` that a journal has of it find it again. OptionError if it is in the way, or
        is not that file; BlockIOError."""
        self.target: str = os.path.realpath(target)
        self.path = f"{self.target}.partial"
        try:
            if identity is None:
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, self._mode()))
            status = os.lstat(self.path)
        except FileExistsError as error:
            hint = "remove it, or name the journal of the copy that left it"
            raise OptionError("this file is in the way of the copy", path=self.path, hint=hint) from error
        except OSError as error:
            what = "cannot create a file there" if identity is None else "what was copied before is gone"
            start_over = None if identity is None else "remove the journal to copy from the start"
            raise BlockIOError.from_os(error, what, path=self.path, hint=start_over) from error
        self.identity = [status.st_dev, status.st_ino]
        if identity is not None and self.identity != identity:
            hint = "remove both it and the journal to copy from the start"
            raise OptionError("this is not the file that the journal speaks of", path=self.path, hint=hint)

    def _mode(self) -> int:
        """The permissions of the file that is replaced, or those of any new one."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self.target).st_mode & 0o777
        return 0o666

    def discard(self) -> None:
        """Nothing was copied, and no journal speaks of it."""
        try:
            os.unlink(self.path)
        except OSError as error:
            raise BlockIOError.from_os(error, "an empty file is left there", path=self.path) from error

    def finish(self) -> None:
        """It is whole, and durable: give it its name."""
        try:
            os.replace(self.path, self.target)
            sync_folder(os.path.dirname(self.target))
        except OSError as error:
            raise BlockIOError.from_os(error, "the copy is whole but cannot be put there", path=self.target) from error

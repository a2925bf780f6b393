"""What a server has to offer, and what of it a client may see: exports by name, single or as a folder of images.

Nothing is opened because somebody connects. An image in a folder is opened when a client that may see it asks for it by name,
is shared by all who have it, and closed when the last of them leaves.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from ..errors import OptionError, printable
from ..image import Image
from . import wire
from .export import Export
from .server_negotiation import Refused
from .tls import allowed


class Offer:
    """One export, and who may see it: `tls_only`: under TLS alone; `allow`: names of certificates, one of which the client
    must have (None: everybody)."""

    def __init__(self, export: Export, *, tls_only: bool = False, allow: Collection[str] | None = None) -> None:
        self.export = export
        self.tls_only = tls_only
        self.allow = allow

    def shown_to(self, secure: bool, names: Sequence[str]) -> bool:
        return (secure or not self.tls_only) and (self.allow is None or allowed(names, self.allow))


class Folder:
    """The files of a folder as exports, by their names; `open(path)` opens one. Links that lead elsewhere, files in folders
    below and names that begin with a dot are none."""

    def __init__(self, path: str | os.PathLike[str], open: Callable[[str], Image], *, writable: bool = False) -> None:
        self.path = Path(path)
        self._open = open
        self._writable = writable
        self._mutex = threading.Lock()
        self._opened: dict[str, tuple[Export, int]] = {}  # and by how many clients

    def names(self) -> list[str]:
        """The names of all files, sorted."""
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if self._served(entry.name))

    def acquire(self, name: str) -> Export | None:
        """The export of that name, opened; None if there is none. Give it back with `release`."""
        if not self._served(name):
            return None
        with self._mutex:
            export, count = self._opened.get(name, (None, 0))
            if export is None:
                export = Export(self._open(str(self.path / name)), name, writable=self._writable)
            self._opened[name] = (export, count + 1)
            return export

    def release(self, name: str) -> None:
        """A client does not need it any more."""
        with self._mutex:
            export, count = self._opened.pop(name)
            if count > 1:
                self._opened[name] = (export, count - 1)
            else:
                export.image.close()

    def _served(self, name: str) -> bool:
        if not name or name.startswith(".") or "/" in name or "\0" in name or len(name.encode()) > 255:
            return False
        try:
            name.encode().decode()
            return stat.S_ISREG(os.lstat(self.path / name).st_mode)
        except (OSError, UnicodeError):
            return False


class View:
    """What one client may see at this point of its connection. `close` gives back what it had opened."""

    def __init__(
        self, offers: Iterable[Offer], folder: Folder | None, *, secure: bool = False, names: Sequence[str] = ()
    ) -> None:
        self._all = list(offers)
        self._folder = folder
        self._secure, self._names = secure, names
        self._held: dict[str, Export] = {}

    def secured(self, names: Sequence[str]) -> View:
        """The view of the same client, now under TLS and with these names in its certificate."""
        self.close()
        return View(self._all, self._folder, secure=True, names=names)

    def names(self) -> list[tuple[str, str]]:
        """(name, description) of every export."""
        shown = [offer.export for offer in self._all if offer.shown_to(self._secure, self._names)]
        found = [(export.name, export.description) for export in shown]
        if self._folder is not None:
            found += [(name, "") for name in self._folder.names()]
        return found

    def find(self, name: str) -> Export:
        """The export of that name. "" is the only one, where there is but one. Raises Refused, or the LaminaError of opening
        a file in a folder."""
        for offer in self._all:
            if offer.export.name == name or (not name and len(self._all) == 1 and self._folder is None):
                if offer.shown_to(self._secure, self._names):
                    return offer.export
                if offer.tls_only and not self._secure:
                    raise Refused(wire.REP_ERR_TLS_REQD, "this export needs TLS")
                break  # whoever may not see it is not told that it is there
        else:
            if self._folder is not None:
                return self._in_folder(self._folder, name)
        raise Refused(wire.REP_ERR_UNKNOWN, f'there is no export "{printable(name[:200])}"')

    def _in_folder(self, folder: Folder, name: str) -> Export:
        export = self._held.get(name) or folder.acquire(name)
        if export is None:
            raise Refused(wire.REP_ERR_UNKNOWN, f'there is no export "{printable(name[:200])}"')
        self._held[name] = export
        return export

    def close(self) -> None:
        """Give back what this client had opened."""
        held, self._held = self._held, {}
        for name in held:
            if self._folder is not None:
                self._folder.release(name)


def check_names(offers: Sequence[Offer]) -> None:
    """LaminaError if two exports have one name, or a name cannot be sent."""
    seen: set[str] = set()
    for offer in offers:
        name = offer.export.name
        if name in seen:
            raise OptionError(f'two exports are named "{printable(name)}"', hint="give each a name of its own")
        seen.add(name)
        for text in (name, offer.export.description):
            if "\0" in text or len(text.encode()) > wire.MAX_STRING:
                raise OptionError("names and descriptions are at most 4096 bytes long, without NUL")

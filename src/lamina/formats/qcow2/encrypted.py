"""The node of an encrypted image: the clusters of the guest are encrypted sector by sector, the tables are not.

With LUKS the number of a sector is its place in the image file, with the legacy AES its place on the disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ...errors import OptionError
from ...format_node import FormatNode, Mapping
from ...limits import MIB, align_up
from ...status import COMPRESSED, DATA

if TYPE_CHECKING:
    from collections.abc import Mapping as Options

    from ...crypto.sectors import SectorCipher
    from ...format_node import Columns, Reservation
    from ...graph import Opener
    from ...limits import Limits
    from .header import Header
    from .tables import Tables

#: Bytes of a sector.
SECTOR: Final = 512
#: Bytes that are encrypted at a time before they are written: a copy of no more than this exists.
_PIECE: Final = MIB


class Encrypted(FormatNode):
    """What distinguishes the node of an image whose guest data is encrypted; mixed into the driver. Without a key (`cipher`
    None), which an image that is opened for its tables alone does not need, the data can neither be read nor written."""

    header: Header
    tables: Tables
    cipher: SectorCipher | None = None
    #: Whether sectors are numbered by their place in the file.
    _by_host = True

    def unlock(self, options: Options[str, Any] | None, opener: Opener) -> None:
        """Take the passphrase that the options give; see `encryption.cipher_of`."""
        from .encryption import cipher_of

        self._by_host = self.header.crypt_method == 2
        self.cipher = cipher_of(self.file, self.header, options or {}, needed=not opener.no_references)

    def amend_key_slot(self, values: Options[str, Any]) -> None:
        from .amend import amend_key_slot

        key = self._cipher("amend").key
        self.tables.changing(self.tables.require_apart)
        amend_key_slot(self.file, self.header, key, values)

    @property
    def limits(self) -> Limits:
        return super().limits._replace(request_alignment=SECTOR)

    # -- the mapping: what is stored has no offset at which it could be read as it is

    def map(self, offset: int, length: int) -> Mapping:
        found = super().map(offset, length)
        if found.flags & DATA and not found.flags & COMPRESSED:
            return Mapping(found.flags, found.length, -1, found.child, found.offset)
        return found

    def map_columns(self, offset: int, length: int) -> Columns:
        from ...numeric import np

        found = super().map_columns(offset, length)
        place = np.where(found.flags & np.uint8(DATA), -1, found.offset)
        # Neighbours that only their offsets told apart are one row.
        first = np.append(True, (found.flags[1:] != found.flags[:-1]) | (place[1:] >= 0) | (place[:-1] >= 0))
        end = found.start[-1] + found.length[-1]
        start = found.start[first]
        return found._replace(
            start=start, length=np.diff(start, append=end), flags=found.flags[first], offset=place[first]
        )

    def load(self, mapping: Mapping, offset: int, view: memoryview) -> None:
        if mapping.flags & COMPRESSED:
            super().load(mapping, offset, view)
            return
        assert mapping.child is not None
        stored = mapping.child
        cipher = self._cipher("read")
        host, length = mapping.token, len(view)
        sector = (host if self._by_host else offset) // SECTOR
        whole = length - length % SECTOR
        stored.tell("read_aio")
        stored.read_into(host, view[:whole])
        cipher.decrypt(sector, view[:whole])
        if whole < length:  # the disk ends inside a sector
            last = memoryview(bytearray(SECTOR))
            stored.read_into(host + whole, last)
            cipher.decrypt(sector + whole // SECTOR, last)
            view[whole:] = last[: length - whole]

    load_parts = FormatNode.load_parts  # not that of compressed clusters: any of the parts may be encrypted

    def reserve(self, offset: int, length: int) -> Reservation:
        self._cipher("write")
        found = super().reserve(offset, length)
        found.blank = False  # zeros in the file are not zeros of the disk
        return found

    def store(self, reservation: Reservation, offset: int, view: memoryview, event: str = "write_aio") -> None:
        cipher = self._cipher("write")
        shift = reservation.host - reservation.offset if self._by_host else 0
        for at in range(0, len(view), _PIECE):
            part = view[at : at + _PIECE]
            if len(part) % SECTOR:  # the disk ends inside a sector
                part = memoryview(bytes(part).ljust(align_up(len(part), SECTOR), b"\0"))
            encrypted = cipher.encrypt((offset + at + shift) // SECTOR, part)
            super().store(reservation, offset + at, memoryview(encrypted), event)

    def _cipher(self, operation: str) -> SectorCipher:
        if self.cipher is None:
            raise OptionError(
                "the image is encrypted, and was opened without its passphrase",
                path=self.filename,
                operation=operation,
                hint="name a secret (encrypt.key-secret)",
            )
        return self.cipher

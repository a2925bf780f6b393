"""Encrypted images: the clusters of the guest are encrypted sector by sector, the tables are not. After "Full disk encryption
header pointer" and "Data encryption" of the published specification.

With LUKS the number of a sector is its place in the image file, with the legacy AES its place on the disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ...crypto.luks1 import MAX_BYTES, Luks1, Settings
from ...crypto.secret import reveal
from ...crypto.sectors import SECTOR, CipherSpec
from ...errors import CorruptImage, LimitExceeded, OptionError
from ...format_node import Mapping
from ...limits import MIB, align_up
from ...status import COMPRESSED, DATA
from . import layout as q
from .driver import Qcow2

if TYPE_CHECKING:
    from collections.abc import Mapping as Options

    from ...crypto.sectors import SectorCipher
    from ...format_node import Columns, Reservation
    from ...graph import Opener
    from ...limits import Limits
    from ...request import Child
    from .header import Header
    from .tables import Tables

#: Bytes that are encrypted at a time before they are written: a copy of no more than this exists.
_PIECE: Final = MIB
#: The legacy AES has keys of 128 bits: the passphrase itself.
_AES_KEY: Final = 16


class EncryptedQcow2(Qcow2):
    """A qcow2 image whose guest data is encrypted. Without a key (`cipher` None), which an image that is opened for its
    tables alone does not need, the data can neither be read nor written."""

    cipher: SectorCipher | None = None
    #: Whether sectors are numbered by their place in the file.
    _by_host = True

    def unlock(self, options: Options[str, Any] | None, opener: Opener) -> None:
        """Take the passphrase that the options name. OptionError where they name none, or a wrong one."""
        given = dict(options or {})
        kind = q.CRYPT_METHODS[self.header.crypt_method]
        if given.get("format") not in (None, kind):
            raise OptionError(f"the image is encrypted with {kind}, not with {given['format']}", path=self.filename)
        self._by_host = kind == "luks"
        header = luks_header(self.file, self.header) if self._by_host else None
        named = given.get("key-secret")
        if named is None:
            if opener.no_references:
                return  # for its tables alone
            raise OptionError(
                "the image is encrypted, and no passphrase is given",
                path=self.filename,
                hint="name a secret: --object secret,id=s0,file=PATH --image-opts "
                "driver=qcow2,encrypt.key-secret=s0,file.filename=IMAGE",
            )
        passphrase = reveal(named)
        if header is None:
            self.cipher = CipherSpec("aes", "cbc", "plain64").with_key(passphrase[:_AES_KEY].ljust(_AES_KEY, b"\0"))
        else:
            self.cipher = header.cipher(header.unlock(passphrase))

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
        cipher = self._cipher("read")
        host, length = mapping.token, len(view)
        sector = (host if self._by_host else offset) // SECTOR
        whole = length - length % SECTOR
        self.file.tell("read_aio")
        self.file.read_into(host, view[:whole])
        cipher.decrypt(sector, view[:whole])
        if whole < length:  # the disk ends inside a sector
            last = memoryview(bytearray(SECTOR))
            self.file.read_into(host + whole, last)
            cipher.decrypt(sector + whole // SECTOR, last)
            view[whole:] = last[: length - whole]

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


def luks_header(file: Child, header: Header) -> Luks1:
    """The LUKS header to which the header of the image points. Raises CorruptImage and what `Luks1.read` raises."""
    place, path = header.encryption_header, file.node.filename
    if place is None:
        raise CorruptImage("the image is encrypted with LUKS, and has no pointer to its encryption header", path=path)
    offset, length = place
    if offset % header.cluster_size or not offset or offset + length > file.size:
        raise CorruptImage(
            f"the encryption header of {length} bytes is said to lie at {offset:#x}, which cannot be", path=path
        )
    if length > MAX_BYTES:
        raise LimitExceeded(f"the encryption header has {length} bytes, above the limit of {MAX_BYTES}", path=path)
    return Luks1.read(file, offset, length)


def settings_of(values: Options[str, Any]) -> Settings:
    """What a new LUKS header is made of, by the options of a new image. UnsupportedFeature where it cannot be."""
    cipher, _, bits = str(values["cipher-alg"]).rpartition("-")
    mode = values["cipher-mode"]
    ivgen = "" if mode == "ecb" else values["ivgen-alg"]
    ivhash = (values.get("ivgen-hash-alg") or "sha256") if ivgen == "essiv" else ""
    spec = CipherSpec(cipher, mode, ivgen, ivhash)
    spec.require_supported()
    length = int(bits) // 8 if bits.isdecimal() else 0
    return Settings(spec, 2 * length if mode == "xts" else length, values["hash-alg"], values["iter-time"])


def add_luks(tables: Tables, values: Options[str, Any]) -> None:
    """Give a new image, which is empty, a LUKS header. The caller stores the header of the image afterwards."""
    header, settings = tables.header, settings_of(values)
    length = Luks1.layout(settings.key_bytes)[1]
    offset = tables.allocate_metadata(align_up(length, header.cluster_size))
    Luks1.create(tables.file, offset, reveal(values.get("key-secret")), settings)
    header.crypt_method = 2
    header.extensions.append((q.EXT_ENCRYPTION, q.ENCRYPTION_POINTER.pack(offset=offset, length=length)))


def describe(file: Child, header: Header) -> dict[str, Any]:
    """What `lamina info` says of the encryption, without the passphrase."""
    kind = q.CRYPT_METHODS[header.crypt_method]
    return {"format": kind, **(luks_header(file, header).to_json() if kind == "luks" else {})}

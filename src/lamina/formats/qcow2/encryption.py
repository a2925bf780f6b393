"""Keys of encrypted images: the LUKS header inside an image, and the legacy AES. After "Full disk encryption header pointer"
and "Data encryption" of the published specification. (`encrypted` has the node.)"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ...crypto.luks1 import MAX_BYTES, Luks1, Settings
from ...crypto.secret import reveal
from ...crypto.sectors import CipherSpec
from ...errors import CorruptImage, Hint, LimitExceeded, OptionError
from ...limits import align_up
from . import layout as q

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...crypto.sectors import SectorCipher
    from ...request import Child
    from .header import Header
    from .tables import Tables

#: The legacy AES has keys of 128 bits: the passphrase itself.
_AES_KEY: Final = 16


def cipher_of(file: Child, header: Header, options: Mapping[str, Any], *, needed: bool) -> SectorCipher | None:
    """The cipher of the image in `file`, by the passphrase that its options (`encrypt`) name. None where they name none, and
    none is `needed`. OptionError where it is missing or wrong, CorruptImage and what `Luks1.read` raises."""
    kind, path = q.CRYPT_METHODS[header.crypt_method], file.node.filename
    if options.get("format") not in (None, kind):
        raise OptionError(f"the image is encrypted with {kind}, not with {options['format']}", path=path)
    luks = luks_header(file, header) if kind == "luks" else None
    named = options.get("key-secret")
    if named is None:
        if not needed:
            return None
        raise OptionError(
            "the image is encrypted, and no passphrase is given",
            path=path,
            hint=Hint(
                'open it with {"driver": "qcow2", "encrypt": {"key-secret": lamina.Secret(...)}, "file": {...}}',
                command="name a secret: --object secret,id=s0,file=PATH --image-opts "
                "driver=qcow2,encrypt.key-secret=s0,file.filename=IMAGE",
            ),
        )
    passphrase = reveal(named)
    if luks is None:
        return CipherSpec("aes", "cbc", "plain64").with_key(passphrase[:_AES_KEY].ljust(_AES_KEY, b"\0"))
    return luks.cipher(luks.unlock(passphrase))


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


def settings_of(values: Mapping[str, Any]) -> Settings:
    """What a new LUKS header is made of, by the options of a new image. UnsupportedFeature where it cannot be."""
    cipher, _, bits = str(values["cipher-alg"]).rpartition("-")
    mode = values["cipher-mode"]
    ivgen = "" if mode == "ecb" else values["ivgen-alg"]
    ivhash = (values.get("ivgen-hash-alg") or "sha256") if ivgen == "essiv" else ""
    spec = CipherSpec(cipher, mode, ivgen, ivhash)
    spec.require_supported()
    length = int(bits) // 8 if bits.isdecimal() else 0
    return Settings(spec, 2 * length if mode == "xts" else length, values["hash-alg"], values["iter-time"])


def add_luks(tables: Tables, values: Mapping[str, Any]) -> None:
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

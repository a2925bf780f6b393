"""Ciphers over the sectors of a disk: each sector of 512 bytes is encrypted by itself, with an initialisation vector (IV)
that derives from its number. After the LUKS1 on-disk format ("Cipher and Hash specification registry") and IEEE 1619 (XTS).

A call of the cipher for each sector takes 5 us whatever its length, and gives some 100 MB/s. So XTS is made of few calls of
the bare block cipher (ECB) over whole buffers: one for the tweaks of all sectors and one for the blocks of each piece, with
the multiplications between them as columns: 1,600 MB/s on one thread.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, NamedTuple

from ..errors import UnsupportedFeature

#: Bytes of a sector.
SECTOR = 512

#: From so many sectors on, columns (some 30 us for a few sectors) are faster than a call for each sector (4 us each).
_FEW = 8
#: Columns are made of so many bytes at a time, which the cache holds; with half of them XTS is an eighth slower.
_PIECE = 256 * SECTOR
#: The tweaks of so many bytes are encrypted at once.
_TWEAKED = 16 * _PIECE

#: Ciphers by the names of the LUKS1 specification: bytes of a block, and lengths of their keys in bytes.
_CIPHERS = {"aes": (16, (16, 24, 32)), "cast5": (8, (16,))}
_MODES = ("xts", "cbc", "ecb")


class CipherSpec(NamedTuple):
    """How sectors are encrypted. `mode`: xts, cbc or ecb. `ivgen`: how the IV of a sector derives from its number: plain (32
    bits), plain64, or essiv (encrypted with a hash of the key, `ivhash`). ecb has no IV, and ignores it."""

    cipher: str
    mode: str
    ivgen: str = ""
    ivhash: str = ""

    @classmethod
    def parse(cls, cipher: str, mode: str) -> CipherSpec:
        """From the fields of a LUKS header, such as "aes" and "xts-plain64" or "cbc-essiv:sha256". UnsupportedFeature where
        Lamina has no such cipher."""
        chain, _, rest = mode.partition("-")
        ivgen, _, ivhash = rest.partition(":")
        spec = cls(cipher, chain, ivgen, ivhash)
        spec.require_supported()
        return spec

    @property
    def mode_text(self) -> str:
        """The cipher mode as a LUKS header says it."""
        text = f"{self.mode}-{self.ivgen}" if self.ivgen else self.mode
        return f"{text}:{self.ivhash}" if self.ivhash else text

    def require_supported(self) -> None:
        """Raise UnsupportedFeature if this module has no such cipher."""
        known = self.cipher in _CIPHERS and self.mode in _MODES
        if known and self.mode == "xts":
            known = _CIPHERS[self.cipher][0] == 16
        if self.mode == "ecb":
            known = known and self.ivgen in ("", "plain", "plain64")  # ignored
        elif self.ivgen == "essiv":
            known = known and self.ivhash in hashlib.algorithms_available
        else:
            known = known and self.ivgen in ("plain", "plain64") and not self.ivhash
        if not known:
            raise UnsupportedFeature(
                f"there is no cipher {self.cipher}-{self.mode_text} here",
                hint="aes in the modes xts, cbc and ecb, and cast5 in cbc and ecb are known, with plain, plain64 or essiv",
            )

    def key_sizes(self) -> tuple[int, ...]:
        """The lengths in bytes that a key may have."""
        sizes = _CIPHERS[self.cipher][1]
        return tuple(2 * size for size in sizes if size != 24) if self.mode == "xts" else sizes

    def with_key(self, key: bytes) -> SectorCipher:
        """The cipher with this key. UnsupportedFeature where the key has another length, or `cryptography` is missing."""
        self.require_supported()
        if len(key) not in self.key_sizes():
            raise UnsupportedFeature(f"{self.cipher}-{self.mode_text} has no keys of {len(key) * 8} bits")
        return SectorCipher(self, key)


class SectorCipher:
    """Encrypts and decrypts buffers that begin with a sector of a given number; the last sector may be shorter, by whole
    blocks of the cipher. Any number of threads may use it."""

    def __init__(self, spec: CipherSpec, key: bytes) -> None:
        self.spec = spec
        #: The key: in no text, and for nobody but who gives it to another passphrase.
        self.key = key
        self._block = _CIPHERS[spec.cipher][0]
        half = len(key) // 2
        if spec.mode == "xts":
            if key[:half] == key[half:]:
                raise UnsupportedFeature("the two halves of an XTS key are equal, which makes it useless")
            self._data, self._tweak = _key_of(spec.cipher, key[:half]), _key_of(spec.cipher, key[half:])
            self._whole = _key_of(spec.cipher, key)
        else:
            self._data = _key_of(spec.cipher, key)
        if spec.ivgen == "essiv":
            self._salt = _key_of(spec.cipher, _essiv_key(spec, key))

    def __repr__(self) -> str:
        return f"<SectorCipher {self.spec.cipher}-{self.spec.mode_text}>"

    def encrypt(self, sector: int, plain: memoryview) -> bytearray:
        """The encrypted bytes of `plain`, which begins with the sector of this number."""
        done = bytearray(plain)
        self._crypt(sector, memoryview(done), encrypt=True)
        return done

    def decrypt(self, sector: int, view: memoryview) -> None:
        """Decrypt `view`, which begins with the sector of this number, in place."""
        self._crypt(sector, view, encrypt=False)

    def _crypt(self, sector: int, view: memoryview, *, encrypt: bool) -> None:
        if self.spec.mode == "xts":
            step, crypt = _TWEAKED, self._xts
        elif self.spec.mode == "cbc":
            step, crypt = _PIECE, self._cbc_encrypt if encrypt else self._cbc_decrypt
        else:
            step, crypt = _PIECE, self._whole_blocks
        for at in range(0, len(view), step):
            piece, number = view[at : at + step], sector + at // SECTOR
            if self.spec.mode != "ecb" and (len(piece) < _FEW * SECTOR or len(piece) % SECTOR):
                self._one_by_one(number, piece, encrypt=encrypt)
            else:
                crypt(number, piece, encrypt=encrypt)

    # -- initialisation vectors

    def _iv(self, sector: int) -> bytes:
        if self.spec.ivgen == "plain":
            return struct.pack("<I", sector & 0xFFFFFFFF) + bytes(self._block - 4)
        number = struct.pack("<Q", sector) + bytes(self._block - 8)
        return number if self.spec.ivgen == "plain64" else _ecb(self._salt, number, encrypt=True)

    def _ivs(self, sector: int, count: int) -> bytes:
        """Those of `count` sectors, one after the other."""
        from ..numeric import np

        numbers = np.zeros((count, self._block // 8), np.uint64)
        numbers[:, 0] = np.arange(sector, sector + count, dtype=np.uint64)
        if self.spec.ivgen == "plain":
            numbers[:, 0] &= np.uint64(0xFFFFFFFF)
        plain = numbers.astype("<u8").tobytes()
        return plain if self.spec.ivgen != "essiv" else _ecb(self._salt, plain, encrypt=True)

    # -- modes, each in place

    def _one_by_one(self, sector: int, view: memoryview, *, encrypt: bool) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, modes

        mode, key = (modes.XTS, self._whole) if self.spec.mode == "xts" else (modes.CBC, self._data)
        for number, at in enumerate(range(0, len(view), SECTOR), sector):
            cipher = Cipher(key, mode(self._iv(number)))
            context = cipher.encryptor() if encrypt else cipher.decryptor()
            view[at : at + SECTOR] = context.update(view[at : at + SECTOR])

    def _whole_blocks(self, sector: int, view: memoryview, *, encrypt: bool) -> None:
        view[:] = _ecb(self._data, view, encrypt=encrypt)

    def _xts(self, sector: int, view: memoryview, *, encrypt: bool) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, modes

        from ..numeric import np

        first = np.frombuffer(_ecb(self._tweak, self._ivs(sector, len(view) // SECTOR), encrypt=True), np.uint64)
        cipher = Cipher(self._data, modes.ECB())
        crypt = (cipher.encryptor() if encrypt else cipher.decryptor()).update_into
        done = memoryview(bytearray(min(_PIECE, len(view)) + self._block - 1))  # `update_into` asks for that much
        for at in range(0, len(view), _PIECE):
            piece = view[at : at + _PIECE]
            tweaks = _powers(first[at // SECTOR * 2 : (at + len(piece)) // SECTOR * 2])
            words = np.frombuffer(piece, np.uint64)
            words ^= tweaks
            crypt(piece, done)
            np.bitwise_xor(np.frombuffer(done, np.uint64, len(words)), tweaks, out=words)

    def _cbc_decrypt(self, sector: int, view: memoryview, *, encrypt: bool) -> None:
        from ..numeric import np

        # Each block is decrypted, and then mixed with the encrypted one before it: all at once.
        words = self._block // 8
        before = np.empty((len(view) // SECTOR, SECTOR // 8), np.uint64)
        before[:, words:] = np.frombuffer(view, np.uint64).reshape(before.shape)[:, :-words]
        before[:, :words] = np.frombuffer(self._ivs(sector, len(before)), np.uint64).reshape(-1, words)
        before ^= np.frombuffer(_ecb(self._data, view, encrypt=encrypt), np.uint64).reshape(before.shape)
        view[:] = before.reshape(-1).data.cast("B")

    def _cbc_encrypt(self, sector: int, view: memoryview, *, encrypt: bool) -> None:
        from ..numeric import np

        # A block needs the one before it, but sectors need not each other: the first blocks of all, then the second ones.
        words = self._block // 8
        plain = np.frombuffer(view, np.uint64).reshape(len(view) // SECTOR, -1)
        last = np.frombuffer(self._ivs(sector, len(plain)), np.uint64).reshape(-1, words)
        for at in range(0, SECTOR // 8, words):
            mixed = plain[:, at : at + words] ^ last
            last = np.frombuffer(_ecb(self._data, mixed.data.cast("B"), encrypt=encrypt), np.uint64).reshape(-1, words)
            plain[:, at : at + words] = last


def _powers(first: Any) -> Any:
    """The tweaks of all blocks of the sectors, as 64-bit words: `first` has that of the first block of each, and block number
    n has its product with x to the power of n (in GF(2^128), IEEE 1619)."""
    from ..numeric import np

    one, two, five = np.uint64(1), np.uint64(2), np.uint64(5)
    powers = np.arange(SECTOR // 16, dtype=np.uint64)
    low, high = first[0::2, np.newaxis], first[1::2, np.newaxis]
    tweaks = np.empty((len(low), len(powers), 2), np.uint64)
    back = np.uint64(64) - powers  # (a shift by 64 makes 0)
    np.bitwise_or(high << powers, low >> back, out=tweaks[:, :, 1])
    # The bits that left the upper end are a number below 2^31: it comes back times x^7 + x^2 + x + 1.
    carry = high >> back
    folded = carry << one
    folded ^= carry
    carry <<= two
    folded ^= carry
    carry <<= five
    folded ^= carry
    np.bitwise_xor(low << powers, folded, out=tweaks[:, :, 0])
    return tweaks.reshape(-1)


def _ecb(key: Any, data: bytes | memoryview, *, encrypt: bool) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, modes

    cipher = Cipher(key, modes.ECB())
    return (cipher.encryptor() if encrypt else cipher.decryptor()).update(data)


def _key_of(cipher: str, key: bytes) -> Any:
    try:
        if cipher == "aes":
            from cryptography.hazmat.primitives.ciphers.algorithms import AES

            return AES(key)
        from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5

        return CAST5(key)
    except ImportError as error:
        raise UnsupportedFeature(
            "encrypted images need the Python module cryptography, which is not installed",
            hint="install it: python -m pip install 'lamina[crypto]'",
        ) from error


def _essiv_key(spec: CipherSpec, key: bytes) -> bytes:
    salt = hashlib.new(spec.ivhash, key).digest()
    sizes = _CIPHERS[spec.cipher][1]
    if len(salt) not in sizes:
        raise UnsupportedFeature(f"{spec.cipher} has no keys as long as a {spec.ivhash} digest, which essiv needs")
    return salt

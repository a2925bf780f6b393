"""The LUKS1 header: how the disk is encrypted, and up to eight passphrases that each unlock its master key. After "LUKS
On-Disk Format Specification" 1.2.3, whose words are used here.

A key slot holds the master key, encrypted with a key that PBKDF2 derives from a passphrase, and split into 4000 stripes that
are all needed to put it together again (anti-forensic splitting): a slot whose stripes were overwritten in part is lost.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
import uuid
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..errors import CorruptImage, FormatError, LimitExceeded, OptionError, UnsupportedFeature
from ..layout import Field, Structure
from ..limits import MIB, align_up
from .sectors import SECTOR, CipherSpec, SectorCipher

if TYPE_CHECKING:
    from ..request import Child

MAGIC: Final = b"LUKS\xba\xbe"
SLOTS: Final = 8
ACTIVE: Final = 0x00AC71F3
INACTIVE: Final = 0x0000DEAD
STRIPES: Final = 4000
DIGEST: Final = 20

#: Iterations of PBKDF2, of one slot or of the digest: 12 million take some seconds. The specification has no upper limit.
MAX_ITERATIONS: Final = 12_000_000
#: The fewest that a new slot, and a new digest, get.
MIN_ITERATIONS: Final = 1000
#: Seconds that all slots together may take.
PATIENCE: Final = 60.0
#: Key material begins on multiples of this, in bytes.
_ALIGN: Final = 4096
#: The longest key: two of 256 bits, for XTS.
_MAX_KEY: Final = 64
#: A header with its key material is shorter than this, whatever its keys.
MAX_BYTES: Final = 16 * MIB

HEADER: Final = Structure(
    "LUKS1 header",
    ">",
    [
        Field("magic", "6s", "LUKS and two bytes", default=MAGIC),
        Field("version", "u16", "version of the header", default=1),
        Field("cipher_name", "32s", "cipher, ends with a NUL"),
        Field("cipher_mode", "32s", "mode of the cipher and source of its IVs"),
        Field("hash_spec", "32s", "hash of PBKDF2 and of the anti-forensic splitter"),
        Field("payload_offset", "u32", "where the encrypted disk begins, in sectors"),
        Field("key_bytes", "u32", "length of the master key"),
        Field("mk_digest", "20s", "checksum of the master key, by PBKDF2"),
        Field("mk_digest_salt", "32s", "salt of that checksum"),
        Field("mk_digest_iter", "u32", "iterations of that checksum"),
        Field("uuid", "40s", "UUID of the partition"),
    ],
)
KEY_SLOT: Final = Structure(
    "LUKS1 key slot",
    ">",
    [
        Field("active", "u32", "state", values={ACTIVE: "enabled", INACTIVE: "disabled"}, default=INACTIVE),
        Field("iterations", "u32", "iterations of PBKDF2", default=0),
        Field("salt", "32s", "salt of PBKDF2", default=bytes(32)),
        Field("key_material_offset", "u32", "where the key material begins, in sectors from the header"),
        Field("stripes", "u32", "stripes of the anti-forensic splitter", default=STRIPES),
    ],
)
#: Bytes of the header with its slots.
HEADER_BYTES: Final = HEADER.size + SLOTS * KEY_SLOT.size


class Slot(NamedTuple):
    """One key slot. `offset`: where its key material begins, in bytes from the header."""

    active: bool
    iterations: int
    salt: bytes
    offset: int


class Settings(NamedTuple):
    """What a new header is made of. `iter_time`: the milliseconds that unlocking should take on this machine."""

    cipher: CipherSpec = CipherSpec("aes", "xts", "plain64")
    key_bytes: int = 64
    hash: str = "sha256"
    iter_time: int = 2000


class WrongPassphrase(OptionError):
    """No key slot opens with this passphrase."""


class Luks1:
    """The header that lies in `storage` at `base`. Its owner calls one method at a time; what changes the header is on stable
    storage when it returns, in an order in which no cut of the power loses a slot that was usable before and should stay."""

    def __init__(self, storage: Child, base: int, header: Any, slots: list[Slot]) -> None:
        self._storage, self._base = storage, base
        self._header, self.slots = header, slots
        self.spec = CipherSpec.parse(_text(header.cipher_name), _text(header.cipher_mode))
        self.hash = _text(header.hash_spec)
        self.key_bytes: int = header.key_bytes

    # -- open

    @classmethod
    def read(cls, storage: Child, base: int, length: int) -> Luks1:
        """The header of at most `length` bytes at `base`. FormatError where there is none, CorruptImage, LimitExceeded and
        UnsupportedFeature where it cannot be used."""
        path = storage.node.filename
        if length < HEADER_BYTES:
            raise CorruptImage(f"an encryption header of {length} bytes is too short for LUKS", path=path, offset=base)
        raw = bytearray(HEADER_BYTES)
        storage.read_into(base, memoryview(raw))
        if not raw.startswith(MAGIC):
            raise FormatError("there is no LUKS header", path=path, offset=base)
        header = HEADER.unpack(raw)
        if header.version != 1:
            raise UnsupportedFeature(f"LUKS version {header.version} is not supported here", path=path, offset=base)
        entries = [KEY_SLOT.unpack(raw, HEADER.size + number * KEY_SLOT.size) for number in range(SLOTS)]
        try:
            found = cls(storage, base, header, [_slot(entry) for entry in entries])
            found._require_usable(entries, length)
        except FormatError as error:
            error.path, error.offset = path, base
            raise
        return found

    def _require_usable(self, entries: list[Any], length: int) -> None:
        _require_hash(self.hash)
        if self.key_bytes not in self.spec.key_sizes():
            raise CorruptImage(f"a key of {self.key_bytes} bytes does not fit {self.spec.cipher}-{self.spec.mode_text}")
        _require_iterations(self._header.mk_digest_iter, "the checksum of the master key")
        taken = [(0, HEADER_BYTES, "the header")]
        for number, entry in enumerate(entries):
            if entry.active not in (ACTIVE, INACTIVE):
                raise CorruptImage(f"key slot {number} is neither enabled nor disabled: {entry.active:#x}")
            if entry.stripes != STRIPES:
                raise CorruptImage(f"key slot {number} has {entry.stripes} stripes instead of {STRIPES}")
            if entry.active == ACTIVE:
                _require_iterations(entry.iterations, f"key slot {number}")
            start = entry.key_material_offset * SECTOR
            if start + self.material_bytes > length:
                raise CorruptImage(f"the key material of slot {number} at {start} is outside the encryption header")
            taken.append((start, start + self.material_bytes, f"key slot {number}"))
        taken.sort()
        for (_, end, one), (start, _, other) in pairwise(taken):
            if start < end:
                raise CorruptImage(f"{one} and {other} lie over each other")

    @property
    def payload_offset(self) -> int:
        """Where the encrypted disk begins, in bytes from the header, in a LUKS file. (A qcow2 image says that itself.)"""
        return int(self._header.payload_offset) * SECTOR

    @property
    def material_bytes(self) -> int:
        """Bytes of the key material of a slot."""
        return self.key_bytes * STRIPES

    def unlock(self, passphrase: bytes, *, patience: float = PATIENCE) -> bytes:
        """The master key. WrongPassphrase if no slot opens; LimitExceeded if they take longer than `patience` seconds."""
        return self._open_slot(passphrase, patience)[1]

    def slots_of(self, passphrase: bytes) -> list[int]:
        """The slots that this passphrase opens."""
        return [number for number, slot in enumerate(self.slots) if slot.active and self._key_in(slot, passphrase)]

    def _open_slot(self, passphrase: bytes, patience: float) -> tuple[int, bytes]:
        deadline = time.monotonic() + patience
        for number, slot in enumerate(self.slots):
            if not slot.active:
                continue
            if time.monotonic() > deadline:
                raise LimitExceeded(
                    f"the key slots take more than {patience:.0f} seconds to try", path=self._storage.node.filename
                )
            key = self._key_in(slot, passphrase)
            if key is not None:
                return number, key
        raise WrongPassphrase("no key slot opens with this passphrase", path=self._storage.node.filename)

    def _key_in(self, slot: Slot, passphrase: bytes) -> bytes | None:
        """The master key in this slot, if the passphrase is the right one."""
        material = bytearray(self.material_bytes)
        view = memoryview(material)
        self._storage.read_into(self._base + slot.offset, view)
        self._slot_cipher(slot, passphrase).decrypt(0, view)
        key = af_merge(material, self.key_bytes, self.hash)
        right = hmac.compare_digest(self._digest(key), self._header.mk_digest)
        return key if right else None

    def _slot_cipher(self, slot: Slot, passphrase: bytes) -> SectorCipher:
        return self.spec.with_key(
            hashlib.pbkdf2_hmac(self.hash, passphrase, slot.salt, slot.iterations, self.key_bytes)
        )

    def _digest(self, key: bytes) -> bytes:
        header = self._header
        return hashlib.pbkdf2_hmac(self.hash, key, header.mk_digest_salt, header.mk_digest_iter, DIGEST)

    def cipher(self, key: bytes) -> SectorCipher:
        """The cipher of the disk with this master key."""
        return self.spec.with_key(key)

    # -- create

    @staticmethod
    def layout(key_bytes: int) -> tuple[list[int], int]:
        """Where the key material of each slot begins in a new header, and where the header ends: bytes from its beginning."""
        step = align_up(key_bytes * STRIPES, _ALIGN)
        return [_ALIGN + number * step for number in range(SLOTS)], _ALIGN + SLOTS * step

    @classmethod
    def create(cls, storage: Child, base: int, passphrase: bytes, settings: Settings) -> tuple[Luks1, bytes]:
        """A new header at `base`, whose first slot opens with `passphrase`, and the new master key. The storage there reads
        as zeros. OptionError, UnsupportedFeature for settings that cannot be."""
        settings.cipher.require_supported()
        _require_hash(settings.hash)
        if settings.key_bytes not in settings.cipher.key_sizes():
            raise OptionError(f"{settings.cipher.cipher}-{settings.cipher.mode_text} has no keys of that length")
        key = _new_key(settings)
        salt = os.urandom(32)
        iterations = max(iterations_in(settings.hash, settings.key_bytes, settings.iter_time / 8), MIN_ITERATIONS)
        starts, end = cls.layout(settings.key_bytes)
        header = HEADER.unpack(
            HEADER.pack(
                cipher_name=settings.cipher.cipher.encode().ljust(32, b"\0"),
                cipher_mode=settings.cipher.mode_text.encode().ljust(32, b"\0"),
                hash_spec=settings.hash.encode().ljust(32, b"\0"),
                payload_offset=end // SECTOR,
                key_bytes=settings.key_bytes,
                mk_digest=hashlib.pbkdf2_hmac(settings.hash, key, salt, iterations, DIGEST),
                mk_digest_salt=salt,
                mk_digest_iter=iterations,
                uuid=str(uuid.uuid4()).encode().ljust(40, b"\0"),
            )
        )
        made = cls(storage, base, header, [Slot(False, 0, bytes(32), start) for start in starts])
        made.add_key(key, passphrase, iter_time=settings.iter_time)
        return made, key

    # -- change key slots

    def add_key(self, key: bytes, passphrase: bytes, *, slot: int | None = None, iter_time: int = 2000) -> int:
        """Let `passphrase` open the disk of the master key `key`; returns the slot. OptionError if that slot, or each one, is
        in use."""
        if slot is None:
            slot = next((number for number, one in enumerate(self.slots) if not one.active), None)
            if slot is None:
                raise OptionError("all eight key slots are in use", hint="erase one first")
        elif not 0 <= slot < SLOTS or self.slots[slot].active:
            raise OptionError(f"key slot {slot} is in use, or is none of 0 to 7", hint="choose another, or none")
        iterations = max(iterations_in(self.hash, self.key_bytes, iter_time), MIN_ITERATIONS)
        new = Slot(True, iterations, os.urandom(32), self.slots[slot].offset)
        material = af_split(key, self.hash)
        encrypted = self._slot_cipher(new, passphrase).encrypt(0, memoryview(material))
        self._storage.write(self._base + new.offset, memoryview(encrypted))
        self._storage.flush()  # a slot that the header calls enabled has its material
        self._set(slot, new)
        return slot

    def erase_slot(self, slot: int, *, force: bool = False) -> None:
        """Make the key in this slot unusable for ever. OptionError if it is the last one, unless `force`: then nobody can
        read the disk any more."""
        if not 0 <= slot < SLOTS or not self.slots[slot].active:
            raise OptionError(f"key slot {slot} is not in use")
        if not force and sum(one.active for one in self.slots) == 1:
            raise OptionError(
                f"key slot {slot} is the last one: without it nobody could read the disk",
                hint="add another passphrase first, or force it",
            )
        old = self.slots[slot]
        # The material first: were the header first, a cut of the power could leave the key on the disk.
        self._storage.write(self._base + old.offset, memoryview(os.urandom(self.material_bytes)))
        self._storage.flush()
        self._set(slot, Slot(False, 0, bytes(32), old.offset))

    def _set(self, number: int, slot: Slot) -> None:
        slots = [*self.slots[:number], slot, *self.slots[number + 1 :]]
        self._storage.write(self._base, memoryview(self._packed(slots)))
        self._storage.flush()
        self.slots = slots

    def _packed(self, slots: list[Slot]) -> bytes:
        packed = HEADER.pack(**self._header._asdict())
        for slot in slots:
            packed += KEY_SLOT.pack(
                active=ACTIVE if slot.active else INACTIVE,
                iterations=slot.iterations,
                salt=slot.salt,
                key_material_offset=slot.offset // SECTOR,
            )
        return packed

    def to_json(self) -> dict[str, Any]:
        """The header by the names that `qemu-img info --output=json` uses. No secret is in it."""
        return {
            "ivgen-alg": self.spec.ivgen,
            "hash-alg": self.hash,
            "cipher-alg": f"{self.spec.cipher}-{self.key_bytes * 8 // (2 if self.spec.mode == 'xts' else 1)}",
            "uuid": _text(self._header.uuid),
            "cipher-mode": self.spec.mode,
            "slots": [
                {"active": True, "iters": slot.iterations, "key-offset": slot.offset, "stripes": STRIPES}
                if slot.active
                else {"active": False, "key-offset": slot.offset}
                for slot in self.slots
            ],
            "payload-offset": self.payload_offset,
            "master-key-iters": int(self._header.mk_digest_iter),
        } | ({"ivgen-hash-alg": self.spec.ivhash} if self.spec.ivhash else {})


def af_split(key: bytes, hash: str) -> bytearray:
    """The key as 4000 stripes, all of which are needed to put it together again ("AF splitter")."""
    size = len(key)
    material = bytearray(os.urandom(size * (STRIPES - 1)))
    last = int.from_bytes(key) ^ int.from_bytes(_diffused(material, size, hash))
    return material + last.to_bytes(size)


def af_merge(material: bytes | bytearray, size: int, hash: str) -> bytes:
    """The key of `size` bytes that `af_split` split."""
    before = _diffused(material[: size * (STRIPES - 1)], size, hash)
    return (int.from_bytes(before) ^ int.from_bytes(material[-size:])).to_bytes(size)


def _diffused(stripes: bytes | bytearray, size: int, hash: str) -> bytes:
    """What the stripes before the last one make."""
    new = hashlib.new
    length = new(hash).digest_size
    parts = [(number.to_bytes(4), at, at + length) for number, at in enumerate(range(0, size, length))]
    state = bytes(size)
    for start in range(0, len(stripes), size):
        mixed = (int.from_bytes(state) ^ int.from_bytes(stripes[start : start + size])).to_bytes(size)
        state = b"".join(new(hash, number + mixed[low:high]).digest()[: high - low] for number, low, high in parts)[
            :size
        ]
    return state


def iterations_in(hash: str, key_bytes: int, milliseconds: float) -> int:
    """How many iterations of PBKDF2 take so long here."""
    return min(int(_speed(hash, key_bytes) * milliseconds / 1000), MAX_ITERATIONS)


@cache
def _speed(hash: str, key_bytes: int) -> float:
    """Iterations per second of the CPU, measured once."""
    count = 1 << 14
    while True:
        begun = time.thread_time()
        hashlib.pbkdf2_hmac(hash, b"passphrase", bytes(32), count, key_bytes)
        taken = time.thread_time() - begun
        if taken >= 0.02 or count >= MAX_ITERATIONS:
            return count / max(taken, 1e-6)
        count *= 4


def _new_key(settings: Settings) -> bytes:
    while True:
        key = os.urandom(settings.key_bytes)
        half = len(key) // 2
        if settings.cipher.mode != "xts" or key[:half] != key[half:]:
            return key


def _slot(entry: Any) -> Slot:
    return Slot(entry.active == ACTIVE, entry.iterations, entry.salt, entry.key_material_offset * SECTOR)


def _text(field: bytes) -> str:
    text, end, _ = field.partition(b"\0")
    if not end or not text.isascii() or not text.decode("latin-1").isprintable():
        raise CorruptImage("a name in the LUKS header is not text that ends with a NUL")
    return text.decode()


def _require_hash(name: str) -> None:
    if name not in hashlib.algorithms_available or name.startswith("shake"):
        raise UnsupportedFeature(f"there is no hash {name} here", hint="sha1, sha256 and sha512 are always there")


def _require_iterations(count: int, what: str) -> None:
    if not count:
        raise CorruptImage(f"{what} has no iterations")
    if count > MAX_ITERATIONS:
        raise LimitExceeded(f"{what} has {count} iterations, above the limit of {MAX_ITERATIONS}")

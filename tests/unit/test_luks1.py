"""The LUKS1 header: made, opened, its key slots changed; broken and hostile headers; a power cut in each change."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

import lamina
from lamina.crypto import luks1
from lamina.crypto.luks1 import HEADER, HEADER_BYTES, KEY_SLOT, Luks1, Settings, WrongPassphrase, af_merge, af_split
from lamina.crypto.sectors import CipherSpec
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

BASE = 8192
SIZE = 4 << 20
FAST = Settings(iter_time=0)


class Recorded(MemoryStorage):
    """It keeps what was on stable storage after each flush, and each write between them."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.history: list[Any] = []

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.history.append((offset, bytes(view)))
        super().write(offset, view, flags)

    def flush(self) -> None:
        self.history.append(None)
        super().flush()


def new(settings: Settings = FAST, passphrase: bytes = b"secret") -> tuple[Luks1, bytes, Child]:
    storage = Child(Recorded(SIZE), "file")
    return *Luks1.create(storage, BASE, passphrase, settings), storage


def again(storage: Child) -> Luks1:
    return Luks1.read(storage, BASE, SIZE - BASE)


@pytest.mark.parametrize("size", [16, 24, 32, 64])
@pytest.mark.parametrize("hash", ["sha1", "sha256", "sha512"])
def test_a_key_in_stripes_needs_all_of_them(size: int, hash: str) -> None:
    key = bytes(range(size))
    material = af_split(key, hash)
    assert len(material) == 4000 * size
    assert af_merge(material, size, hash) == key
    material[17 * size] ^= 1
    assert af_merge(material, size, hash) != key


@pytest.mark.parametrize(
    ("cipher", "mode", "size"),
    [
        ("aes", "xts-plain64", 64),
        ("aes", "xts-plain", 32),
        ("aes", "cbc-essiv:sha256", 24),
        ("cast5", "cbc-plain64", 16),
    ],
)
def test_a_new_header_opens_with_its_passphrase_alone(cipher: str, mode: str, size: int) -> None:
    made, key, storage = new(Settings(CipherSpec.parse(cipher, mode), size, "sha512", 0))
    found = again(storage)
    assert found.unlock(b"secret") == key
    assert len(key) == size
    with pytest.raises(WrongPassphrase):
        found.unlock(b"Secret")
    assert found.slots == made.slots
    assert found.payload_offset == made.layout(size)[1]
    assert found.to_json() == made.to_json()
    text = json.dumps(found.to_json()) + repr(found)
    assert key.hex() not in text
    assert "secret" not in text


def test_slots_are_added_and_erased() -> None:
    made, key, storage = new()
    for number in range(1, 8):
        assert made.add_key(key, b"%d" % number, iter_time=0) == number
    with pytest.raises(lamina.OptionError, match="all eight"):
        made.add_key(key, b"more", iter_time=0)
    with pytest.raises(lamina.OptionError, match="in use"):
        made.add_key(key, b"more", slot=3, iter_time=0)
    assert again(storage).slots_of(b"5") == [5]
    old = made.slots[5]
    before = storage.node.read_into  # the storage itself
    material = bytearray(made.material_bytes)
    before(BASE + old.offset, memoryview(material))
    made.erase_slot(5)
    rest = bytearray(made.material_bytes)
    before(BASE + old.offset, memoryview(rest))
    assert sum(a == b for a, b in zip(material, rest, strict=True)) < len(rest) // 64, "the key material is there still"
    found = again(storage)
    assert found.slots_of(b"5") == []
    assert found.unlock(b"6") == key
    assert made.add_key(key, b"new", slot=5, iter_time=0) == 5
    for number in (0, 1, 2, 3, 4, 5, 6):
        made.erase_slot(number)
    with pytest.raises(lamina.OptionError, match="last one"):
        made.erase_slot(7)
    assert again(storage).unlock(b"7") == key
    made.erase_slot(7, force=True)
    with pytest.raises(WrongPassphrase):
        again(storage).unlock(b"7")
    with pytest.raises(lamina.OptionError, match="not in use"):
        made.erase_slot(7)


def states(history: list[Any], before: bytes) -> Any:
    """What a cut of the power may leave: the writes since the last flush may be there or not, each by itself."""
    stable, waiting = bytearray(before), []
    for event in history:
        if event is not None:
            waiting.append(event)
        for chosen in range(1 << len(waiting)):
            state = bytearray(stable)
            for number, (offset, data) in enumerate(waiting):
                if chosen >> number & 1:
                    state[offset : offset + len(data)] = data
            yield bytes(state)
        if event is None:
            for offset, data in waiting:
                stable[offset : offset + len(data)] = data
            waiting = []


def bytes_of(storage: Child) -> bytes:
    data = bytearray(storage.node.size)
    storage.node.read_into(0, memoryview(data))
    return bytes(data)


@pytest.mark.parametrize("change", ["add", "erase"])
def test_a_power_cut_loses_no_passphrase_that_should_stay(change: str) -> None:
    made, key, storage = new()
    made.add_key(key, b"second", iter_time=0)
    node: Any = storage.node
    before = bytes_of(storage)
    node.history.clear()
    if change == "add":
        made.add_key(key, b"third", iter_time=0)
    else:
        made.erase_slot(1)
    seen = 0
    for state in states(node.history, before):
        cut = Child(MemoryStorage(SIZE), "file")
        cut.write(0, memoryview(state))
        found = again(cut)
        assert found.unlock(b"secret") == key
        if change == "add":
            assert found.unlock(b"second") == key
            # Whatever the header calls enabled opens.
            assert all(slot.active is False or found._key_in(slot, word) for slot, word in zip(
                found.slots, (b"secret", b"second", b"third", *[b""] * 5), strict=True))  # fmt: skip
        seen += 1
    assert seen >= 6


def broken(change: Any) -> Child:
    storage = new()[2]
    raw = bytearray(HEADER_BYTES)
    storage.read_into(BASE, memoryview(raw))
    change(raw)
    storage.write(BASE, memoryview(raw))
    return storage


def field(raw: bytearray, name: str, value: Any) -> None:
    at = HEADER[name].offset
    raw[at : at + HEADER[name].size] = value if isinstance(value, bytes) else HEADER.pack_field(name, value)


def slot_field(raw: bytearray, slot: int, name: str, value: int) -> None:
    struct.pack_into(">I", raw, HEADER.size + slot * KEY_SLOT.size + KEY_SLOT[name].offset, value)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda raw: field(raw, "magic", b"LUKS\xba\xbf"), lamina.FormatError, "no LUKS header"),
        (lambda raw: field(raw, "version", 2), lamina.UnsupportedFeature, "version 2"),
        (lambda raw: field(raw, "cipher_name", b"x" * 32), lamina.CorruptImage, "ends with a NUL"),
        (lambda raw: field(raw, "cipher_name", b"\x1b[2J".ljust(32, b"\0")), lamina.CorruptImage, "not text"),
        (lambda raw: field(raw, "cipher_name", b"twofish".ljust(32, b"\0")), lamina.UnsupportedFeature, "twofish"),
        (lambda raw: field(raw, "hash_spec", b"whirlpool".ljust(32, b"\0")), lamina.UnsupportedFeature, "whirlpool"),
        (lambda raw: field(raw, "key_bytes", 1 << 31), lamina.CorruptImage, "does not fit"),
        (lambda raw: field(raw, "key_bytes", 0), lamina.CorruptImage, "does not fit"),
        (lambda raw: field(raw, "mk_digest_iter", 0), lamina.CorruptImage, "no iterations"),
        (lambda raw: field(raw, "mk_digest_iter", (1 << 32) - 1), lamina.LimitExceeded, "above the limit"),
        (lambda raw: slot_field(raw, 0, "iterations", (1 << 32) - 1), lamina.LimitExceeded, "key slot 0"),
        (lambda raw: slot_field(raw, 0, "iterations", 0), lamina.CorruptImage, "key slot 0 has no"),
        (lambda raw: slot_field(raw, 3, "stripes", 0), lamina.CorruptImage, "3 has 0 stripes"),
        (lambda raw: slot_field(raw, 3, "stripes", 1 << 31), lamina.CorruptImage, "stripes"),
        (lambda raw: slot_field(raw, 3, "active", 1), lamina.CorruptImage, "neither"),
        (lambda raw: slot_field(raw, 3, "key_material_offset", 1), lamina.CorruptImage, "over each other"),
        (lambda raw: slot_field(raw, 3, "key_material_offset", 9), lamina.CorruptImage, "over each other"),
        (lambda raw: slot_field(raw, 3, "key_material_offset", (1 << 32) - 1), lamina.CorruptImage, "outside"),
    ],
)
def test_a_header_that_cannot_be_is_refused(change: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        again(broken(change))


def test_slots_may_take_so_long_and_no_longer() -> None:
    made, _, _ = new()
    with pytest.raises(lamina.LimitExceeded, match="more than -1 seconds"):
        made.unlock(b"secret", patience=-1)


def test_a_passphrase_takes_as_long_as_was_asked_for() -> None:
    assert luks1.iterations_in("sha256", 64, 200) >= 99 * luks1.iterations_in("sha256", 64, 2)
    assert luks1.iterations_in("sha1", 16, 10**9) == luks1.MAX_ITERATIONS

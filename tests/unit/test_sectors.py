"""Sectors are encrypted as the standard library of ciphers does it one by one, however many there are."""

from __future__ import annotations

import os
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.crypto import sectors
from lamina.crypto.sectors import SECTOR, CipherSpec

KINDS = [
    ("aes", "xts-plain64", 64),
    ("aes", "xts-plain", 32),
    ("aes", "cbc-essiv:sha256", 32),
    ("aes", "cbc-plain64", 16),
    ("aes", "cbc-plain", 24),
    ("aes", "ecb", 32),
    ("cast5", "cbc-plain64", 16),
    ("cast5", "ecb", 16),
]


def test_xts_by_the_vector_of_the_standard() -> None:
    """IEEE 1619, annex B, vector 10: a sector of 512 bytes with two keys of 256 bits."""
    key = bytes.fromhex("2718281828459045235360287471352662497757247093699959574966967627") + bytes.fromhex(
        "3141592653589793238462643383279502884197169399375105820974944592"
    )
    plain = bytes(range(256)) * 2
    done = CipherSpec.parse("aes", "xts-plain64").with_key(key).encrypt(0xFF, memoryview(plain))
    assert done[:16].hex() == "1c3b3a102f770386e4836c99e370cf9b"
    expected = Cipher(algorithms.AES(key), modes.XTS((0xFF).to_bytes(16, "little"))).encryptor().update(plain)
    assert done == expected


@pytest.mark.parametrize(("cipher", "mode", "size"), KINDS)
@pytest.mark.parametrize("sector", [0, 7, (1 << 32) - 5, (1 << 33) + 1])
def test_many_sectors_are_encrypted_as_each_by_itself(cipher: str, mode: str, size: int, sector: int) -> None:
    found = CipherSpec.parse(cipher, mode).with_key(os.urandom(size))
    for count in (1, 2, sectors._FEW, sectors._PIECE // SECTOR + 3, 300):
        plain = os.urandom(count * SECTOR)
        done = found.encrypt(sector, memoryview(plain))
        each = b"".join(
            found.encrypt(sector + at, memoryview(plain)[at * SECTOR : (at + 1) * SECTOR]) for at in range(count)
        )
        assert done == each
        found.decrypt(sector, memoryview(done))
        assert done == plain


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), st.integers(0, 1 << 40), st.binary(min_size=1, max_size=64), st.integers(0, 31))
def test_any_part_is_what_was_encrypted(kind: Any, sector: int, data: bytes, blocks: int) -> None:
    cipher, mode, size = kind
    found = CipherSpec.parse(cipher, mode).with_key(bytes(range(size)))
    plain = (data * SECTOR)[: len(data) * SECTOR // 4 * 4]
    plain = plain[: len(plain) // SECTOR * SECTOR] + bytes(16 * blocks)
    done = found.encrypt(sector, memoryview(plain))
    assert len(done) == len(plain)
    found.decrypt(sector, memoryview(done))
    assert done == plain


def test_a_cipher_that_is_not_here_is_refused_by_name() -> None:
    refused = [("serpent", "xts-plain64"), ("aes", "ctr-plain"), ("aes", "cbc-essiv"), ("aes", "cbc-essiv:md9")]
    for cipher, mode in [*refused, ("cast5", "xts-plain64"), ("aes", "cbc-plain:sha256"), ("aes", "")]:
        with pytest.raises(lamina.UnsupportedFeature, match=f"{cipher}-{mode.split(':')[0]}"):
            CipherSpec.parse(cipher, mode)
    with pytest.raises(lamina.UnsupportedFeature, match="160 bits"):
        CipherSpec.parse("aes", "xts-plain64").with_key(bytes(20))
    with pytest.raises(lamina.UnsupportedFeature, match="equal"):
        CipherSpec.parse("aes", "xts-plain64").with_key(bytes(64))
    with pytest.raises(lamina.UnsupportedFeature, match="sha1"):
        CipherSpec.parse("aes", "cbc-essiv:sha1").with_key(bytes(32))


def test_the_key_is_in_no_text() -> None:
    key = bytes(range(64))
    found = CipherSpec.parse("aes", "xts-plain64").with_key(key)
    assert repr(found) == "<SectorCipher aes-xts-plain64>"

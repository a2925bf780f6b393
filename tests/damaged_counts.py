"""qcow2 images whose reference counts and flags are wrong, for tests of repair: nothing that says where a byte of the guest
lies is changed."""

from __future__ import annotations

import random
from pathlib import Path

import lamina
from lamina.errors import LimitExceeded
from lamina.formats.qcow2 import layout as q

#: The size of the clusters of images with extended L2 entries.
EXTENDED = 16_384


def made(path: Path, rng: random.Random, cluster: int, bits: int, size: int = 1 << 20) -> bytes:
    """A new image with data, and often a snapshot; what its disk reads as."""
    lamina.create(path, "qcow2", size, cluster_size=cluster, refcount_bits=bits, extended_l2=cluster == EXTENDED)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for _ in range(12):
            offset = rng.randrange(size)
            image.write(offset, rng.randbytes(min(rng.choice((1, 5000, 60_000)), size - offset)))
        if rng.randrange(3):
            try:
                image.create_snapshot("one")
                image.write(rng.randrange(size // 2), rng.randbytes(60_000))
            except LimitExceeded:
                pass
        return image.read(0, size)


def word(raw: bytes | bytearray, at: int) -> int:
    return int.from_bytes(raw[at : at + 8], "big")


def put(raw: bytearray, at: int, value: int) -> None:
    raw[at : at + 8] = value.to_bytes(8, "big")


def damaged(content: bytes, rng: random.Random, cluster: int) -> bytes:
    """Counts, pointers to counts, and flags are changed."""
    raw = bytearray(content)
    header = q.HEADER_V3.unpack(raw)
    table, l1 = header.refcount_table_offset, header.l1_table_offset
    blocks = [word(raw, table + 8 * at) for at in range(cluster // 8)]
    for _ in range(rng.randrange(1, 10)):
        kind = rng.randrange(8)
        if kind < 4:
            block = rng.choice([block for block in blocks if block])
            raw[block + rng.randrange(cluster)] = rng.randrange(256)
        elif kind == 4:
            put(raw, table + 8 * rng.randrange(len([block for block in blocks if block])), rng.choice((0, 3, 1 << 50)))
        else:
            at = l1 + 8 * rng.randrange(header.l1_size)
            l2 = word(raw, at) & q.OFFSET_MASK
            size = 16 if cluster == EXTENDED else 8
            at = l2 + size * rng.randrange(cluster // size) if l2 and kind > 5 else at
            if word(raw, at) & q.OFFSET_MASK and not word(raw, at) & q.COMPRESSED:
                put(raw, at, word(raw, at) ^ q.COPIED)
    return bytes(raw)

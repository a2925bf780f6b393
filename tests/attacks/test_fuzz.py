"""Mutations of valid images: bytes flipped, fields and table entries set to interesting values, pieces moved about.

The seed is printed. LAMINA_SEED repeats a run, LAMINA_FUZZ_SECONDS makes it longer; `LAMINA_FUZZ_KEEP=FOLDER` keeps the image
that failed.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import lamina
from lamina.formats.qcow2 import layout as q
from tests import evidence

from .images import KIB, U64, Victim, victim
from .oracle import Answer, survives

SECONDS = float(os.environ.get("LAMINA_FUZZ_SECONDS", "10"))

_HEADER_FIELDS = [field.name for field in q.HEADER_V3.fields if field.is_integer]
_INTERESTING = (
    0,
    1,
    2,
    7,
    8,
    63,
    64,
    511,
    512,
    513,
    0x7FFF,
    0xFFFF,
    0x10000,
    0x10001,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
)
_EXTENSIONS = (0, q.EXT_BACKING_FORMAT, q.EXT_FEATURE_NAMES, q.EXT_BITMAPS, q.EXT_ENCRYPTION, q.EXT_DATA_FILE, 0x1234)


def interesting(rng: random.Random, found: Victim, bits: int) -> int:
    """A value that parsers stumble over: limits, their neighbours, offsets that mean something in this image."""
    kind = rng.randrange(6)
    if kind == 0:
        value = rng.choice(_INTERESTING)
    elif kind == 1:
        value = (1 << rng.randrange(bits + 1)) + rng.choice((-1, 0, 1))
    elif kind == 2:
        value = rng.getrandbits(bits)
    elif kind == 3:
        value = rng.randrange(len(found.bytes) // 512 + 2) * 512 + rng.choice((0, 0, 0, 1, 8))
    else:
        cluster = 1 << min(max(found.bytes[23], 9), 16)
        value = rng.randrange(len(found.bytes) // cluster + 2) * cluster
        value |= rng.choice((0, q.COPIED, q.COPIED, q.COMPRESSED, q.ZERO, q.COPIED | q.ZERO))
    return value & ((1 << bits) - 1)


def set_field(rng: random.Random, found: Victim) -> str:
    name = rng.choice(_HEADER_FIELDS)
    bits = 8 * len(q.HEADER_V3.pack_field(name, 0))
    value = interesting(rng, found, bits)
    found.set(**{name: value})
    return f"{name} = {value:#x}"


def set_entry(places: Callable[[random.Random, Victim], int]) -> Callable[[random.Random, Victim], str]:
    def change(rng: random.Random, found: Victim) -> str:
        at = places(rng, found)
        if not 0 <= at <= len(found.bytes) - 8:
            return "nothing"
        value = interesting(rng, found, 64)
        found.put(at, value)
        return f"entry at {at:#x} = {value:#x}"

    return change


def set_count(rng: random.Random, found: Victim) -> str:
    at = found.refblock(rng.randrange(64)) if len(found.bytes) > found.reftable() + 8 else 0
    if at + 2 > len(found.bytes):
        return "nothing"
    found.put(at, value := rng.choice((0, 1, 2, 0xFFFF)), 2)
    return f"count at {at:#x} = {value}"


def flip_bit(rng: random.Random, found: Victim) -> str:
    at = rng.randrange(len(found.bytes))
    found.bytes[at] ^= 1 << rng.randrange(8)
    return f"bit in {at:#x}"


def overwrite(rng: random.Random, found: Victim) -> str:
    at, length = rng.randrange(len(found.bytes)), rng.randrange(1, 64)
    found.bytes[at : at + length] = rng.choice((rng.randbytes(length), bytes(length), b"\xff" * length))
    return f"{length} bytes at {at:#x}"


def insert(rng: random.Random, found: Victim) -> str:
    at, length = rng.choice((rng.randrange(len(found.bytes)), rng.randrange(256))), rng.choice((1, 8, 16, 512))
    found.bytes[at:at] = rng.randbytes(length)
    return f"{length} bytes inserted at {at:#x}"


def copy_piece(rng: random.Random, found: Victim) -> str:
    size = rng.choice((8, 512, 4096))
    source, target = (rng.randrange(len(found.bytes) // size + 1) * size for _ in range(2))
    found.bytes[target : target + size] = found.bytes[source : source + size]
    return f"{size} bytes from {source:#x} to {target:#x}"


def cut(rng: random.Random, found: Victim) -> str:
    size = rng.choice((rng.randrange(len(found.bytes) + 1), rng.randrange(128)))
    found.truncate(size)
    return f"cut to {size}"


def add_extension(rng: random.Random, found: Victim) -> str:
    kind, data = rng.choice(_EXTENSIONS), rng.randbytes(rng.choice((0, 1, 24, 48, 96)))
    length = rng.choice((None, None, interesting(rng, found, 32)))
    found.extension(kind, data, length)
    return f"extension {kind:#x} of {len(data)}, said to be {length}"


_MUTATIONS: tuple[tuple[Callable[[random.Random, Victim], str], int], ...] = (
    (set_field, 6),
    (set_entry(lambda rng, found: found.l1(rng.randrange(4))), 3),
    (set_entry(lambda rng, found: found.l2(rng.randrange(32))), 5),
    (set_entry(lambda rng, found: found.reftable(rng.randrange(3))), 3),
    (set_count, 3),
    (flip_bit, 2),
    (overwrite, 2),
    (insert, 1),
    (copy_piece, 2),
    (cut, 1),
    (add_extension, 1),
)


def mutate(rng: random.Random, found: Victim) -> list[str]:
    """Change `found` in a few ways; what was done."""
    done = []
    actions, weights = zip(*_MUTATIONS, strict=True)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if len(found.bytes) < q.HEADER_V3.size or found.bytes[23] > 24:
            break
        done.append(rng.choices(actions, weights)[0](rng, found))
    return done


def originals(folder: Path) -> list[Victim]:
    (folder / "base.raw").write_bytes(b"\x77" * (96 * KIB))
    backed = {"backing_file": "base.raw", "backing_fmt": "raw"}
    return [
        victim(folder, "a.qcow2", size=64 * KIB, cluster_size=512),
        victim(folder, "b.qcow2", size=128 * KIB, cluster_size=4096, **backed),
        victim(folder, "c.qcow2", size=128 * KIB, cluster_size=4096, compat="0.10", **backed),
        victim(folder, "d.qcow2", size=64 * KIB, cluster_size=512, refcount_bits=1),
        victim(folder, "e.qcow2", size=1024 * KIB, cluster_size=64 * KIB, refcount_bits=64),
        victim(folder, "f.qcow2", size=200 * KIB + 512, cluster_size=1024, compat="0.10"),
        victim(folder, "g.qcow2", size=512 * KIB, cluster_size=16 * KIB, extended_l2=True, **backed),
    ]


def clean(answers: list[Answer]) -> bool:
    """Whether the check, the last answer of those that only read, found no error."""
    found = answers[-1].value
    return isinstance(found, tuple) and not found[0] and not found[2]


def test_mutated_images_survive_the_oracle(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    sources = originals(tmp_path)
    base = tmp_path / "base.raw"
    kept = base.read_bytes()
    target = tmp_path / "hostile.qcow2"
    end = time.monotonic() + SECONDS
    rounds = answered = 0
    while time.monotonic() < end:
        source = rng.choice(sources)
        found = Victim(source.path)
        done = mutate(rng, found)
        found.save(target)
        try:
            # Tracing memory is slow: some of the time.
            result = survives(target, granted=[base, *(other.path for other in sources)], costs=rounds % 8 == 0)
            if clean(result.read):
                assert clean(result.after), f"clean before, after ordinary writes {result.after[-1]}"
        except BaseException as error:
            if keep := os.environ.get("LAMINA_FUZZ_KEEP"):
                found.save(Path(keep) / "failed.qcow2")
            error.add_note(f"round {rounds} of seed {seed}: {source.path.name} with {'; '.join(done)}")
            raise
        rounds += 1
        answered += not result.errors
    print(f"{rounds} images, {answered} of them without any error")
    evidence.count("mutated images", rounds)
    assert base.read_bytes() == kept
    assert rounds > 10


def test_valid_images_answer_without_an_error(tmp_path: Path) -> None:
    """What is mutated is valid to begin with: else the fuzzer would only ever see the first check."""
    for source in originals(tmp_path):
        result = survives(source.path, granted=[tmp_path / "base.raw"])
        refused = [answer for answer in result.written if answer.error not in (None, "NotSupported")]
        assert not refused, source.path
        with lamina.open(source.path, format="qcow2") as image:
            assert image.node.check().clean  # type: ignore[attr-defined]


def test_every_truncation_of_the_header_survives(tmp_path: Path) -> None:
    found = victim(tmp_path, cluster_size=512, size=64 * KIB)
    for length in range(q.HEADER_V3.size + 16, -1, -4):
        found.truncate(length).save()
        assert survives(found.path, costs=False).errors


def test_every_byte_of_the_header_may_be_all_ones(tmp_path: Path) -> None:
    path = victim(tmp_path, cluster_size=4096).path
    for at in range(0, q.HEADER_V3.size + 8, 2):
        found = Victim(path)
        found.put(at, U64 >> 48, 2)
        survives(found.save(tmp_path / "ones.qcow2"), costs=False)

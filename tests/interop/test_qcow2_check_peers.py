"""Our check of qcow2 images against `qemu-img check`: on whole images of every shape, and on broken ones.

The images are QEMU's own; then words of their tables are overwritten. Leaks and check errors must be as many as QEMU finds,
corruptions never fewer. We are stricter in a few points, all of which the specification asks for:

- an L2 entry that is marked COPIED but points nowhere (only an external data file may have that);
- the zero flag in version 2;
- a cluster that is metadata and something else, though its reference count agrees with that;
- COPIED flags behind an L1 entry that points into the header: QEMU walks that "table" but skips its flags.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import FormatError
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.check import check
from lamina.formats.qcow2.header import Header
from lamina.report import CheckReport
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

STATISTICS = {
    "image-end-offset": "image_end_offset",
    "total-clusters": "total_clusters",
    "allocated-clusters": "allocated_clusters",
    "fragmented-clusters": "fragmented_clusters",
    "compressed-clusters": "compressed_clusters",
}


class Bytes:
    """The bytes of an image, and where its tables are."""

    def __init__(self, raw: bytes) -> None:
        self.raw = bytearray(raw)
        (self.cluster_bits,) = struct.unpack_from(">I", raw, 20)
        (self.l1_size,) = struct.unpack_from(">I", raw, 36)
        self.l1, self.reftable = struct.unpack_from(">QQ", raw, 40)
        self.cs = 1 << self.cluster_bits
        self.block = self.get(self.reftable)
        self.l2 = self.get(self.l1) & q.OFFSET_MASK

    def get(self, at: int) -> int:
        return int(struct.unpack_from(">Q", self.raw, at)[0])

    def put(self, at: int, value: int) -> None:
        struct.pack_into(">Q", self.raw, at, value)

    def entries(self, compressed: bool = False) -> list[int]:
        """Where the entries of the first L2 table are that point somewhere."""
        places = range(self.l2, self.l2 + self.cs, 8)
        flag = q.COMPRESSED if compressed else 0
        return [at for at in places if self.get(at) & q.OFFSET_MASK and self.get(at) & q.COMPRESSED == flag]

    def count(self, offset: int, value: int) -> None:
        """Store the reference count, of 16 bits and in the first block, of the cluster at `offset`."""
        struct.pack_into(">H", self.raw, self.block + 2 * (offset // self.cs), value)


def ours(raw: bytes) -> CheckReport:
    storage = MemoryStorage(len(raw))
    storage.write(0, memoryview(raw))
    storage.read_only = True
    child = Child(storage, "file")
    return check(child, Header.read(child))


def theirs(qemu: Any, image: Path, raw: bytes) -> dict[str, Any]:
    image.write_bytes(raw)
    status, report = qemu.check(image)
    assert "error" not in report, report
    if report.get("check-errors"):
        assert status == 1
    else:
        assert status == (2 if report.get("corruptions") else 3 if report.get("leaks") else 0)
    return dict(report)


def compare(mine: CheckReport, peer: dict[str, Any], *, stricter: int = 0) -> None:
    said = [finding.message for finding in mine.findings[:20]]
    assert mine.check_errors == peer.get("check-errors", 0), said
    assert mine.leaks == peer.get("leaks", 0), said
    assert mine.corruptions == peer.get("corruptions", 0) + stricter, said
    for key, name in STATISTICS.items():
        # Where counts are unknown, QEMU leaves their clusters out of the end offset; we go by the references.
        if key != "image-end-offset" or not mine.check_errors:
            assert getattr(mine, name) == peer.get(key, 0), key


def make(qemu: Any, image: Path, size: str, options: str, *commands: str) -> Bytes:
    image.unlink(missing_ok=True)
    qemu.img("create", "-q", "-f", "qcow2", "-o", options, image, size)
    if commands:
        qemu.io("-f", "qcow2", *(word for command in commands for word in ("-c", command)), image)
    return Bytes(image.read_bytes())


SHAPES = [f"cluster_size={1 << bits}" for bits in range(9, 22)]
SHAPES += [f"compat=0.10,cluster_size={1 << bits}" for bits in (9, 12, 16, 21)]
SHAPES += [f"cluster_size={size},refcount_bits={1 << order}" for size in (512, 4096, 65536) for order in range(7)]


@pytest.mark.parametrize("options", SHAPES)
def test_whole_images_are_clean(qemu: Any, tmp_path: Path, options: str) -> None:
    size = int(options.split("cluster_size=")[1].split(",")[0])
    commands = [f"write {3 * size} {2 * size}", f"write 0 {size}", f"write -z {8 * size} {size}"]
    if options.split(",")[-1] != "refcount_bits=1":
        commands += [f"write -c {6 * size} {size}", f"write -c {7 * size} {size}"]
    commands += [f"write {200 * size} 512", f"discard {3 * size} {size}"]
    image = make(qemu, tmp_path / "image", str(1000 * size + 512), options, *commands)
    mine = ours(bytes(image.raw))
    assert mine.clean, mine.findings
    compare(mine, theirs(qemu, tmp_path / "image", bytes(image.raw)))


def test_many_refcount_blocks_and_tables(qemu: Any, tmp_path: Path) -> None:
    for options in ("cluster_size=512,refcount_bits=64", "cluster_size=512,refcount_bits=1", "cluster_size=4096"):
        image = make(qemu, tmp_path / "image", "24M", options + ",preallocation=metadata", "write 1M 4M")
        mine = ours(bytes(image.raw))
        assert mine.clean, mine.findings
        compare(mine, theirs(qemu, tmp_path / "image", bytes(image.raw)))


@pytest.fixture(scope="session")
def sample(qemu: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """4 KiB clusters with data, zeros and compressed data, under two L2 tables."""
    commands = ["write 0 64k", "write 128k 4k", "write 256k 8k", "write -z 512k 8k"]
    commands += [f"write -c {1024 + 4 * index}k 4k" for index in range(3)]
    folder = tmp_path_factory.mktemp("check")
    return bytes(make(qemu, folder / "image", "4M", "cluster_size=4096", *commands, "write 3M 12k").raw)


def spoil(image: Bytes, name: str) -> None:
    """Break one thing."""
    first, second = image.entries()[:2]
    packed = image.entries(compressed=True)[0]
    value, end = image.get(first), len(image.raw)
    place = value & q.OFFSET_MASK
    words = {
        "L2 COPIED cleared": (first, place),
        "L1 COPIED cleared": (image.l1, image.l2),
        "compressed and COPIED": (packed, image.get(packed) | q.COPIED),
        "L2 to another's cluster": (first, image.get(second)),
        "L2 to an L2 table": (first, image.l2 | q.COPIED),
        "L2 to the L1 table": (first, image.l1 | q.COPIED),
        "L2 to the refcount table": (first, image.reftable | q.COPIED),
        "L2 to the refcount block": (first, image.block | q.COPIED),
        "L2 to nowhere, COPIED": (first, q.COPIED),
        "L2 to the end": (first, end | q.COPIED),
        "L2 far beyond": (first, 1 << 55 | q.COPIED),
        "L2 misaligned": (first, value + 512),
        "L2 misaligned at the end": (first, q.COPIED | end - 512),
        "L2 misaligned, zero flag": (first, value + 513),
        "L2 reserved bit 1": (first, value | 2),
        "L2 reserved bit 56": (first, value | 1 << 56),
        "compressed in the header": (packed, q.COMPRESSED),
        "compressed just past the end": (packed, q.COMPRESSED | end + 5),
        "compressed far past the end": (packed, q.COMPRESSED | 15 << 58 | end - 5),
        "compressed at bit 56": (packed, image.get(packed) | 1 << 56),
        "L1 reserved bit": (image.l1, image.get(image.l1) | 1 << 56),
        "L1 misaligned": (image.l1, image.get(image.l1) + 512),
        "L1 to the end": (image.l1, end | q.COPIED),
        "L1 far beyond": (image.l1, 1 << 50 | q.COPIED),
        "L1 zeroed": (image.l1, 0),
        "L1 twice the same": (image.l1 + 8, image.get(image.l1)),
        "L1 to the refcount block": (image.l1, image.block | q.COPIED),
        "L1 to the header": (image.l1 + 8, q.COPIED),
        "refblock zeroed": (image.reftable, 0),
        "refblock misaligned": (image.reftable, image.block + 512),
        "refblock at the end": (image.reftable, end),
        "refblock at 2^55": (image.reftable, 1 << 55),
        "refblock at 2^63": (image.reftable, 0xFFFF << 48),
        "refblock reserved bit": (image.reftable, image.block | 1),
        "refblock twice": (image.reftable + 8, image.block),
        "refblock is data": (image.reftable + 8, place),
        "refblock is an L2 table": (image.reftable + 8, image.l2),
        "refblock is the refcount table": (image.reftable, image.reftable),
        "refblock is the L1 table": (image.reftable, image.l1),
        "last refblock beyond": (image.reftable + image.cs - 8, 1 << 60),
    }
    counts = {
        "count of data 0": (place, 0),
        "count of data 2": (place, 2),
        "count of header 0": (0, 0),
        "count of header 2": (0, 2),
        "count of L1 0": (image.l1, 0),
        "count of L2 0": (image.l2, 0),
        "count of L2 2": (image.l2, 2),
        "count of refcount block 0": (image.block, 0),
        "count of refcount table 3": (image.reftable, 3),
        "count of compressed 2": (image.get(packed) & q.OFFSET_MASK & -image.cs, 2),
        "count of compressed 4": (image.get(packed) & q.OFFSET_MASK & -image.cs, 4),
        "count beyond the end": (end + 5 * image.cs, 1),
    }
    if name in words:
        image.put(*words[name])
    elif name in counts:
        image.count(*counts[name])
    elif name == "cut":
        del image.raw[-image.cs :]
    elif name == "cut by bytes":
        del image.raw[-100:]
    elif name == "cut in half":
        del image.raw[end // 2 :]
    elif name == "longer":
        image.raw += bytes(3 * image.cs + 100)
    elif name == "metadata shared, all counted":
        image.put(first, image.l2)
        image.put(image.l1, image.l2)
        image.count(image.l2, 2)
        image.count(place, 0)
    else:
        assert name == "shared and counted"
        image.put(first, place)
        image.put(second, place)
        image.count(place, 2)
        image.count(place + image.cs, 0)


BREAKS = """L2 COPIED cleared, L1 COPIED cleared, compressed and COPIED, L2 to another's cluster, L2 to an L2 table,
L2 to the L1 table, L2 to the refcount table, L2 to the refcount block, L2 to the end, L2 far beyond, L2 misaligned,
L2 misaligned at the end, L2 reserved bit 1, L2 reserved bit 56, compressed in the header, compressed just past the end,
compressed far past the end, compressed at bit 56, L1 reserved bit, L1 misaligned, L1 to the end, L1 far beyond, L1 zeroed,
L1 twice the same, L1 to the refcount block, refblock zeroed, refblock misaligned, refblock at the end, refblock at 2^55,
refblock at 2^63, refblock reserved bit, refblock twice, refblock is data, refblock is an L2 table,
refblock is the refcount table, refblock is the L1 table, last refblock beyond, count of data 0, count of data 2,
count of header 0, count of header 2, count of L1 0, count of L2 0, count of L2 2, count of refcount block 0,
count of refcount table 3, count of compressed 2, count of compressed 4, count beyond the end, cut, cut by bytes,
cut in half, longer, shared and counted"""
NAMES = [name.strip() for name in BREAKS.replace("\n", " ").split(", ")] + ["L2 misaligned, zero flag"]


@pytest.mark.parametrize("name", NAMES)
def test_broken_images_count_the_same(qemu: Any, tmp_path: Path, sample: bytes, name: str) -> None:
    image = Bytes(sample)
    spoil(image, name)
    raw = bytes(image.raw)
    compare(ours(raw), theirs(qemu, tmp_path / "image", raw))


@pytest.mark.parametrize(
    ("name", "more"),
    [("L2 to nowhere, COPIED", 1), ("metadata shared, all counted", 1), ("L1 to the header", 2)],
)
def test_where_ours_is_stricter(qemu: Any, tmp_path: Path, sample: bytes, name: str, more: int) -> None:
    image = Bytes(sample)
    spoil(image, name)
    raw = bytes(image.raw)
    compare(ours(raw), theirs(qemu, tmp_path / "image", raw), stricter=more)


def test_zero_flag_in_version_2(qemu: Any, tmp_path: Path) -> None:
    image = make(qemu, tmp_path / "image", "1M", "compat=0.10,cluster_size=4096", "write 0 64k")
    first = image.entries()[0]
    image.put(first, image.get(first) | q.ZERO)
    raw = bytes(image.raw)
    compare(ours(raw), theirs(qemu, tmp_path / "image", raw), stricter=1)


def test_counts_that_cannot_hold_their_references(qemu: Any, tmp_path: Path) -> None:
    image = make(qemu, tmp_path / "image", "1M", "cluster_size=4096,refcount_bits=1", "write 0 64k")
    for index, target in enumerate((image.l2, image.block, image.get(image.entries()[-1]) & q.OFFSET_MASK)):
        broken = Bytes(bytes(image.raw))
        for at in broken.entries()[: index + 1]:
            broken.put(at, target | q.COPIED)
        raw = bytes(broken.raw)
        compare(ours(raw), theirs(qemu, tmp_path / "image", raw))


def test_snapshots_are_counted(qemu: Any, tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(qemu, path, "4M", "cluster_size=4096", "write 0 64k", "write -c 1M 4k")
    for name in ("first", "second"):
        qemu.img("snapshot", "-c", name, path)
        qemu.io("-f", "qcow2", "-c", "write 0 8k", "-c", "write 3M 8k", path)
    image = Bytes(path.read_bytes())
    mine = ours(bytes(image.raw))
    assert mine.clean, mine.findings
    (table,) = struct.unpack_from(">Q", image.raw, 64)
    l1 = image.get(table)
    l2 = image.get(l1) & q.OFFSET_MASK
    end = len(image.raw)
    for at, value in (
        (table, l1 + 512),
        (table, end),
        (table, 1 << 60),
        (l1, 0),
        (l1, image.get(l1) | 2),
        (l2, end),
        (l2, image.get(l2) | 2),
        (l2, image.get(l2) ^ q.COPIED),
        (l2, image.l2),
        (image.l2 + 8, end),
    ):
        broken = Bytes(bytes(image.raw))
        broken.put(at, value)
        raw = bytes(broken.raw)
        compare(ours(raw), theirs(qemu, path, raw))


def test_an_unknown_count_behind_the_last_cluster(qemu: Any, tmp_path: Path) -> None:
    """An entry that is not on a boundary reaches into the cluster behind the end, whose count cannot be read either."""
    path = tmp_path / "image"
    image = make(qemu, path, "1M", "compat=0.10", "write 0 64k")
    image.put(image.l2, q.COPIED | (len(image.raw) - image.cs + 512))
    image.put(image.reftable, len(image.raw) - 512)
    raw = bytes(image.raw)
    mine = ours(raw)
    assert mine.check_errors == len(raw) // image.cs + 1
    peer = theirs(qemu, path, raw)
    compare(mine, peer, stricter=max(mine.corruptions - peer.get("corruptions", 0), 0))


@pytest.mark.parametrize("options", ["cluster_size=4096", "cluster_size=512,refcount_bits=2", "compat=0.10"])
def test_random_damage(qemu: Any, tmp_path: Path, seed: int, options: str) -> None:
    """Words of the tables replaced at random: corruptions are never fewer than QEMU finds, all else is equal."""
    rng = random.Random(f"{seed}/{options}")
    path = tmp_path / "image"
    sound = make(qemu, path, "1M", options, "write 0 64k", "write -c 512k 64k", "write 700k 12k")
    for _ in range(40):
        image = Bytes(bytes(sound.raw))
        words = [image.l1, image.reftable, image.reftable + 8, *range(image.l2, image.l2 + min(image.cs, 256), 8)]
        for _ in range(rng.randrange(1, 5)):
            at = rng.choice(words)
            old = image.get(at)
            flags = old & (q.COPIED | q.COMPRESSED)
            new = [
                old ^ 1 << rng.randrange(64),
                old ^ q.COPIED,
                flags | rng.randrange(0, len(image.raw) + 3 * image.cs, image.cs),
                flags | rng.randrange(0, len(image.raw) + 3 * image.cs, 512),
                0,
                image.get(rng.choice(words)),
            ]
            image.put(at, rng.choice(new))
        raw = bytes(image.raw)
        try:
            mine = ours(raw)
        except FormatError as error:  # damage in tables never reaches the header
            pytest.fail(str(error))
        peer = theirs(qemu, path, raw)
        compare(mine, peer, stricter=max(mine.corruptions - peer.get("corruptions", 0), 0))

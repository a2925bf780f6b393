"""The laws of `explain` for qcow2: every byte of a file is explained once, as the check sees it and with the values that
are there; and a byte of the disk is found where a read finds it, and leads back.

The images are random, with snapshots, bitmaps, compressed clusters, subclusters, encryption, and widths of counts.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from lamina.creation import create_driver
from lamina.errors import LimitExceeded
from lamina.explanation import DATA, FREE, LEAKED, UNKNOWN, UNREFERENCED, Explanation, Part
from lamina.formats.qcow2 import references, snapshot_table
from lamina.formats.qcow2.explain import Qcow2Explainer
from lamina.formats.qcow2.header import Header
from lamina.formats.qcow2.references import NAMES, References
from lamina.request import Child
from lamina.status import COMPRESSED, ZERO
from tests.attacks.layout_images import SECRET, Kept, content_of, open_on, originals, storage_of

ROUNDS = int(os.environ.get("LAMINA_EXPLAIN_ROUNDS", "6"))
KIB = 1 << 10

#: What the check calls the structures; an explanation has finer names for some.
KINDS = {name: kind for kind, name in NAMES.items()} | {
    "compressed guest data": references.DATA,
    "bitmap directory": references.BITMAPS,
    "bitmap table": references.BITMAPS,
    "bitmap bits": references.BITMAPS,
}


def random_image(rng: random.Random) -> bytes:
    """A valid image with a bit of everything."""
    bits = rng.choice((9, 9, 10, 12, 12, 14, *(16,) * (ROUNDS > 50)))
    cluster = 1 << bits
    options: dict[str, Any] = {
        "cluster_size": cluster,
        "refcount_bits": rng.choice((1, 2, 4, 8, 16, 16, 32, 64)[bits // 14 * 4 :]),
    }
    if rng.randrange(5) == 0:
        options |= {"compat": "0.10", "refcount_bits": 16}
    elif bits >= 14:
        options["extended_l2"] = rng.random() < 0.7
    version2 = "compat" in options
    if not version2 and rng.randrange(3) == 0:
        options["compression_type"] = "zstd"
    if rng.randrange(4) == 0:
        options["encrypt"] = {"format": "luks", "key-secret": SECRET, "iter-time": 1}
    size = rng.randrange(1, 40) * cluster + rng.choice((0, 512, 1024)) % cluster
    backing = rng.randrange(4) == 0
    if backing:
        options |= {"backing_file": "base", "backing_fmt": "raw", "backing_unchecked": True}
    storage = Kept()
    kind: Any = create_driver("qcow2")
    kind.create(Child(storage, "file", grows=True), size, kind.create_schema.parse({**options, "size": size}))
    with open_on(storage, read_only=False, backing=backing) as image:
        node: Any = image.node
        if not version2:
            for number in range(rng.randrange(3)):
                image.add_bitmap(f"b{number}", rng.choice((512, 4096, 65536)), enabled=rng.random() < 0.7)
        for number in range(rng.randrange(5, 25)):
            at = rng.randrange(size)
            length = min(rng.choice((1, 512, cluster, 3 * cluster)), size - at)
            which = rng.randrange(8)
            if which == 0:
                image.zero(at, length, unmap=rng.random() < 0.5)
            elif which == 1:
                image.discard(at, length)
            elif which == 2 and options["refcount_bits"] > 1 and number > 3:
                with suppress(LimitExceeded):  # the counts have too few bits for another one
                    image.create_snapshot(f"s{number}", os.urandom(rng.choice((0, 0, 700))))
            elif which < 5 and node.limits.compress_alignment and options["refcount_bits"] > 4:
                at -= at % cluster
                image.write(at, bytes(rng.choices(b"ab", k=min(cluster, size - at))), compress=True)
            else:
                image.write(at, rng.randbytes(length))
    return content_of(storage)


def explainer(content: bytes, **values: Any) -> Qcow2Explainer:
    return Qcow2Explainer(Child(storage_of(content), "file"), values)


def tiles(of: Qcow2Explainer, size: int) -> Iterator[tuple[Explanation, Part]]:
    """The parts of the file one after the other: each begins where the one before it ends."""
    at = 0
    while at < size:
        found = of.at(at)
        assert len(found.parts) == 1, f"{at:#x}: {found.parts}"
        assert found.problems == ()
        (part,) = found.parts
        assert part.offset == at, f"{at:#x} is inside of {part}"
        assert part.length > 0
        yield found, part
        at += part.length
    assert at == size


def holds(content: bytes, rng: random.Random) -> None:
    of = explainer(content)
    header = Header.read(Child(storage_of(content), "file"))
    disks = {id: _disk(content, id) for id in (None, *_snapshots(content))}
    kinds: dict[int, int] = {}
    for found, part in tiles(of, len(content)):
        # Any byte of it has the same explanation, the exact byte of the guest apart.
        inside = part.offset + rng.randrange(part.length)
        if part.value or rng.randrange(10) == 0:
            assert [_inexact(one) for one in of.at(inside).parts] == [_inexact(part)]
        assert found.cluster == part.offset >> header.cluster_bits
        raw = content[part.offset : part.offset + part.length]
        if isinstance(part.value, int):
            assert int.from_bytes(raw) == part.value, part
        elif part.value is not None:
            assert part.value.encode("utf-8", "surrogateescape") == raw, part
        assert part.structure not in (LEAKED, UNKNOWN), part
        assert (part.structure == FREE) == (found.refcount == 0), part
        if part.structure not in (FREE, UNREFERENCED):
            last = part.offset + part.length - 1
            for cluster in range(part.offset >> header.cluster_bits, (last >> header.cluster_bits) + 1):
                kinds[cluster] = kinds.get(cluster, 0) | KINDS[part.structure]
        for guest in part.guest:
            if guest.exact is None or guest.status not in ("data", "zero"):
                continue
            shift = inside - part.offset
            there = disks[guest.snapshot].guest(guest.offset + min(shift, guest.length - 1))
            assert there.status == guest.status
            assert there.host == part.offset + min(shift, guest.length - 1)
    assert kinds == _of_check(content)
    for id, there in disks.items():
        _guest_leads_back(content, of, there, id, rng)


def _inexact(part: Part) -> Part:
    guests = tuple(one._replace(exact=None) for one in part.guest)
    if part.structure == "bitmap bits":
        return part._replace(guest=guests, text="", details={})
    return part._replace(guest=guests)


def _of_check(content: bytes) -> dict[int, int]:
    """The kinds of references to each cluster that the check collects."""
    storage = Child(storage_of(content), "file")
    walk = References(storage, Header.read(storage))
    walk.walk()
    found: dict[int, int] = {}
    for use, parts in walk.uses.items():
        for cluster in (int(one) for part in parts for one in part):
            found[cluster] = found.get(cluster, 0) | use.kind
    return {cluster: kind for cluster, kind in found.items() if cluster << walk.bits < len(content)}


def _snapshots(content: bytes) -> list[str]:
    storage = Child(storage_of(content), "file")
    return [one.id for one in snapshot_table.read(storage, Header.read(storage))]


def _disk(content: bytes, snapshot: str | None) -> Qcow2Explainer:
    return explainer(content) if snapshot is None else explainer(content, **{"snapshot-id": snapshot})


def _guest_leads_back(
    content: bytes, of: Qcow2Explainer, there: Qcow2Explainer, snapshot: str | None, rng: random.Random
) -> None:
    """Each byte of the disk is where a read finds it, and what is there says that it serves it."""
    storage = Child(storage_of(content), "file")
    header = Header.read(storage)
    with open_on(
        storage_of(content), read_only=True, backing=header.backing_file is not None, snapshot=snapshot
    ) as image:
        at = 0
        while at < image.size:
            step = there.guest(at)
            assert 0 < step.length <= image.size - at
            inside = at + rng.randrange(step.length)
            mapping = image.node.map(inside, 1)  # type: ignore[attr-defined]
            flags = mapping.flags
            expected = (
                "compressed" if flags & COMPRESSED else "zero" if flags & ZERO else "data" if flags else "unallocated"
            )
            assert step.status == expected
            assert (
                there.guest(inside)[4:]
                == step._replace(
                    length=step.length - (inside - at), host=None if step.host is None else step.host + inside - at
                )[4:]
            )
            for part in step.parts:
                assert int.from_bytes(content[part.offset : part.offset + part.length]) == part.value
                (same,) = of.at(part.offset).parts
                assert (same.offset, same.length, same.field, same.value) == (
                    part.offset,
                    part.length,
                    part.field,
                    part.value,
                )
                assert same.details == part.details
            if step.host is not None:
                host = step.host + inside - at
                if not header.crypt_method:
                    assert mapping.offset == host
                    if step.status == "data":
                        assert content[host : host + 1].ljust(1, b"\0") == image.read(inside, 1)
                if host < len(content):
                    (back,) = of.at(host).parts
                    assert (snapshot, inside) in {(one.snapshot, one.exact) for one in back.guest}
                    assert back.structure == DATA
            if step.stored is not None:
                (back,) = of.at(step.stored[0]).parts
                assert back.offset == step.stored[0]
                assert any(
                    one.snapshot == snapshot and one.offset <= inside < one.offset + one.length for one in back.guest
                )
            at += step.length
        assert at == image.size


@pytest.mark.parametrize("number", range(ROUNDS))
def test_random_images(number: int, seed: int) -> None:
    rng = random.Random(f"{seed} {number}")
    holds(random_image(rng), rng)


@pytest.mark.parametrize(
    "original", [one for one in originals() if one.cluster_size <= 16 * KIB], ids=lambda original: original.name
)
def test_images_with_each_feature(original: Any, seed: int) -> None:
    holds(original.content, random.Random(seed))


def test_thousands_of_compressed_clusters_in_one() -> None:
    """All of them lie in one cluster of the file, each with its own bytes."""
    cluster, count = 64 * KIB, 1500
    storage = Kept()
    kind: Any = create_driver("qcow2")
    size = count * cluster
    kind.create(Child(storage, "file", grows=True), size, kind.create_schema.parse({"size": size}))
    with open_on(storage, read_only=False, backing=False) as image:
        for number in range(count):
            image.write(number * cluster, bytes([number % 251]) * cluster, compress=True)
    content = content_of(storage)
    of = explainer(content)
    starts = [step.stored[0] for number in range(count) if (step := of.guest(number * cluster)).stored]
    assert len(starts) == count
    assert max(starts) - min(starts) < 6 * cluster
    for number, start in enumerate(starts):
        (part,) = of.at(start).parts
        assert (part.offset, part.guest[0].offset) == (start, number * cluster)
        assert of.at(start + part.length - 1).parts == (part,)

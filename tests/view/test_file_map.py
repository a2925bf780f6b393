"""The map of a file says of every cluster what `explain` says of its bytes, and shows leaks and overlaps."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.explanation import DATA, FREE, LEAKED, UNKNOWN
from lamina.file_map import KINDS, NUMBER, FileMap, of_regions
from lamina.formats.qcow2.explain import Qcow2Explainer
from lamina.request import Child
from tests.attacks.layout_images import storage_of
from tests.unit.test_explain_qcow2 import random_image

ROUNDS = int(os.environ.get("LAMINA_EXPLAIN_ROUNDS", "6"))
#: What an explanation calls the parts of a kind; bitmaps have several.
WORDS = {
    "free": {FREE},
    "leaked": {LEAKED},
    "unknown": {UNKNOWN},
    "bitmaps": {"bitmap directory", "bitmap table", "bitmap bits"},
    "guest data": {DATA},
    "shared guest data": {DATA},
    "guest data of snapshots": {DATA},
    "compressed guest data": {"compressed guest data"},
}


def explainer_of(raw: bytes) -> Qcow2Explainer:
    return Qcow2Explainer(Child(storage_of(raw), "file"), {})


def kind_at(found: FileMap, offset: int) -> str:
    row = int(found.start.searchsorted(offset, "right")) - 1
    return KINDS[int(found.kind[row])][0]


def test_every_cluster_is_what_explain_says(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        raw = random_image(rng)
        explainer = explainer_of(raw)
        found = explainer.file_map(len(raw))
        assert int(found.length.sum()) == len(raw)
        assert sum(found.bytes_of().values()) == len(raw)
        for offset in range(0, len(raw), found.cluster):
            told = explainer.at(offset)
            kind = kind_at(found, offset)
            names = {part.structure for part in told.parts}
            if names == {"unreferenced"} or kind == "compressed guest data":
                continue  # beside something in the same cluster
            assert names & WORDS.get(kind, {kind}), (offset, kind, names)
            row = int(found.start.searchsorted(offset, "right")) - 1
            assert told.refcount == found.references[row]
            moments = {one.snapshot for part in told.parts for one in part.guest}
            if kind == "guest data of snapshots":
                assert None not in moments
            if kind == "guest data":
                assert None in moments


def test_the_route_leads_to_every_table(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        raw = random_image(rng)
        explainer = explainer_of(raw)
        route = explainer.route()
        assert route is not None
        tables = dict(zip(route.entry.tolist(), route.table.tolist(), strict=True))
        for offset in range(0, explainer.disk_size, route.unit):
            parts: Any = explainer.guest(offset).parts
            entry = offset // route.span
            assert parts[0].offset == route.l1 + 8 * entry
            assert (len(parts) == 2) == (entry in tables)
            if len(parts) == 2:
                assert parts[1].offset == tables[entry] + offset % route.span // route.unit * route.width


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 1 << 20, cluster_size=4096)
    with lamina.open(path, format="qcow2", read_only=False) as opened:
        opened.write(0, b"x" * 8192)
    return path


def map_of(path: Path) -> FileMap:
    raw = path.read_bytes()
    return explainer_of(raw).file_map(len(raw))


def test_a_leak_and_an_overlap_are_seen(image: Path) -> None:
    found = map_of(image)
    assert NUMBER["leaked"] not in found.kind
    assert NUMBER["in conflict"] not in found.kind
    raw = bytearray(image.read_bytes())
    route = explainer_of(bytes(raw)).route()
    assert route is not None
    table = int(route.table[0])
    first, second = raw[table : table + 8], raw[table + 8 : table + 16]
    raw[table + 8 : table + 16] = first  # both entries point to the first cluster
    image.write_bytes(raw)
    found = map_of(image)
    at = int.from_bytes(first) & ~(1 << 63)
    assert kind_at(found, at) == "in conflict"
    assert kind_at(found, int.from_bytes(second) & ~(1 << 63)) == "leaked"


def test_regions_alone_make_a_map(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 10_000)
    regions = lamina.structures(path, format="raw").regions
    assert [KINDS[kind][0] for kind in of_regions(regions, 10_000).kind.tolist()] == ["guest data"]
    assert of_regions(regions, 12_000).start.tolist() == [0, 10_000]
    assert of_regions((), 0).length.tolist() == []


def test_an_image_without_a_usable_header_has_a_map(image: Path) -> None:
    raw = bytearray(image.read_bytes())
    raw[20:24] = b"\xff" * 4  # the number of bits of a cluster
    assert explainer_of(bytes(raw)).file_map(len(raw)).bytes_of() == {"unknown": len(raw)}

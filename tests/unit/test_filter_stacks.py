"""Stacks of filters that leave bytes alone, over random chains: the same bytes, the same exact status, rounded as declared.

`LAMINA_STACKS` sets how many stacks are tried.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from lamina import registry
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.node import Node
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from tests import evidence

STACKS = int(os.environ.get("LAMINA_STACKS", "2000"))
BATCH = 100

#: Filters that change neither bytes nor status, and options drawn for each.
TRANSPARENT: dict[str, Any] = {
    "blkdebug": lambda rng: {
        "align": rng.choice([0, 1, 512, 4096, 65536]),
        "max-transfer": rng.choice([0, 65536, 1 << 20]),
        "opt-write-zero": rng.choice([0, 65536]),
    },
    "blocksize": lambda rng: {"minimum": rng.choice([1, 512, 4096])},
    "cache": lambda rng: {"blocks": rng.choice([2, 16])},
    "delay": lambda rng: {},
    "faults": lambda rng: {"seed": rng.randrange(100)},
    "nodiscard": lambda rng: {},
    "nozero": lambda rng: {},
    "offset": lambda rng: {"offset": 0},
    "protect": lambda rng: {"ranges": "0-1k"},
    "readonly": lambda rng: {},
    "retry": lambda rng: {"retries": 1},
    "stats": lambda rng: {},
    "throttle": lambda rng: {},
}


def layer(rng: random.Random, below: Node | None, model: bytearray) -> tuple[Node, bytearray]:
    """A new qcow2 layer over `below`, with random content, and what it reads as."""
    storage = Child(MemoryStorage(0), "file", grows=True)
    size = max(512, rng.choice([len(model), len(model) // 2, len(model) + 5000, 40000]) + rng.choice([0, 0, 7]))
    options = {"cluster_size": rng.choice([512, 1024, 4096]), "compat": rng.choice(["0.10", "1.1"])}
    values = Qcow2.create_schema.parse(options)
    Qcow2.create(storage, size, values)
    spec: dict[str, Any] = {"file": storage}
    if below is not None:
        spec["backing"] = Child(below, "backing")
    node = Qcow2.open(Qcow2.schema.parse(spec), Opener(read_only=False))
    now = bytearray(model[:size].ljust(size, b"\0"))
    edge = Child(node, "root")
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(size)
        length = min(rng.randrange(1, 9000), size - at)
        if rng.random() < 0.7:
            data = rng.randbytes(length)
            edge.write(at, memoryview(data))
            now[at : at + length] = data
        else:
            edge.zero(at, length)
            now[at : at + length] = bytes(length)
    return node, now


def chain(rng: random.Random) -> tuple[Node, bytearray]:
    node: Node | None = None
    model = bytearray(rng.choice([0, 30000]))
    for _ in range(rng.randrange(1, 4)):
        node, model = layer(rng, node, model)
    assert node is not None
    return node, model


def stack(rng: random.Random, node: Node) -> Node:
    """Up to eight filters over `node`."""
    for _ in range(rng.randrange(1, 9)):
        name = rng.choice(sorted(TRANSPARENT))
        kind: Any = registry.lookup(name, "filter")
        below = node.limits.request_alignment
        options = TRANSPARENT[name](rng)
        if name == "blocksize":
            options["minimum"] = max(options["minimum"], below)
        if name == "blkdebug":
            unit = max(options["align"], below)
            options = {key: value for key, value in options.items() if key == "align" or value % unit == 0}
        spec = {"driver": name, **options, "image": Child(node, "image", grows=True)}
        node = kind.open(kind.schema.parse(spec), Opener(read_only=name == "readonly" or node.read_only))
    return node


@pytest.mark.parametrize("batch", range(STACKS // BATCH))
def test_stacks_change_nothing(batch: int, seed: int) -> None:
    rng = random.Random(f"{seed}/{batch}")
    for number in range(BATCH):
        if number % 10 == 0:
            bare, model = chain(rng)
            right = Child(bare, "root").extents(0, bare.size)
        top = stack(rng, bare)
        root = Child(top, "root")
        assert root.size == len(model), f"{top!r}"
        for at, length in [(0, len(model)), *((rng.randrange(len(model)), rng.randrange(1, 9000)) for _ in range(3))]:
            length = min(length, len(model) - at)
            buffer = bytearray(length)
            root.read_into(at, memoryview(buffer))
            assert buffer == model[at : at + length], f"{top!r} at {at}"
        found = root.extents(0, root.size)
        assert found.coalesce() == right.coalesce(), f"{top!r}"
        alignment = top.limits.request_alignment
        assert found.align(alignment) == right.align(alignment), f"{top!r}"
    evidence.count("stacks of filters compared with what is below them", BATCH)

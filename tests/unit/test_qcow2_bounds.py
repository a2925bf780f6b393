"""A qcow2 image in tight places: requests longer than anybody waits for, and caches smaller than what a request touches."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from lamina.errors import Closed
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.image import Image
from lamina.limits import KIB, MIB, Budget
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.image_checks import check_whole

PATIENCE = 20
PIB = 1 << 50


class Kept(MemoryStorage):
    """Survives the close of its image."""

    def close(self) -> None:
        pass


def opened(storage: MemoryStorage, budget: Budget, *, read_only: bool = False) -> Image:
    options = Qcow2.schema.parse({"file": Child(storage, "file", grows=True)})
    return Image(Qcow2.open(options, Opener(read_only=read_only, budget=budget)))


def created(size: int, **options: Any) -> Kept:
    storage = Kept()
    Qcow2.create(Child(storage, "file", grows=True), size, Qcow2.create_schema.parse(options))
    return storage


@pytest.mark.parametrize("operation", ["zero", "discard"])
def test_a_request_of_a_pebibyte_lets_others_in_and_ends_with_a_close(operation: str) -> None:
    below = created(PIB, cluster_size=65536)
    storage = created(PIB, cluster_size=65536)
    options = Qcow2.schema.parse(
        {
            "file": Child(storage, "file", grows=True),
            "backing": Child(
                Qcow2.open(Qcow2.schema.parse({"file": Child(below, "file")}), Opener(read_only=True)), "backing"
            ),
        }
    )
    image = Image(Qcow2.open(options, Opener(read_only=False)))
    ended: list[BaseException | None] = []

    def long() -> None:
        try:
            getattr(image, operation)(0, PIB)
            ended.append(None)
        except BaseException as error:  # noqa: BLE001 - looked at below
            ended.append(error)

    thread = threading.Thread(target=long, daemon=True)
    thread.start()
    while storage.size < 4 * MIB and thread.is_alive():
        time.sleep(0.001)
    others: list[bool] = []

    def other() -> None:
        for number in range(20):
            image.write(PIB - (number + 1) * MIB, b"other")
            others.append(image.read(PIB - (number + 1) * MIB, 5) == b"other")
        image.close()

    second = threading.Thread(target=other, daemon=True)
    second.start()
    second.join(PATIENCE)
    thread.join(PATIENCE)
    assert not second.is_alive()
    assert not thread.is_alive()
    assert others == [True] * 20
    assert isinstance(ended[0], Closed)


@pytest.mark.parametrize("cache", [0, 2 * KIB, 64 * KIB])
@pytest.mark.parametrize("cluster_size", [512, 4096])
def test_any_cache_however_small(cache: int, cluster_size: int, seed: int) -> None:
    rng = random.Random(f"{seed}/{cache}/{cluster_size}")
    size = 5000 * 512 if cluster_size == 512 else 4 * MIB
    storage = created(size, cluster_size=cluster_size)
    budget = Budget(cache_bytes=cache)
    expected = bytearray(size)
    image = opened(storage, budget)
    for _ in range(60):
        at, length = rng.randrange(size) if rng.random() < 0.8 else 0, rng.choice([100, cluster_size, size // 5, size])
        length = min(length, size - at)
        kind = rng.choice(["write", "write", "compress", "compress", "zero", "discard", "read", "flush", "reopen"])
        data = bytes([rng.randrange(1, 256)]) * length
        if kind in ("write", "compress"):
            image.write(at, data, compress=kind == "compress")
            expected[at : at + length] = data
        elif kind == "zero":
            image.zero(at, length, unmap=rng.random() < 0.5)
            expected[at : at + length] = bytes(length)
        elif kind == "discard":
            lo, hi = -(-at // cluster_size) * cluster_size, (at + length) // cluster_size * cluster_size
            image.discard(at, length)
            if at + length == size:
                hi = size
            if lo < hi:
                expected[lo:hi] = bytes(hi - lo)
        elif kind == "flush":
            image.flush()
        elif kind == "reopen":  # its tables are loaded, not made, from here on
            image.close()
            image = opened(storage, budget)
        else:
            assert image.read(at, length) == expected[at : at + length]
    assert image.read(0, size) == expected
    image.close()
    with opened(storage, budget, read_only=True) as again:
        assert not check_whole(again).leaks
        assert again.read(0, size) == expected

"""The filter `faults`: when rules take part, what each action does, and that the same seed does the same again."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lamina
from lamina import BlockIOError, OptionError
from lamina.errors import NotSupported
from lamina.filters.faults import Faults
from lamina.filters.faults.rule import ByteSet
from lamina.graph import Opener
from lamina.image import Image
from lamina.node import MAY_UNMAP
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

SIZE = 64 * 1024
OLD = bytes(at % 251 for at in range(SIZE))


class Clock:
    """Time stands still until somebody sleeps, or a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.now += seconds


def over(*rules: dict[str, Any], **options: Any) -> tuple[Image, Faults, MemoryStorage]:
    """A disk of SIZE bytes that reads as OLD, the filter over it, and the storage below."""
    storage = MemoryStorage(SIZE)
    storage.write(0, memoryview(OLD))
    clock = options.pop("clock", None)
    spec = {"image": Child(storage, "image", grows=True), "rules": list(rules), **options}
    node = Faults.open(Faults.schema.parse(spec), Opener(read_only=False))
    node.clock = clock or Clock()
    return Image(node), node, storage


def fails(operation: Callable[[], object], number: int = errno.EIO) -> bool:
    """Whether it fails with this errno; another error goes through."""
    try:
        operation()
    except BlockIOError as error:
        if error.errno != number:
            raise
        return True
    return False


def pattern(image: Image, count: int) -> str:
    return "".join("x" if fails(lambda: image.read(0, 512)) else "." for _ in range(count))


# When


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, "xxxxxxxxxx"),
        ({"nth": 3}, "..x......."),
        ({"every": 3}, "..x..x..x."),
        ({"after": 4}, "....xxxxxx"),
        ({"after": 4, "every": 2}, ".....x.x.x"),
        ({"after": 2, "nth": 2}, "...x......"),
        ({"once": True}, "x........."),
        ({"times": 3, "every": 2}, ".x.x.x...."),
        ({"p": 0}, ".........."),
        ({"p": "100%"}, "xxxxxxxxxx"),
        ({"kind": "write"}, ".........."),
        ({"start": 511}, "xxxxxxxxxx"),
        ({"start": 512}, ".........."),
    ],
)
def test_when_a_rule_takes_part(rule: dict[str, Any], expected: str) -> None:
    assert pattern(over(rule)[0], 10) == expected


def test_a_probability_comes_out_and_repeats() -> None:
    first = pattern(over({"p": "1:4"}, seed=7)[0], 4000)
    assert 850 < first.count("x") < 1150
    assert pattern(over({"p": 0.25}, seed=7)[0], 4000) == first
    assert pattern(over({"p": "25%"}, seed=8)[0], 4000) != first
    beside = over({"p": "1:4"}, {"kind": "read", "p": "1:2", "latency": 1}, seed=7)[0]
    assert pattern(beside, 4000) == first, "another rule changes nothing for this one"


def test_each_kind_of_operation() -> None:
    image, node, _ = over()
    operations: dict[str, Callable[[], object]] = {
        "read": lambda: image.read(0, 1),
        "write": lambda: image.write(0, b"x"),
        "zero": lambda: image.zero(0, 512),
        "discard": lambda: image.discard(0, 512),
        "truncate": lambda: image.truncate(SIZE),
        "flush": image.flush,
        "extents": lambda: image.extents(),
    }
    for kind in operations:
        node.add(kind=kind)
        assert [name for name, operation in operations.items() if fails(operation)] == [kind]
        node.clear()
    node.add()
    assert all(fails(operation) for operation in operations.values())


def test_windows_on_a_clock() -> None:
    clock = Clock()
    image, _, _ = over({"up": 20, "down": 10}, clock=clock)
    seen = ""
    for _ in range(9):
        seen += pattern(image, 1)
        clock.sleep(0.0100001)
    assert seen == "..x..x..x"


# What


@pytest.mark.parametrize("error", ["ENOSPC", errno.ENOSPC, str(errno.ENOSPC)])
def test_an_error(error: Any) -> None:
    image, node, storage = over({"kind": "write", "error": error})
    assert fails(lambda: image.write(0, b"x" * 700), errno.ENOSPC)
    assert image.read(0, SIZE) == OLD
    assert [(entry.kind, entry.length, entry.action) for entry in node.history] == [("write", 700, "error")]
    assert storage.size == SIZE


def test_what_is_not_supported_falls_back() -> None:
    image, _, _ = over({"kind": "zero", "error": "ENOTSUP"})
    image.zero(0, 1000)
    assert image.read(0, 1001) == bytes(1000) + OLD[1000:1001]
    with pytest.raises(NotSupported):
        image.zero(0, 1000, fast=True)


def test_bad_ranges_are_healed_by_writing() -> None:
    image, _, _ = over({"kind": "read", "start": 4096, "length": 1024, "heal_on_write": True})
    assert fails(lambda: image.read(4000, 200))
    image.write(4096, b"y" * 512)
    assert image.read(4000, 608) == OLD[4000:4096] + b"y" * 512
    assert fails(lambda: image.read(4607, 2))
    image.zero(4608, 512)
    assert image.read(4096, 1024) == b"y" * 512 + bytes(512)


def test_space_is_used_up_and_given_back() -> None:
    image, node, storage = over(space=4096)
    root = Child(node, "file", grows=True)
    image.write(0, b"x" * 8192)
    assert node.space == 4096, "what is there takes up space already"
    root.write(SIZE, memoryview(b"a" * 3000))
    assert fails(lambda: root.write(SIZE + 3000, memoryview(b"b" * 2000)), errno.ENOSPC)
    assert storage.size == SIZE + 3000
    assert node.history[-1].action == "space"
    image.discard(0, 1000)
    image.discard(0, 1000)
    assert node.space == 2096, "given back once"
    root.write(SIZE + 3000, memoryview(b"b" * 2000))
    assert node.space == 96
    assert fails(lambda: image.write(0, b"c" * 500), errno.ENOSPC)
    image.truncate(SIZE)
    assert node.space == 5096
    image.truncate(SIZE + 100_000)
    assert node.space == 5096, "length alone takes up nothing"
    image.write(SIZE + 50_000, b"d" * 5000)
    node.zero(SIZE + 50_000, 1000, MAY_UNMAP)
    assert node.space == 1096
    node.clear()
    image.write(SIZE, b"e" * 50_000)


def test_zeroes_past_the_end_take_and_give_no_space() -> None:
    image, node, storage = over(space=4096)
    root = Child(node, "file", grows=True)
    root.zero(SIZE + 4096, 4096, MAY_UNMAP)
    assert (node.space, storage.size) == (4096, SIZE + 8192)
    assert fails(lambda: root.write(SIZE, memoryview(bytes(8192))), errno.ENOSPC)
    root.write(SIZE + 4096, memoryview(b"a" * 4096))
    assert node.space == 0
    assert image.read(SIZE, 4097) == bytes(4096) + b"a"


def test_dropped_changes() -> None:
    image, node, storage = over({"drop": True, "after": 1})
    image.write(0, b"x" * 512)
    image.write(1000, b"y" * 512)
    image.zero(2000, 512)
    image.discard(0, 4096)
    image.truncate(100)
    assert image.read(0, SIZE) == b"x" * 512 + OLD[512:]
    assert storage.size == SIZE
    assert [entry.kind for entry in node.history] == ["write", "zero", "discard", "truncate"]


@pytest.mark.parametrize("error", [None, "EIO"])
def test_a_torn_write(error: str | None) -> None:
    image, _, _ = over({"torn": "prefix", "keep": 2, "kind": "write", "error": error})
    assert fails(lambda: image.write(100, b"x" * 2000)) is bool(error)
    assert image.read(0, 3000) == OLD[:100] + b"x" * (1024 - 100) + OLD[1024:3000]


def test_a_torn_write_keeps_a_choice_of_sectors() -> None:
    seen = set()
    for seed in range(40):
        image, _, _ = over({"torn": "subset"}, seed=seed)
        image.write(0, b"\xff" * 2048)
        found = image.read(0, 2048)
        sectors = tuple(found[at : at + 512] == b"\xff" * 512 for at in range(0, 2048, 512))
        assert all(
            new or found[i * 512 : i * 512 + 512] == OLD[i * 512 : i * 512 + 512] for i, new in enumerate(sectors)
        )
        assert not all(sectors)
        seen.add(sectors)
    assert len(seen) > 8


def test_flipped_bits() -> None:
    image, _, _ = over({"kind": "read", "flip": 1, "once": True}, {"kind": "write", "flip": 1, "once": True})
    wrong = int.from_bytes(image.read(0, 4096)) ^ int.from_bytes(OLD[:4096])
    assert wrong.bit_count() == 1
    assert image.read(0, 4096) == OLD[:4096], "only what was read was changed"
    data = bytes(4096)
    image.write(0, data)
    assert data == bytes(4096), "the caller's bytes are the caller's"
    assert int.from_bytes(image.read(0, 4096)).bit_count() == 1


def test_misdirected_requests() -> None:
    image, node, _ = over(
        {"kind": "write", "misdirect": 3, "times": 2}, {"kind": "read", "misdirect": -1, "once": True}
    )
    assert image.read(512, 10) == OLD[:10]
    image.write(1000, b"x" * 10)
    assert image.read(1000, 10) == OLD[1000:1010]
    assert image.read(1000 + 3 * 512, 10) == b"x" * 10
    image.write(SIZE - 10, b"y" * 10)
    assert image.read(SIZE - 10, 10) == b"y" * 10, "there is no such place"
    assert len(node.history) == 2


def test_latency_and_jitter_go_by_the_clock() -> None:
    clock = Clock()
    image, _, _ = over({"latency": 1000, "jitter": 500}, clock=clock)
    times = []
    for _ in range(30):
        before = clock.now
        image.read(0, 1)
        times.append(clock.now - before)
    assert all(1 <= round(one, 6) <= 1.5 for one in times)
    assert len({round(one, 3) for one in times}) > 5


def test_a_request_hangs_until_it_is_released() -> None:
    image, node, _ = over({"kind": "write", "hang": "here", "once": True})
    thread = threading.Thread(target=lambda: image.write(0, b"late"))
    thread.start()
    assert node.wait_hung("here")
    assert image.read(0, 4) == OLD[:4]
    assert thread.is_alive()
    assert node.release("here") == 1
    thread.join(10)
    assert image.read(0, 4) == b"late"
    assert node.release("here") == 0
    assert not node.wait_hung("here", 0.01)


# Flushes that lie


def test_a_crash_after_a_lying_flush() -> None:
    image, node, storage = over({"kind": "flush", "ack_only": True, "after": 1})
    image.write(0, b"kept")
    image.flush()
    image.write(2, b"lost")
    Child(node, "file", grows=True).write(SIZE + 5, memoryview(b"longer"))
    image.zero(8192, 8192)
    image.write(16_000, b"and this", fua=True)
    image.flush()
    image.truncate(500)
    assert image.read(0, 500) == b"kelost" + OLD[6:500]
    assert node.crash() > 4
    assert storage.size == SIZE
    assert image.read(0, SIZE) == b"kept" + OLD[4:]
    assert node.crash() == 0


@given(st.integers(0, 1 << 30))
def test_a_crash_brings_back_what_the_last_real_flush_made_durable(seed: int) -> None:
    rng = random.Random(seed)
    image, node, storage = over({"kind": "flush", "ack-only": True, "p": 0.5}, seed=seed)
    durable = OLD
    for _ in range(20):
        offset = rng.randrange(image.size + 1)
        length = rng.randrange(min(image.size - offset, 9000) + 1)
        choice = rng.randrange(6)
        if choice < 2:
            image.write(offset, rng.randbytes(length), fua=False)
        elif choice == 2:
            image.zero(offset, length, unmap=True)
        elif choice == 3:
            image.discard(offset, length)
        elif choice == 4:
            image.truncate(rng.randrange(SIZE * 2))
        else:
            lies = len(node.history)
            image.flush()
            if len(node.history) == lies:
                durable = Image(storage).read(0, storage.size)
    node.crash()
    assert Image(storage).read(0, storage.size) == durable


def test_nothing_can_be_taken_back_that_was_not_remembered() -> None:
    _, node, _ = over()
    with pytest.raises(NotSupported, match="undo"):
        node.crash()
    with pytest.raises(OptionError, match="undo"):
        node.add(ack_only=True)


# Rules


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"error": "ENOSUCH"}, "ENOSUCH"),
        ({"error": 99999}, "99999"),
        ({"p": "2"}, "p is 2"),
        ({"p": "1:0"}, "1:0"),
        ({"p": "often"}, "often"),
        ({"kind": "seek"}, "seek"),
        ({"kind": "read", "torn": "prefix"}, "torn"),
        ({"kind": "write", "ack-only": True}, "ack-only"),
        ({"heal-on-write": True}, "range"),
        ({"kind": "write", "length": 512, "heal-on-write": True}, "kind=read"),
        ({"nth": 0}, "nth"),
    ],
)
def test_rules_that_cannot_be(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        over(rule)


def test_the_same_seed_and_order_give_the_same_history() -> None:
    rules = [
        {"p": "1:5", "error": "EIO"},
        {"kind": "write", "torn": "subset", "p": "1:3"},
        {"kind": "read", "flip": 2, "every": 4},
        {"kind": "any", "jitter": 9, "p": 0.5},
    ]

    def run(seed: int) -> tuple[list[Any], bytes, float]:
        clock = Clock()
        image, node, storage = over(*rules, seed=seed, clock=clock)
        rng = random.Random(1)
        for _ in range(300):
            offset = rng.randrange(SIZE - 5000)
            kind = rng.choice([image.read, image.zero, lambda at, n: image.write(at, b"w" * n)])
            fails(lambda: kind(offset, rng.randrange(5000)))  # noqa: B023 - called now
        return node.history, Image(storage).read(0, SIZE), clock.now

    assert run(5) == run(5)
    assert run(5) != run(6)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 20))))
def test_spans_are_sets(steps: list[tuple[bool, int, int]]) -> None:
    spans, model = ByteSet(), set[int]()
    for add, start, length in steps:
        before = set(model)
        if add:
            model |= set(range(start, start + length))
            assert spans.add(start, start + length) == len(model - before)
        else:
            model -= set(range(start, start + length))
            assert spans.remove(start, start + length) == len(before - model)
        assert {at for low, high in spans.spans for at in range(low, high)} == model


def test_it_opens_by_options(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(OLD)
    spec = {
        "driver": "faults",
        "seed": "3",
        "rules.0.kind": "read",
        "rules.0.start": "4k",
        "rules.0.length": "512",
        "image": {"driver": "raw", "file": {"filename": str(path)}},
    }
    with lamina.open(spec) as image:
        assert image.read(0, 4096) == OLD[:4096]
        with pytest.raises(BlockIOError) as caught:
            image.read(4096, 10)
    assert caught.value.errno == errno.EIO
    assert "rule 0" in str(caught.value)

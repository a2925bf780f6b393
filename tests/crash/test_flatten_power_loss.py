"""The power is cut while an overlay is flattened: at any moment the disk reads as before, with the backing file as long as
the header names it, and without it from then on.

`LAMINA_CRASH_STATES` says how many states there are, as in `test_qcow2_power_loss`.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from lamina.errors import Cancelled
from lamina.formats.qcow2.header import Header
from lamina.jobs.flatten import flatten
from lamina.jobs.progress import Monitor
from lamina.request import Child
from lamina.testing.image_checks import check_whole
from lamina.testing.persistence import CrashState
from lamina.testing.recorder import Marks, Recorder

from .workloads import examine_workloads, fresh, is_noticed_without_flushes, open_on

STATES = int(os.environ.get("LAMINA_CRASH_STATES", "36000")) // 60
GEOMETRIES: list[dict[str, Any]] = [
    {"cluster_size": 512, "refcount_bits": 16},
    {"cluster_size": 1024, "compat": "0.10"},
    {"cluster_size": 4096, "refcount_bits": 64},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 65536},
]


class FlattenWork:
    """An image over a backing file, longer or shorter than it, that is flattened in two attempts: the first one stops."""

    def __init__(self, rng: random.Random, options: dict[str, Any]) -> None:
        size = rng.choice([24 << 10, 66 << 10, 130 << 10])
        below = rng.choice([size // 2, size, size + 4096]) & -512
        self.rng = rng
        self.backing = bytearray(rng.randbytes(below))
        for _ in range(rng.randrange(3)):
            at = rng.randrange(below)
            self.backing[at : at + 9000] = bytes(len(self.backing[at : at + 9000]))
        node = Recorder(fresh(options, size))
        with open_on(node, read_only=False, backing=bytes(self.backing)) as image:
            image.amend(backing_file="base", backing_fmt="raw")
            for _ in range(rng.randrange(6)):
                at = rng.randrange(size // 512) * 512
                length = min(rng.choice([512, 4096, 20000 & -512]), size - at)
                if rng.random() < 0.3:
                    image.zero(at, length)
                else:
                    image.write(at, rng.randbytes(1) * length)
            self.disk = image.read(0, size)
        self.start = bytes(node.content)

    def __call__(self, storage: Recorder, marks: Marks) -> None:
        monitor = Monitor()
        with open_on(storage, read_only=False, backing=bytes(self.backing)) as image:
            if self.rng.random() < 0.5:
                monitor.cancel()  # heard after the first batch
                with pytest.raises(Cancelled):
                    flatten(image, monitor=monitor)
        with open_on(storage, read_only=False, backing=bytes(self.backing)) as image:
            flatten(image)
            marks.durable("flattened")
            assert image.read(0, image.size) == self.disk
            assert image.node.children.get("backing") is None

    def opened(self, content: bytes) -> Any:
        node = Recorder(content)
        backing = bytes(self.backing) if self.named(content) else None
        return lambda *, read_only: open_on(node, read_only=read_only, backing=backing)

    def named(self, content: bytes) -> bool:
        """Whether the header names the backing file."""
        return Header.read(Child(Recorder(content), "file")).backing_file is not None

    def verify(self, content: bytes, state: CrashState) -> None:
        assert not (self.named(content) and state.durable)
        with self.opened(content)(read_only=True) as image:
            check_whole(image)
            assert image.read(0, image.size) == self.disk


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.jobs.convert_transfer.BUFFER", 16 << 10)


@pytest.mark.parametrize("options", GEOMETRIES, ids=lambda options: ",".join(map(str, options.values())))
def test_no_power_cut_changes_a_byte_of_the_guest(options: dict[str, Any], seed: int) -> None:
    examine_workloads(lambda rng: FlattenWork(rng, options), STATES, name=options, seed=seed)


def test_the_reference_must_not_go_before_the_copies_are_stored() -> None:
    """Over storage whose flushes do nothing the harness finds states in which the disk has changed."""
    assert is_noticed_without_flushes(FlattenWork(random.Random(7), {"cluster_size": 4096}))

"""Random work on a qcow2 image over a storage that remembers, and what its disk may hold after a power cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest

from lamina.creation import create_driver
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.image import Image
from lamina.request import Child
from lamina.testing.disk_history import DiskHistory
from lamina.testing.image_checks import Verdict, check_agrees, check_recovers, check_whole
from lamina.testing.persistence import SECTOR, Bounds, CrashState, Persistence
from lamina.testing.power_loss import PowerLossFailure, record
from lamina.testing.recorder import Marks, Recorder
from tests import evidence
from tests.two_files import ROOM, image_behind_data_file, two_files

#: One state of so many is opened for writing and used.
RECOVERED_EVERY = 20


class Geometry(NamedTuple):
    """A kind of image. `backing`: half of the disk lies in a layer below. `filled`: bytes that are written before the
    recording begins, so that tables are about to grow."""

    options: dict[str, Any]
    sizes: tuple[int, ...] = (24 << 10, 64 << 10, 130 << 10)
    backing: bool = False
    filled: int = 0
    grow: bool = False

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options.items()]
        words += [name for name in ("backing", "filled", "grow") if getattr(self, name)]
        return ",".join(words)


GEOMETRIES = [
    Geometry({"cluster_size": 512, "refcount_bits": 64}, grow=True),
    Geometry({"cluster_size": 512, "refcount_bits": 16}, backing=True),
    Geometry({"cluster_size": 512, "refcount_bits": 1}),
    Geometry({"cluster_size": 1024, "compat": "0.10"}, grow=True),
    Geometry({"cluster_size": 1024, "compat": "0.10"}, backing=True),
    Geometry({"cluster_size": 4096, "refcount_bits": 16}, (64 << 10, 256 << 10), backing=True),
    Geometry({"cluster_size": 4096, "refcount_bits": 64}, (64 << 10, 256 << 10), grow=True),
    Geometry({"cluster_size": 65536}, (256 << 10,)),
    Geometry({"cluster_size": 16384, "extended_l2": True}, (64 << 10, 200 << 10), backing=True),
    Geometry({"cluster_size": 16384, "extended_l2": True}, (64 << 10, 200 << 10), grow=True),
    Geometry({"cluster_size": 512, "data_file": "data"}, backing=True),
    Geometry({"cluster_size": 4096, "data_file": "data", "data_file_raw": True}, (64 << 10, 200 << 10)),
    Geometry({"cluster_size": 16384, "data_file": "data", "extended_l2": True}, (64 << 10, 200 << 10), backing=True),
    # One table of counts, a cluster, reaches 2 MiB: it must grow.
    Geometry({"cluster_size": 512, "refcount_bits": 64}, (2100 << 10,), filled=1976 << 10),
]


def fresh(options: dict[str, Any], size: int) -> bytes:
    """A new image, as the bytes of its file."""
    kind: Any = create_driver("qcow2")
    node = Recorder()
    if "data_file" in options:
        return image_behind_data_file(options, size)
    kind.create(Child(node, "file", grows=True), size, kind.create_schema.parse({**options, "size": size}))
    return bytes(node.content)


def open_on(node: Recorder, *, read_only: bool, backing: bytes | None = None, repair: bool = False) -> Image:
    """The image that lies in `node`."""
    spec: dict[str, Any] = {"file": Child(node, "file", grows=True)}
    if node.content[: len(q.MAGIC)] != q.MAGIC:
        spec = two_files(node)
    if backing is not None:
        spec["backing"] = Child(Recorder(backing), "backing")
    return Image(Qcow2.open(Qcow2.schema.parse(spec), Opener(read_only=read_only, repair=repair)))


class Work:
    """Random operations on one image. Call it with a storage that holds `start`; `verify` judges what a power cut left.

    `unaligned`: some writes are not whole sectors.
    """

    def __init__(self, rng: random.Random, geometry: Geometry, operations: int, *, unaligned: bool = False) -> None:
        self.rng = rng
        self.unaligned = unaligned
        self.geometry = geometry
        self.operations = operations
        self.size = rng.choice(geometry.sizes)
        self.backing = rng.randbytes(self.size // 2) if geometry.backing else None
        self.start = fresh(geometry.options, self.size)
        content = (self.backing or b"").ljust(self.size, b"\0")
        if geometry.filled:
            content = rng.randbytes(geometry.filled).ljust(self.size, b"\0")
            node = Recorder(self.start)
            with open_on(node, read_only=False) as image:
                image.write(0, content[: geometry.filled])
            self.start = bytes(node.content)
        self.history = DiskHistory(content)

    @property
    def moment(self) -> int:
        """The number of operations so far."""
        return self.history.moment

    def __call__(self, storage: Recorder, marks: Marks) -> None:
        ends = {len(self.start)}
        with open_on(storage, read_only=False, backing=self.backing) as image:
            header = image.node.header  # type: ignore[attr-defined]
            for number in range(self.operations):
                self._one(image, marks, number)
                # Else a later write of that sector is torn where the power goes and the new length is lost. (An L1 table is
                # never written past its end.)
                before = ROOM if header.external_data else 0
                ends.add(before + header.l1_table_offset + 8 * header.l1_size)
                assert storage.size % SECTOR == 0 or storage.size in ends, "data ends inside a sector of the file"

    def _one(self, image: Image, marks: Marks, number: int) -> None:
        rng, history = self.rng, self.history
        names = ["write", "zero", "unmap", "discard", "flush", "grow", "shrink"]
        grow = int(self.geometry.grow)
        name = rng.choices(names, [8, 2, 2, 4, 3, grow, grow])[0]
        # Where little is free, work in one place finds it; unaligned writes merge with what is around them.
        offset = rng.randrange(0, history.size // SECTOR) * SECTOR
        if self.geometry.filled and rng.random() < 0.5:
            offset = rng.randrange(self.geometry.filled // SECTOR, history.size // SECTOR) * SECTOR
        length = min(rng.choice([SECTOR, 2 * SECTOR, 8 * SECTOR, 40 * SECTOR]), history.size - offset)
        if name == "flush":
            image.flush()
            marks.durable(history.moment)
            return
        marks.begin(history.moment + 1)
        if name == "write":
            if self.unaligned and rng.random() < 0.5:
                offset, length = offset + rng.randrange(200), length - 200
            data = bytes([number % 255 + 1]) * length
            image.write(offset, data)
            history.write(offset, data)
        elif name == "discard":
            image.discard(offset, length)
            history.discard(offset, length, reads=image.read(offset, length))
        elif name in ("grow", "shrink"):
            change = rng.choice([16, 200]) * SECTOR
            size = history.size + change if name == "grow" else max(history.size - change, 40 * SECTOR)
            image.truncate(size)
            history.resize(size)
        else:
            image.zero(offset, length, unmap=name == "unmap")
            history.zero(offset, length)

    def opened(self, content: bytes) -> Any:
        """How the image in `content` is opened, again and again: what is written to it stays."""
        node = Recorder(content)
        return lambda *, read_only: open_on(node, read_only=read_only, backing=self.backing)

    def verify(self, content: bytes, state: CrashState) -> None:
        """A1: the image is whole. A4: each sector holds what was flushed, or was written since."""
        with open_on(Recorder(content), read_only=True, backing=self.backing) as image:
            check_whole(image)
            disk = image.read(0, image.size)
        if self.geometry.options.get("data_file_raw") and len(disk) <= ROOM:
            length = min(len(disk), len(content))
            assert disk[:length] == content[:length], "the raw data file is not the disk"
        begun = state.begun[-1] if state.begun else 0
        self.history.check(disk, begun, state.durable[-1] if state.durable else 0)


class Workload(Protocol):
    """Work on an image whose disk never changes: a function for `record`."""

    #: The content of the storage before it.
    start: bytes

    def __call__(self, storage: Recorder, marks: Marks) -> None: ...

    def verify(self, content: bytes, state: CrashState) -> None: ...

    def opened(self, content: bytes) -> Any:
        """How the image in `content` is opened, again and again."""


def examine_workloads(make: Callable[[random.Random], Workload], states: int, *, name: object, seed: int) -> None:
    """Verify at least so many states of random workloads; every 20th is opened for writing and used."""
    examined = workloads = 0

    def examine(content: bytes, state: CrashState) -> None:
        nonlocal examined
        work.verify(content, state)
        examined += 1
        if examined % RECOVERED_EVERY == 0:
            check_recovers(work.opened(content))

    while examined < states:
        work = make(random.Random(f"{seed}/{name}/{workloads}"))
        print(f"workload {workloads} of LAMINA_SEED={seed}")
        record(work, start=work.start, model=Persistence.P4, seed=seed, bounds=Bounds(at_cut=8)).examine(examine)
        workloads += 1
    evidence.count("crash states", examined)


def is_noticed_without_flushes(work: Workload) -> bool:
    """Whether the harness finds a wrong state where the flushes of the storage do nothing."""

    def unordered(storage: Recorder, marks: Marks) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "flush", lambda: None)
            work(storage, Marks(Recorder()))

    try:
        record(unordered, start=work.start, model=Persistence.P4, bounds=Bounds(at_cut=8)).examine(work.verify)
    except PowerLossFailure:
        return True
    return False


class Examination:
    """Verifies states; every 20th is opened for writing and used, every `peers_every`-th is checked by `peers` as well. It
    counts the states, from `before`, the checks by peers, and the compressed clusters that our checks found."""

    def __init__(self, work: Work, folder: Path, peers: list[Any], *, peers_every: int, before: int = 0) -> None:
        self.work, self.folder, self.peers = work, folder, peers
        self.peers_every = peers_every
        self.count = before
        self.asked = self.compressed = 0

    def __call__(self, content: bytes, state: CrashState) -> None:
        self.work.verify(content, state)
        self.count += 1
        if self.count % RECOVERED_EVERY == 0:
            check_recovers(self.work.opened(content))
        if self.count % self.peers_every == 0 and "data_file" not in self.work.geometry.options:
            with self.work.opened(content)(read_only=True) as image:
                report = check_whole(image)
            self.compressed += report.compressed_clusters
            path = self.folder / "state.qcow2"
            path.write_bytes(content)
            for peer in self.peers:
                status, said = peer.check(path)
                assert status in (0, 3), f"{peer}: {said}"
                check_agrees(report, Verdict(said.get("corruptions", 0), said.get("leaks", 0)))
                self.asked += 1

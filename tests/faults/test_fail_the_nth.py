"""Every request of every operation of raw and qcow2 fails once and for good, with EIO and ENOSPC; nothing is lost.

What is asserted of each point is said in `lamina.testing.failing`.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from lamina import BlockIOError, LimitExceeded
from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.qcow2.header import Header
from lamina.formats.raw import Raw
from lamina.graph import Opener
from lamina.image import Image
from lamina.limits import DEFAULT_BUDGET, Budget
from lamina.node import Node
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.failing import FailingStorage, Opening, Session, fail_nth
from tests import evidence
from tests.two_files import image_behind_data_file, open_two_files

KIB = 1024
MIB = KIB * KIB
#: The least number of points in one run of this file.
POINTS = 12_000

Operation = Callable[[Session], None]


class Geometry(NamedTuple):
    """How images are made, and how large."""

    name: str
    driver: type[Node]
    options: dict[str, Any]
    size: int
    cluster: int
    backing: int = 0
    cache: int = DEFAULT_BUDGET.cache_bytes

    @property
    def below(self) -> bytes:
        return random.Random(self.backing).randbytes(self.backing)


GEOMETRIES = [
    Geometry("raw", Raw, {}, 20 * KIB + 100, 4 * KIB),
    Geometry("512 bytes, 64 bits", Qcow2, {"cluster_size": 512, "refcount_bits": 64}, 66 * KIB, 512),
    Geometry("512 bytes, 1 bit", Qcow2, {"cluster_size": 512, "refcount_bits": 1}, 70 * KIB + 300, 512),
    Geometry(
        "512 bytes, 64 bits, no cache", Qcow2, {"cluster_size": 512, "refcount_bits": 64}, 66 * KIB, 512, cache=2 * KIB
    ),
    Geometry(
        "512 bytes, no cache, over a file", Qcow2, {"cluster_size": 512}, 66 * KIB, 512, 50 * KIB + 77, cache=2 * KIB
    ),
    Geometry("1 KiB, version 2", Qcow2, {"cluster_size": 1024, "compat": "0.10"}, 140 * KIB, 1024),
    Geometry("4 KiB", Qcow2, {"cluster_size": 4096}, 100 * KIB, 4096),
    Geometry("512 bytes over a file", Qcow2, {"cluster_size": 512}, 66 * KIB, 512, 50 * KIB + 77),
    Geometry("4 KiB over a file", Qcow2, {"cluster_size": 4096, "refcount_bits": 64}, 100 * KIB, 4096, 120 * KIB),
    Geometry(
        "1 KiB, version 2, over a file", Qcow2, {"cluster_size": 1024, "compat": "0.10"}, 70 * KIB, 1024, 60 * KIB
    ),
    Geometry("subclusters over a file", Qcow2, {"cluster_size": 16384, "extended_l2": True}, 102_912, 16384, 71_757),
]
WITH_DATA_FILE = [
    Geometry("data file over a file", Qcow2, {"cluster_size": 4096, "data_file": "d"}, 100 * KIB, 4096, 120 * KIB),
    Geometry("raw data file", Qcow2, {"cluster_size": 512, "data_file": "d", "data_file_raw": True}, 66 * KIB, 512),
]


def data(length: int, value: int) -> bytes:
    return bytes((value + at * 7) % 255 + 1 for at in range(251)) * (length // 251) + bytes([value]) * (length % 251)


def opening(geometry: Geometry) -> Opening:
    def make(storage: Child, read_only: bool) -> Image:
        options: dict[str, Any] = {"file": storage}
        if geometry.backing:
            below = MemoryStorage()
            below.write(0, memoryview(geometry.below))
            below.read_only = True
            options["backing"] = Child(below, "backing")
        opener = Opener(read_only=read_only, budget=Budget(cache_bytes=geometry.cache))
        if "data_file" in geometry.options:
            return Image(open_two_files(options, opener))
        return Image(geometry.driver.open(geometry.driver.schema.parse(options), opener))

    return make


def lay_out(geometry: Geometry, storage: Child, size: int | None = None) -> None:
    kind: Any = geometry.driver
    size = size or geometry.size
    if "data_file" in geometry.options:
        storage.write(0, memoryview(image_behind_data_file(geometry.options, size)))
        return
    kind.create(storage, size, kind.create_schema.parse({**geometry.options, "size": size}))


def full(session: Session) -> None:
    """The state most operations begin with: some data, some zeros, some room that was given back, some holes."""
    size = session.image.size
    session.write(0, data(6 * KIB, 3))
    session.write(9 * KIB + 100, data(3 * KIB, 5))
    session.zero(10 * KIB, KIB)
    session.write(size - 3 * KIB, data(3 * KIB, 7))
    session.flush()
    session.discard(2 * KIB, 2 * KIB)
    session.flush()


made: dict[tuple[str, tuple[Operation, ...]], bytes] = {}


def contents(geometry: Geometry, *setups: Operation) -> bytes:
    """What the file of an image holds after `setups`."""
    key = (geometry.name, setups)
    if key not in made:
        made[key] = prepare(geometry, setups)
    return made[key]


def prepare(geometry: Geometry, setups: tuple[Operation, ...]) -> bytes:
    storage = FailingStorage()
    lay_out(geometry, Child(storage, "file", grows=True))
    session = Session(opening(geometry), storage, starts_as(geometry, bytes(storage.content)))
    for setup in setups:
        setup(session)
    session.close()
    return bytes(storage.content)


def starts_as(geometry: Geometry, content: bytes) -> bytes:
    """What the disk reads as that lies in `content`."""
    with opening(geometry)(Child(FailingStorage(content), "file", grows=True), True) as image:
        return image.read(0, image.size)


# The operations. Each can be done again after it failed half-way.


def open_and_close(session: Session) -> None:
    session.close()
    session.image.flush()
    session.close()


def reading(session: Session) -> None:
    for offset, length in ((0, KIB), (5 * KIB, 7 * KIB), (session.image.size - 5 * KIB, 5 * KIB)):
        session.read(offset, length)


def status(session: Session) -> None:
    session.extents()
    session.extents(KIB + 1, 9 * KIB)


def checking(session: Session) -> None:
    """What could not be read is a finding; only what opening reads is an error."""
    node: Any = session.image.node
    if isinstance(node, Qcow2):
        failed = len(session.storage.failed)
        report = node.check()
        assert report.check_errors or not report.corruptions
        assert bool(report.check_errors) == (len(session.storage.failed) > failed)


def allocating(session: Session) -> None:
    session.write(20 * KIB - 5000, data(5000, 11))
    session.flush()


def partial(session: Session) -> None:
    session.write(14 * KIB + 77, data(100, 13))
    session.write(17 * KIB + 500, data(700, 17))
    session.flush()


def overwriting(session: Session) -> None:
    session.write(KIB, data(4 * KIB + 50, 19))
    session.flush()


def zeroing(session: Session) -> None:
    session.zero(700, 5 * KIB)
    session.zero(12 * KIB, 6 * KIB)
    session.flush()


def unmapping(session: Session) -> None:
    session.zero(700, 9 * KIB, unmap=True)
    session.flush()


def discarding(session: Session) -> None:
    session.discard(0, 6 * KIB)
    session.flush()
    session.discard(9 * KIB, 9 * KIB)
    session.flush()
    session.flush()


def reusing(session: Session) -> None:
    """What was discarded is given out again, and the second flush is what frees it."""
    session.discard(0, 6 * KIB)
    session.flush()
    session.flush()
    session.write(12 * KIB, data(6 * KIB, 23))
    session.flush()


def closing(session: Session) -> None:
    """All is left to close."""
    session.write(3 * KIB, data(9 * KIB, 29))
    session.discard(0, 2 * KIB)
    session.close()
    session.read(0, 14 * KIB)


def two_flushes(session: Session) -> None:
    """The second write is to a table that the first has just published, or failed to."""
    for at in (12 * KIB, 13 * KIB, 18 * KIB):
        session.write(at, data(600, at // KIB))
        session.flush()


def everywhere(session: Session) -> None:
    """More tables and counts than a small cache holds; what is written, unlinked and freed lies far apart."""
    size = session.image.size
    for at in range(0, size - KIB, 9 * KIB):
        session.write(at, data(700, at % 200))
    session.flush()
    session.discard(0, size)
    session.flush()
    session.flush()
    for at in range(4 * KIB, size - KIB, 13 * KIB):
        session.write(at, data(700, at % 200))
    session.flush()


def growing(session: Session) -> None:
    session.truncate(session.image.size // 512 * 512 + 3 * KIB + 512)
    session.flush()
    session.write(session.image.size - 3 * KIB, data(3 * KIB, 31))
    session.flush()


def growing_far(session: Session) -> None:
    """So far that the L1 table needs another place."""
    session.truncate(400 * KIB)
    session.flush()
    session.write(390 * KIB, data(2 * KIB, 37))
    session.flush()


def shrinking(session: Session) -> None:
    session.truncate(9 * KIB + 512)
    session.flush()


def shrinking_and_growing(session: Session) -> None:
    """What was cut off does not come back."""
    session.truncate(3 * KIB)
    session.truncate(20 * KIB)
    session.flush()


def snapshotting(session: Session) -> None:
    """Snapshots are made, applied and deleted; the disk reads as before, and what is written meanwhile is lost by intent."""
    node: Any = session.image.node
    if not isinstance(node, Qcow2):
        return
    for one in node.snapshots():  # of an attempt that failed half-way
        node.delete_snapshot(one.id)
    try:
        made = node.create_snapshot("one")
    except LimitExceeded:  # counts of one bit
        return
    session.write(3 * KIB, session.image.read(3 * KIB, 2 * KIB))
    session.flush()
    node.apply_snapshot(made.id)
    node.delete_snapshot(made.id)


def creating(geometry: Geometry) -> Operation:
    def operation(session: Session) -> None:
        session.close()
        lay_out(geometry, session.edge)
        below = geometry.below[: geometry.size]
        session.created(below + bytes(geometry.size - len(below)))
        session.read(0, KIB)

    return operation


OPERATIONS: list[Operation] = [
    open_and_close,
    reading,
    status,
    checking,
    allocating,
    partial,
    overwriting,
    zeroing,
    unmapping,
    discarding,
    reusing,
    closing,
    two_flushes,
    everywhere,
    growing,
    growing_far,
    shrinking,
    shrinking_and_growing,
    snapshotting,
]

CASES = [
    (operation, geometry)
    for operation in OPERATIONS
    for geometry in GEOMETRIES
    if operation is not everywhere or geometry.cache < MIB
]
# A data file of a fixed length on the same disk. Such images have no snapshots.
CASES += [
    (operation, geometry)
    for operation in OPERATIONS
    for geometry in WITH_DATA_FILE
    if operation not in (everywhere, growing, growing_far, shrinking_and_growing, snapshotting)
]


def requests(geometry: Geometry, operation: Operation, content: bytes) -> int:
    """How many requests reach the storage when nothing fails."""
    storage = FailingStorage(content)
    session = Session(opening(geometry), storage, starts_as(geometry, content) if content else None)
    storage.arm(1 << 62, errno.EIO)
    operation(session)
    seen = storage.seen
    session.close()
    return seen


@pytest.mark.parametrize(
    ("operation", "geometry"), CASES, ids=[f"{operation.__name__}, {geometry.name}" for operation, geometry in CASES]
)
def test_each_request_of_an_operation_fails(operation: Operation, geometry: Geometry) -> None:
    absorbed = ("read",) if operation is checking else ()
    content = contents(geometry, full)
    points = fail_nth(opening(geometry), operation, content=content, absorbed=absorbed)
    assert points == 4 * requests(geometry, operation, content)
    evidence.count("points (operation, request that fails, fault)", points)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=[geometry.name for geometry in GEOMETRIES])
def test_each_request_of_a_creation_fails(geometry: Geometry) -> None:
    points = fail_nth(opening(geometry), creating(geometry))
    assert points
    evidence.count("points (operation, request that fails, fault)", points)


def test_there_are_enough_points() -> None:
    """Counted without the faults, so that it holds wherever the tests above run."""
    points = sum(4 * requests(geometry, operation, contents(geometry, full)) for operation, geometry in CASES)
    print(f"fail the Nth: {points} points in {len(CASES)} operations")
    assert points >= POINTS


LARGE = Geometry(
    "2 MiB of 512 bytes, 64 bits", Qcow2, {"cluster_size": 512, "refcount_bits": 64}, 3 * MIB, 512, cache=4 * KIB
)


def nearly_all_counted(session: Session) -> None:
    """The file ends right before what its refcount table can count: 64 blocks of 64 clusters."""
    at = 0
    while len(session.storage.content) < 2 * MIB - 6 * KIB:
        room = 2 * MIB - len(session.storage.content)
        session.image.write(at, data(max(room // 2 // 512 * 512, 512), 41))
        at += max(room // 2 // 512 * 512, 512)
        session.image.flush()


def growing_counts(session: Session) -> None:
    session.write(session.image.size - 9 * KIB, data(9 * KIB, 43))
    session.flush()


def freeing_much(session: Session) -> None:
    """The counts that fall lie in more blocks than are kept in memory."""
    session.discard(64 * KIB, 300 * KIB)
    session.flush()
    session.flush()


@pytest.mark.parametrize("operation", [growing_counts, freeing_much])
def test_the_counts_of_a_large_file(operation: Operation) -> None:
    content = contents(LARGE, nearly_all_counted)
    stored = b""

    def observed(session: Session) -> None:
        nonlocal stored
        operation(session)
        stored = bytes(session.storage.content)

    points = fail_nth(opening(LARGE), observed, content=content, errnos=(errno.EIO,), sticky=(False,))
    assert points
    evidence.count("points (operation, request that fails, fault)", points)
    grew = header(stored).refcount_table_clusters > header(content).refcount_table_clusters
    assert grew is (operation is growing_counts)


def header(content: bytes) -> Header:
    return Header.read(Child(FailingStorage(content), "file"))


# What is published is not changed before what it newly names is durable, also when the flush after publishing failed


def test_a_table_whose_publication_failed_counts_as_published() -> None:
    geometry = GEOMETRIES[1]
    content = contents(geometry)
    start = starts_as(geometry, content)
    for failing in range(1, 9):
        storage = FailingStorage(content)
        session = Session(opening(geometry), storage, start)
        session.write(0, data(512, 1))
        storage.arm(failing, errno.EIO, kinds=["flush"])
        try:
            session.flush()
        except BlockIOError:
            storage.disarm()
        else:
            assert failing == 3, "behind counts and new tables, and behind the mapping"
            return
        named = int.from_bytes(storage.content[(at := header(bytes(storage.content)).l1_table_offset) : at + 8], "big")
        table = named & (1 << 56) - 512
        assert bool(table) is (failing == 2)
        session.write(512, data(512, 2))
        log: list[int] = []
        logged(storage, log)
        session.flush()
        assert -1 in log
        if table:
            assert table not in log[: log.index(-1)], "the table that is published names what is not durable yet"
            assert table in log


def logged(storage: FailingStorage, log: list[int]) -> None:
    """From now on `log` gets the offset of each write and -1 for each flush."""
    write, flush = storage.write, storage.flush

    def logging_write(offset: int, view: memoryview, flags: int = 0) -> None:
        log.append(offset)
        write(offset, view, flags)

    def logging_flush() -> None:
        log.append(-1)
        flush()

    storage.write, storage.flush = logging_write, logging_flush  # type: ignore[method-assign]

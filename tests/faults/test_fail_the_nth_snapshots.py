"""Every request fails once and for good, with EIO and ENOSPC, while snapshots with a machine state are made, applied and
deleted: each whole, or not at all.

What is asserted of each point is said in `one_operation`. Snapshots without a machine state: see `test_fail_the_nth`.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import ENOSPC
from typing import Any, NamedTuple

import pytest

from lamina.image import Image
from lamina.request import Child
from lamina.testing.failing import FailingStorage

from .one_operation import (
    GEOMETRIES,
    KIB,
    SMALL,
    WIDE,
    Geometry,
    Kind,
    Operation,
    Qcow2Session,
    data,
    fail_each,
    filled,
    opening,
    waiting,
)

#: Where the disk tells which of its states it has.
MARK = 3 * KIB
OLD_MACHINE, NEW_MACHINE = data(5 * KIB, 51), data(9 * KIB + 100, 53)
OLD_MARK = data(KIB, 61)
#: What a rewrite does after it has published its tables: what is free now is discarded.
AFTER_A_REWRITE = ("discard", "flush")
#: Then a new snapshot alone keeps its machine state: the disk gives it up.
AFTER_A_CREATION = ("discard", "flush", "read", "write")


class Kept(NamedTuple):
    """The mark of the disk, and the snapshots by name, each with the length of its machine state."""

    mark: bytes
    snapshots: dict[str, int]


def kept_in(image: Image) -> Kept:
    return Kept(image.read(MARK, 16), {one.name: one.vm_state for one in image.snapshots()})


def snapshot(content: bytearray, geometry: Geometry, name: str) -> Image:
    edge = Child(FailingStorage(bytes(content)), "file", grows=True)
    return opening(geometry, **{"snapshot-name": name})(edge, True)


def kind_for(geometry: Geometry) -> Kind:
    def require_whole(image: Image, states: list[Kept], disk: bytes) -> None:
        found = kept_in(image)
        assert found in states, f"neither before nor after, but {found}"
        node: Any = image.node
        for name, machine in (("old", OLD_MACHINE), ("new", NEW_MACHINE)):
            if name in found.snapshots:
                with snapshot(node.file.node.content, geometry, name) as kept:
                    assert kept.read_vm_state(0, len(machine)) == machine
                    if name == "new":
                        assert kept.read(0, kept.size) == disk, "the snapshot is not the disk of then"
                    else:
                        assert kept.read(MARK, 16) == OLD_MARK[:16]

    return Kind(kept_in, require_whole, without_new)


def without_new(session: Qcow2Session) -> None:
    """The next try begins like the first."""
    image = session.image
    for one in image.snapshots():
        if one.name == "new":
            session.do("delete_snapshot", one.id)
    if not image.snapshots():
        take_old(session)


def with_old(session: Qcow2Session) -> None:
    filled(session)
    take_old(session)


def take_old(session: Qcow2Session) -> None:
    """A snapshot, and a disk that was written since."""
    session.write(MARK, OLD_MARK)
    session.do("create_snapshot", "old", OLD_MACHINE)
    session.write(MARK, data(KIB, 67))
    session.flush()


def creating(session: Qcow2Session) -> None:
    session.do("create_snapshot", "new", NEW_MACHINE)


def created(before: Kept) -> Kept:
    return before._replace(snapshots={**before.snapshots, "new": len(NEW_MACHINE)})


def deleting(session: Qcow2Session) -> None:
    session.do("delete_snapshot", "1")


def deleted(before: Kept) -> Kept:
    return before._replace(snapshots={name: one for name, one in before.snapshots.items() if name != "old"})


def applying(geometry: Geometry) -> Callable[[Qcow2Session], None]:
    def apply(session: Qcow2Session) -> None:
        with snapshot(session.storage.content, geometry, "old") as kept:
            disk = kept.read(0, kept.size)
        session.apply_snapshot("1", disk)

    return apply


def applied(before: Kept) -> Kept:
    return before._replace(mark=OLD_MARK[:16])


def cases() -> list[tuple[Geometry, Operation]]:
    found = []
    for one in GEOMETRIES:
        for name, setup in (("first", filled), ("second", with_old)):
            if setup is filled or one is SMALL:
                work = Operation(
                    f"create the {name}", creating, created, setup, waiting, AFTER_A_CREATION, quiet=(ENOSPC,)
                )
                found.append((one, work))
        found.append((one, Operation("apply", applying(one), applied, with_old, waiting, AFTER_A_REWRITE)))
        if one is not WIDE:
            found.append((one, Operation("delete", deleting, deleted, with_old, waiting, AFTER_A_REWRITE)))
    return found


CASES = cases()


@pytest.mark.parametrize(
    ("geometry", "operation"), CASES, ids=[f"{operation.name}, {geometry.name}" for geometry, operation in CASES]
)
def test_each_request_of_an_operation_on_snapshots_fails(geometry: Geometry, operation: Operation) -> None:
    assert fail_each(geometry, kind_for(geometry), operation)

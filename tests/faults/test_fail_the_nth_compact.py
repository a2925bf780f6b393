"""Every request of what `compact` asks of a format, and of the rebase of `flatten`, fails once and for good, with EIO and
ENOSPC: the disk stays, and so does the image.

What is asserted of each point is said in `one_operation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lamina.image import Image
from lamina.jobs.rebase import rebase

from .one_operation import (
    BACKED,
    GEOMETRIES,
    KIB,
    SMALL,
    Geometry,
    Kind,
    Operation,
    Qcow2Session,
    data,
    fail_each,
    filled,
    waiting,
)


def state(image: Image) -> tuple[str | None, list[str]]:
    """What must not change, or change at once: the name of the backing file, and the snapshots."""
    node: Any = image.node
    return node.header.backing_file, [one.name for one in image.snapshots()]


def require_one_of(image: Image, states: list[Any], disk: bytes) -> None:
    assert state(image) in states


KIND = Kind(state, require_one_of)


def free_zeros(session: Qcow2Session) -> None:
    session.trace.append("free_zeros")
    image = session.image
    node: Any = image.node
    unit = node.limits.zero_alignment
    start, length = -(-8 * KIB // unit) * unit, 16 * KIB // unit * unit
    assert not any(image.read(start, length))
    image.root.alone("frees zeros", node.free_zeros, start, length)
    session.image.flush()


def trim(session: Qcow2Session) -> None:
    session.trace.append("trim")
    node: Any = session.image.node
    session.image.root.alone("trims", node.trim)


def with_zeros(session: Qcow2Session) -> None:
    filled(session)
    session.write(8 * KIB, bytes(16 * KIB))
    session.flush()


def with_snapshot(session: Qcow2Session) -> None:
    with_zeros(session)
    session.do("create_snapshot", "one")
    session.write(8 * KIB, bytes(16 * KIB))
    session.flush()


def with_free_space(session: Qcow2Session) -> None:
    """Clusters that are free in the middle, and more behind the last one in use."""
    filled(session)
    session.write(8 * KIB, data(16 * KIB, 5))
    session.write(24 * KIB, data(4 * KIB, 9))
    session.flush()
    session.discard(8 * KIB, 16 * KIB)
    session.flush()
    session.storage._put(len(session.storage.content), b"rest" * 1024)


def at_rest(session: Qcow2Session) -> None:
    """The open image has nothing to write."""
    session.read(0, KIB)


def operations() -> list[tuple[Geometry, Operation]]:
    found: list[tuple[Geometry, Operation]] = []
    works: list[tuple[str, Callable[[Qcow2Session], None], Callable[[Qcow2Session], None]]] = [
        ("free zeros", free_zeros, with_zeros),
        ("free zeros beside a snapshot", free_zeros, with_snapshot),
        ("trim", trim, with_free_space),
    ]
    for geometry in GEOMETRIES:
        for name, work, setup in works:
            ready = waiting if geometry is SMALL and name == "trim" else at_rest
            found.append((geometry, Operation(name, work, lambda before: before, setup, ready, ("",))))
    return found


CASES = operations()


@pytest.mark.parametrize(
    ("geometry", "operation"), CASES, ids=[f"{operation.name}, {geometry.name}" for geometry, operation in CASES]
)
def test_each_request_fails(geometry: Geometry, operation: Operation) -> None:
    assert fail_each(geometry, KIND, operation)


def to_none(session: Qcow2Session) -> None:
    session.trace.append("rebase to none")
    rebase(session.image, None)


def test_each_request_of_a_rebase_to_no_backing_file_fails() -> None:
    def named(session: Qcow2Session) -> None:
        filled(session)
        session.amend(backing_file="base", backing_fmt="raw")

    work = Operation("to none", to_none, lambda before: (None, before[1]), named, waiting, ("",))
    assert fail_each(BACKED, KIND, work)

"""Every request fails once and for good, with EIO and ENOSPC, while bitmaps are removed, cleared, enabled and merged: each
change is whole or not at all, and no bitmap is clean and wrong.

What is asserted of each point is said in `one_operation`. How bitmaps are recorded and stored: see
`test_fail_the_nth_bitmaps_stored`. To add one makes no request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from lamina.formats.qcow2 import bitmap_directory
from lamina.image import Image

from .one_operation import (
    GEOMETRIES,
    WAITING,
    Geometry,
    Kind,
    Operation,
    Qcow2Session,
    data,
    dirty_sectors,
    fail_each,
    filled,
    require_right_bitmaps,
    without_unusable_bitmaps,
)

#: The tables of a bitmap that was removed are read, for their clusters to be given back.
AFTER_A_REMOVAL = ("read",)
#: The bitmaps of the images: whether each records.
NAMES = {"one": True, "two": True, "off": False}


class Bits(NamedTuple):
    """A bitmap as users see it; `dirty`: the sectors."""

    enabled: bool
    dirty: frozenset[int]


State = dict[str, Bits]


def bitmaps_of(image: Image) -> State:
    found: dict[str, Any] = dict(image.bitmaps)
    return {name: Bits(one.enabled, dirty_sectors(one, image.size)) for name, one in found.items()}


def require_none_wrong(image: Image, states: list[State], disk: bytes) -> None:
    require_right_bitmaps(image, disk)
    node: Any = image.node
    usable = {entry.name for entry in bitmap_directory.read(node.file, node.header) if entry.usable}
    found = bitmaps_of(image)
    assert found.keys() == usable
    for name, one in found.items():
        known = [state[name] for state in states if name in state]
        assert any(one.enabled == other.enabled and one.dirty >= other.dirty for other in known), (
            f"bitmap {name} is clean and wrong: {one}, not one of {known}"
        )


def as_at_first(session: Qcow2Session) -> None:
    """The image has the bitmaps of `NAMES` again, and no other."""
    without_unusable_bitmaps(session)
    for name in set(session.image.bitmaps) - set(NAMES):
        session.do("remove_bitmap", name)
    for name, enabled in NAMES.items():
        if name not in session.image.bitmaps:
            session.do("add_bitmap", name, 512, enabled=enabled)


BITMAPS = Kind(bitmaps_of, require_none_wrong, as_at_first)


def three_bitmaps(session: Qcow2Session) -> None:
    """`one` has recorded more than `two`."""
    filled(session)
    for name, enabled in NAMES.items():
        session.do("add_bitmap", name, 512, enabled=enabled)
        session.write(7 * 1024, data(1024, 41))
    session.flush()


def opened(session: Qcow2Session) -> None:
    """The image is open, and was not written."""
    assert session.image


def written(session: Qcow2Session) -> None:
    """Bitmaps have recorded a write, and are marked as in use."""
    session.write(WAITING, data(700, 11))


def calling(method: str, *arguments: Any, **options: Any) -> Callable[[Qcow2Session], None]:
    return lambda session: session.do(method, *arguments, **options)


def merging(session: Qcow2Session) -> None:
    session.do("merge_bitmaps", "off", [session.image.bitmaps["one"], session.image.bitmaps["two"]])


def only_two(session: Qcow2Session) -> None:
    filled(session)
    session.do("add_bitmap", "two", 512)
    session.write(7 * 1024, data(1024, 41))


def changed(name: str, **values: Any) -> Callable[[State], State]:
    return lambda state: {**state, name: state[name]._replace(**values)}


def without(name: str) -> Callable[[State], State]:
    return lambda state: {other: one for other, one in state.items() if other != name}


def merged(state: State) -> State:
    dirty = state["one"].dirty | state["two"].dirty | state["off"].dirty
    return {**state, "off": state["off"]._replace(dirty=dirty)}


def cases() -> list[Operation]:
    found = []
    for ready in (opened, written):
        for name, work, expected, late in (
            ("remove", calling("remove_bitmap", "two"), without("two"), AFTER_A_REMOVAL),
            ("clear", calling("clear_bitmap", "one"), changed("one", dirty=frozenset()), ()),
            ("enable", calling("enable_bitmap", "off", True), changed("off", enabled=True), ()),
            ("disable", calling("enable_bitmap", "one", False), changed("one", enabled=False), ()),
            ("merge", merging, merged, ()),
        ):
            found.append(Operation(f"{name}, {ready.__name__}", work, expected, three_bitmaps, ready, late))
        last = calling("remove_bitmap", "two")
        found.append(
            Operation(f"remove the last, {ready.__name__}", last, without("two"), only_two, ready, AFTER_A_REMOVAL)
        )
    return found


CASES = [(geometry, operation) for geometry in GEOMETRIES for operation in cases()]


@pytest.mark.parametrize(
    ("geometry", "operation"), CASES, ids=[f"{operation.name}, {geometry.name}" for geometry, operation in CASES]
)
def test_each_request_of_a_change_of_a_bitmap_fails(geometry: Geometry, operation: Operation) -> None:
    assert fail_each(geometry, BITMAPS, operation)

"""Every request fails once and for good, with EIO and ENOSPC, while bitmaps are loaded, recorded and stored: each is right,
knows too much, or is marked as in use; none is clean and wrong.

What is asserted of each point is said in `one_operation`.
"""

from __future__ import annotations

import pytest

from .one_operation import GEOMETRIES, SMALL, WAITING, Geometry, Operation, Qcow2Session, data, fail_each, filled
from .test_fail_the_nth_bitmaps import BITMAPS, State, opened, three_bitmaps, written


def with_the_first(session: Qcow2Session) -> None:
    """The file has no bitmaps yet."""
    session.do("add_bitmap", "one", 512)
    session.write(WAITING, data(700, 11))


def with_another(session: Qcow2Session) -> None:
    session.do("add_bitmap", "new", 512)
    session.write(WAITING, data(700, 11))


def closed(session: Qcow2Session) -> None:
    """The image is not open yet."""


def loading(session: Qcow2Session) -> None:
    for one in session.image.bitmaps.values():
        assert list(one.dirty(0, session.image.size)) is not None


def writing(session: Qcow2Session) -> None:
    session.write(20 * 1024 - 100, data(900, 43))


def flushing(session: Qcow2Session) -> None:
    session.flush()


def closing(session: Qcow2Session) -> None:
    session.close()


def reopening(session: Qcow2Session) -> None:
    """The bitmaps are stored while the image stays open."""
    if not session.image.read_only:
        session.do("reopen", read_only=True)
    session.do("reopen", read_only=False)


def same(state: State) -> State:
    return state


def marked(state: State) -> State:
    new = frozenset(range(20 * 1024 - 512, 20 * 1024 + 800, 512))
    return {name: one._replace(dirty=one.dirty | new) if one.enabled else one for name, one in state.items()}


def first_marked(state: State) -> list[State]:
    return [{**state, "one": marked(state)["one"]}]


def cases() -> list[Operation]:
    return [
        Operation("load", loading, same, three_bitmaps, closed),
        Operation("write", writing, marked, three_bitmaps, opened, ("",), first_marked),
        Operation("second write", writing, marked, three_bitmaps, written, ("",), first_marked),
        Operation("flush", flushing, same, three_bitmaps, written),
        Operation("close, opened", closing, same, three_bitmaps, opened),
        Operation("close, written", closing, same, three_bitmaps, written),
        Operation("reopen, opened", reopening, same, three_bitmaps, opened),
        Operation("reopen, written", reopening, same, three_bitmaps, written),
        Operation("store the first", reopening, same, filled, with_the_first),
    ]


CASES = [(geometry, operation) for geometry in GEOMETRIES for operation in cases()]
CASES.append((SMALL, Operation("store another", reopening, same, three_bitmaps, with_another)))


@pytest.mark.parametrize(
    ("geometry", "operation"), CASES, ids=[f"{operation.name}, {geometry.name}" for geometry, operation in CASES]
)
def test_each_request_fails_while_bitmaps_are_recorded_and_stored(geometry: Geometry, operation: Operation) -> None:
    assert fail_each(geometry, BITMAPS, operation)

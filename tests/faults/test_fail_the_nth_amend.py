"""Every request of an amend fails once and for good, with EIO and ENOSPC: each option changes whole, or not at all.

What is asserted of each point is said in `one_operation`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest

from lamina.formats.qcow2 import layout as q
from lamina.image import Image

from .one_operation import (
    BACKED,
    GEOMETRIES,
    KIB,
    SMALL,
    SUBCLUSTERS,
    WIDE,
    Geometry,
    Kind,
    Operation,
    Qcow2Session,
    data,
    fail_each,
    filled,
    require_right_bitmaps,
    waiting,
    without_unusable_bitmaps,
)

#: What a rewrite does after it has published its tables: what is free now is discarded.
AFTER_A_REWRITE = ("discard", "flush")


class Options(NamedTuple):
    """The options of an image that an amend changes, and what it keeps."""

    version: int
    refcount_bits: int
    lazy: bool
    backing_file: str | None
    backing_format: str | None
    size: int
    snapshots: int


def options_of(image: Image) -> Options:
    header = image.node.header  # type: ignore[attr-defined]
    lazy = bool(header.compatible_features & q.LAZY_REFCOUNTS)
    kept = (header.backing_file, header.backing_format, header.size, header.nb_snapshots)
    return Options(header.version, header.refcount_bits, lazy, *kept)


def require_one_of(image: Image, states: list[Any], disk: bytes) -> None:
    require_right_bitmaps(image, disk)
    found = options_of(image)
    assert found in states, f"neither before nor after, but {found}"


OPTIONS = Kind(options_of, require_one_of, without_unusable_bitmaps)


def amending(name: str, change: dict[str, Any], more: Any = (), late: tuple[str, ...] = (), **values: Any) -> Operation:
    """amend(**values), which changes `Options` like `change`. `more`: setups after `filled`."""

    def setup(session: Qcow2Session) -> None:
        filled(session)
        for one in more:
            one(session)

    return Operation(
        name, lambda session: session.amend(**values), lambda before: before._replace(**change), setup, waiting, late
    )


def with_snapshot(session: Qcow2Session) -> None:
    session.do("create_snapshot", "one")
    session.write(3 * KIB, data(KIB, 31))
    session.flush()


def with_bitmap(session: Qcow2Session) -> None:
    session.do("add_bitmap", "one", 512)


def amended(**values: Any) -> Callable[[Qcow2Session], None]:
    return lambda session: session.amend(**values)


def named(name: str, **change: Any) -> dict[str, Any]:
    return {"backing_file": name, "backing_format": "raw", **change}


OLD = amended(compat="0.10")
BOTH = [SMALL, BACKED]
LONG = {SMALL.name: 300, WIDE.name: 240, BACKED.name: 900, SUBCLUSTERS.name: 900}


def cases() -> list[tuple[Geometry, Operation]]:
    width = partial(amending, late=AFTER_A_REWRITE)
    found: list[tuple[Geometry, Operation]] = []
    for one in GEOMETRIES:
        to = 32 if one is WIDE else 64
        long = "b" * LONG[one.name]
        found += [
            (one, width(f"to {to} bits", {"refcount_bits": to}, refcount_bits=to)),
            (one, amending("lazy", {"lazy": True}, lazy_refcounts=True)),
            (one, amending("not lazy", {"lazy": False}, [amended(lazy_refcounts=True)], lazy_refcounts=False)),
            (one, amending("short name", named("b"), backing_file="b", backing_fmt="raw")),
            (one, amending("long name", named(long), backing_file=long, backing_fmt="raw")),
            (
                one,
                amending(
                    "no name",
                    {"backing_file": None, "backing_format": None},
                    [amended(backing_file=long, backing_fmt="raw")],
                    backing_file="",
                ),
            ),
            (
                one,
                amending("larger", {"size": 80 * KIB}, size=80 * KIB)
                if one is SMALL
                else amending("larger", {"size": 200 * KIB}, size=200 * KIB),
            ),
            (one, amending("smaller", {"size": 8 * KIB}, late=("",), size=8 * KIB)),
        ]
    for one in (SMALL, BACKED):
        found += [
            (one, width("to 1 bit", {"refcount_bits": 1}, refcount_bits=1)),
            (one, amending("version 2", {"version": 2}, compat="0.10")),
            (one, amending("version 3", {"version": 3}, [OLD], compat="1.1")),
        ]
    for one in (SMALL, SUBCLUSTERS):
        found += [
            (one, width("64 bits beside a snapshot", {"refcount_bits": 64}, [with_snapshot], refcount_bits=64)),
            (one, width("64 bits beside a bitmap", {"refcount_bits": 64}, [with_bitmap], refcount_bits=64)),
            (
                one,
                amending(
                    "a name beside a bitmap", named("b" * 20), [with_bitmap], backing_file="b" * 20, backing_fmt="raw"
                ),
            ),
            (one, amending("larger beside a bitmap", {"size": 200 * KIB}, [with_bitmap], size=200 * KIB)),
            (one, amending("smaller beside a bitmap", {"size": 8 * KIB}, [with_bitmap], late=("",), size=8 * KIB)),
        ]
    return found


def several_steps(before: Options) -> list[Options]:
    """Each option changes whole, one after the other."""
    names = before._replace(**named("b"))
    wide = names._replace(refcount_bits=64)
    return [names, wide, wide._replace(lazy=True)]


def several(size: int) -> Operation:
    work = amended(size=size, lazy_refcounts=True, refcount_bits=64, backing_file="b", backing_fmt="raw")
    last = lambda before: several_steps(before)[-1]._replace(size=size)  # noqa: E731
    return Operation("several options", work, last, filled, waiting, between=several_steps)


CASES = [*cases(), (SMALL, several(80 * KIB)), (SUBCLUSTERS, several(200 * KIB))]


@pytest.mark.parametrize(
    ("geometry", "operation"), CASES, ids=[f"{operation.name}, {geometry.name}" for geometry, operation in CASES]
)
def test_each_request_of_an_amend_fails(geometry: Geometry, operation: Operation) -> None:
    assert fail_each(geometry, OPTIONS, operation)

"""The harness of `test_fail_the_nth` notices what it is there for."""

from __future__ import annotations

import pytest

from lamina import BlockIOError
from lamina.formats.qcow2.bitmaps import Bitmaps
from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.qcow2.header import Header
from lamina.formats.qcow2.tables import Tables
from lamina.testing.failing import fail_nth

from . import test_fail_the_nth_amend as amend
from . import test_fail_the_nth_bitmaps as bitmaps
from . import test_fail_the_nth_bitmaps_stored as stored
from . import test_fail_the_nth_snapshots as snapshots
from .one_operation import SMALL, Geometry, Kind, fail_each
from .one_operation import Operation as OneOperation
from .test_fail_the_nth import GEOMETRIES, Operation, allocating, contents, full, opening, reading


def test_it_notices_an_error_that_is_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Qcow2.flush

    def flush(self: Qcow2) -> None:
        try:
            real(self)
        except BlockIOError:
            return

    monkeypatch.setattr(Qcow2, "flush", flush)
    noticed(allocating, "raised no error")


def test_it_notices_a_foreign_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Qcow2.read_into

    def read_into(self: Qcow2, offset: int, view: memoryview) -> None:
        try:
            real(self, offset, view)
        except BlockIOError as error:
            raise KeyError(offset) from error

    monkeypatch.setattr(Qcow2, "read_into", read_into)
    noticed(reading, "KeyError")


def test_it_notices_a_mapping_published_before_its_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tables.write_out

    def write_out(self: Tables) -> bool:
        if self.mappings.dirty:
            self.mappings.write_tables()
            self.mappings.write_links()
        return real(self)

    monkeypatch.setattr(Tables, "write_out", write_out)
    noticed(allocating, "corrupt")


def noticed(operation: Operation, said: str) -> None:
    geometry = GEOMETRIES[1]
    with pytest.raises(AssertionError, match=said) as caught:
        fail_nth(opening(geometry), operation, content=contents(geometry, full))
    assert "faults begin" in str(caught.value)
    assert "request" in str(caught.value)


# The harness of `one_operation`


def one_of(cases: list[tuple[Geometry, OneOperation]], name: str) -> OneOperation:
    return next(operation for geometry, operation in cases if geometry is SMALL and operation.name == name)


def unmended(self: Tables) -> None:
    """The fields of the header whose change failed are not written again."""
    self._unsure, self._unsure_start = (), b""


@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        (amend.OPTIONS, one_of(amend.CASES, "to 64 bits")),
        (amend.OPTIONS, one_of(amend.CASES, "short name")),
        (amend.OPTIONS, one_of(amend.CASES, "lazy")),
        (snapshots.kind_for(SMALL), one_of(snapshots.CASES, "create the first")),
        (snapshots.kind_for(SMALL), one_of(snapshots.CASES, "delete")),
    ],
    ids=lambda value: value.name if isinstance(value, OneOperation) else "",
)
def test_it_notices_a_header_that_is_left_as_the_failure_left_it(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, operation: OneOperation
) -> None:
    monkeypatch.setattr(Tables, "_store_unsure", unmended)
    with pytest.raises(AssertionError, match=r"request .* fails with"):
        fail_each(SMALL, kind, operation)


def test_it_notices_a_directory_that_is_left_as_the_failure_left_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Header, "forget_bitmaps", lambda self, storage: None)
    with pytest.raises(AssertionError, match=r"clean and wrong|does not know"):
        fail_each(SMALL, bitmaps.BITMAPS, one_of(bitmaps.CASES, "remove, written"))


def test_it_notices_a_bitmap_that_changes_before_the_image_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def clear(self: Bitmaps, name: str) -> None:
        one = self.get(name)
        one.marks[:] = bytes(len(one.marks))
        self._begin_change(one)

    monkeypatch.setattr(Bitmaps, "clear", clear)
    with pytest.raises(AssertionError, match="it is done, and raises"):
        fail_each(SMALL, bitmaps.BITMAPS, one_of(bitmaps.CASES, "clear, opened"))


def test_it_notices_a_bitmap_that_is_not_marked_as_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bitmaps.begin

    def begin(self: Bitmaps) -> None:
        try:
            real(self)
        finally:
            self._begun = True

    monkeypatch.setattr(Bitmaps, "begin", begin)
    with pytest.raises(AssertionError, match=r"clean and wrong|does not know"):
        fail_each(SMALL, stored.BITMAPS, one_of(stored.CASES, "write"))

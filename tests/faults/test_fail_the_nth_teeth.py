"""The harness of `test_fail_the_nth` notices what it is there for."""

from __future__ import annotations

import pytest

from lamina import BlockIOError
from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.qcow2.tables import Tables
from lamina.testing.failing import fail_nth

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

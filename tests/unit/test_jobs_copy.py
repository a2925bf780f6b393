"""What a copy is planned from, and parts on the grid of a target; and journals held to their copy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lamina
from lamina.errors import LaminaError, OptionError
from lamina.image import Image
from lamina.jobs import copy_ends
from lamina.jobs.copy import Copied, Copy, Plan
from lamina.jobs.copy_ends import Part, PipeSource, StorageSource, StorageTarget, on_grid
from lamina.jobs.copy_journal import Journal, PartialFile
from lamina.node import StorageNode
from lamina.pending import DONE, Pending
from lamina.request import Child
from lamina.target_file import Target

BLOCKS = st.sampled_from([1, 2, 4, 8])
RUNS = st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=12)


@given(RUNS, BLOCKS, st.sampled_from([8, 16, 32]), st.integers(0, 5))
def test_parts_on_a_grid(runs: list[tuple[int, bool]], block: int, request_size: int, first: int) -> None:
    """Nothing is lost or said twice; what is called zero was; zeros lie on the grid; a whole block of zeros is found."""
    begin = at = first * block
    parts: list[Part] = []
    for length, zero in runs:
        parts.append((at, length, zero))
        at += length
    known = {offset + n: zero for offset, length, zero in parts for n in range(length)}
    found = list(on_grid(iter(parts), begin, block, request_size))
    said = [offset + n for offset, length, _ in found for n in range(length)]
    assert said == sorted(known)
    for offset, length, zero in found:
        if zero:
            assert offset % block == 0
            assert length % block == 0
            assert all(known[offset + n] for n in range(length))
        else:
            assert length <= request_size
            assert offset // request_size == (offset + length - 1) // request_size
            assert offset % block == 0
            assert (offset + length) % block == 0 or offset + length == at
    for offset, length, zero in parts:
        if zero:
            whole = range(offset + -offset % block, offset + length - (offset + length) % block)
            marked = {o + n for o, count, z in found if z for n in range(count)}
            assert marked.issuperset(whole)


class _Answers(StorageNode):
    """Storage of which only the zeros are asked: `runs` of (length, zero), told `most` bytes at a time."""

    driver = "answers"

    def __init__(self, runs: list[tuple[int, bool]], most: int, fails: int) -> None:
        super().__init__()
        self.told = [zero for length, zero in runs for _ in range(length)]
        self.asked = 0
        self._most, self._fails = most, fails

    @property
    def size(self) -> int:
        return len(self.told)

    def zero_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        assert 0 < length <= self.size - offset
        self.asked += 1
        if self.asked == self._fails:
            raise LaminaError("no status")
        return [(1, zero) for zero in self.told[offset : offset + min(length, self._most)]]


@given(
    runs=st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=12),
    block=BLOCKS,
    most=st.integers(1, 50),
    fails=st.sampled_from([-1, -1, 1, 3]),
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=20),
    again=st.integers(0, 20),
)
def test_what_must_be_made_zero(
    runs: list[tuple[int, bool]], block: int, most: int, fails: int, lengths: list[tuple[int, int]], again: int
) -> None:
    """In whole blocks, inside what was asked, and never without a byte that is not zero."""
    answers = _Answers(runs, most, fails)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy_ends, "_LEAST_QUERIED", 2)
        patch.setattr(copy_ends, "_FREE_QUERIES", 7)
        status = copy_ends._KnownZeros(Child(answers, "target"), block)
        at = 0
        for number, (gap, count) in enumerate(lengths):
            if number == again:
                status.forget()
                at = 0
            lo = min(at + gap * block, answers.size // block * block)
            hi = min(lo + count * block, answers.size)
            if hi <= lo:
                break
            parts = status.others(lo, hi - lo)
            inside = set()
            for start, length in parts:
                assert lo <= start < start + length <= hi
                assert start % block == 0
                assert (start + length) % block == 0 or start + length == hi
                assert not inside & set(range(start, start + length))
                inside |= set(range(start, start + length))
            assert all(answers.told[place] for place in set(range(lo, hi)) - inside)
            at = hi
        assert answers.asked <= 2 * (7 + 1)  # of two, one is asked ahead


def test_a_source_that_tells_of_single_bytes_is_read() -> None:
    answers = _Answers([(300_000, False)], 1, -1)
    with Image(answers) as image:
        parts = list(StorageSource(image).parts(0))
    assert sum(length for _, length, _ in parts) == 300_000
    assert answers.asked < 1000


class _Memory:
    """Source and target in memory, for a copy whose every step can fail: `fail` names the request that does."""

    name = "memory"
    forgets = False
    ordered = False
    blank = False

    def __init__(self, data: bytes, *, block: int = 1, fail: int = -1) -> None:
        self.data = bytearray(data)
        self.size = len(data)
        self.block = block
        self.flushed = bytes(data)
        self._left = fail

    def _step(self) -> None:
        self._left -= 1
        if self._left == -1:
            raise LaminaError("this one fails")

    def parts(self, begin: int) -> Any:
        yield begin, self.size - begin, False

    def start_read(self, offset: int, view: memoryview) -> Pending:
        return _Later(self._step, lambda: view.__setitem__(slice(None), self.data[offset : offset + len(view)]))

    def start_write(self, offset: int, view: memoryview) -> Pending:
        return _Later(self._step, lambda: self.data.__setitem__(slice(offset, offset + len(view)), view))

    def start_zero(self, offset: int, length: int) -> Pending:
        self.data[offset : offset + length] = bytes(length)
        return DONE

    def to_zero(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(offset, length)]

    def forget(self) -> None:
        pass

    def flush(self) -> None:
        self._step()
        self.flushed = bytes(self.data)

    def resize(self, size: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Later:
    """A request that is done when it is waited for; its outcome stays."""

    def leave(self) -> None:
        self._steps.clear()

    def __init__(self, *steps: Any) -> None:
        self._steps = list(steps)
        self._error: LaminaError | None = None

    def wait(self) -> None:
        while self._steps and self._error is None:
            try:
                self._steps.pop(0)()
            except LaminaError as error:
                self._error = error
        if self._error is not None:
            raise self._error


CONTENT = os.urandom(40_000) + bytes(9_000) + os.urandom(1_001)


@pytest.mark.parametrize("requests", [1, 2, 5, 64])
@pytest.mark.parametrize("end", ["source", "target"])
def test_whichever_request_fails_the_position_is_true(end: str, requests: int) -> None:
    """Each request fails once: the copy raises, and everything before its position is there."""
    plan = Plan(4096, requests, 4096, True)
    succeeded = False
    for number in range(40):
        source = _Memory(CONTENT, fail=number if end == "source" else -1)
        target = _Memory(b"\xff" * len(CONTENT), fail=number if end == "target" else -1)
        job = Copy(source, target, plan)
        try:
            copied = job.run()
        except LaminaError:
            assert target.data[: job.position] == CONTENT[: job.position]
            assert not succeeded
        else:
            succeeded = True
            assert target.flushed == CONTENT
            assert copied == Copied(len(CONTENT), len(CONTENT), copied.written, copied.zeroed, 0, 0)
            assert copied.written + copied.zeroed == len(CONTENT)
    assert succeeded


def test_a_journal_is_true_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not flushed is lost each time that a request fails; the journal leads to a whole copy all the same."""
    monkeypatch.setattr("lamina.jobs.copy._BETWEEN", 0.0)
    path = str(tmp_path / "journal")
    target = _Memory(b"\xff" * len(CONTENT))
    Journal(path, {"of": "this"}).record(0)
    for number in range(3, 200):
        target._left = number % 7 + 3
        journal = Journal.resume(path)
        assert journal is not None
        assert target.flushed[: journal.position] == CONTENT[: journal.position]
        try:
            Copy(_Memory(CONTENT), target, Plan(4096, 3), journal=journal).run()
        except LaminaError:
            target.data[:] = target.flushed  # the power is cut
        else:
            break
    assert target.flushed == CONTENT
    assert number > 3


@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("align", [1, 4096])
def test_storage_that_is_there_already(blank: bool, align: int) -> None:
    """As a device is written: in place, no longer than it is; zeros are made, unless it is known to be zero."""
    size = len(CONTENT) + 5000
    opened = {"driver": "blkdebug", "align": align, "image": {"driver": "memory", "size": size}}
    with lamina.open(opened, read_only=False) as image:
        if not blank:
            image.write(0, b"\xff" * size)
        target = StorageTarget(Child(image.node, "target"), "there", blank=blank, grows=False)
        copied = Copy(_Memory(CONTENT), target, Plan(4096, 4, 4096, True)).run()
        assert image.read(0, size) == CONTENT + (bytes(5000) if blank else b"\xff" * 5000)
        assert (copied.zeroed == 0, copied.skipped == 0) == (blank, not blank)
        with pytest.raises(OptionError, match="large enough"):
            Copy(_Memory(bytes(size + 1)), target, Plan())


def test_a_pipe_has_no_journal(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be resumed"):
        Copy(PipeSource(0), _Memory(b""), Plan(), journal=Journal(str(tmp_path / "j"), {}))


def test_a_journal_names_what_differs(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    assert Journal.resume(path) is None
    Journal(path, {"source": "a", "source-size": 5}).record(3)
    found = Journal.resume(path)
    assert found is not None
    assert found.position == 3
    found.expect({"source": "a", "source-size": 5})
    with pytest.raises(OptionError, match="its source size was 5, and is 6"):
        found.expect({"source": "a", "source-size": 6})
    with pytest.raises(OptionError, match="target"):
        found.expect({"source": "a", "source-size": 5, "target": "b"})
    assert json.loads(Path(path).read_text())["facts"] == {"source": "a", "source-size": 5}
    assert os.listdir(tmp_path) == ["journal"]


def test_a_partial_file_is_the_same_or_refused(tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    target.write_bytes(b"old")
    target.chmod(0o600)
    held = Target(str(target))
    first = PartialFile(str(target), None, held)
    Path(first.path).write_bytes(b"new")
    assert PartialFile(str(target), first.identity).identity == first.identity
    with pytest.raises(OptionError, match="not the file"):
        PartialFile(str(target), [0, 0])
    with pytest.raises(OptionError, match="in the way"):
        PartialFile(str(target), None)
    first.finish()
    held.close()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o600
    with pytest.raises(LaminaError, match="gone"):
        PartialFile(str(target), first.identity)


def test_the_source_may_be_closed_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "one.raw").write_bytes(CONTENT)
    image = lamina.open(tmp_path / "one.raw", format="raw")
    node = image.node
    source = StorageSource(image)
    image.close()
    target = _Memory(bytes(len(CONTENT)))
    Copy(source, target, Plan(4096, 3)).run()
    assert node.held
    source.close()
    assert not node.held

"""`in_two_steps`: items whose requests are finished in order, step after step, with a bounded number in flight."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import BlockIOError
from lamina.jobs.requests import in_two_steps
from lamina.pending import DONE, Pending


class Request:
    """A request that `wait` finishes, or fails."""

    def __init__(self, log: list[tuple[str, int]], step: str, item: int, fails: bool = False) -> None:
        self._log, self._step, self._item, self._fails = log, step, item, fails
        self.left = False

    def wait(self) -> None:
        if self._fails:
            raise BlockIOError(f"{self._step} {self._item}")
        self._log.append((self._step, self._item))

    def leave(self) -> None:
        self.left = True


class Work:
    """Steps of items, some of which are done at once; `fails`: the step of an item that fails."""

    def __init__(self, quick_reads: bool, quick_writes: bool, fails: tuple[str, int] | None = None) -> None:
        self.log: list[tuple[str, int]] = []
        self.requests: list[Request] = []
        self.in_flight = self.most = self.most_writes = 0
        self._quick = {"read": quick_reads, "write": quick_writes}
        self._fails = fails
        self._reading = 0

    def _start(self, step: str, item: int) -> Sequence[Pending]:
        if self._quick[step]:
            self.log.append((step, item))
            return [DONE]
        self.requests.append(Request(self.log, step, item, self._fails == (step, item)))
        return [self.requests[-1]]

    def read(self, item: int) -> Sequence[Pending]:
        self.in_flight += 1
        self._reading += 1
        self.most = max(self.most, self.in_flight)
        return self._start("read", item)

    def write(self, item: int) -> Sequence[Pending]:
        self._reading -= 1
        self.most_writes = max(self.most_writes, self.in_flight - self._reading)
        return self._start("write", item)


@given(st.integers(0, 30), st.integers(1, 9), st.booleans(), st.booleans())
def test_each_item_is_read_then_written_in_order(items: int, count: int, quick_reads: bool, quick_writes: bool) -> None:
    work, found = Work(quick_reads, quick_writes), []
    for item in in_two_steps(range(items), work.read, work.write, count):
        work.in_flight -= 1
        assert ("write", item) in work.log
        found.append(item)
    assert found == list(range(items))
    for step in ("read", "write"):
        assert [item for kind, item in work.log if kind == step] == found
    assert work.most <= count
    if items > 2 * count:
        # Where one step takes no time the other one has all requests, else each has half of them.
        busy = (not quick_reads) + (not quick_writes)
        assert work.most == (count if busy else 1)
        if busy == 2 and count > 1:
            assert work.most_writes >= count // 2


@pytest.mark.parametrize("step", ["read", "write"])
@pytest.mark.parametrize("broken", [0, 7, 19])
def test_what_precedes_a_failure_is_still_finished(step: str, broken: int) -> None:
    work = Work(False, False, (step, broken))
    found: list[int] = []
    with pytest.raises(BlockIOError, match=f"{step} {broken}"):
        found.extend(in_two_steps(range(20), work.read, work.write, 6))
    assert found == list(range(broken))
    finished = {(kind, item) for kind, item in work.log}
    for request in work.requests:
        assert request.left or (request._step, request._item) in finished


def test_a_consumer_that_stops_leaves_what_is_in_flight() -> None:
    work = Work(False, False)
    steps = in_two_steps(range(20), work.read, work.write, 6)
    assert next(steps) == 0
    steps.close()
    assert all(request.left for request in work.requests if (request._step, request._item) not in work.log)

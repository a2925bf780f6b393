"""Which states a power cut can leave: the models of `lamina.testing.persistence`, held against small cases done by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.node import FUA, MAY_UNMAP
from lamina.testing.disk_history import DiskHistory, same_bytes
from lamina.testing.persistence import SECTOR, Bounds, CrashState, Persistence, Record, crash_states
from lamina.testing.power_loss import PowerLossFailure, cut_power, record
from lamina.testing.recorder import Marks, Recorder

P0, P1, P2, P3, P4 = Persistence


def sector(letter: str, count: int = 1) -> bytes:
    return letter.encode() * SECTOR * count


def states(work: Callable[[Recorder, Marks], object], model: Persistence, start: str = "...") -> list[CrashState]:
    return list(record(work, start=b"".join(map(sector, start)), model=model, bounds=Bounds(at_cut=0)).states())


def letters(found: list[CrashState]) -> set[str]:
    """The contents, a letter for each sector."""
    return {"".join(map(chr, state.content[::SECTOR])).replace("\0", "0") for state in found}


def two_writes(storage: Recorder, marks: Marks) -> None:
    storage.write(0, sector("a"))
    storage.write(SECTOR, sector("b"))


def test_a_prefix_or_any_subset() -> None:
    assert letters(states(two_writes, P0)) == {"...", "a..", "ab."}
    assert letters(states(two_writes, P1)) == {"...", "a..", "ab.", ".b."}


def test_a_flush_ends_the_choice() -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        storage.write(0, sector("a"))
        storage.flush()
        storage.write(SECTOR, sector("b"))

    assert letters(states(work, P4)) == {"...", "a..", "ab."}


def test_writes_that_overlap_keep_their_order() -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        storage.write(0, sector("a", 2))
        storage.write(SECTOR, sector("b", 2))

    assert letters(states(work, P1)) == {"...", "aa.", "abb", ".bb"}


def test_a_torn_write_has_any_of_its_sectors() -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        storage.write(0, sector("a", 3))

    assert letters(states(work, P2)) == {"".join(each) for each in itertools.product(".a", repeat=3)}


def test_a_long_write_is_torn_after_any_sector() -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        storage.write(0, sector("a", 12))

    assert letters(states(work, P2, "." * 12)) == {"a" * count + "." * (12 - count) for count in range(13)}


def test_of_two_writes_into_one_sector_the_later_has_both() -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        storage.write(0, b"a" * 10)
        storage.write(10, b"b" * 10)

    found = {state.content[:20] for state in states(work, P1, ".")}
    assert found == {b"." * 20, b"a" * 10 + b"." * 10, b"a" * 10 + b"b" * 10}


def test_the_length_is_lost_by_itself() -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        storage.write(SECTOR, sector("a", 2))

    assert letters(states(work, P1, "..")) == {"..", ".aa"}
    assert letters(states(work, P3, "..")) == {"..", ".a", ".aa", "..0", "..a", ".a0"}


def test_a_truncate_is_reordered() -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        storage.truncate(SECTOR)
        storage.write(SECTOR, sector("a"))

    assert letters(states(work, P1, "...")) == {"...", ".", ".a", ".a."}
    assert letters(states(work, P3, "...")) >= {"...", ".", ".a", ".a.", "..", ".0", ".00", ".a0"}


def test_a_discard_comes_late_and_stays_late() -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        storage.discard(0, SECTOR)
        storage.write(0, sector("a"))
        storage.flush()
        marks.durable("a")

    assert letters(states(work, P3, ".")) == {".", "0", "a"}
    assert letters([state for state in states(work, P3, ".") if state.durable]) == {"a"}
    late = [state for state in states(work, P4, ".") if state.durable]
    assert letters(late) == {"a", "0"}
    assert any("took effect late" in line for state in late for line in state.story)


@pytest.mark.parametrize(("flags", "late"), [(0, False), (MAY_UNMAP, True), (MAY_UNMAP | FUA, False)])
def test_a_zero_comes_late_if_it_may_unmap(flags: int, late: bool) -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        storage.zero(0, SECTOR, flags)
        storage.write(0, sector("a"))
        storage.flush()
        marks.durable("a")

    assert letters([state for state in states(work, P4, ".") if state.durable]) == ({"a", "0"} if late else {"a"})


def test_what_a_flush_makes_durable_is_what_was_there_when_it_began() -> None:
    flush = "one"
    log = [
        Record("write", 0, SECTOR, sector("a")),
        Record("flush_start", label=flush),
        Record("write", SECTOR, SECTOR, sector("b")),
        Record("flush_done", label=flush),
        Record("durable", label="a"),
    ]
    found = [state for state in crash_states(sector(".", 2), log, model=P1) if state.durable]
    assert letters(found) == {"a.", "ab"}


def test_a_write_with_fua_is_there_once_it_returned() -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        storage.write(0, sector("a"))
        storage.write(SECTOR, sector("b"), FUA)
        storage.write(2 * SECTOR, sector("c"))
        marks.durable("b")

    found = states(work, P1)
    assert letters([state for state in found if not state.durable]) == {"...", "a..", ".b.", "ab."} | {".bc", "abc"}
    assert letters([state for state in found if state.durable]) == {".b.", "ab.", ".bc", "abc"}


def test_marks_are_those_of_the_moment() -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        marks.begin("a")
        storage.write(0, sector("a"))
        storage.flush()
        marks.durable("a")
        marks.begin("b")
        storage.write(0, sector("b"))

    found = {("".join(letters([state])), state.begun, state.durable) for state in states(work, P4, ".")}
    assert found == {
        (".", (), ()),
        (".", ("a",), ()),
        ("a", ("a",), ()),
        ("a", ("a",), ("a",)),
        ("b", ("a", "b"), ("a",)),
    } - {(".", ("a",), ())}


def test_a_promise_before_the_flush_is_seen() -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        storage.write(0, sector("a"))
        marks.durable("a")
        storage.flush()

    with pytest.raises(PowerLossFailure) as caught:
        cut_power(work, lambda content, state: not state.durable or content == sector("a"), start=sector("."))
    assert "verify returned False" in str(caught.value)
    assert "record 0: write of 512 at 0: lost" in str(caught.value)
    assert f"only={caught.value.state.number}" in str(caught.value)


@pytest.mark.parametrize("count", [3, 20])
def test_states_are_numbered_and_repeat(count: int, seed: int) -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        rng = random.Random(seed)
        for number in range(count):
            marks.begin(number)
            storage.write(rng.randrange(8) * SECTOR, rng.randbytes(SECTOR * 2))

    recording = record(work, seed=seed, bounds=Bounds(at_cut=100))
    found = list(recording.states())
    assert [state.number for state in found] == list(range(len(found)))
    assert found == list(record(work, seed=seed, bounds=Bounds(at_cut=100)).states())
    seen: list[CrashState] = []
    number = len(found) // 2
    assert recording.examine(lambda content, state: seen.append(state), only=number) == 1
    assert seen == [found[number]]


records = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 2000), st.integers(1, 1500)),
        st.tuples(st.just("zero"), st.integers(0, 2000), st.integers(1, 1500)),
        st.tuples(st.just("discard"), st.integers(0, 2000), st.integers(1, 1500)),
        st.tuples(st.just("truncate"), st.integers(0, 3000), st.just(0)),
        st.tuples(st.just("flush"), st.just(0), st.just(0)),
    ),
    max_size=5,
)


@settings(max_examples=25)
@given(records)
def test_each_model_allows_what_the_one_before_does(plan: list[tuple[str, int, int]]) -> None:
    def work(storage: Recorder, marks: Marks) -> None:
        for number, (kind, offset, length) in enumerate(plan):
            if kind == "write":
                storage.write(offset, bytes([number + 1]) * length)
            elif kind == "truncate":
                storage.truncate(offset)
            elif kind == "flush":
                storage.flush()
                marks.durable(number)
            else:
                getattr(storage, kind)(offset, length)

    found = [
        {(state.content, state.durable) for state in record(work, model=model, bounds=Bounds(at_cut=0)).states()}
        for model in Persistence
    ]
    for fewer, more in itertools.pairwise(found):
        assert fewer <= more
    storage = Recorder()
    work(storage, storage.marks)
    assert any(content == bytes(storage.content) for content, _ in found[0]), "no power cut is a state, too"


# -- what a disk may hold


def history() -> DiskHistory:
    return DiskHistory(sector(".", 2))


def test_old_flushed_or_newer() -> None:
    disk = history()
    first, second = disk.write(0, sector("a")), disk.write(0, sector("b"))
    for content in (".", "a", "b"):
        disk.check(sector(content) + sector("."), second, 0)
    disk.check(sector("a") + sector("."), second, first)
    for content, begun, durable in ((".", second, first), ("a", second, second), ("b", first, first), ("x", second, 0)):
        with pytest.raises(AssertionError, match="sector 0"):
            disk.check(sector(content) + sector("."), begun, durable)


def test_a_discard_leaves_the_old_or_zero() -> None:
    disk = history()
    written = disk.write(0, sector("a"))
    gone = disk.discard(0, SECTOR)
    disk.check(sector("a") + sector("."), gone, gone)
    disk.check(sector("\0") + sector("."), gone, gone)
    with pytest.raises(AssertionError):
        disk.check(sector("\0") + sector("."), written, written)
    with pytest.raises(AssertionError):
        disk.check(sector(".") + sector("."), gone, gone)


def test_a_size_is_old_or_new_and_what_is_added_is_zero() -> None:
    disk = history()
    grown = disk.resize(3 * SECTOR)
    disk.check(sector(".", 2), grown, 0)
    disk.check(sector(".", 2) + sector("\0"), grown, grown)
    with pytest.raises(AssertionError, match="bytes long"):
        disk.check(sector(".", 2), grown, grown)
    with pytest.raises(AssertionError, match="sector 2"):
        disk.check(sector(".", 3), grown, 0)
    cut = disk.resize(SECTOR)
    again = disk.resize(2 * SECTOR)
    disk.check(sector(".") + sector("\0"), again, again)
    with pytest.raises(AssertionError, match="sector 1"):
        disk.check(sector(".", 2), again, again)
    assert (cut, again) == (grown + 1, grown + 2)


def test_bytes_that_must_not_change() -> None:
    same_bytes(b"abc", b"abc")
    same_bytes(b"abc", b"abc\0\0")
    for after in (b"abd", b"ab", b"abc\0x"):
        with pytest.raises(AssertionError):
            same_bytes(b"abc", after)

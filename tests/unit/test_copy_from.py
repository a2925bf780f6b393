"""Copies of host ranges: equal to reading and writing, refused where anybody must see the bytes, and nothing is lost when
the system stops half-way."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina.errors import BlockIOError, Closed, LaminaError, NotSupported, OutOfRange, ReadOnly
from lamina.limits import Limits
from lamina.node import FUA, NO_FALLBACK, Node
from lamina.request import Child
from lamina.storage.file import DirectFileStorage, FileStorage
from lamina.storage.memory import MemoryStorage
from tests.unit.copying import (
    BLOCK,
    DATA,
    KIB,
    OLD,
    SIZE,
    SOURCE,
    Copying,
    Sharing,
    Stops,
    content,
    file,
    honest,
    no_copy,
    reluctant,
    says,
)


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> Sharing:
    calls = Sharing()
    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", calls)
    monkeypatch.setattr(os, "copy_file_range", no_copy)
    return calls


@pytest.fixture
def unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that cannot share blocks, whatever this one can."""
    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", says(errno.EOPNOTSUPP))


# -- storage


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranges=st.lists(
        st.tuples(st.integers(0, SIZE + 9000), st.integers(0, SIZE), st.integers(1, SIZE), st.booleans()), max_size=4
    ),
    how=st.one_of(st.sampled_from([honest, reluctant, "share"]), st.integers(0, 9000), st.tuples(st.integers(1, 9000))),
)
def test_a_copy_equals_reading_and_writing(tmp_path: Path, ranges: list[Any], how: Any) -> None:
    source, target = file(tmp_path / "a", DATA), file(tmp_path / "b", OLD)
    model = bytearray(OLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.storage.system.fcntl.ioctl", Sharing() if how == "share" else says(errno.EOPNOTSUPP))
        for offset, source_offset, length, whole in ranges:
            if whole:
                offset, source_offset = offset // BLOCK * BLOCK, source_offset // BLOCK * BLOCK
                length = -(-length // BLOCK) * BLOCK
            length = min(length, SIZE - source_offset)
            if not length:
                continue
            if callable(how):
                patch.setattr(os, "copy_file_range", how)
            elif how != "share":  # it stops after so many bytes
                patch.setattr(os, "copy_file_range", Stops(how, 0) if isinstance(how, int) else Stops(how[0], 18))
            try:
                target.copy_from(offset, source, source_offset, length)
            except NotSupported:
                assert how == 0
                continue
            model += bytes(max(offset + length - len(model), 0))
            model[offset : offset + length] = DATA[source_offset : source_offset + length]
    assert target.size == len(model)
    assert content(target) == model
    source.close()
    target.close()


@pytest.mark.parametrize("number", ["EXDEV", "EINVAL", "EOPNOTSUPP", "ENOSYS", "ENOTTY", "ETXTBSY", "EBADF", "EPERM"])
def test_what_the_system_cannot_do_touches_nothing(pair: Any, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    source, target = pair
    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", says(getattr(errno, number)))
    monkeypatch.setattr(os, "copy_file_range", says(getattr(errno, number)))
    for offset in (0, 60 * KIB, 100 * KIB):
        with pytest.raises(NotSupported):
            target.copy_from(offset, source, 0, 8 * KIB)
    assert content(target) == OLD
    assert target.size == SIZE


def test_without_a_call_of_the_system_it_is_refused(pair: Any, unshared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range")
    with pytest.raises(NotSupported):
        pair[1].copy_from(0, pair[0], 0, BLOCK)


@pytest.mark.parametrize("offset", [0, 62 * KIB, 80 * KIB])
def test_no_space_in_the_middle(pair: Any, unshared: None, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    source, target = pair
    monkeypatch.setattr(os, "copy_file_range", Stops(5 * KIB, errno.ENOSPC))
    with pytest.raises(BlockIOError) as caught:
        target.copy_from(offset, source, 0, 10 * KIB)
    assert caught.value.errno == errno.ENOSPC
    assert not isinstance(caught.value, NotSupported)
    assert "free some space" in str(caught.value)
    # The node knows how long its file is, so what is there past its end does not come back by itself.
    assert target.size == os.path.getsize(target.filename)
    assert content(target)[: min(offset, SIZE)] == OLD[: min(offset, SIZE)]
    assert content(target)[offset + 10 * KIB : SIZE] == OLD[offset + 10 * KIB : SIZE]


def test_an_error_while_sharing_is_an_error(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", says(errno.EIO))
    with pytest.raises(BlockIOError) as caught:
        pair[1].copy_from(0, pair[0], 0, BLOCK)
    assert caught.value.errno == errno.EIO


def test_only_sharing(pair: Any, sharing: Sharing) -> None:
    source, target = pair
    target.copy_from(8 * KIB, source, 4 * KIB, 12 * KIB, NO_FALLBACK)
    assert sharing.shared == [12 * KIB]
    assert content(target) == OLD[: 8 * KIB] + DATA[4 * KIB : 16 * KIB] + OLD[20 * KIB :]
    for place in ((1, 0, BLOCK), (0, 1, BLOCK), (0, 0, BLOCK - 1)):
        with pytest.raises(NotSupported):
            target.copy_from(place[0], source, *place[1:], NO_FALLBACK)
    assert sharing.shared == [12 * KIB]


def test_where_it_cannot_be_shared_nothing_is_copied_unasked(
    pair: Any, unshared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", no_copy)
    with pytest.raises(NotSupported):
        pair[1].copy_from(0, pair[0], 0, BLOCK, NO_FALLBACK)


def test_within_one_file(pair: Any, tmp_path: Path, unshared: None) -> None:
    _, target = pair
    again = file(Path(target.filename))
    for other in (target, again):
        for at in (0, 1, 4095):
            with pytest.raises(NotSupported):
                target.copy_from(BLOCK + at, other, BLOCK, BLOCK)
            with pytest.raises(NotSupported):
                target.copy_from(BLOCK, other, BLOCK + at, BLOCK)
    assert content(target) == OLD
    target.copy_from(BLOCK, again, 2 * BLOCK, BLOCK)
    assert content(target)[BLOCK : 2 * BLOCK] == OLD[2 * BLOCK : 3 * BLOCK]
    again.close()


def test_what_is_no_range_of_a_file_is_refused(pair: Any, tmp_path: Path) -> None:
    source, target = pair

    class Watched(FileStorage):
        def read_into(self, offset: int, view: memoryview) -> None:
            raise AssertionError("not asked to read")

    watched = file(tmp_path / "watched", DATA, kind=Watched)
    assert not watched.copyable
    refused: list[tuple[Any, int, int]] = [(source, -1, 10), (source, 1, SIZE), (source, 10**9, 1), (watched, 0, BLOCK)]
    for storage, offset, length in [*refused, (MemoryStorage(SIZE), 0, BLOCK)]:
        with pytest.raises(NotSupported):
            target.copy_from(0, storage, offset, length)
    with pytest.raises(NotSupported):
        MemoryStorage(SIZE).copy_from(0, source, 0, BLOCK)
    assert content(target) == OLD
    watched.close()


def test_a_source_that_was_cut_reads_as_zeros_past_its_end(pair: Any, unshared: None) -> None:
    source, target = pair
    os.truncate(source.filename, 5 * KIB)
    target.copy_from(0, source, 0, 12 * KIB)
    assert content(target) == DATA[: 5 * KIB] + bytes(7 * KIB) + OLD[12 * KIB :]


@pytest.mark.parametrize("which", [0, 1])
def test_closed(pair: Any, which: int) -> None:
    pair[which].close()
    with pytest.raises(Closed):
        pair[1].copy_from(0, pair[0], 0, BLOCK)


@pytest.mark.parametrize("which", [0, 1])
def test_around_the_page_cache_blocks_are_shared_and_nothing_is_copied(
    tmp_path: Path, pair: Any, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    nodes = [file(Path(node.filename), kind=(FileStorage, DirectFileStorage)[number == which])
             for number, node in enumerate(pair)]  # fmt: skip
    monkeypatch.setattr(os, "copy_file_range", no_copy)
    calls = Sharing()
    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", says(errno.EOPNOTSUPP))
    with pytest.raises(NotSupported):
        nodes[1].copy_from(0, nodes[0], 0, BLOCK)
    # What stands in for sharing reads and writes itself, through descriptors that demand alignment.
    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", lambda *_: calls.shared.append(1))
    nodes[1].copy_from(0, nodes[0], 0, BLOCK)
    assert calls.shared == [1]
    for node in nodes:
        node.close()


# -- the request path


def test_bounds_and_the_right_to_write() -> None:
    node = Copying(10 * KIB)
    edge = Child(node, "root")
    for offset, length in ((-1, 1), (0, 10 * KIB + 1), (10 * KIB, 1), (0, -1), (1 << 63, 1)):
        with pytest.raises(OutOfRange):
            edge.copy_from(offset, SOURCE, 0, length)
    edge.copy_from(5, SOURCE, 0, 0)
    node.read_only = True
    with pytest.raises(ReadOnly):
        edge.copy_from(0, SOURCE, 0, KIB)
    assert node.seen == []


def test_growing_storage_may_be_passed() -> None:
    node = Copying(KIB, grows=True)
    with pytest.raises(OutOfRange):
        Child(node, "root").copy_from(0, SOURCE, 0, 2 * KIB)
    Child(node, "file", grows=True).copy_from(KIB, SOURCE, 0, 2 * KIB)
    assert node.seen == [(KIB, 0, 2 * KIB, 0)]


@given(
    align=st.sampled_from([1, 512, 4096]),
    most=st.sampled_from([0, 4096, 8192]),
    offset=st.integers(0, 40).map(lambda n: n * 256),
    length=st.integers(1, 40).map(lambda n: n * 256),
    start=st.integers(0, 9999),
)
def test_ranges_are_aligned_and_split(align: int, most: int, offset: int, length: int, start: int) -> None:
    node = Copying(20 * KIB + 256, Limits(request_alignment=align, max_transfer=most))
    length = min(length, node.size - offset)
    end = offset + length
    edge = Child(node, "root")
    if offset % align or (end % align and end != node.size):
        with pytest.raises(NotSupported):
            edge.copy_from(offset, SOURCE, start, length)
        assert node.seen == []
        return
    edge.copy_from(offset, SOURCE, start, length, NO_FALLBACK)
    at = offset
    for to, source, count, flags in node.seen:
        assert (to, source, flags) == (at, start + at - offset, NO_FALLBACK)
        assert count <= (most or 1 << 30)
        assert to % align == 0
        at += count
    assert at == end


def test_fua_is_a_flush_behind_it() -> None:
    node = Copying(SIZE)
    Child(node, "root").copy_from(0, SOURCE, 0, BLOCK, FUA | NO_FALLBACK)
    assert (node.seen, node.flushes) == ([(0, 0, BLOCK, NO_FALLBACK)], 1)


def test_who_looks_for_zeros_must_see_the_bytes() -> None:
    node = Copying(SIZE)
    node.zero_detected = 0
    with pytest.raises(NotSupported):
        Child(node, "root").copy_from(0, SOURCE, 0, BLOCK)
    assert node.seen == []


def test_who_hears_of_writes_must_see_them() -> None:
    class Observing(Copying):
        def event(self, name: str) -> None:
            raise AssertionError("a copy that is refused is not announced")

    node = Observing(SIZE)
    with pytest.raises(NotSupported):
        Child(node, "root").copy_from(0, SOURCE, 0, BLOCK)
    assert node.seen == []


def test_a_copy_waits_for_requests_that_overlap() -> None:
    node = Copying(SIZE, serialise=BLOCK)
    edge = Child(node, "root")
    thread = threading.Thread(target=edge.copy_from, args=(BLOCK + 1, SOURCE, 0, 10))

    def while_the_range_is_held() -> None:
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        assert node.seen == []
        edge.copy_from(2 * BLOCK, SOURCE, 0, 10)  # elsewhere nobody waits

    node.ranges.exclusive(0, 2 * BLOCK, while_the_range_is_held)
    thread.join(10)
    assert [seen[0] for seen in node.seen] == [2 * BLOCK, BLOCK + 1]


def test_a_refusal_gives_the_range_back() -> None:
    class Refuses(Copying):
        copy_from = Node.copy_from

    node = Refuses(SIZE, serialise=BLOCK)
    with pytest.raises(NotSupported):
        Child(node, "root").copy_from(0, SOURCE, 0, BLOCK)
    node.ranges.exclusive(0, SIZE, list)


def test_every_error_is_ours(pair: Any, unshared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in errno.errorcode:
        monkeypatch.setattr(os, "copy_file_range", says(number))
        with pytest.raises(LaminaError):
            pair[1].copy_from(0, pair[0], 0, BLOCK)
    assert content(pair[1]) == OLD

"""Comparing two disks: the answer is that of comparing their bytes, and zeros are not read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lamina
from lamina.errors import Cancelled
from lamina.image import Image
from lamina.jobs import compare as module
from lamina.jobs.compare import Difference, compare
from lamina.jobs.progress import Monitor

PAGE = 4096


def disk(path: Path, content: bytes) -> Path:
    """A raw file with holes where `content` has whole pages of zeros."""
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), PAGE):
            page = content[at : at + PAGE]
            if page.strip(b"\0"):
                file.seek(at)
                file.write(page)
    return path


def model(first: bytes, second: bytes) -> Difference | None:
    length = max(len(first), len(second))
    pairs = enumerate(zip(first.ljust(length, b"\0"), second.ljust(length, b"\0"), strict=True))
    return next((Difference("content", at) for at, (a, b) in pairs if a != b), None)


pages = st.lists(st.sampled_from([0, 0, 1, 2]), max_size=5)


@given(pages, pages, st.integers(0, PAGE - 1), st.booleans(), st.integers(0, 1 << 20))
def test_the_answer_is_that_of_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, one: list[int], other: list[int], odd: int, same: bool, spot: int
) -> None:
    folder = tmp_path_factory.mktemp("compare")
    first = b"".join(bytes([value]) * PAGE for value in one) + bytes(odd)
    second = bytearray(first if same else b"".join(bytes([value]) * PAGE for value in other))
    if second and spot % 3 == 0:
        second[spot % len(second)] ^= 5
    left, right = disk(folder / "a", first), disk(folder / "b", bytes(second))
    with lamina.open(left, format="raw") as a, lamina.open(right, format="raw") as b:
        assert compare(a, b) == model(first, bytes(second))
        assert compare(b, a) == model(first, bytes(second))


def test_pieces_end_nowhere_too_early(tmp_path: Path) -> None:
    content = bytearray(b"\7" * (3 * module._PIECE + 5))
    left = disk(tmp_path / "a", content)
    for spot in (0, module._PIECE - 1, module._PIECE, 3 * module._PIECE, len(content) - 1):
        changed = bytearray(content)
        changed[spot] = 0
        right = disk(tmp_path / "b", changed)
        with lamina.open(left, format="raw") as a, lamina.open(right, format="raw") as b:
            assert compare(a, b) == Difference("content", spot)


def test_what_is_zero_in_both_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = disk(tmp_path / "a", bytes(1 << 26)), disk(tmp_path / "b", bytes(1 << 25))

    def never(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(Image, "read_into", never)
    with lamina.open(left, format="raw") as a, lamina.open(right, format="raw") as b:
        assert compare(a, b) is None


def test_strict_sees_size_and_status(tmp_path: Path) -> None:
    content = bytes(4 * PAGE) + b"\1" * PAGE
    sparse = disk(tmp_path / "a", content)
    (tmp_path / "b").write_bytes(content)
    with lamina.open(sparse, format="raw") as a, lamina.open(tmp_path / "b", format="raw") as b:
        assert compare(a, b) is None
        assert compare(a, b, strict=True) == Difference("status", 0)
        assert compare(a, a, strict=True) is None
    shorter = disk(tmp_path / "c", content[:-1])
    with lamina.open(sparse, format="raw") as a, lamina.open(shorter, format="raw") as c:
        assert compare(a, c, strict=True) == Difference("size", len(content) - 1)


def test_strict_tells_content_that_differs_before_the_status_does(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\1" * PAGE + bytes(PAGE))
    disk(tmp_path / "b", b"\2" * PAGE + bytes(PAGE))
    with lamina.open(tmp_path / "a", format="raw") as a, lamina.open(tmp_path / "b", format="raw") as b:
        assert compare(a, b, strict=True) == Difference("content", 0)


def test_it_can_be_stopped_and_tells_how_far_it_is(tmp_path: Path) -> None:
    content = b"\1" * (4 * module._PIECE)
    disk(tmp_path / "a", content)
    told: list[tuple[int, int]] = []
    with lamina.open(tmp_path / "a", format="raw") as a:
        assert compare(a, a, monitor=Monitor(lambda done, total: told.append((done, total)))) is None
        assert told[-1] == (len(content), len(content))
        assert told == sorted(told)
        monitor = Monitor()
        monitor.cancel()
        with pytest.raises(Cancelled):
            compare(a, a, monitor=monitor)

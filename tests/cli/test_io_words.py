"""The parts of `lamina io` that need no image: words and numbers, patterns, the texts, and what a target opens."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.cli.io import grammar, patterns
from lamina.cli.io.output import Output, clock, hex_dump, human_size, machine_statistics, statistics
from lamina.cli.io.target import Target, merged
from lamina.errors import OptionError


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("read 0 512", ["read", "0", "512"]),
        ("  read   0 512  \n", ["read", "0", "512"]),
        ("\n", []),
        ("read\t0", ["read\t0"]),
        ('write "a b"', ["write", '"a', 'b"']),
    ],
)
def test_spaces_part_words_and_nothing_quotes_them(line: str, words: list[str]) -> None:
    assert grammar.split(line) == words


def test_flags() -> None:
    assert grammar.parse_flags(["-qP", "3", "0", "-v", "4"], "qvP:") == (
        {"q": [""], "P": ["3"], "v": [""]},
        ["0", "4"],
    )
    assert grammar.parse_flags(["-oa", "-o", "b", "--", "-q"], "qo:") == ({"o": ["a", "b"]}, ["-q"])
    for words in (["-x"], ["-P"], ["--long"], ["-1"]):
        with pytest.raises(OptionError):
            grammar.parse_flags(words, "qP:")


@given(st.integers(-(10**18), 10**18))
def test_whole_numbers_as_c_writes_them(number: int) -> None:
    sign, size = "-" * (number < 0), abs(number)
    for text in (f"{sign}{size}", f"{sign}{size:#x}", f"{sign}0{size:o}"):
        if len(text) <= 20:
            assert grammar.integer(text) == number


@pytest.mark.parametrize("text", ["", "-", "0x", "08", "1.0", "1e3", " 1", "1 ", "\u0661", "0b1", "1_0", "9" * 5000])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(OptionError):
        grammar.integer(text)
    with pytest.raises(OptionError):
        grammar.pattern_byte(text)


@given(st.binary(min_size=1, max_size=300), st.integers(0, 1000))
def test_a_pattern_file_is_repeated(tmp_path_factory: pytest.TempPathFactory, unit: bytes, length: int) -> None:
    path = tmp_path_factory.mktemp("pattern") / "file"
    path.write_bytes(unit)
    data = patterns.from_file(str(path), length)
    assert data == bytes(unit[at % len(unit)] for at in range(length))


@given(st.integers(0, 255), st.integers(1, 5000), st.data())
def test_one_other_byte_is_noticed(byte: int, length: int, draw: st.DataObject) -> None:
    data = patterns.repeated(byte, length)
    start = draw.draw(st.integers(0, length))
    count = draw.draw(st.integers(0, length - start))
    assert patterns.matches(data, start, count, byte)
    at = draw.draw(st.integers(0, length - 1))
    data[at] ^= 1 << draw.draw(st.integers(0, 7))
    assert patterns.matches(data, start, count, byte) == (not start <= at < start + count)


@pytest.mark.parametrize("at", [0, (1 << 20) - 1, 1 << 20, (3 << 20) - 1, 3 << 20])
def test_long_buffers_are_compared_to_their_end(at: int) -> None:
    data = patterns.repeated(7, (3 << 20) + 1)
    assert patterns.matches(data, 0, len(data), 7)
    data[at] = 8
    assert not patterns.matches(data, 0, len(data), 7)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (693.841669, "693.841669 bytes"),
        (1024, "1 KiB"),
        (1536, "1.500 KiB"),
        (1000000, "976.562 KiB"),
        (1048577, "1 MiB"),
        (1 << 63, "8 EiB"),
    ],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert human_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "short", "full"),
    [
        (0, "00.00 sec", "0:00:00.00"),
        (1.239, "01.23 sec", "0:00:01.23"),
        (59.999, "59.99 sec", "0:00:59.99"),
        (60, "0:01:00.00", "0:01:00.00"),
        (1627.41, "0:27:07.41", "0:27:07.41"),
        (36000.5, "10:00:00.50", "10:00:00.50"),
    ],
)
def test_times(seconds: float, short: str, full: str) -> None:
    assert clock(seconds) == short
    assert clock(seconds, full=True) == full


def test_statistics() -> None:
    assert statistics("read", 512, 1024, 0.5) == [
        "read 1024/1024 bytes at offset 512",
        "1 KiB, 1 ops; 00.50 sec (2 KiB/sec and 2.0000 ops/sec)",
    ]
    assert machine_statistics(1024, 0.5) == "1024,1,0:00:00.50,2048.000,2.000"
    assert "inf" not in "".join(statistics("read", 0, 0, 0.0))


def test_hex_dump() -> None:
    assert hex_dump(0xFFFFFFFA, bytes(range(0x37, 0x4B))) == [
        "fffffffa:  37 38 39 3a 3b 3c 3d 3e 3f 40 41 42 43 44 45 46  789.......ABCDEF",
        "10000000a:  47 48 49 4a  GHIJ",
    ]
    assert hex_dump(0, b"") == []


def test_lines_said_together_stay_together() -> None:
    out = io.StringIO()
    output = Output("lamina", out, io.StringIO())
    threads = [
        threading.Thread(target=lambda word: [output.say(*[word] * 3) for _ in range(200)], args=(word,))
        for word in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = out.getvalue().splitlines()
    assert len(lines) == 4 * 200 * 3
    assert all(len(set(lines[at : at + 3])) == 1 for at in range(0, len(lines), 3))


@pytest.mark.parametrize(
    ("target", "spec"),
    [
        (Target("a"), {"file": {"driver": "file", "filename": "a"}}),
        (Target("a", format="file"), {"driver": "file", "filename": "a"}),
        (
            Target("a", {"driver": "raw", "offset": "4k"}),
            {"driver": "raw", "offset": "4k", "file": {"driver": "file", "filename": "a"}},
        ),
        (Target("a", {"driver": "blkdebug"}), {"driver": "blkdebug", "image": {"driver": "file", "filename": "a"}}),
        (
            Target("a", format="raw", cache="none"),
            {"file": {"driver": "file", "filename": "a", "cache": {"direct": True}}},
        ),
        (
            Target(options={"driver": "raw", "filename": "a"}, cache="none"),
            {"driver": "raw", "file": {"driver": "file", "filename": "a", "cache": {"direct": True}}},
        ),
        (
            Target(options={"driver": "raw", "file": {"filename": "a", "cache": {"direct": "off"}}}, cache="none"),
            {"driver": "raw", "file": {"filename": "a", "cache": {"direct": "off"}}},
        ),
        (
            Target(options={"driver": "quorum", "children": [{"driver": "file", "filename": "a"}, "b"]}, cache="none"),
            {"driver": "quorum", "children": [{"driver": "file", "filename": "a", "cache": {"direct": True}}, "b"]},
        ),
        (Target('json:{"driver":"raw","file.filename":"a"}'), {"driver": "raw", "file": {"filename": "a"}}),
    ],
)
def test_what_a_target_opens(target: Target, spec: dict[str, object]) -> None:
    assert target.spec() == spec


def test_direct_requests_leave_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    with Target(str(path), format="raw", cache="none", read_only=True).open() as image:
        assert image.alignment > 1
    with Target(str(path), format="raw", read_only=True).open() as image:
        assert image.alignment == 1


def test_merged_options_change_only_what_is_named() -> None:
    before = {"driver": "raw", "file": {"filename": "a", "cache": {"direct": "on"}}}
    changes = {"file": {"cache": {"direct": "off"}}, "offset": "1k"}
    assert merged(before, changes) == {
        "driver": "raw",
        "offset": "1k",
        "file": {"filename": "a", "cache": {"direct": "off"}},
    }
    assert before["file"] == {"filename": "a", "cache": {"direct": "on"}}

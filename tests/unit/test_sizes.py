"""Sizes and ranges of bytes, as command lines and options write them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import OptionError
from lamina.limits import MAX_SIZE
from lamina.options import format_size, parse_range, parse_size
from lamina.schema import Option

if TYPE_CHECKING:
    from tests.conftest import Qemu

SIZES = {
    "0": 0,
    "00": 0,
    "512": 512,
    "010": 10,
    "10b": 10,
    "10B": 10,
    "+1": 1,
    " 1": 1,
    "1k": 1024,
    "1K": 1024,
    "4M": 4 << 20,
    "4m": 4 << 20,
    "1.5G": 3 << 29,
    "1.50G": 3 << 29,
    "1T": 1 << 40,
    "1p": 1 << 50,
    "1e": 1 << 60,
    "7E": 7 << 60,
    "5.": 5,
    "1.0": 1,
    "1.0b": 1,
    "0.5k": 512,
    "0x200": 512,
    "0X1F": 31,
    "0x1b": 27,
    "0x1e": 30,
}
NO_SIZES = ["", " ", ".", "k", ".k", "x", "0x", "0xg", "0x200k", "0x1.8k", "1kb", "1 k", "1 ", "1\n", "1e3", "1.5.5k"]
NO_SIZES += [
    "1s",
    "10%",
    "inf",
    "nan",
    "1_000",
    "-1",
    "-1k",
    "--1",
    "++1",
    "1,5k",
    "\u0663",
    "\uff11k",
    "1\u212a",
    "\xb2",
    "1\0",
    "k1",
]


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(text, exact=False) == size


@pytest.mark.parametrize("text", [*NO_SIZES, "9" * 65, "9" * 100_000, "1" * 100_000 + "x"])
def test_what_is_no_size(text: str) -> None:
    started = time.perf_counter()
    for exact in (True, False):
        with pytest.raises(OptionError, match=r"is not a size; write bytes.*1\.5G") as caught:
            parse_size(text, exact=exact)
        assert len(str(caught.value)) < 400
    assert time.perf_counter() - started < 20, "it takes the square of its length"


def test_fractions_of_a_byte() -> None:
    for text in ("1.3k", "0.1k", "1.5", "0.5b", "0.0001M"):
        with pytest.raises(OptionError, match="not a whole number of bytes"):
            parse_size(text)
    for text, size in (("1.1k", 1126), ("1.2k", 1229), ("0.1k", 102), ("1.9999k", 2048)):
        assert parse_size(text, exact=False) == size
    with pytest.raises(OptionError, match="not a whole number"):
        parse_size("1.5", exact=False)
    # Exact where a float is not.
    assert parse_size("4503599627370495.5k") == 4503599627370495 * 1024 + 512


def test_largest_size() -> None:
    assert parse_size("9223372036854775807") == parse_size("0x7fffffffffffffff") == (1 << 63) - 1
    for text in ("9223372036854775808", "8E", "0x8000000000000000", "99999999999999E", "7.9999999999999999999999E"):
        with pytest.raises(OptionError, match=r"too large|not a whole"):
            parse_size(text)


@given(st.integers(0, (1 << 63) - 1))
def test_a_number_of_bytes_is_its_size(size: int) -> None:
    assert parse_size(str(size)) == parse_size(hex(size)) == parse_size(f"{size}B") == size
    assert parse_size(Option("x", "size", "").spell(size)) == size


@given(st.integers(0, (1 << 33) - 1), st.integers(0, 3), st.sampled_from("kMGkmg"))
def test_fractions_are_exact_or_refused(number: int, digits: int, suffix: str) -> None:
    text = f"{number // 10**digits}.{number % 10**digits:0{digits}d}{suffix}" if digits else f"{number}{suffix}"
    unit = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}[suffix.lower()]
    if number * unit % 10**digits == 0:
        assert parse_size(text) == number * unit // 10**digits
    else:
        with pytest.raises(OptionError):
            parse_size(text)


@pytest.mark.peers
def test_sizes_mean_what_they_mean_to_qemu_io(qemu: Qemu) -> None:
    accepted = [text for text in SIZES if parse_size(text) < 4 << 60 and text.strip() == text] + [
        "1.1k",
        "1.2k",
        "0.1k",
        "1.9999k",
        "0.00001M",
    ]
    commands = [part for text in accepted for part in ("-c", f"read {text} 0")]
    output = qemu.io("--image-opts", "driver=null-co,size=4E,read-zeroes=on", *commands, check=False).stdout
    said = [int(line.rsplit(" ", 1)[1]) for line in output.splitlines() if line.startswith("read 0/0")]
    assert said == [parse_size(text, exact=False) for text in accepted]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (65536, "64 KiB"),
        (197120, "192 KiB"),
        (999 * 1024, "999 KiB"),
        (1000 * 1024, "0.977 MiB"),
        (1 << 20, "1 MiB"),
        (3 << 29, "1.5 GiB"),
        (12345679360, "11.5 GiB"),
        (1234567890432, "1.12 TiB"),
        (1 << 50, "1 PiB"),
        (1 << 60, "1 EiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.peers
def test_sizes_are_written_as_qemu_img_does(qemu: Qemu) -> None:
    sizes = [0, 512, 1024, 1536, 999 * 1024, 1000 * 1024, 1023488, 65536, 123456789504, 1126400000, 11 << 58, 1 << 60]
    for size in sizes:
        output = qemu.img("info", f'json:{{"driver":"null-co","size":{size}}}').stdout
        assert f"virtual size: {format_size(size)} ({size} bytes)" in output


# -- ranges


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("0-1", 0, 1),
        ("512-1k", 512, 1024),
        (" 0x200-0x400 ", 512, 1024),
        ("1.5M-", 3 << 19, MAX_SIZE),
        (f"0-{MAX_SIZE}", 0, MAX_SIZE),
    ],
)
def test_ranges(text: str, start: int, end: int) -> None:
    assert parse_range(text) == (start, end)


@pytest.mark.parametrize("text", ["", "-", "1M", "-5", "5-5", "6-5", "1-2-3", "a-b", "0-8E", f"{MAX_SIZE}-"])
def test_no_ranges(text: str) -> None:
    with pytest.raises(OptionError):
        parse_range(text)

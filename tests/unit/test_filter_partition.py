"""The filter `partition`: tables made by hand after their specifications, whole ones and hostile ones."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import CorruptImage, FormatError, LaminaError, LimitExceeded, NotSupported, OptionError
from lamina.filters.partition import GPT_ENTRY, GPT_HEADER, MBR_ENTRY, Partition, find, partitions
from lamina.graph import open_graph
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

MIB = 1 << 20


def record(*entries: tuple[int, int, int]) -> bytes:
    """A boot record: (type, first sector, sectors) for each entry."""
    packed = b"".join(MBR_ENTRY.pack(type=kind, first=first, sectors=count) for kind, first, count in entries)
    return bytes(446) + packed.ljust(64, b"\0") + b"\x55\xaa"


def disk(size: int, parts: dict[int, bytes]) -> Child:
    storage = MemoryStorage(size)
    for offset, part in parts.items():
        storage.write(offset, memoryview(part))
    return Child(storage, "image")


def gpt(
    size: int, sector: int, entries: dict[int, tuple[int, int]], count: int = 128, **changes: Any
) -> dict[int, bytes]:
    """A protective MBR, and both copies of a GPT with these partitions (first and last sector)."""
    table = bytearray(count * 128)
    for number, (first, last) in entries.items():
        GPT_ENTRY.pack_into(table, (number - 1) * 128, type_guid=b"\1" * 16, first=first, last=last)
    room = -(-len(table) // sector)
    sectors = size // sector

    def header(my: int, other: int, at: int) -> bytes:
        values = {
            "my_lba": my,
            "alternate_lba": other,
            "first_usable": 2 + room,
            "last_usable": sectors - 2 - room,
            "entries_lba": at,
            "entry_count": count,
            "entries_crc": zlib.crc32(table),
            **changes,
        }
        raw = GPT_HEADER.pack(**values)
        return GPT_HEADER.pack(**{**values, "header_crc": zlib.crc32(raw[: values.get("header_size", 92)])})

    return {
        0: record((0xEE, 1, min(sectors - 1, 0xFFFFFFFF))),
        sector: header(1, sectors - 1, 2),
        2 * sector: bytes(table),
        (sectors - 1 - room) * sector: bytes(table),
        (sectors - 1) * sector: header(sectors - 1, 1, sectors - 1 - room),
    }


# -- MBR

#: Two primary partitions, and an extended one (8192 sectors from 8192) with three logical ones.
CLASSIC = {
    0: record((0x83, 2048, 2048), (0x07, 4096, 1000), (0, 0, 0), (0x0F, 8192, 8192)),
    8192 * 512: record((0x83, 63, 100), (0x05, 1024, 500)),
    9216 * 512: record((0x82, 1, 99), (0x05, 2048, 500)),
    10240 * 512: record((0x83, 2, 6142)),
}


@pytest.mark.parametrize(
    ("number", "first", "sectors"),
    [(1, 2048, 2048), (2, 4096, 1000), (5, 8192 + 63, 100), (6, 9216 + 1, 99), (7, 10242, 6142)],
)
def test_primary_and_logical_partitions(number: int, first: int, sectors: int) -> None:
    assert find(disk(16384 * 512, CLASSIC), number) == (first * 512, sectors * 512)


@pytest.mark.parametrize(
    ("made", "numbers"),
    [
        (disk(16384 * 512, CLASSIC), [1, 2, 5, 6, 7]),
        (disk(64 * MIB, gpt(64 * MIB, 512, {1: (2048, 4095), 9: (4096, 8191)})), [1, 9]),
        (disk(64 * MIB, gpt(64 * MIB, 4096, {128: (300, 300)})), [128]),
        (disk(MIB, {}), []),
        (disk(MIB, {0: record()}), []),
        (disk(512, {}), []),
    ],
)
def test_all_partitions(made: Child, numbers: list[int]) -> None:
    assert partitions(made) == {number: find(made, number) for number in numbers}
    assert list(partitions(made)) == numbers


def test_an_error_of_one_partition_is_one_of_the_list() -> None:
    with pytest.raises(CorruptImage, match=r"partition 2 .* is not inside"):
        partitions(disk(4096 * 512, {0: record((0x83, 1, 1), (0x83, 4096, 1))}))
    with pytest.raises(CorruptImage, match="not a boot record"):
        partitions(disk(4096 * 512, {0: record((0x83, 1, 1), (0x05, 100, 100))}))
    with pytest.raises(CorruptImage, match="no copy of the GPT"):
        partitions(disk(4096 * 512, {0: record((0xEE, 1, 1))}))


@pytest.mark.parametrize("number", [3, 4, 8, 129, 10**30])
def test_what_is_not_there_is_refused_and_what_is_there_named(number: int) -> None:
    with pytest.raises(OptionError, match="has no partition") as caught:
        find(disk(16384 * 512, CLASSIC), number)
    assert "1, 2" in str(caught.value)


def test_sectors_of_4096() -> None:
    parts = {0: record((0x83, 256, 10), (0x05, 300, 100)), 300 * 4096: record((0x83, 1, 5))}
    assert find(disk(400 * 4096, parts), 1, 4096) == (256 * 4096, 10 * 4096)
    assert find(disk(400 * 4096, parts), 5, 4096) == (301 * 4096, 5 * 4096)
    assert find(disk(400 * 4096, parts), 1) == (256 * 512, 10 * 512)


@pytest.mark.parametrize(
    "parts",
    [
        {0: record((0x83, 2048, 0))},
        {0: record((0x83, 2048, 2049))},
        {0: record((0x83, 0xFFFFFFFF, 0xFFFFFFFF))},
        {0: record((0x83, 4097, 1))},
    ],
)
def test_a_partition_outside_the_disk_is_refused(parts: dict[int, bytes]) -> None:
    with pytest.raises(CorruptImage, match="is not inside"):
        find(disk(4096 * 512, parts), 1)


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ({2048 * 512: record((0x83, 1, 1), (0x05, 0, 10))}, "returns to"),
        ({2048 * 512: record((0, 0, 0), (0x05, 8, 10)), 2056 * 512: record((0, 0, 0), (0x05, 8, 9))}, "returns to"),
        ({2048 * 512: record((0, 0, 0), (0x05, 1024, 10))}, "not a boot record"),
        ({2048 * 512: record((0, 0, 0), (0x05, 5, 10))}, "not a boot record"),
        ({}, "not a boot record"),
        ({2048 * 512: record((0x83, 1, 1024))}, "ends outside"),
        ({2048 * 512: record((0x83, 0xFFFFFFFF, 1))}, "ends outside"),
    ],
)
def test_hostile_chains(chain: dict[int, bytes], words: str) -> None:
    with pytest.raises(CorruptImage, match=words):
        find(disk(4096 * 512, {0: record((0x05, 2048, 1024)), **chain}), 9)


def test_an_endless_chain_is_bounded() -> None:
    parts = {0: record((0x05, 1, 4000))}
    parts |= {(1 + at) * 512: record((0, 0, 0), (0x05, at + 1, 1)) for at in range(3000)}
    with pytest.raises(LimitExceeded, match="more than 128"):
        find(disk(4096 * 512, parts), 5)


@pytest.mark.parametrize("content", [b"", b"x" * 511, bytes(4096), b"\xee" * 510 + b"\x55\xaa" + bytes(512)])
def test_no_table(content: bytes) -> None:
    with pytest.raises(FormatError, match="no partition table"):
        find(disk(len(content), {0: content} if content else {}), 1)


# -- GPT


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("given_sector", [False, True])
def test_gpt(sector: int, given_sector: bool) -> None:
    image = disk(4 * MIB, gpt(4 * MIB, sector, {1: (100, 199), 128: (200, 200)}))
    asked = sector if given_sector else None
    assert find(image, 1, asked) == (100 * sector, 100 * sector)
    assert find(image, 128, asked) == (200 * sector, sector)
    with pytest.raises(OptionError, match="the partitions are: 1, 128"):
        find(image, 2, asked)
    with pytest.raises(OptionError, match="no partition 129"):
        find(image, 129, asked)


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("broken", [0, 16, 60, 1])
def test_the_backup_stands_in_for_a_broken_primary(sector: int, broken: int) -> None:
    parts = gpt(4 * MIB, sector, {3: (100, 199)})
    at = sector + broken if broken != 1 else 2 * sector + 7  # the header, or the entries
    image = disk(4 * MIB, {**parts, at: b"\xff"})
    # What comes later wins: the broken byte is written over the table.
    assert find(image, 3) == (100 * sector, 100 * sector)
    last = 4 * MIB - sector
    image.write(last, memoryview(b"\xff"))
    with pytest.raises(CorruptImage, match="no copy of the GPT is valid"):
        find(image, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"entry_size": 100},
        {"entry_size": 384},
        {"entry_size": 0},
        {"entry_count": 0},
        {"entry_count": 0xFFFFFFFF},
        {"entries_lba": 1 << 63},
        {"entries_lba": 0},
        {"entries_lba": 8191},
        {"first_usable": 9000},
        {"last_usable": (1 << 64) - 1},
        {"last_usable": 8192},
        {"my_lba": 7},
        {"header_size": 91},
        {"header_size": 513},
        {"entries_crc": 1},
    ],
)
def test_numbers_that_cannot_be(changes: dict[str, int]) -> None:
    """The checksum over them is right: whoever wrote them meant it."""
    image = disk(4 * MIB, gpt(4 * MIB, 512, {1: (100, 199)}, **changes))
    with pytest.raises(CorruptImage, match="no copy"):
        find(image, 1)


@pytest.mark.parametrize("place", [(199, 100), (100, 8191), (1, 100), (100, (1 << 64) - 1), ((1 << 64) - 1, 5)])
def test_an_entry_outside_the_usable_sectors_is_refused(place: tuple[int, int]) -> None:
    with pytest.raises(CorruptImage, match="partition 1 "):
        find(disk(4 * MIB, gpt(4 * MIB, 512, {1: place})), 1)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_tables_raise_our_errors_and_never_leave_the_disk(data: st.DataObject) -> None:
    parts = data.draw(st.sampled_from([CLASSIC, gpt(8 * MIB, 512, {1: (100, 199), 6: (300, 9000)})]))
    image = disk(16384 * 512, parts)
    offsets = sorted(offset + at for offset, part in parts.items() for at in range(min(len(part), 512)))
    for _ in range(data.draw(st.integers(1, 6))):
        damage = bytes(data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=4)))
        image.write(data.draw(st.sampled_from(offsets)), memoryview(damage))
    try:
        offset, length = find(image, data.draw(st.integers(1, 8)), data.draw(st.sampled_from([None, 512, 4096])))
    except LaminaError:
        return
    assert length > 0
    assert offset >= 0
    assert offset + length <= image.size


# -- the node


def test_it_is_a_window() -> None:
    image = disk(16384 * 512, CLASSIC)
    whole, part = Image(image.node), Image(Partition(image, 1))
    part.write(0, b"x" * part.size)
    assert whole.read(2048 * 512 - 1, part.size + 2) == b"\0" + b"x" * part.size + b"\0"
    (row,) = part.extents(0, 100)
    assert (row.start, row.file, row.offset, row.depth) == (0, image.node, 2048 * 512, 0)
    assert part.node.host_base == (image.node, 2048 * 512)
    with pytest.raises(NotSupported):
        part.truncate(512)


def test_it_is_opened_by_its_name(tmp_path: Any) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(record((0x83, 1, 3)).ljust(4 * 512, b"z"))
    spec = {"driver": "partition", "partition": "1", "image": {"driver": "raw", "file.filename": str(path)}}
    with Image(open_graph(spec)) as part:
        assert part.read(0, part.size) == b"z" * 3 * 512
        assert part.read_only
    with pytest.raises(OptionError, match="partition is missing"):
        open_graph({"driver": "partition", "image.driver": "memory"})
    with pytest.raises(OptionError, match="sector-size"):
        open_graph({**spec, "sector-size": 1024})

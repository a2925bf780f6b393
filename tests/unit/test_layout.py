"""Structures declared once: offsets, reading, writing, flags, and what is said when something does not fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import CorruptImage
from lamina.layout import Field, Flags, Record, Structure

FEATURES = Flags({2: ("external", "data lies in another file"), 0: ("dirty", "was not closed"), 1: ("corrupt", "")})

V2 = Structure(
    "toy header",
    ">",
    [
        Field("magic", "4s", "always TOY", default=b"TOY\xfb"),
        Field("version", "u32", "2 or 3"),
        Field("", "4x", "reserved"),
        Field("size", "u64", "bytes of the disk", default=0),
        Field("method", "u8", "compression", default=0, values={0: "deflate", 1: "zstd"}),
    ],
    doc="The beginning of every toy.",
)
V3 = V2.extend("toy header 3", [Field("features", "u64", "what a reader must know", default=0, flags=FEATURES)])

INTEGERS = {f"{sign}{bits}": (sign, bits) for sign in "ui" for bits in (8, 16, 32, 64)}


def test_offsets_and_sizes_have_no_gaps() -> None:
    assert [(field.name, field.offset, field.size) for field in V2.fields] == [
        ("magic", 0, 4),
        ("version", 4, 4),
        ("", 8, 4),
        ("size", 12, 8),
        ("method", 20, 1),
    ]
    assert V2.size == 21
    assert V2["size"].offset == 12
    assert V2["size"].doc == "bytes of the disk"
    assert V2.names == ("magic", "version", "size", "method")
    assert "size" in V2
    assert "" not in V2
    assert [field.type for field in V2] == ["4s", "u32", "4x", "u64", "u8"]
    with pytest.raises(KeyError, match="toy header has no field 'nope'"):
        V2["nope"]


def test_extended_structure_begins_with_its_base() -> None:
    assert [(f.name, f.offset) for f in V3.fields[:5]] == [(f.name, f.offset) for f in V2.fields]
    assert V3["features"].offset == V2.size
    assert V3.size == V2.size + 8
    assert V3.doc == V2.doc
    assert "features" not in V2
    assert V3.pack(version=3)[: V2.size] == V2.pack(version=3)


def test_byte_order() -> None:
    fields = [Field("number", "u32")]
    assert Structure("big", ">", fields).pack(number=1) == b"\0\0\0\1"
    assert Structure("little", "<", fields).pack(number=1) == b"\1\0\0\0"
    assert Structure("little", "<", fields).unpack(b"\1\0\0\0").number == 1


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_unpack_from_any_buffer_at_any_place(kind: Any) -> None:
    packed = V2.pack(version=2, size=1 << 40, method=1)
    record = V2.unpack(kind(b"xyz" + packed + b"tail"), 3)
    assert (record.magic, record.version, record.size, record.method) == (b"TOY\xfb", 2, 1 << 40, 1)
    assert tuple(record) == (b"TOY\xfb", 2, 1 << 40, 1)
    assert record._asdict() == {"magic": b"TOY\xfb", "version": 2, "size": 1 << 40, "method": 1}
    assert V2.pack(**record._asdict()) == packed
    assert V2.unpack_field("size", kind(b"xyz" + packed), 3) == 1 << 40


def test_record_is_immutable_and_shows_itself() -> None:
    record = V2.unpack(V2.pack(version=2))
    assert isinstance(record, Record)
    assert repr(record) == "ToyHeader(magic=b'TOY\\xfb', version=2, size=0, method=0)"
    with pytest.raises(AttributeError):
        setattr(record, "version", 3)  # noqa: B010
    with pytest.raises(AttributeError):
        setattr(record, "other", 3)  # noqa: B010
    with pytest.raises(AttributeError):
        _ = record.nope
    assert type(V2.unpack(V2.pack(version=3))) is type(record)


def test_field_names_may_be_those_of_tuple_methods() -> None:
    record = Structure("list", "<", [Field("count", "u8"), Field("index", "u8")]).unpack(b"\3\4")
    assert (record.count, record.index) == (3, 4)


def test_short_buffer_names_structure_and_sizes() -> None:
    with pytest.raises(
        CorruptImage, match=r"toy header is truncated: it needs 21 bytes at offset 5, and only 15 remain"
    ):
        V2.unpack(bytes(20), 5)
    with pytest.raises(CorruptImage, match=r"at offset 99, and only 0 remain"):
        V2.unpack(bytes(20), 99)
    with pytest.raises(CorruptImage, match=r"size of the toy header .* needs 8 bytes at offset 12, and only 4 remain"):
        V2.unpack_field("size", bytes(16))
    assert V2.unpack_field("version", bytes(8)) == 0
    for call in (V2.unpack, V2.describe, lambda buffer, at: V2.unpack_field("size", buffer, at)):
        with pytest.raises(ValueError, match="offset -1 is negative"):
            call(bytes(40), -1)


def test_pack_takes_defaults_and_names_what_is_wrong() -> None:
    assert V2.pack(version=2) == b"TOY\xfb" + bytes([0, 0, 0, 2]) + bytes(13)
    with pytest.raises(ValueError, match="toy header: the value of version is missing"):
        V2.pack()
    with pytest.raises(ValueError, match=r"toy header has no field colour, sise"):
        V2.pack(version=2, sise=1, colour=2)
    with pytest.raises(ValueError, match=r"size is 18446744073709551616, outside u64 \(0 to 18446744073709551615\)"):
        V2.pack(version=2, size=1 << 64)
    with pytest.raises(ValueError, match="method is -1, outside u8"):
        V2.pack(version=2, method=-1)
    with pytest.raises(TypeError, match="size is '1', and must be an integer"):
        V2.pack(version=2, size="1")
    with pytest.raises(TypeError, match=r"size is 1\.0, and must be an integer"):
        V2.pack(version=2, size=1.0)
    with pytest.raises(TypeError, match="magic is 'TOY', and must be bytes"):
        V2.pack(version=2, magic="TOY")
    with pytest.raises(ValueError, match="magic is 5 bytes long, and the field only 4"):
        V2.pack(version=2, magic=b"TOYED")
    assert V2.pack(version=2, magic=b"T").startswith(b"T\0\0\0")


def test_pack_into_writes_all_or_nothing() -> None:
    buffer = bytearray(b"\xaa" * 30)
    V2.pack_into(buffer, 4, version=7)
    assert buffer == b"\xaa" * 4 + V2.pack(version=7) + b"\xaa" * 5
    V2.pack_into(memoryview(buffer)[4:], version=8)
    assert V2.unpack(buffer, 4).version == 8
    before = bytes(buffer)
    for at, values in ((10, {"version": 1}), (-1, {"version": 1}), (4, {"version": -1}), (4, {})):
        with pytest.raises(ValueError, match=r"do not fit into a buffer of 30|version"):
            V2.pack_into(buffer, at, **values)
    assert buffer == before


def test_pack_field_changes_only_that_field() -> None:
    buffer = bytearray(V3.pack(version=3, size=5))
    field = V3["features"]
    buffer[field.offset : field.offset + field.size] = V3.pack_field("features", FEATURES["corrupt"])
    assert V3.unpack(buffer) == V3.unpack(V3.pack(version=3, size=5, features=2))
    assert V3.pack_field("magic", b"A") == b"A\0\0\0"
    with pytest.raises(ValueError, match="method is 256"):
        V3.pack_field("method", 256)
    with pytest.raises(KeyError):
        V3.pack_field("nope", 1)


def test_describe_has_a_row_for_every_field() -> None:
    raw = b"\0" + V3.pack(version=3, features=FEATURES.mask("dirty"))
    raw = raw[:9] + b"\1\2\3\4" + raw[13:]
    rows = V3.describe(raw, 1)
    assert [(row.offset, row.size, row.name, row.value) for row in rows] == [
        (1, 4, "magic", b"TOY\xfb"),
        (5, 4, "version", 3),
        (9, 4, "(padding)", b"\1\2\3\4"),
        (13, 8, "size", 0),
        (21, 1, "method", 0),
        (22, 8, "features", 1),
    ]
    assert rows[1].doc == "2 or 3"


def test_describe_shows_what_is_there_of_a_broken_structure() -> None:
    rows = V3.describe(V3.pack(version=3)[:14])
    assert [row.name for row in rows] == ["magic", "version", "(padding)"]
    assert V3.describe(b"") == []


def test_text_for_people() -> None:
    assert V3["features"].text(FEATURES.mask("dirty", "external") | 0x80) == "0x85 (dirty, external, unknown bits 0x80)"
    assert V3["features"].text(0) == "0x0 (none)"
    assert V3["method"].text(1) == "1 (zstd)"
    assert V3["method"].text(9) == "9 (unknown)"
    assert V3["version"].text(3) == "3"
    assert V3["size"].text(65536) == "65536 (0x10000)"
    assert V3["magic"].text(b"QFI\0") == '"QFI"'
    assert V3["magic"].text(b"QFI\xfb") == "51 46 49 fb"
    assert V3["magic"].text(bytes(4)) == "4 zero bytes"
    # What a file holds must not drive a terminal.
    assert V3["magic"].text(b"\x1b[2J") == "1b 5b 32 4a"


def test_flags() -> None:
    assert [flag.name for flag in FEATURES.bits] == ["dirty", "corrupt", "external"]
    assert FEATURES.known == 7
    assert FEATURES["external"] == 4
    assert FEATURES.names(0b1101) == ("dirty", "external")
    assert FEATURES.unknown(0b1101) == 8
    assert FEATURES.unknown(7) == 0
    assert FEATURES.text(8) == "unknown bits 0x8"
    with pytest.raises(KeyError):
        FEATURES["nope"]
    with pytest.raises(KeyError):
        FEATURES.mask("dirty", "nope")
    with pytest.raises(ValueError, match="one name"):
        Flags({0: ("same", ""), 1: ("same", "")})


@given(st.integers(0, (1 << 64) - 1))
def test_flags_name_every_bit_once(value: int) -> None:
    assert FEATURES.mask(*FEATURES.names(value)) | FEATURES.unknown(value) == value


@pytest.mark.parametrize(
    ("name", "type", "options"),
    [
        ("x", "u24", {}),
        ("x", "s", {}),
        ("x", "0s", {}),
        ("x", "-1s", {}),
        ("x", "", {}),
        ("x", "4q", {}),
        ("class", "u8", {}),
        ("_x", "u8", {}),
        ("a b", "u8", {}),
        ("", "u8", {}),
        ("x", "4s", {"flags": FEATURES}),
        ("x", "4s", {"values": {0: "zero"}}),
    ],
)
def test_bad_fields_are_refused(name: str, type: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the type .* is unknown|cannot be the name|only an integer"):
        Field(name, type, **options)


def test_bad_structures_are_refused() -> None:
    with pytest.raises(ValueError, match="two fields are named a"):
        Structure("twice", ">", [Field("a", "u8"), Field("a", "u8")])
    with pytest.raises(ValueError, match="byte order"):
        Structure("native", "=", [Field("a", "u8")])
    with pytest.raises(ValueError, match="a is 256"):
        Structure("default", ">", [Field("a", "u8", default=256)])
    assert Structure("pads", ">", [Field("", "2x"), Field("reserved", "1x"), Field("", "1x")]).pack() == bytes(4)


def test_declared_fields_are_not_changed_by_the_structures_they_are_in() -> None:
    shared = Field("shared", "u8")
    first = Structure("first", ">", [Field("a", "u64"), shared])
    second = Structure("second", ">", [shared])
    assert (first["shared"].offset, second["shared"].offset, shared.offset) == (8, 0, 0)


@pytest.mark.parametrize("type", INTEGERS)
def test_range_of_integers(type: str) -> None:
    low, high = Field("x", type).range
    structure = Structure("one", "<", [Field("x", type)])
    for value in (low, high):
        assert structure.unpack(structure.pack(x=value)).x == value
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match="x is"):
            structure.pack(x=value)
        with pytest.raises(ValueError, match="x is"):
            structure.pack_field("x", value)


@st.composite
def filled(draw: st.DrawFn) -> tuple[str, list[Field], dict[str, Any]]:
    fields: list[Field] = []
    values: dict[str, Any] = {}
    for number in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from([*INTEGERS, "s", "x"]))
        if kind in "sx":
            kind = f"{draw(st.integers(1, 9))}{kind}"
        field = Field(f"f{number}", kind)
        fields.append(field)
        if field.is_integer:
            values[field.name] = draw(st.integers(*field.range))
        elif not field.is_pad:
            values[field.name] = draw(st.binary(min_size=field.size, max_size=field.size))
    return draw(st.sampled_from("<>")), fields, values


@given(filled(), st.binary(max_size=9))
def test_pack_and_unpack_are_inverse_and_agree_with_each_field(
    declared: tuple[str, list[Field], dict[str, Any]], before: bytes
) -> None:
    order, fields, values = declared
    structure = Structure("any", order, fields)
    packed = structure.pack(**values)
    assert len(packed) == structure.size == sum(field.size for field in fields)
    buffer = before + packed
    assert structure.unpack(buffer, len(before))._asdict() == values
    rows = structure.describe(buffer, len(before))
    assert {row.name: row.value for row in rows if row.name in structure} == values
    assert b"".join(buffer[row.offset : row.offset + row.size] for row in rows) == packed
    for name, value in values.items():
        field = structure[name]
        assert structure.pack_field(name, value) == packed[field.offset : field.offset + field.size]
        assert structure.unpack_field(name, buffer, len(before)) == value

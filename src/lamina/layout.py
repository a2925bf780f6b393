"""Declarations of binary structures: the offset, type and meaning of each field of a header or table entry.

A format or protocol declares its structures as data: names, types, documentation. Reading, writing, the documentation pages
and the fuzzers all use the declaration. Base layer, without I/O.

    HEADER = Structure("example header", ">", [
        Field("magic", "4s", "always EXMP", default=b"EXMP"),
        Field("version", "u32", "format version", default=1),
        Field("size", "u64", "size of the disk in bytes"),
        Field("", "8x", "reserved"),
    ])
    HEADER.unpack(buffer).size;  HEADER["size"].offset;  HEADER.pack(size=1 << 30)

Structures and their fields are immutable, so this module is thread-safe.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from keyword import iskeyword
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import CorruptImage

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_INTEGERS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i8": "b", "i16": "h", "i32": "i", "i64": "q"}


class Flag(NamedTuple):
    """One named bit."""

    bit: int
    name: str
    doc: str


class Flags:
    """The named bits of an integer field: `Flags({0: ("dirty", "what it means when set"), ...})`, bit 0 the lowest.

    `known` is the mask of all named bits, `bits` the tuple of `Flag`, lowest first.
    """

    __slots__ = ("_masks", "bits", "known")

    def __init__(self, bits: Mapping[int, tuple[str, str]]) -> None:
        self.bits: tuple[Flag, ...] = tuple(Flag(bit, *bits[bit]) for bit in sorted(bits))
        self._masks = {flag.name: 1 << flag.bit for flag in self.bits}
        if len(self._masks) != len(self.bits):
            raise ValueError("two flags have one name")
        self.known: int = sum(self._masks.values())

    def __getitem__(self, name: str) -> int:
        """The mask of the flag `name`; KeyError if there is none."""
        return self._masks[name]

    def mask(self, *names: str) -> int:
        """The value that has exactly the flags `names` set; KeyError for a name that is not declared."""
        value = 0
        for name in names:
            value |= self._masks[name]
        return value

    def names(self, value: int) -> tuple[str, ...]:
        """The names of the flags that are set in `value`, lowest bit first. `unknown` returns the other bits."""
        return tuple(flag.name for flag in self.bits if value >> flag.bit & 1)

    def unknown(self, value: int) -> int:
        """The bits of `value` without a name; 0 if all are known."""
        return value & ~self.known

    def text(self, value: int) -> str:
        """A readable text: `dirty, corrupt, unknown bits 0x10`; `none` if no bit is set."""
        parts = list(self.names(value))
        if self.unknown(value):
            parts.append(f"unknown bits {self.unknown(value):#x}")
        return ", ".join(parts) or "none"


class Field:
    """One field: name, type and documentation.

    `type`: `u8 u16 u32 u64 i8 i16 i32 i64`, `Ns` (N bytes), or `Nx` (N bytes of padding: written as zeros, absent from
    records, with any name or none). `default` is the value that `pack` uses if none is given; without a default the value
    is required. `flags` names the bits of an integer, `values` names its values (`{0: "deflate", 1: "zstd"}`); other values
    are read all the same.

    `size` is in bytes. `offset`, in bytes from the start of the structure, is set in the fields of a `Structure`.
    """

    __slots__ = ("_code", "default", "doc", "flags", "name", "offset", "size", "type", "values")

    default: int | bytes | None
    doc: str
    flags: Flags | None
    name: str
    type: str
    values: Mapping[int, str] | None

    def __init__(
        self,
        name: str,
        type: str,
        doc: str = "",
        *,
        default: int | bytes | None = None,
        flags: Flags | None = None,
        values: Mapping[int, str] | None = None,
    ) -> None:
        code = _INTEGERS.get(type)
        if code is None:
            if type[-1:] not in ("s", "x") or not type[:-1].isdecimal() or int(type[:-1]) == 0:
                raise ValueError(f"field {name!r}: the type {type!r} is unknown")
            code = type
        self.name, self.type, self.doc = name, type, doc
        self.default, self.flags, self.values = default, flags, values
        self.offset: int = 0
        self._code = code
        self.size: int = struct.calcsize("=" + code)
        if not self.is_pad and (not name.isidentifier() or iskeyword(name) or name.startswith("_")):
            raise ValueError(f"{name!r} cannot be the name of a field")
        if not self.is_integer and (flags or values):
            raise ValueError(f"field {name!r}: only an integer has flags or named values")

    @property
    def is_pad(self) -> bool:
        """Whether its bytes have no meaning."""
        return self.type.endswith("x")

    @property
    def is_integer(self) -> bool:
        """Whether its value is an integer."""
        return self.type in _INTEGERS

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and largest value of an integer field."""
        bits = self.size * 8
        return (-(1 << bits - 1), (1 << bits - 1) - 1) if self.type[0] == "i" else (0, (1 << bits) - 1)

    def check(self, value: object) -> None:
        """Raise ValueError or TypeError if the field cannot store `value`. Bytes may be shorter than the field."""
        if self.is_integer:
            if not hasattr(value, "__index__"):
                raise TypeError(f"{self.name} is {value!r}, and must be an integer")
            low, high = self.range
            if not low <= value.__index__() <= high:
                raise ValueError(f"{self.name} is {value}, outside {self.type} ({low} to {high})")
        elif not isinstance(value, bytes | bytearray):
            raise TypeError(f"{self.name} is {value!r}, and must be bytes")
        elif len(value) > self.size:
            raise ValueError(f"{self.name} is {len(value)} bytes long, and the field only {self.size}")

    def text(self, value: int | bytes) -> str:
        """A readable text of `value`: the declared names of flags and values; printable bytes as text."""
        if isinstance(value, int):
            if self.flags:
                return f"{value:#x} ({self.flags.text(value)})"
            if self.values:
                return f"{value} ({self.values.get(value, 'unknown')})"
            return f"{value} ({value:#x})" if not -10 < value < 10 else str(value)
        stripped = bytes(value).rstrip(b"\0")
        if stripped and all(0x20 <= byte < 0x7F for byte in stripped):
            return f'"{stripped.decode("ascii")}"'
        return bytes(value).hex(" ") if stripped else f"{len(value)} zero bytes"

    def _at(self, offset: int) -> Field:
        field = Field(self.name, self.type, self.doc, default=self.default, flags=self.flags, values=self.values)
        field.offset = offset
        return field

    def __repr__(self) -> str:
        return f"<Field {self.name or 'padding'} {self.type} at {self.offset}>"


class Record(tuple[Any, ...]):
    """The result of `Structure.unpack`: an immutable tuple of values, which are also attributes with the fields' names."""

    __slots__ = ()
    if TYPE_CHECKING:
        # Fields may have the names of these methods of tuple.
        count: Any
        index: Any

        def __getattr__(self, name: str) -> Any: ...

    _fields: tuple[str, ...] = ()

    def _asdict(self) -> dict[str, Any]:
        """The values by field name, in the order of the structure: keyword arguments of `Structure.pack`."""
        return dict(zip(self._fields, self, strict=True))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"


class Row(NamedTuple):
    """One row of `Structure.describe`. `value` is the unpacked value; `Field.text` makes it readable."""

    offset: int
    size: int
    name: str
    value: int | bytes
    doc: str


class Structure:
    """Fields that follow one another without gaps, in one byte order (">" big-endian, "<" little-endian).

    `size` is in bytes; `fields` lists every field with its offset, including padding; `structure[name]` is one field.
    """

    __slots__ = ("_by_name", "_bytes", "_names", "_record", "_struct", "byte_order", "doc", "fields", "name", "size")

    doc: str
    name: str

    def __init__(self, name: str, byte_order: str, fields: Sequence[Field], *, doc: str = "") -> None:
        if byte_order not in ("<", ">"):
            raise ValueError(f"{name}: the byte order is {byte_order!r}, not '<' or '>'")
        self.name, self.byte_order, self.doc = name, byte_order, doc
        located: list[Field] = []
        self._by_name: dict[str, Field] = {}
        offset = 0
        for field in fields:
            field = field._at(offset)
            offset += field.size
            located.append(field)
            if field.is_pad:
                continue
            if field.name in self._by_name:
                raise ValueError(f"{name}: two fields are named {field.name}")
            self._by_name[field.name] = field
        self.size: int = offset
        self.fields: tuple[Field, ...] = tuple(located)
        self._names = tuple(self._by_name)
        self._bytes = tuple(field for field in self._by_name.values() if not field.is_integer)
        self._struct = struct.Struct(byte_order + "".join(field._code for field in located))
        self._record: type[Record] | None = None
        for field in self._by_name.values():
            if field.default is not None:
                field.check(field.default)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all fields except padding, in order."""
        return self._names

    @property
    def codec(self) -> struct.Struct:
        """The `struct.Struct` of all values in order, for hot paths in which a record (1 us) is too slow."""
        return self._struct

    def extend(self, name: str, fields: Sequence[Field], *, doc: str = "") -> Structure:
        """A structure with the fields of this one followed by `fields`."""
        return Structure(name, self.byte_order, [*self.fields, *fields], doc=doc or self.doc)

    def __getitem__(self, name: str) -> Field:
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"{self.name} has no field {name!r}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)

    def __repr__(self) -> str:
        return f"<Structure {self.name}: {self.size} bytes>"

    def unpack(self, buffer: ReadableBuffer, at: int = 0) -> Record:
        """The record at the offset `at` of `buffer`. Raises CorruptImage if the buffer is too short."""
        if at < 0:
            raise ValueError(f"{self.name}: the offset {at} is negative")
        try:
            values = self._struct.unpack_from(buffer, at)
        except struct.error:
            raise self._too_short(self.name, at, self.size, memoryview(buffer).nbytes) from None
        return (self._record or self._make_record())(values)

    def unpack_field(self, name: str, buffer: ReadableBuffer, at: int = 0) -> Any:
        """The value of one field of the structure at the offset `at` of `buffer`.

        The buffer may end after this field. Raises CorruptImage if it ends before the end of this field.
        """
        if at < 0:
            raise ValueError(f"{self.name}: the offset {at} is negative")
        field = self[name]
        try:
            return struct.unpack_from(self.byte_order + field._code, buffer, at + field.offset)[0]
        except struct.error:
            what = f"{name} of the {self.name}"
            raise self._too_short(what, at + field.offset, field.size, memoryview(buffer).nbytes) from None

    def pack(self, /, **values: Any) -> bytes:
        """The bytes of a structure with these values; other fields have their defaults.

        Raises ValueError for a field that is unknown, missing or out of range, TypeError for a value of the wrong type.
        """
        ordered = self._ordered(values)
        try:
            return self._struct.pack(*ordered)
        except struct.error:
            self._check(ordered)
            raise

    def pack_into(self, buffer: WriteableBuffer, at: int = 0, /, **values: Any) -> None:
        """As `pack`, into `buffer` at the offset `at`. Raises ValueError if the buffer is too short. After an error `buffer`
        is unchanged."""
        available = memoryview(buffer).nbytes
        if at < 0 or available - at < self.size:
            raise ValueError(f"{self.name}: {self.size} bytes at offset {at} do not fit into a buffer of {available}")
        memoryview(buffer).cast("B")[at : at + self.size] = self.pack(**values)

    def pack_field(self, name: str, value: int | bytes) -> bytes:
        """The bytes of one field, to be written at `structure[name].offset`. Raises as `pack` does."""
        field = self[name]
        field.check(value)
        return struct.pack(self.byte_order + field._code, value)

    def describe(self, buffer: ReadableBuffer, at: int = 0) -> list[Row]:
        """A row for each field, including padding, of the structure at the offset `at` of `buffer`.

        Offsets are relative to the start of `buffer`. For a truncated structure, as in a damaged image, the result contains
        the fields that are complete.
        """
        if at < 0:
            raise ValueError(f"{self.name}: the offset {at} is negative")
        view = memoryview(buffer).cast("B")
        rows = []
        for field in self.fields:
            start = at + field.offset
            if start + field.size > len(view):
                break
            code = field._code.replace("x", "s")
            value = struct.unpack_from(self.byte_order + code, view, start)[0]
            rows.append(Row(start, field.size, field.name or "(padding)", value, field.doc))
        return rows

    def _make_record(self) -> type[Record]:
        # Created at the first use, so that a command that reads one header does not create the classes of all formats.
        body: dict[str, Any] = {"__slots__": (), "_fields": self._names, "__doc__": self.doc or self.name}
        for index, name in enumerate(self._names):
            body[name] = property(itemgetter(index), doc=self._by_name[name].doc)
        words = "".join(c if c.isalnum() else " " for c in self.name).split()
        self._record = type("".join(word[0].upper() + word[1:] for word in words) or "Record", (Record,), body)
        return self._record

    def _ordered(self, values: dict[str, Any]) -> list[Any]:
        """`values` with the defaults of the other fields, in the order of the fields."""
        ordered = []
        for name, field in self._by_name.items():
            value = values.get(name, field.default)
            if value is None:
                raise ValueError(f"{self.name}: the value of {name} is missing")
            ordered.append(value)
        if not values.keys() <= self._by_name.keys():
            unknown = ", ".join(sorted(values.keys() - self._by_name.keys()))
            raise ValueError(f"{self.name} has no field {unknown}")
        # struct truncates bytes that are too long without an error.
        for field in self._bytes:
            if field.name in values:
                field.check(values[field.name])
        return ordered

    def _check(self, ordered: list[Any]) -> None:
        """Raise the error of the first value that its field cannot store."""
        for field, value in zip(self._by_name.values(), ordered, strict=True):
            field.check(value)

    @staticmethod
    def _too_short(what: str, at: int, needed: int, available: int) -> CorruptImage:
        left = max(0, available - at)
        return CorruptImage(f"the {what} is truncated: it needs {needed} bytes at offset {at}, and only {left} remain")

"""Detection of formats by the bytes of a file.

The module does no I/O: callers read the first HEAD_BYTES and the last TAIL_BYTES of a file. Every test looks at fixed offsets
only (for the text descriptor of VMDK: at its first lines) and is independent of the others, so their order has no effect, and
two formats in one file are reported as two. More formats are detected than supported, so that a file of an unsupported format
is not taken for raw by accident. Partition tables and file systems are the content of raw disks, not formats.

The signatures are those of published descriptions: by the QEMU project for qcow2 and QED, and the descriptions of VMDK, VHD,
VHDX (MS-VHDX 2.2.1), VDI, LUKS, UDIF, Bochs redologs and ISO 9660 (ECMA-119).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from .errors import FormatError, Hint, OptionError, printable

if TYPE_CHECKING:
    from .json_forms import DetectionJson

Buffer = bytes | bytearray | memoryview

#: The number of bytes that a caller reads from the start of a file (fewer if it is shorter), and from its end.
HEAD_BYTES = 64 << 10
TAIL_BYTES = 1 << 10

_SECTOR = 512


class Detection(NamedTuple):
    """The result of a detection. `matches` are formats in alphabetical order; if it is empty, only raw is possible.

    `contents` is the content of a raw image (now only "iso9660"), for information only.
    """

    matches: tuple[str, ...]
    contents: tuple[str, ...] = ()
    path: str | None = None

    @property
    def format(self) -> str:
        """The single matching format, or "raw" if there is none. Raises FormatError if several match."""
        if len(self.matches) > 1:
            raise FormatError(
                f"the magic of the file fits several formats: {', '.join(self.matches)}",
                path=self.path,
                hint=Hint(
                    f'give the right one, for example format="{self.matches[0]}"',
                    command=f"give the right one, for example -f {self.matches[0]}",
                ),
            )
        return self.matches[0] if self.matches else "raw"

    @property
    def certain(self) -> bool:
        """Whether exactly one format was detected; never true for raw, since any content can be raw."""
        return len(self.matches) == 1

    def supported(self, names: Collection[str]) -> bool:
        """Whether `format` is one of `names` (those with a driver). Raises FormatError if several formats fit."""
        return self.format in names

    def to_json(self) -> DetectionJson:
        """The same as a dict of JSON types. "format" is absent if several formats match."""
        found: DetectionJson = {"matches": list(self.matches), "contents": list(self.contents)}
        if self.path is not None:
            found["filename"] = self.path
        if len(self.matches) <= 1:
            found["format"] = self.format
        return found


class KnownFormat(NamedTuple):
    """One row of the table: a format, and a test whether `head` and `tail` of a file of `size` bytes match it."""

    summary: str
    probe: Callable[[bytes, bytes, int | None], bool]
    aliases: tuple[str, ...] = ()


def _starts(*magics: bytes) -> Callable[[bytes, bytes, int | None], bool]:
    return lambda head, tail, size: head.startswith(magics)


def _is_qcow(head: bytes, tail: bytes, size: int | None) -> bool:
    return head.startswith(b"QFI\xfb\0\0\0\1")


def _is_qcow2(head: bytes, tail: bytes, size: int | None) -> bool:
    # Future versions as well: the driver refuses them, with a better message than a guess at raw would give.
    return head.startswith(b"QFI\xfb") and head[4:8] != b"\0\0\0\1"


def _is_vmdk(head: bytes, tail: bytes, size: int | None) -> bool:
    return head.startswith((b"KDMV", b"COWD")) or _is_vmdk_descriptor(head)


def _is_vmdk_descriptor(head: bytes) -> bool:
    """Whether a VMDK text descriptor follows comments and blank lines, if there are any.

    It begins with the comment "# Disk DescriptorFile", or with a version line, which other readers accept as well.
    """
    start = 0
    while start < len(head):
        end = head.find(b"\n", start)
        line = head[start : end if end >= 0 else len(head)].strip()
        start = end + 1 if end >= 0 else len(head)
        if line.startswith(b"#"):
            if line[1:].strip().lower() == b"disk descriptorfile":
                return True
        elif line:
            key, equals, value = line.partition(b"=")
            return bool(equals) and key.strip().lower() == b"version" and value.strip().isdigit()
    return False


def _is_vpc(head: bytes, tail: bytes, size: int | None) -> bool:
    # The footer is the last sector. Old programs wrote it one byte short; a reader of whole sectors finds it at the start of
    # the last sector, even if that is incomplete.
    starts = {_SECTOR, _SECTOR - 1}
    if size:
        starts.add((size - 1) % _SECTOR + 1)
    return head.startswith(b"conectix") or any(_ends(tail, b"conectix", start) for start in starts)


def _is_vdi(head: bytes, tail: bytes, size: int | None) -> bool:
    return head.startswith(b"\x7f\x10\xda\xbe", 64)


def _is_dmg(head: bytes, tail: bytes, size: int | None) -> bool:
    return _ends(tail, b"koly", _SECTOR)


def _ends(tail: bytes, magic: bytes, distance: int) -> bool:
    """Whether `magic` is found `distance` bytes before the end."""
    return len(tail) >= distance and tail.startswith(magic, len(tail) - distance)


#: Every detected format, with or without a driver.
FORMATS: dict[str, KnownFormat] = {
    "bochs": KnownFormat("Bochs redolog", _starts(b"Bochs Virtual HD Image")),
    "cloop": KnownFormat("compressed loop device", _starts(b"#!/bin/sh\n#V2.0 Format")),
    "dmg": KnownFormat("Apple disk image (UDIF)", _is_dmg),
    "luks": KnownFormat("LUKS encrypted volume", _starts(b"LUKS\xba\xbe")),
    "parallels": KnownFormat("Parallels expanding disk", _starts(b"WithoutFreeSpace", b"WithouFreSpacExt")),
    "qcow": KnownFormat("QEMU copy-on-write, version 1", _is_qcow),
    "qcow2": KnownFormat("QEMU copy-on-write, versions 2 and 3", _is_qcow2),
    "qed": KnownFormat("QEMU enhanced disk", _starts(b"QED\0")),
    "vdi": KnownFormat("VirtualBox disk image", _is_vdi),
    "vhdx": KnownFormat("Hyper-V disk, version 2", _starts(b"vhdxfile")),
    "vmdk": KnownFormat("VMware disk", _is_vmdk),
    "vpc": KnownFormat("Virtual PC and Hyper-V disk (VHD)", _is_vpc, aliases=("vhd",)),
}

_ALIASES = {alias: name for name, row in FORMATS.items() for alias in row.aliases}


def canonical(name: str) -> str:
    """The name in FORMATS for `name` ("vhd" is "vpc"); other names are returned unchanged."""
    return _ALIASES.get(name, name)


def detect(head: Buffer, tail: Buffer = b"", size: int | None = None, *, path: str | None = None) -> Detection:
    """The formats of the file with these first and last bytes; never raises.

    `head` are the first HEAD_BYTES and `tail` the last TAIL_BYTES, or the whole of a shorter file. `size` is the size of the
    file in bytes. If `head` is the whole file, `tail` may be omitted; otherwise formats with a footer are then not detected.
    `path` is for messages.
    """
    head = bytes(head[:HEAD_BYTES])
    tail = bytes(tail[-TAIL_BYTES:])
    if size is not None and size <= len(head):
        head = head[: max(size, 0)]
        tail = tail or head[-TAIL_BYTES:]
    matches = tuple(sorted(name for name, row in FORMATS.items() if row.probe(head, tail, size)))
    contents = ("iso9660",) if head.startswith(b"CD001", 64 * _SECTOR + 1) else ()
    return Detection(matches, contents, path)


def check_declared(
    declared: str, head: Buffer, tail: Buffer = b"", size: int | None = None, *, path: str | None = None
) -> None:
    """Raise FormatError if the bytes look like formats other than the `declared` one, and not like it.

    Anything may be declared raw, since the caller then wants the bytes themselves. If the bytes look like no format, the
    driver of the declared format reports the precise error.
    """
    found = detect(head, tail, size, path=path)
    if canonical(declared) == "raw" or not found.matches or canonical(declared) in found.matches:
        return
    raise FormatError(
        f"it was opened as {printable(declared)}, but it looks like {' and '.join(found.matches)}",
        path=path,
        hint=Hint(
            f'if that is its format, give format="{found.matches[0]}"',
            command=f"if that is its format, give -f {found.matches[0]}",
        ),
    )


def refuse_probed_raw(found: Detection, name: str, *, operation: str = "write") -> None:
    """Raise OptionError if the format of the image `name` is raw only because no magic was found.

    Callers use this before they change an image in place: its guest may have written, or may write now, the header of another
    format. Raises FormatError if several formats match.
    """
    if found.format == "raw":
        raise OptionError(
            "the format was not given, and no magic was found",
            path=name,
            operation=operation,
            hint=Hint('if the image is raw, give format="raw"', command="if the image is raw, give -f raw"),
        )


def touches_probe(offset: int, length: int, size: int) -> bool:
    """Whether `length` bytes at `offset` of a file of `size` bytes overlap the bytes that `detect` examines.

    Such a write may change the detected format of a raw image. So may any change of the size, which moves the footer.
    """
    return length > 0 and (offset < HEAD_BYTES or offset + length > size - TAIL_BYTES)

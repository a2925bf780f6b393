"""Which format these bytes are.

Pure: callers read the first HEAD_BYTES and the last TAIL_BYTES of a file and ask. Every probe looks at fixed places
only (the text descriptor of VMDK: at its leading lines) and none knows of the others, so order means nothing, and two
formats in one file are reported as two. Recognising more than is supported is on purpose: a file that *looks* like a
format must not be taken for raw by accident. Partition tables and file systems are contents of raw disks, not formats.

The signatures are those that the formats' own publications give: the QEMU project's for qcow2 and QED, and the
descriptions of VMDK, VHD, VHDX (MS-VHDX 2.2.1), VDI, LUKS, UDIF, Bochs redologs and ISO 9660 (ECMA-119).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from .errors import FormatError, OptionError, printable

Buffer = bytes | bytearray | memoryview

#: What a caller reads from the start of a file (fewer bytes if it is shorter), and from its end.
HEAD_BYTES = 64 << 10
TAIL_BYTES = 1 << 10

_SECTOR = 512


class Detection(NamedTuple):
    """What was recognised. `matches` are formats in alphabetical order; none means that nothing but raw fits.

    `contents` says what lies inside a raw image (now only "iso9660"): for information, it decides nothing.
    """

    matches: tuple[str, ...]
    contents: tuple[str, ...] = ()
    path: str | None = None

    @property
    def format(self) -> str:
        """The one format that fits, "raw" if none does. Raises FormatError if several do."""
        if len(self.matches) > 1:
            raise FormatError(
                f"these bytes fit several formats: {', '.join(self.matches)}",
                path=self.path,
                hint=f"say which one it is, for example -f {self.matches[0]}",
            )
        return self.matches[0] if self.matches else "raw"

    @property
    def certain(self) -> bool:
        """True if exactly one format was recognised; raw never is: anything can be raw."""
        return len(self.matches) == 1

    def supported(self, names: Collection[str]) -> bool:
        """Whether `format` is one of `names` (those with a driver). Raises FormatError if several formats fit."""
        return self.format in names


class KnownFormat(NamedTuple):
    """One row of the table: what a format is, and whether `head` and `tail` of a file of `size` bytes look like it."""

    summary: str
    probe: Callable[[bytes, bytes, int | None], bool]
    aliases: tuple[str, ...] = ()


def _starts(*magics: bytes) -> Callable[[bytes, bytes, int | None], bool]:
    return lambda head, tail, size: head.startswith(magics)


def _is_qcow(head: bytes, tail: bytes, size: int | None) -> bool:
    return head.startswith(b"QFI\xfb\0\0\0\1")


def _is_qcow2(head: bytes, tail: bytes, size: int | None) -> bool:
    # Also versions that do not exist yet: refused by the driver, with a better message than a guess at raw.
    return head.startswith(b"QFI\xfb") and head[4:8] != b"\0\0\0\1"


def _is_vmdk(head: bytes, tail: bytes, size: int | None) -> bool:
    return head.startswith((b"KDMV", b"COWD")) or _is_vmdk_descriptor(head)


def _is_vmdk_descriptor(head: bytes) -> bool:
    """Whether comments and blank lines, if any, lead to what a VMDK text descriptor starts with.

    That is the comment "# Disk DescriptorFile", or a version line: other readers are content with the latter.
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
    # The footer is the last sector. Old writers made it a byte short, and a reader of whole sectors finds it where
    # the last one starts, even if that one is cut off.
    starts = {_SECTOR, _SECTOR - 1}
    if size:
        starts.add((size - 1) % _SECTOR + 1)
    return head.startswith(b"conectix") or any(_ends(tail, b"conectix", start) for start in starts)


def _is_vdi(head: bytes, tail: bytes, size: int | None) -> bool:
    return head.startswith(b"\x7f\x10\xda\xbe", 64)


def _is_dmg(head: bytes, tail: bytes, size: int | None) -> bool:
    return _ends(tail, b"koly", _SECTOR)


def _ends(tail: bytes, magic: bytes, distance: int) -> bool:
    """Whether `magic` stands `distance` bytes before the end."""
    return len(tail) >= distance and tail.startswith(magic, len(tail) - distance)


#: Every format that is recognised, whether or not there is a driver for it.
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
    """The name in FORMATS that `name` means ("vhd" is "vpc"); other names are returned as they are."""
    return _ALIASES.get(name, name)


def detect(head: Buffer, tail: Buffer = b"", size: int | None = None, *, path: str | None = None) -> Detection:
    """What the file with these first and last bytes is; never raises, whatever they are.

    `head` are the first HEAD_BYTES, `tail` the last TAIL_BYTES; of a shorter file, all of it. `size` is the file's
    size in bytes. Where `size` says that `head` is the whole file, `tail` may be left out; otherwise, without it,
    formats that end in a footer are not seen. `path` is for messages.
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
    """Raise FormatError if the bytes look like other formats than the `declared` one, and not like it.

    Anything may be declared raw: whoever says so wants the bytes as they are. Bytes that look like nothing are left to
    the declared format's driver, which says precisely what is wrong with them.
    """
    found = detect(head, tail, size, path=path)
    if canonical(declared) == "raw" or not found.matches or canonical(declared) in found.matches:
        return
    raise FormatError(
        f"opened as {printable(declared)}, but it looks like {' and '.join(found.matches)}",
        path=path,
        hint=f"if that is what it is, give -f {found.matches[0]}",
    )


def refuse_probed_raw(found: Detection, name: str, *, operation: str = "write") -> None:
    """Raise OptionError if the image `name` counts as raw only because nothing was recognised in it.

    For whoever is about to change an image in place: its guest may have written, or may now write, another format's
    header into it. Raises FormatError if several formats fit.
    """
    if found.format == "raw":
        raise OptionError(
            "the format was not given and nothing was recognised",
            path=name,
            operation=operation,
            hint="if the image is raw, give -f raw",
        )


def touches_probe(offset: int, length: int, size: int) -> bool:
    """Whether `length` bytes at `offset` of a file of `size` bytes reach into what `detect` looks at.

    A write that does may turn a raw image into another format for whoever probes it next; so may any change of the
    size, which moves the place of a footer.
    """
    return length > 0 and (offset < HEAD_BYTES or offset + length > size - TAIL_BYTES)

"""`lamina.inspect` beside the format inspector of oslo.utils: never safe where that one refuses, except for the rows of
docs/commands/inspect.md.

The corpus: an image of each format, subformat and option that qemu-img creates; raw disks with partition tables and volumes;
then parts of them, mutations of their headers, and pieces of one in another.
"""

from __future__ import annotations

import io
import logging
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import Secret, Verdict
from lamina.formats.qcow2 import layout as q
from tests import evidence
from tests.attacks.layout_images import Original, originals
from tests.conftest import Qemu, missing

KIB, MIB = 1 << 10, 1 << 20
ROUNDS = int(os.environ.get("LAMINA_INSPECT_ROUNDS", "250"))
PAGE = Path(__file__).parents[2] / "docs" / "commands" / "inspect.md"

#: Options of `qemu-img create`, by the name of the image.
SECRET = "--object secret,id=s,data=abc -o "
CREATED = {
    "qcow2": "-f qcow2",
    "qcow2-v2": "-f qcow2 -o compat=0.10",
    "qcow2-512": "-f qcow2 -o cluster_size=512",
    "qcow2-2M": "-f qcow2 -o cluster_size=2M",
    "qcow2-zstd": "-f qcow2 -o compression_type=zstd",
    "qcow2-lazy": "-f qcow2 -o lazy_refcounts=on,refcount_bits=1",
    "qcow2-extended": "-f qcow2 -o extended_l2=on",
    "qcow2-overlay": "-f qcow2 -b qcow2 -F qcow2",
    "qcow2-v2-overlay": "-f qcow2 -o compat=0.10 -b qcow2 -F qcow2",
    "qcow2-data": "-f qcow2 -o data_file=data",
    "qcow2-data-raw": "-f qcow2 -o data_file=data2,data_file_raw=on",
    "qcow2-aes": f"-f qcow2 {SECRET}encrypt.format=aes,encrypt.key-secret=s",
    "qcow": "-f qcow",
    "qed": "-f qed",
    "luks": f"-f luks {SECRET}key-secret=s,iter-time=10",
    "vmdk": "-f vmdk",
    "vmdk-flat": "-f vmdk -o subformat=monolithicFlat",
    "vmdk-two": "-f vmdk -o subformat=twoGbMaxExtentSparse",
    "vmdk-two-flat": "-f vmdk -o subformat=twoGbMaxExtentFlat",
    "vmdk-stream": "-f vmdk -o subformat=streamOptimized",
    "vmdk-compat6": "-f vmdk -o compat6=on,zeroed_grain=on",
    "vmdk-overlay": "-f vmdk -b vmdk -F vmdk",
    "vdi": "-f vdi",
    "vdi-static": "-f vdi -o static=on",
    "vhdx": "-f vhdx",
    "vhdx-fixed": "-f vhdx -o subformat=fixed",
    "vpc": "-f vpc",
    "vpc-fixed": "-f vpc -o subformat=fixed",
    "parallels": "-f parallels",
    "raw": "-f raw",
}
UNSAFE = {name for name in CREATED if re.search(r"overlay|data|qcow$|qed|flat|two|parallels", name)}


@pytest.fixture(scope="session")
def oslo() -> Any:
    """The module of oslo.utils."""
    try:
        from oslo_utils.imageutils import format_inspector
    except ImportError:
        missing("oslo.utils", "pip install oslo.utils")
    return format_inspector


@pytest.fixture(scope="session")
def images(qemu7: Qemu, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The start of each image that qemu-img creates, as much as decides, or all of it."""
    folder = tmp_path_factory.mktemp("images")
    before = os.getcwd()
    os.chdir(folder)
    try:
        for name, options in CREATED.items():
            size = [] if "overlay" in name else ["4M"]
            qemu7.img("create", "-q", *options.split(" "), name, *size)
        for name, cluster in (("qcow2-luks", 64 * KIB), ("qcow2-luks-2M", 2 * MIB)):  # qemu-img takes seconds for each
            encrypt = {"format": "luks", "key-secret": Secret(b"abc"), "iter-time": 1}
            lamina.create(name, "qcow2", 4 * MIB, cluster_size=cluster, encrypt=encrypt)
        qemu7.io("-f", "qcow2", "-c", "write 0 1M", "qcow2")
        qemu7.img("snapshot", "-c", "first", "qcow2-zstd")
        qemu7.img("bitmap", "--add", "qcow2-lazy", "b0", check=False)
        (folder / "noise").write_bytes(random.Random(1).randbytes(300 * KIB))
        qemu7.img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "noise", "vmdk-stream-data")
        qemu7.img("convert", "-f", "raw", "-O", "vhdx", "noise", "vhdx-data")
        qemu7.img("convert", "-f", "raw", "-O", "vpc", "noise", "vpc-data")
    finally:
        os.chdir(before)
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return found | raw_disks()


def mbr(*partitions: tuple[int, int, int, bytes]) -> bytes:
    """A boot sector with these partitions: status, type, first sector, first CHS."""
    entries = b"".join(
        bytes([status]) + chs + bytes([kind]) + bytes(3) + first.to_bytes(4, "little") + (2048).to_bytes(4, "little")
        for status, kind, first, chs in partitions
    )
    return bytes(446) + entries.ljust(64, b"\0") + b"\x55\xaa"


PROTECTIVE = (0, 0xEE, 1, b"\0\2\0")
VOLUME = bytes(32 * KIB) + b"\1CD001\1"


def raw_disks() -> dict[str, bytes]:
    chs = bytes(3)
    tables = {
        "mbr": mbr((0x80, 0x83, 2048, chs)),
        "mbr-empty": mbr(),
        "mbr-boot-flag": mbr((7, 0x83, 2048, chs)),
        "gpt": mbr(PROTECTIVE) + b"EFI PART",
        "gpt-second": mbr((0, 0, 0, chs), PROTECTIVE),
        "gpt-hybrid": mbr(PROTECTIVE, (0, 0x83, 2048, chs)),
        "gpt-lba": mbr((0, 0xEE, 2, b"\0\2\0")),
        "gpt-chs": mbr((0, 0xEE, 1, b"\0\3\0")),
        "fat": bytearray(mbr((7, 7, 7, chs))),
        "iso": VOLUME,
        "udf": VOLUME.replace(b"CD001", b"NSR03"),
        "iso-hybrid": mbr((0x80, 0x83, 2048, chs)) + VOLUME[512:],
        "nothing": b"",
        "text": b"a list\nof words\n" * 400,
        "text-descriptor": b'createType="monolithicSparse"\nRW 8192 SPARSE "x.vmdk"\n' + b"# more\n" * 200,
    }
    fat: Any = tables["fat"]
    fat[0x10], fat[0x15] = 2, 0xF8
    return {name: bytes(head).ljust(64 * KIB if head else 0, b"\0") for name, head in tables.items()}


def refused_by(oslo: Any, content: bytes) -> str | None:
    """Why oslo.utils refuses this file; None if it is safe there."""
    logging.disable(logging.CRITICAL)
    try:
        wrapper = oslo.InspectWrapper(io.BytesIO(content))
        while wrapper.read(4096):  # as its detect_file_format does
            if wrapper.format is not None:
                break
        wrapper.close()
        wrapper.format.safety_check()
    except oslo.SafetyCheckFailed as error:
        return ", ".join(sorted(error.failures))
    except Exception as error:  # noqa: BLE001 - an error of its own ends in no permission, too
        return f"{type(error).__name__}: {error}"
    finally:
        logging.disable(logging.NOTSET)
    return None


def judged(content: bytes, format: str | None = None) -> Verdict:
    fd = os.memfd_create("image")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        return lamina.inspect(fd, format=format)
    finally:
        os.close(fd)


def exception(content: bytes, ours: Verdict, theirs: str) -> str | None:
    """The row of the page that explains why this is safe here and not there."""
    header = q.HEADER_V3.unpack(content.ljust(q.HEADER_V3.size, b"\0"))
    if ours.format == "qcow2" and theirs == "unknown_features" and header.version == 3:
        return "extended L2 entries" if header.incompatible_features & ~0xF == q.EXTENDED_L2 else None
    if ours.format == "qcow2" and theirs == "data_file" and header.version == 2:
        return "feature bits of version 2"
    return "text with other bytes behind it" if ours.format == "raw" and theirs.startswith("AttributeError") else None


def never_less_strict(oslo: Any, content: bytes, what: str) -> Verdict:
    ours = judged(content)
    theirs = refused_by(oslo, content)
    if ours.safe and theirs is not None:
        row = exception(content, ours, theirs)
        assert row is not None, f"{what}: safe here, and refused there: {theirs}"
        assert f"| {row} |" in PAGE.read_text(), f"the row {row!r} is missing on {PAGE.name}"
    return ours


def test_images_as_they_are_made(oslo: Any, images: dict[str, bytes]) -> None:
    safe = {name for name, content in images.items() if never_less_strict(oslo, content, name).safe}
    assert not UNSAFE & safe
    made = {*CREATED, "qcow2-luks", "qcow2-luks-2M", "vmdk-stream-data", "vhdx-data", "vpc-data"}
    assert (made | {"mbr", "gpt", "fat", "iso", "udf", "text"}) - UNSAFE <= safe
    tables = {"mbr-empty", "mbr-boot-flag", "gpt-second", "gpt-hybrid", "gpt-lba", "gpt-chs"}
    assert not (tables | {"iso-hybrid", "text-descriptor"}) & safe


def test_parts_of_images(oslo: Any, images: dict[str, bytes], seed: int) -> None:
    rng = random.Random(seed)
    for name, content in images.items():
        lengths = {0, 4, 8, 63, 64, 72, 104, 511, 512, 513, 592, 1023, 1024, 1536, 4096, 64 * KIB, 192 * KIB, 321 * KIB}
        lengths |= {len(content) - step for step in (1, 511, 512, 513, 1024, 1536)}
        for length in sorted(one for one in lengths | {rng.randrange(len(content) + 1)} if 0 <= one < len(content)):
            never_less_strict(oslo, content[:length], f"{length} bytes of {name}")


#: What goes into a descriptor of VMDK.
_PIECES = (
    *(b"\n", b"/", b'"', b"=", b" ", b"\0", b"\xff", b"\r", b"#", b"RW 1 ", b"RW 1 FLAT ", b'\nRW 1 SPARSE "a"\n'),
    *(b'#createType="monolithicFlat"\n', b'\ncreateType="custom"\n', b"\nparentCID=0\n", b"\nddb x\n", b"\nhelp\n"),
)


def mutants(rng: random.Random, images: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Images with bytes changed where a format has its header, or pieces of others in them."""
    names = sorted(name for name, content in images.items() if content)
    places = (0, 0, 0, 0, 64, 72, 446, 512, 592, 64 * KIB, 128 * KIB, 192 * KIB, 2 * MIB, 3 * MIB)
    for number in range(ROUNDS):
        name = names[number % len(names)]
        content = bytearray(images[name])
        for _ in range(rng.choice((1, 1, 2, 4))):
            kind = rng.randrange(4)
            at = min(rng.choice(places) + rng.randrange(rng.choice((16, 128, 512))), len(content) - 1)
            if kind == 0:
                content[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                content[at : at + 4] = rng.choice((b"\0" * 4, b"\xff" * 4, rng.randbytes(4)))[: len(content) - at]
            elif kind == 2:
                other = images[rng.choice(names)]
                start = rng.choice(places)
                piece = other[start : start + rng.choice((4, 8, 64, 512, 2048))]
                at = rng.choice((start, start, at))
                content[at : at + len(piece)] = piece
            elif b"createType" in content:
                at = content.index(b"createType") + rng.randrange(300)
                content[at : at + 1] = rng.choice(_PIECES)
        yield name, bytes(content)


def test_mutated_images(oslo: Any, images: dict[str, bytes], seed: int) -> None:
    rng = random.Random(seed)
    refused = 0
    for number, (name, content) in enumerate(mutants(rng, images)):
        refused += not never_less_strict(oslo, content, f"mutant {number} of {name}, seed {seed}").safe
    assert 0 < refused < ROUNDS
    evidence.count("mutated images beside format_inspector of oslo.utils", ROUNDS)


def test_images_with_every_field_changed(oslo: Any, seed: int) -> None:
    """The images of the attacks on qcow2, with values at the edges of intervals."""
    rng = random.Random(seed)
    made: list[Original] = originals()
    for original in made:
        never_less_strict(oslo, original.content, original.name)
        for _ in range(20):
            content, done = original.changed(rng)
            never_less_strict(oslo, content, f"{original.name}: {done}")


def test_a_refusal_there_is_seen_here(oslo: Any, images: dict[str, bytes]) -> None:
    """The test can fail: oslo.utils does refuse what it is known to refuse."""
    assert refused_by(oslo, images["qcow2"]) is None
    assert refused_by(oslo, images["qcow2-overlay"]) == "backing_file"
    assert refused_by(oslo, images["qcow2-extended"]) == "unknown_features"
    assert "Multiple formats" in str(refused_by(oslo, images["iso-hybrid"]))

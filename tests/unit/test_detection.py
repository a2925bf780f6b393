"""Recognising formats: every signature, every place, and no bytes at all that make it raise."""

from __future__ import annotations

import time
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina import detection as module
from lamina.detection import (
    FORMATS,
    HEAD_BYTES,
    TAIL_BYTES,
    canonical,
    check_declared,
    detect,
    refuse_probed_raw,
    touches_probe,
)
from lamina.errors import FormatError, OptionError

DESCRIPTOR = b"# Disk DescriptorFile\nversion=1\nCID=fffffffe\n"

#: How images of each format begin, as their usual writers make them.
HEADS = {
    "bochs": [b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + b"Growing".ljust(16, b"\0")],
    "cloop": [b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"],
    "luks": [b"LUKS\xba\xbe\0\1", b"LUKS\xba\xbe\0\2"],
    "parallels": [b"WithoutFreeSpace\2\0\0\0\x10\0\0\0", b"WithouFreSpacExt\2\0\0\0\x10\0\0\0"],
    "qcow": [bytes.fromhex("514649fb0000000100000000")],
    "qcow2": [
        bytes.fromhex("514649fb0000000200000000"),
        bytes.fromhex("514649fb0000000300000000"),
        bytes.fromhex("514649fb0000000400000000"),
        bytes.fromhex("514649fb0000000000000000"),
        b"QFI\xfb",
    ],
    "qed": [bytes.fromhex("51454400000001000400000001000000")],
    "vdi": [
        b"<<< QEMU VM Virtual Disk Image >>>\n".ljust(64, b"\0") + bytes.fromhex("7f10dabe01000100"),
        b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + (0xBEDA107F).to_bytes(4, "little"),
    ],
    "vhdx": [b"vhdxfile" + "QEMU v7.2.22".encode("utf-16-le")],
    "vmdk": [bytes.fromhex("4b444d560100000003000000"), b"COWD\1\0\0\0", DESCRIPTOR],
    "vpc": [bytes.fromhex("636f6e65637469780000000200010000")],
}
TAILS = {
    "dmg": b"koly\0\0\0\4\0\0\2\0".ljust(512, b"\0"),
    "vpc": b"conectix\0\0\0\2\0\1\0\0".ljust(512, b"\0"),
}


def image(head: bytes = b"", tail: bytes = b"", size: int = 1 << 20) -> tuple[bytes, bytes, int]:
    """What a caller reads of a file of `size` bytes, zero but for its start and its end."""
    body = bytearray(size)
    body[: len(head)] = head
    body[size - len(tail) :] = tail
    return bytes(body[:HEAD_BYTES]), bytes(body[-TAIL_BYTES:]), size


@pytest.mark.parametrize(("name", "head"), [(name, head) for name, heads in HEADS.items() for head in heads])
def test_signatures_at_the_start(name: str, head: bytes) -> None:
    for size in (4096, HEAD_BYTES, 1 << 20):
        found = detect(*image(head, size=size))
        assert found.matches == (name,)
        assert found.format == name
        assert found.certain
    assert detect(head).format == name
    assert detect(head, size=len(head)).format == name


@pytest.mark.parametrize(("name", "tail"), TAILS.items())
def test_signatures_at_the_end(name: str, tail: bytes) -> None:
    for size in (512, 1000, 1024, 1 << 20, (1 << 20) + 7):
        assert detect(*image(tail=tail, size=size)).matches == (name,)
    # Without the tail it cannot be seen, unless the head is known to be the whole file.
    head, _, size = image(tail=tail)
    assert detect(head, b"", size).format == "raw"
    whole = bytes(1000) + tail
    assert detect(whole).format == "raw"
    assert detect(whole, size=len(whole)).format == name


def test_every_format_of_the_table_is_tested() -> None:
    assert HEADS.keys() | TAILS.keys() == FORMATS.keys()


@pytest.mark.parametrize("size", [511, 1023, 4095, (1 << 20) - 1, 1 << 20])
def test_a_vhd_footer_may_lack_its_last_byte(size: int) -> None:
    assert detect(*image(tail=TAILS["vpc"][:511], size=size)).format == "vpc"


@pytest.mark.parametrize("rest", [8, 88, 510])
def test_a_vhd_footer_in_a_cut_off_last_sector(rest: int) -> None:
    # A reader that rounds the size up to sectors finds a footer there, filled up with zeros.
    assert detect(*image(tail=TAILS["vpc"][:rest], size=4096 + rest)).format == "vpc"
    assert detect(*image(tail=TAILS["vpc"][:rest], size=4096 + rest + 1)).format == "raw"


@pytest.mark.parametrize("magic", [b"koly", b"conectix"])
def test_a_tail_too_short_for_a_footer_holds_none(magic: bytes) -> None:
    tail = magic.ljust(200, b"\0")
    assert detect(b"", tail, 1 << 20).matches == ()
    assert detect(b"", tail).matches == ()


@pytest.mark.parametrize("distance", [*range(513, 530), 510, 509, 504, 1024])
def test_footers_elsewhere_are_data(distance: int) -> None:
    for magic in (b"conectix", b"koly"):
        assert detect(*image(tail=magic.ljust(distance, b"\0"))).format == "raw"


@pytest.mark.parametrize(
    "text",
    [
        b"# Disk DescriptorFile\n",
        b"# Disk DescriptorFile",
        b"#Disk DescriptorFile\r\nversion=1\r\n",
        b"# disk descriptorfile\nversion=1\n",
        b"\n\n   \t\r\n# Disk DescriptorFile\nversion=1\n",
        b"# made by hand\n# on a Monday\n# Disk DescriptorFile\n",
        b"# made by hand\nversion=1\n",
        b"version=1\n",
        b"version=2\r\n",
        b"version=3\n",
        b" Version = 1",
        b"#\n" * 30000 + b"version=1\n",
    ],
)
def test_vmdk_descriptors(text: bytes) -> None:
    assert detect(text + b'RW 2048 FLAT "/etc/passwd" 0\n').format == "vmdk" or not text.endswith(b"\n")
    assert detect(text).format == "vmdk"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"#!/bin/sh\necho\n# Disk DescriptorFile\n",
        b"# Disk\nDescriptorFile\n",
        b"version=\n",
        b"version=one\n",
        b"version\n",
        b"version: 1\n",
        b"\0\n# Disk DescriptorFile\n",
        b"CID=1\nversion=1\n",
    ],
)
def test_other_texts_are_raw(text: bytes) -> None:
    assert detect(text, size=len(text)).format == "raw"


@pytest.mark.parametrize(
    "head",
    [
        b"QFI\xfa\0\0\0\2",
        b"QED\1",
        b"VMDK",
        b"vhdxfil",
        b"LUKS\xba\xbf",
        b"conecti",
        b"WithoutFreeSpac",
        b"#!/bin/sh\n",
    ],
)
def test_near_misses_are_raw(head: bytes) -> None:
    found = detect(*image(head))
    assert found.matches == ()
    assert found.format == "raw"
    assert not found.certain


@pytest.mark.parametrize("name", sorted(HEADS))
def test_signatures_in_other_places_are_data(name: str) -> None:
    for head in HEADS[name]:
        if name != "vmdk":
            assert detect(*image(b"\1" + head)).format == "raw"
        assert detect(*image(bytes(512) + head)).format == "raw"


def test_contents_of_raw_disks_are_not_formats() -> None:
    mbr = bytes(510) + b"\x55\xaa"
    gpt = mbr + b"EFI PART"
    assert detect(*image(mbr)).matches == ()
    assert detect(*image(gpt)).matches == ()
    iso = detect(*image(bytes(32768) + b"\1CD001\1"))
    assert iso.matches == ()
    assert iso.contents == ("iso9660",)
    assert iso.format == "raw"
    assert not iso.certain


def test_two_formats_are_ambiguous() -> None:
    found = detect(*image(HEADS["qcow2"][1], TAILS["dmg"]), path="disk.img")
    assert found.matches == ("dmg", "qcow2")
    assert not found.certain
    with pytest.raises(FormatError) as caught:
        _ = found.format
    text = str(caught.value)
    assert "-f dmg" in caught.value.command_text()
    for part in ("disk.img", "dmg", "qcow2", 'format="dmg"'):
        assert part in text
    with pytest.raises(FormatError):
        found.supported(["qcow2"])


def test_both_ends_of_one_format_are_one_match() -> None:
    assert detect(*image(HEADS["vpc"][0], TAILS["vpc"])).matches == ("vpc",)


PLANTS = [
    (head_name, head, with_vdi, tail_name)
    for (head_name, head), with_vdi, tail_name in product(
        [(name, head) for name, heads in HEADS.items() for head in heads if name != "vdi"] + [("", b"")],
        (False, True),
        ("", *TAILS),
    )
]


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_signatures_are_all_found_and_no_others(plant: tuple[str, bytes, bool, str]) -> None:
    head_name, head, with_vdi, tail_name = plant
    body, tail, size = image(head, TAILS.get(tail_name, b""), size=HEAD_BYTES * 2)
    if with_vdi:
        body = body[:64] + b"\x7f\x10\xda\xbe" + body[68:]
    expected = {head_name, tail_name, "vdi" if with_vdi else ""} - {""}
    assert set(detect(body, tail, size).matches) == expected


@given(st.permutations(sorted(FORMATS)), st.sampled_from(PLANTS))
def test_the_order_of_the_table_means_nothing(order: list[str], plant: tuple[str, bytes, bool, str]) -> None:
    body, tail, size = image(plant[1], TAILS.get(plant[3], b""), size=8192)
    expected = detect(body, tail, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FORMATS", {name: FORMATS[name] for name in order})
        assert detect(body, tail, size) == expected


@given(
    st.lists(st.binary(max_size=80) | st.sampled_from([head for heads in HEADS.values() for head in heads])).map(
        b"".join
    ),
    st.binary(max_size=1100) | st.sampled_from(sorted(TAILS.values())),
    st.none() | st.integers(-10, 1 << 64),
)
def test_no_bytes_make_it_raise(head: bytes, tail: bytes, size: int | None) -> None:
    found = detect(head, tail, size)
    assert set(found.matches) <= FORMATS.keys()
    assert list(found.matches) == sorted(found.matches)
    assert found == detect(bytearray(head), memoryview(tail), size)
    if len(found.matches) < 2:
        assert found.supported(FORMATS) == found.certain


@given(st.binary(max_size=300))
def test_more_bytes_than_needed_change_nothing(more: bytes) -> None:
    head, tail, size = image(DESCRIPTOR, TAILS["dmg"])
    assert detect(head + more, more + tail, size) == detect(head, tail, size)


@pytest.mark.parametrize("head", [b"\n", b"#\n", b"# x\n", b" ", b"#", b"\0"])
def test_hostile_text_costs_little(head: bytes) -> None:
    begun = time.perf_counter()
    detect(head * HEAD_BYTES)
    assert time.perf_counter() - begun < 20, "it takes the square of its length"


def test_supported() -> None:
    assert detect(HEADS["qcow2"][0]).supported(["raw", "qcow2"])
    assert not detect(HEADS["vhdx"][0]).supported(["raw", "qcow2"])
    assert detect(b"").supported(["raw"])


def test_aliases() -> None:
    assert canonical("vhd") == "vpc"
    assert canonical("vpc") == "vpc"
    assert canonical("no-such-format") == "no-such-format"


# --- what a caller says it is


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_declared_format_may_not_look_like_another(name: str) -> None:
    for head in HEADS[name]:
        for declared in (*FORMATS, "vhd", "somebody-elses"):
            if canonical(declared) == name:
                check_declared(declared, *image(head))
                continue
            with pytest.raises(FormatError, match=f"looks like {name}") as caught:
                check_declared(declared, *image(head), path="x.img")
            assert "x.img" in str(caught.value)
            assert f'format="{name}"' in str(caught.value)
            assert f"-f {name}" in caught.value.command_text()


def test_raw_may_look_like_anything() -> None:
    for heads in HEADS.values():
        check_declared("raw", *image(heads[0], TAILS["dmg"]))


def test_bytes_that_look_like_nothing_are_left_to_the_driver() -> None:
    for declared in (*FORMATS, "raw"):
        check_declared(declared, *image())


def test_declaring_one_of_two_settles_it() -> None:
    both = image(HEADS["qcow2"][0], TAILS["vpc"])
    check_declared("qcow2", *both)
    check_declared("vhd", *both)
    with pytest.raises(FormatError, match="looks like qcow2 and vpc"):
        check_declared("dmg", *both)


def test_writers_refuse_a_guess_at_raw() -> None:
    with pytest.raises(OptionError) as caught:
        refuse_probed_raw(detect(bytes(512)), "disk\x1b.img", operation="resize")
    assert 'format="raw"' in str(caught.value)
    assert "-f raw" in caught.value.command_text()
    assert "disk" in str(caught.value)
    assert str(caught.value).isprintable()
    refuse_probed_raw(detect(HEADS["qcow2"][0]), "disk.img")
    with pytest.raises(FormatError):
        refuse_probed_raw(detect(*image(HEADS["qcow2"][0], TAILS["vpc"])), "disk.img")


# --- which writes could change what is found


@pytest.mark.parametrize(
    ("offset", "length", "touches"),
    [
        (0, 1, True),
        (0, 0, False),
        (HEAD_BYTES - 1, 1, True),
        (HEAD_BYTES, 512, False),
        ((1 << 20) - TAIL_BYTES - 1, 1, False),
        ((1 << 20) - TAIL_BYTES - 1, 2, True),
        ((1 << 20) - 1, 1, True),
        (0, 1 << 20, True),
        (1 << 20, 512, True),
    ],
)
def test_which_writes_touch_what_probes_read(offset: int, length: int, touches: bool) -> None:
    assert touches_probe(offset, length, 1 << 20) is touches


@given(
    st.integers(512, 200_000), st.sampled_from([(0, b"QFI\xfb\0\0\0\2"), (64, b"\x7f\x10\xda\xbe"), (-512, b"koly")])
)
def test_a_write_that_changes_the_finding_touches(size: int, plant: tuple[int, bytes]) -> None:
    offset, magic = plant
    offset %= size
    body = bytearray(size)
    body[offset : offset + len(magic)] = magic
    assert detect(bytes(body[:HEAD_BYTES]), bytes(body[-TAIL_BYTES:]), size).certain
    assert touches_probe(offset, len(magic), size)

"""`lamina.inspect`: what is safe, what is not and why, for each judge; from files and from pipes; within its memory."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

import pytest

import lamina
from lamina import Budget, OptionError, Verdict
from lamina.crypto.luks1 import MAX_ITERATIONS
from lamina.formats.qcow2 import layout as q
from tests.attacks.images import U32, overlay, victim
from tests.attacks.oracle import opened_files, strangers
from tests.foreign_images import DESCRIPTOR, encrypted, vhd, vhdx, vmdk

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def through_a_pipe(content: bytes, format: str | None = None) -> Verdict:
    """The verdict on the same bytes from a pipe."""
    reader, writer = os.pipe()

    def feed() -> None:
        with open(writer, "wb") as pipe:
            pipe.write(content)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        return lamina.inspect(reader, format=format)
    finally:
        os.close(reader)
        thread.join()


def judged(path: Path, content: bytes | None = None, format: str | None = None, **limits: int) -> Verdict:
    """The verdict on the file, which a pipe gets too."""
    if content is not None:
        path.write_bytes(content)
    with opened_files() as opened:
        found = lamina.inspect(path, format=format, **limits)  # type: ignore[arg-type]
    assert not strangers(opened, [path])
    if not limits:
        assert through_a_pipe(path.read_bytes(), format) == found
    assert found.safe == (not found.reasons)
    assert set(found.limits_hit) <= set(found.reasons)
    return found


def test_a_plain_image_is_safe(tmp_path: Path) -> None:
    found = judged(victim(tmp_path).save())
    assert found.to_json() == {
        "format": "qcow2",
        "matches": ["qcow2"],
        "references": [],
        "features": ["version 3"],
        "limits_hit": [],
        "safe": True,
        "reasons": [],
    }
    assert found.virtual_size == MIB


@pytest.mark.parametrize("name", ["/etc/passwd", "base.raw", 'json:{"driver":"nbd"}', "a" * 1023, "\x1b]0;x\x07"])
def test_a_backing_file_is_named_and_never_looked_for(tmp_path: Path, name: str) -> None:
    found = judged(overlay(tmp_path, name))
    assert not found.safe
    assert [tuple(one) for one in found.references] == [("backing file", name)]


def test_a_backing_file_without_a_name(tmp_path: Path) -> None:
    made = victim(tmp_path).set(backing_file_offset=512, backing_file_size=0)
    assert judged(made.save()).reasons == ("it has a backing file without a name",)


def test_a_data_file(tmp_path: Path) -> None:
    made = victim(tmp_path).set(incompatible_features=q.DATA_FILE).extension(q.EXT_DATA_FILE, b"/etc/passwd")
    found = judged(made.save())
    assert found.references == (("data file", "/etc/passwd"),)
    assert judged(victim(tmp_path).set(incompatible_features=q.DATA_FILE).save()).reasons == (
        "its data is in another file",
    )
    # Also where the bit says that there is none.
    assert not judged(victim(tmp_path).extension(q.EXT_DATA_FILE, b"x").save()).safe


@pytest.mark.parametrize("bit", [5, 6, 31, 63])
def test_unknown_features(tmp_path: Path, bit: int) -> None:
    found = judged(victim(tmp_path).set(incompatible_features=1 << bit).save())
    assert found.reasons == (f"it uses unknown incompatible feature {bit}",)


def test_features_are_told_and_safe(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    lamina.create(path, "qcow2", MIB, extended_l2=True, compression_type="zstd", lazy_refcounts=True)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.create_snapshot("one")
        image.add_bitmap("records", 65536)
    found = judged(path)
    assert found.safe
    assert found.features == (
        "version 3", "compression type", "extended L2 entries", "lazy refcounts", "bitmaps", "compression zstd",
        "snapshots: 1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"l1_size": U32}, "l1_size is 4294967295"),
        ({"nb_snapshots": U32}, "nb_snapshots is 4294967295"),
        ({"refcount_table_clusters": U32}, "refcount_table_clusters is 4294967295"),
        ({"cluster_bits": 22}, "cluster_bits is 22"),
        ({"size": (1 << 64) - 1}, "size is 18446744073709551615"),
        ({"header_length": U32}, "header_length is 4294967295"),
    ],
)
def test_limits(tmp_path: Path, fields: dict[str, int], limit: str) -> None:
    found = judged(victim(tmp_path).set(**fields).save())
    assert not found.safe
    assert [one for one in found.limits_hit if one.startswith(limit)]


def test_the_limits_of_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    lamina.create(path, "qcow2", 64 * GIB, cluster_size=512)
    assert lamina.inspect(path).safe
    small = lamina.inspect(path, budget=Budget(memory=MIB))
    assert small.limits_hit == ("its tables need 16779264 bytes of memory, above the limit of 1048576",)
    assert lamina.inspect(path, max_size=64 * GIB).safe
    assert not lamina.inspect(path, max_size=64 * GIB - 1).safe


def test_a_declared_format_must_be_the_one_that_is_found(tmp_path: Path) -> None:
    path = victim(tmp_path).save()
    assert judged(path, format="qcow2").safe
    for other in ("raw", "vmdk", "vhd", "iso"):
        found = judged(path, format=other)
        assert not found.safe
        assert found.format == "qcow2"
        assert "declared" in found.reasons[-1]
    plain = tmp_path / "plain"
    assert judged(plain, b"x" * 4096, format="raw").safe
    assert not judged(plain, format="qcow2").safe
    with pytest.raises(OptionError, match="there is no format"):
        lamina.inspect(path, format="qcow3")


def test_two_formats_in_one_file(tmp_path: Path) -> None:
    made = victim(tmp_path)
    made.bytes[-512:-504] = b"conectix"
    found = judged(made.save())
    assert found.matches == ("qcow2", "vpc")
    assert "it can be taken for several things: qcow2, vpc" in found.reasons


@pytest.mark.parametrize("format", ["qcow", "qed", "parallels", "dmg", "bochs", "cloop"])
def test_formats_that_are_never_safe(tmp_path: Path, format: str) -> None:
    heads = {
        "qcow": b"QFI\xfb\0\0\0\1",
        "qed": b"QED\0",
        "parallels": b"WithoutFreeSpace",
        "dmg": b"",
        "bochs": b"Bochs Virtual HD Image",
        "cloop": b"#!/bin/sh\n#V2.0 Format",
    }
    content = heads[format].ljust(8192, b"\0") + (b"koly".ljust(512, b"\0") if format == "dmg" else b"")
    found = judged(tmp_path / "a", content)
    assert (found.format, found.safe) == (format, False)


def test_the_corrupt_bit_and_lost_tables(tmp_path: Path) -> None:
    assert not judged(victim(tmp_path).set(incompatible_features=q.CORRUPT).save()).safe
    whole = victim(tmp_path)
    assert not judged(whole.truncate(4096).save()).safe


# -- encryption


@pytest.mark.parametrize("cluster_size", [4096, 2 * MIB])
def test_the_encryption_header_is_judged(tmp_path: Path, cluster_size: int) -> None:
    path = tmp_path / "a.qcow2"
    content = encrypted(path, cluster_size)
    assert judged(path).features == ("version 3", "encryption luks")
    luks = content.index(b"LUKS\xba\xbe")
    content[luks + 164 : luks + 168] = struct.pack(">I", MAX_ITERATIONS + 1)
    found = judged(path, bytes(content))
    assert found.limits_hit
    assert "iterations" in found.limits_hit[0]


def test_luks(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    content = encrypted(path)
    luks = bytes(content[content.index(b"LUKS\xba\xbe") :])
    payload = int.from_bytes(luks[104:108]) * 512
    luks = luks[:payload].ljust(payload, b"\0") + bytes(MIB)
    found = judged(path, luks)
    assert (found.format, found.virtual_size, found.safe) == ("luks", MIB, True)
    assert not judged(path, luks[:6] + b"\0\2" + luks[8:]).safe
    assert judged(path, luks[:164] + b"\xff" * 4 + luks[168:]).limits_hit
    assert not judged(path, luks[:500]).safe


# -- VMDK


def test_vmdk_with_its_disk_inside(tmp_path: Path) -> None:
    found = judged(tmp_path / "a", vmdk())
    assert found.safe
    assert found.features == ("type monolithicsparse",)
    assert found.virtual_size == 4 * MIB


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'SPARSE "disk.vmdk"', b'FLAT "disk.vmdk" 0'),
        (b'"disk.vmdk"', b'"/etc/passwd"'),
        (b'"disk.vmdk"', b'"..\\x"'),
        (b'"disk.vmdk"\n', b'"disk.vmdk"\nRW 1 SPARSE "other.vmdk"\n'),
        (b'RW 8192 SPARSE "disk.vmdk"\n', b""),
        (b"monolithicSparse", b"monolithicFlat"),
        (b'"monolithicSparse"', b'"monolithicSparse'),
        (b"# Extent", b'createType="custom"\n# Extent'),
        (b"# Extent", b'# createType="custom"\n# Extent'),
        (b"parentCID=ffffffff", b"parentCID=12345678"),
        (b"# Extent", b'parentFileNameHint="base.vmdk"\n# Extent'),
        (b"ddb.", b"what is this\nddb."),
        (b"version", b"\xffversion"),
    ],
)
def test_vmdk_descriptors_that_are_not_safe(tmp_path: Path, old: bytes, new: bytes) -> None:
    assert not judged(tmp_path / "a", vmdk(DESCRIPTOR.replace(old, new))).safe


def test_vmdk_names_are_told(tmp_path: Path) -> None:
    text = (
        b'# Disk DescriptorFile\ncreateType="monolithicFlat"\nRW 2048 FLAT "/etc/passwd" 0\nparentFileNameHint="up"\n'
    )
    found = judged(tmp_path / "a", text)
    assert found.references == (("extent", "/etc/passwd"), ("parent", "up"))
    assert not judged(tmp_path / "a", b"COWD" + bytes(4096)).safe
    assert not judged(tmp_path / "a", vmdk(version=4)).safe
    assert judged(tmp_path / "a", vmdk(grain=3)).limits_hit
    assert not judged(tmp_path / "a", vmdk()[:2048]).safe


def test_vmdk_footers_say_what_the_header_says(tmp_path: Path) -> None:
    stream = DESCRIPTOR.replace(b"monolithicSparse", b"streamOptimized")
    start = vmdk(stream, version=3, directory=(1 << 64) - 1)
    marker = struct.pack("<QII", 1, 0, 3).ljust(512, b"\0")
    footer = vmdk(stream, version=3, directory=99)[:512]
    assert judged(tmp_path / "a", start + marker + footer + bytes(512)).safe
    for wrong in (
        marker + start[:512] + bytes(512),  # another footer
        marker + vmdk(stream, version=3, directory=99, grain=64)[:512] + bytes(512),
        bytes(512) + footer + bytes(512),
        marker + footer + b"\1".ljust(512, b"\0"),
        b"",
    ):
        assert not judged(tmp_path / "a", start + wrong).safe


# -- VHD, VHDX, VDI


def test_vhd(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert judged(path, vhd()).safe
    assert judged(path, vhd(4, parent="C:\\base.vhd")).references == (("parent", "C:\\base.vhd"),)
    assert judged(path, vhd(3, parent="hidden")).references == (("parent", "hidden"),)
    assert not judged(path, vhd(5)).safe
    assert judged(path, vhd(block=3 * MIB)).limits_hit
    assert judged(path, vhd(entries=U32)).limits_hit
    assert not judged(path, vhd()[:-512]).safe
    assert not judged(path, vhd()[:-512] + vhd(2)[-512:]).safe, "the copy at the start says another type"
    wrong = bytearray(vhd())
    wrong[60 + 4] ^= 1
    wrong[-512 + 64] ^= 1
    assert not judged(path, bytes(wrong)).safe
    fixed = bytes(4 * MIB) + vhd(2)[-512:]
    assert judged(path, fixed).safe
    assert not judged(path, fixed[512:]).safe, "shorter than its disk"
    assert not judged(path, bytes(4 * MIB) + vhd(4)[-512:]).safe


def test_vhdx(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for at in (MIB, 2 * MIB, 3 * MIB + 512 * KIB):
        found = judged(path, vhdx(metadata_at=at))
        assert found.safe
        assert found.virtual_size == 64 * MIB
    found = judged(path, vhdx(parent=True))
    assert found.references == (("parent", "a.vhdx"),)
    assert "it has a parent" in found.reasons
    assert not judged(path, vhdx(log=True)).safe
    assert not judged(path, vhdx(required=1)).safe
    assert judged(path, vhdx(required=2)).safe
    whole = vhdx()
    for at in (192 * KIB + 20, 256 * KIB + 20, 64 * KIB + 100):  # of headers, the other one stays valid
        broken = bytearray(whole)
        broken[at] ^= 1
        assert judged(path, bytes(broken)).safe == (at < 192 * KIB)
    assert not judged(path, whole[: 256 * KIB]).safe


@pytest.mark.parametrize("offset", [1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_offsets_past_every_end(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "a"
    content = bytearray(vhdx())
    for at in (192 * KIB, 256 * KIB):
        content[at + 32 : at + 40] = struct.pack("<Q", offset)
    assert "it has no metadata" in judged(path, bytes(content)).reasons
    content = bytearray(vhd())
    content[16:24] = content[-512 + 16 : -512 + 24] = struct.pack(">Q", offset)
    assert "it has no dynamic header where its footer says" in judged(path, bytes(content)).reasons


def test_vdi(tmp_path: Path) -> None:
    def vdi(kind: int = 1, link: bytes = b"", blocks: int = 4, extra: int = 0) -> bytes:
        raw = bytearray(1 << 20)
        raw[64:84] = struct.pack("<IIIII", 0xBEDA107F, 0x10001, 0x180, kind, 0)
        raw[0x154:0x15C] = struct.pack("<II", 512, 1024)
        raw[0x168:0x188] = struct.pack("<IIQIIII", 512, 0, 4 * MIB, MIB, extra, blocks, 0)
        raw[0x1A8:0x1B8] = link.ljust(16, b"\0")
        return bytes(raw)

    path = tmp_path / "a"
    found = judged(path, vdi())
    assert (found.safe, found.virtual_size) == (True, 4 * MIB)
    for wrong in (vdi(4), vdi(3), vdi(link=b"\1"), vdi(blocks=3), vdi(extra=512), vdi()[:300]):
        assert not judged(path, wrong).safe
    assert judged(path, vdi(blocks=U32)).limits_hit

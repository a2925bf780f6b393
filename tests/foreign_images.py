"""Small images of formats that Lamina cannot create: VMDK, VHD, VHDX; and qcow2 images with a LUKS header."""

from __future__ import annotations

import struct
from pathlib import Path

import lamina
from lamina.verdict.vhdx import _crc32c as crc32c

KIB, MIB = 1 << 10, 1 << 20
U32 = (1 << 32) - 1
SECRET = lamina.Secret(b"abc")

DESCRIPTOR = b"""# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="monolithicSparse"

# Extent description
RW 8192 SPARSE "disk.vmdk"

ddb.adapterType = "ide"
"""


def vmdk(descriptor: bytes = DESCRIPTOR, *, version: int = 1, directory: int = 26, grain: int = 128) -> bytes:
    head = struct.pack("<4sIIQQQQIQQ", b"KDMV", version, 3, 8192, grain, 1, 20, 512, 21, directory)
    return head.ljust(512, b"\0") + descriptor.ljust(20 * 512, b"\0") + bytes(64 * KIB)


def encrypted(path: Path, cluster_size: int = 4096) -> bytearray:
    encrypt = {"format": "luks", "key-secret": SECRET, "iter-time": 1}
    lamina.create(path, "qcow2", MIB, cluster_size=cluster_size, encrypt=encrypt)
    return bytearray(path.read_bytes())


def summed(raw: bytearray, at: int) -> bytes:
    raw[at : at + 4] = bytes(4)
    raw[at : at + 4] = struct.pack(">I", ~sum(raw) & U32)
    return bytes(raw)


def vhd(kind: int = 3, *, parent: str = "", block: int = 2 * MIB, entries: int = 4) -> bytes:
    footer = bytearray(512)
    footer[:8], footer[16:24], footer[48:56] = b"conectix", struct.pack(">Q", 512), struct.pack(">Q", 4 * MIB)
    footer[60:64] = struct.pack(">I", kind)
    header = bytearray(1024)
    header[:40] = struct.pack(">8sQQIII", b"cxsparse", (1 << 64) - 1, 1536, 0x10000, entries, block) + bytes(4)
    header[64 : 64 + 2 * len(parent)] = parent.encode("utf-16-be")
    end = summed(footer, 64)
    return end + summed(header, 36) + b"\xff" * 512 + end


def vhdx(*, parent: bool = False, log: bool = False, metadata_at: int = 2 * MIB, required: int = 0) -> bytes:
    content = bytearray(metadata_at + MIB)
    content[:8] = b"vhdxfile"

    def checked(at: int, size: int, raw: bytes) -> None:
        content[at : at + size] = raw.ljust(size, b"\0")
        content[at + 4 : at + 8] = struct.pack("<I", crc32c(bytes(content[at : at + size])))

    for number, at in enumerate((64 * KIB, 128 * KIB)):
        guid = b"\7" * 16 if log and number else bytes(16)
        checked(at, 4096, struct.pack("<4sIQ16s16s16sHHIQ", b"head", 0, number + 1, b"a", b"b", guid, 0, 1, MIB, MIB))
    region = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
    table = struct.pack("<4sIII16sQII", b"regi", 0, 1 + (required != 0), 0, region, metadata_at, MIB, 1)
    table += struct.pack("<16sQII", b"unknown", 0, 0, required)
    for at in (192 * KIB, 256 * KIB):
        checked(at, 64 * KIB, table)
    items = [
        ("3767a1ca36fa434db3b633f0aa44e76b", struct.pack("<II", MIB, 2 * parent)),
        ("2442a52f1bcd7648b2115dbed83bf4b8", struct.pack("<Q", 64 * MIB)),
    ]
    if parent:
        pair = struct.pack("<IIHH", 32, 64, 26, 12) + bytes(0)
        locator = bytes(18) + struct.pack("<H", 1) + pair
        locator = locator.ljust(32, b"\0") + "relative_path".encode("utf-16-le")
        items.append(("2d5fd3a80bb34d45abf7d3d84834ab0c", locator.ljust(64, b"\0") + "a.vhdx".encode("utf-16-le")))
    at = metadata_at + 64 * KIB
    entries = b""
    for guid, value in items:
        content[at : at + len(value)] = value
        entries += struct.pack("<16sIIII", bytes.fromhex(guid), at - metadata_at, len(value), 4, 0)
        at += 4096
    head = struct.pack("<8sHH20s", b"metadata", 0, len(items), b"")
    content[metadata_at : metadata_at + len(head + entries)] = head + entries
    return bytes(content)

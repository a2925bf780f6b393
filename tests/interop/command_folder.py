"""The folder of images in which command lines run under both programs: made once by QEMU, and written anew for each line.

| name | image |
|---|---|
| disk, base | qcow2 with data, zero clusters and holes; 10 and 8 MiB |
| base.raw, raw, odd, empty, notes | raw: 4 MiB, 1 MiB, 1000 bytes, no bytes, a text |
| top, third | a chain of overlays: third over top over base |
| longer | qcow2 of 12 MiB over base.raw |
| noformat | qcow2 over base, which does not state the format of base |
| snap, maps, packed, zst, v2, ext, sub, lazy, enc | qcow2 with snapshots, bitmaps, compression, ... |
| leaky, corrupt, short | damaged images |
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: The images below, by name.
BENEATH = {
    "top": ("base",),
    "third": ("top", "base"),
    "longer": ("base.raw",),
    "noformat": ("base",),
    "ext": ("ext.raw",),
}
_BLOCK = 4096

#: (program, arguments) that make the images.
_STEPS = """
img create -q -f qcow2 disk 10M
io -f qcow2 disk : write -q -P 1 1M 1M : write -q -z 3M 64k : write -q -P 2 9M 64k
img create -q -f raw base.raw 4M
io -f raw base.raw : write -q -P 3 0 64k : write -q -P 4 1M 128k
img create -q -f qcow2 base 8M
io -f qcow2 base : write -q -P 5 0 256k : write -q -P 6 4M 1M
img create -q -f qcow2 -b base -F qcow2 top
io -f qcow2 top : write -q -P 7 128k 64k : write -q -z 4M 128k : write -q -P 7 6M 64k
img create -q -f qcow2 -b top -F qcow2 third
img create -q -f qcow2 -b base.raw -F raw longer 12M
io -f qcow2 longer : write -q -P 8 512k 64k : write -q -P 8 8M 64k
img create -q -f qcow2 -b base -F qcow2 noformat
img create -q -f raw raw 1M
io -f raw raw : write -q -P 9 0 64k : write -q -P 9 512k 4k
img create -q -f qcow2 snap 4M
io -f qcow2 snap : write -q -P 1 0 1M
img snapshot -c one snap
io -f qcow2 snap : write -q -P 2 0 512k
img snapshot -c two snap
img create -q -f qcow2 maps 10M
img bitmap --add maps b0
img bitmap --add -g 4k --disable maps b1
io -f qcow2 maps : write -q -P 1 1M 1M
img convert -c -O qcow2 disk packed
img create -q -f qcow2 -o compression_type=zstd zst 4M
io -f qcow2 zst : write -q -c -P 1 0 64k
img create -q -f qcow2 -o compat=0.10 v2 4M
io -f qcow2 v2 : write -q -P 1 0 64k
img create -q -f qcow2 -o data_file=ext.raw,data_file_raw=on ext 4M
io -f qcow2 ext : write -q -P 1 64k 64k
img create -q -f qcow2 -o extended_l2=on,cluster_size=128k sub 4M
io -f qcow2 sub : write -q -P 1 4k 8k
img create -q -f qcow2 -o lazy_refcounts=on,cluster_size=4k,refcount_bits=8 lazy 4M
img create -q -f qcow2 --object secret,id=s,data=pass -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 enc 1M
img create -q -f qcow2 leaky 2M
io -f qcow2 leaky : write -q -P 1 0 128k
img create -q -f qcow2 corrupt 2M
io -f qcow2 corrupt : write -q -P 1 0 128k
img create -q -f qcow2 short 2M
io -f qcow2 short : write -q -P 1 0 128k
""".strip()


class Images:
    """The images as one version of QEMU makes them, in memory."""

    def __init__(self, qemu: Any, folder: Path) -> None:
        before = os.getcwd()
        os.chdir(folder)
        try:
            for line in _STEPS.splitlines():
                program, _, rest = line.partition(" ")
                if program == "img":
                    qemu.img(*rest.split())
                else:
                    options, *commands = rest.split(" : ")
                    qemu.io(*options.split(), *(part for command in commands for part in ("-c", command)))
        finally:
            os.chdir(before)
        (folder / "odd").write_bytes(b"x" * 1000)
        (folder / "empty").write_bytes(b"")
        (folder / "notes").write_bytes(b"some text\n")
        _damage(folder)
        self.content = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def named_in(self, lines: Iterable[str]) -> set[str]:
        """The images that the lines name, and those below."""
        words = {word for line in lines for word in re.split(r"[^\w.]+", line)}
        found = words & set(self.content)
        return found.union(*(BENEATH.get(name, ()) for name in found))

    def write(self, folder: Path, names: Iterable[str]) -> None:
        """Make these images in `folder`, with holes in the same places each time."""
        for name in names:
            content = self.content[name]
            with open(folder / name, "wb") as file:
                file.truncate(len(content))
                for at in range(0, len(content), _BLOCK):
                    block = content[at : at + _BLOCK]
                    if block.count(0) != len(block):
                        file.seek(at)
                        file.write(block)


def _damage(folder: Path) -> None:
    """A leaked cluster, a reference to a cluster that is counted as free, a file that is too short, and an image whose
    backing format is not stored."""
    for name, index, count in (("leaky", 7, 1), ("corrupt", 5, 0)):
        with open(folder / name, "r+b") as file:
            file.seek(2 * 65536 + 2 * index)
            file.write(struct.pack(">H", count))
            if name == "leaky":
                file.truncate(8 * 65536)
    os.truncate(folder / "short", 5 * 65536)
    with open(folder / "noformat", "r+b") as file:
        header = file.read(65536)
        at = header.index(struct.pack(">I", 0xE2792ACA))
        file.seek(at)
        file.write(struct.pack(">I", 0x12345678))

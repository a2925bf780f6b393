"""Images for measurements, made without Lamina, so that no error of Lamina can improve its own figures.

`alternating` writes a qcow2 file table by table, from the published description of the format. `ext4` calls `mke2fs -d` to
make a real file system of files of this machine. Also a program, so that `run.py` can make its images in a child process and
stay small itself: `python -m benchmarks.images alternating|ext4 PATH`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import stat
import struct
import subprocess
import sys
import sysconfig
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

GIB = 1 << 30
COPIED = 1 << 63  # the flag of a mapping whose cluster has exactly one reference


def alternating(
    path: str | os.PathLike[str], count: int = 1 << 20, cluster_bits: int = 16, *, sharing: int = 1, every: int = 2
) -> Path:
    """Write a qcow2 version 3 image whose clusters alternate, even ones data, odd ones unallocated; return its path.

    `count` guest clusters of `1 << cluster_bits` bytes make a map of exactly `count` extents (the defaults: 64 GiB and
    1,048,576). Header, refcount table, refcount blocks, L1 table and L2 tables come first, then the data clusters in
    guest order. Reference counts are exact. The data is stored in one of two ways:

    `sharing=1`: every guest cluster has a data cluster of its own without stored bytes: all of them are in one hole at the
    end of the file (32 GiB by default), and the file uses about 10 MB of disk. QEMU 7.2 and 10 treat such a file as one with
    preallocated metadata: they query the file system for each data extent (one lseek each, half a million by default),
    report `data true, zero true`, and need 1.5 times the CPU time or more. That favours Lamina, so it is not the fairest
    case.

    `sharing=N` up to 65,535: each data cluster is written in full and is shared by N guest clusters in turn, as after a
    deduplication (so no mapping has the "copied" flag). 512 gives 64 MiB of data by default. The map of QEMU then reports
    `data true, zero false` without a query of the file system, as for an ordinary full image. No two extents coalesce,
    since there is nothing between them.

    `every`: one of this number of guest clusters has data; 1: all have.
    """
    cluster_size = 1 << cluster_bits
    entries_per_table = cluster_size // 8
    counts_per_block = cluster_size // 2
    l2_tables = _divide_up(count, entries_per_table)
    l1_clusters = _divide_up(l2_tables * 8, cluster_size)
    references = _divide_up(count, every)
    data_clusters = _divide_up(references, sharing)

    # Refcount blocks and their table count themselves too: add blocks until all clusters are covered.
    blocks = 0
    while True:
        table_clusters = _divide_up(max(blocks, 1) * 8, cluster_size)
        metadata = 1 + table_clusters + blocks + l1_clusters + l2_tables
        needed = _divide_up(metadata + data_clusters, counts_per_block)
        if needed == blocks:
            break
        blocks = needed

    table_at = cluster_size
    blocks_at = table_at + table_clusters * cluster_size
    l1_at = blocks_at + blocks * cluster_size
    l2_at = l1_at + l1_clusters * cluster_size
    data_at = l2_at + l2_tables * cluster_size

    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb",
        3,  # version
        0,  # backing file name: none
        0,
        cluster_bits,
        count * cluster_size,
        0,  # encryption: none
        l2_tables,
        l1_at,
        table_at,
        table_clusters,
        0,  # snapshots: none
        0,
        0,  # incompatible features
        0,  # compatible features
        0,  # autoclear features
        4,  # reference counts have 1 << 4 bits
        104,  # length of this header
    )
    counts = array("H", [1]) * metadata
    counts.extend(min(sharing, references - first) for first in range(0, references, sharing))
    flag = COPIED if sharing == 1 else 0
    mappings = array("Q", bytes(l2_tables * entries_per_table * 8))
    mappings[0:count:every] = array("Q", (data_at + n // sharing * cluster_size | flag for n in range(references)))

    path = Path(path)
    with path.open("wb") as file:
        file.write(header)
        file.seek(table_at)
        file.write(_big_endian(array("Q", range(blocks_at, l1_at, cluster_size))))
        file.seek(blocks_at)
        file.write(_big_endian(counts))
        file.seek(l1_at)
        file.write(_big_endian(array("Q", (at | COPIED for at in range(l2_at, data_at, cluster_size)))))
        file.seek(l2_at)
        file.write(_big_endian(mappings))
        if sharing == 1:
            file.truncate(data_at + data_clusters * cluster_size)
        else:
            file.seek(data_at)
            for n in range(data_clusters):
                file.write(bytes([n % 255 + 1]) * cluster_size)
    return path


def ext4(path: str | os.PathLike[str], size: int = 4 * GIB, content: int = 3 * GIB // 2) -> Path:
    """Make a raw image of `size` bytes with an ext4 file system of about `content` bytes of real files; return its path.

    The files are this machine's own: Python's standard library, then /usr/lib, then /usr/share, in sorted order until
    `content` bytes are reached. They are copied to a temporary folder next to `path` first, which needs twice `content` of
    free space. The image is sparse where the file system is empty.

    Raises RuntimeError when mke2fs is missing or fails.
    """
    path = Path(path)
    # The PATH of ordinary users often has no sbin directory.
    mke2fs = shutil.which("mke2fs", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if not mke2fs:
        raise RuntimeError("mke2fs was not found; install e2fsprogs")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="ext4-content-") as folder:
        room = content
        for top in (sysconfig.get_path("stdlib"), "/usr/lib", "/usr/share"):
            for source in _regular_files(Path(top)):
                length = source.stat().st_size
                if length > room:
                    continue
                target = Path(folder, *source.parts[1:])
                if target.exists():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                room -= length
        path.unlink(missing_ok=True)
        command = [mke2fs, "-q", "-F", "-t", "ext4", "-d", folder, str(path), f"{size >> 10}k"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(f"mke2fs failed: {made.stderr.strip()}")
    return path


def _regular_files(top: Path) -> Iterator[Path]:
    """The readable regular files below `top`, in sorted order, so that two runs on one machine make the same image."""
    for folder, subfolders, names in os.walk(top):
        subfolders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            if stat.S_ISREG(file.lstat().st_mode) and os.access(file, os.R_OK):
                yield file


def _divide_up(size: int, unit: int) -> int:
    return -(-size // unit)


def _big_endian(values: array[int]) -> bytes:
    if sys.byteorder == "little":
        values.byteswap()
    return values.tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description="Make an image for measurements.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    kind = kinds.add_parser("alternating", help="a qcow2 file with alternating allocated and unallocated clusters")
    kind.add_argument("path")
    kind.add_argument("--count", type=int, default=1 << 20, help="number of clusters, and of extents (1048576)")
    kind.add_argument("--cluster-bits", type=int, default=16)
    kind.add_argument("--sharing", type=int, default=1, help="guest clusters per data cluster; 1: data in a hole")
    kind.add_argument("--every", type=int, default=2, help="one of this number of guest clusters has data (2)")
    kind = kinds.add_parser("ext4", help="a raw image of a real file system")
    kind.add_argument("path")
    kind.add_argument("--size", type=int, default=4 * GIB, help="bytes of the image (4 GiB)")
    kind.add_argument("--content", type=int, default=3 * GIB // 2, help="bytes of files in it (1.5 GiB)")
    options = parser.parse_args()
    if options.kind == "alternating":
        alternating(options.path, options.count, options.cluster_bits, sharing=options.sharing, every=options.every)
    else:
        ext4(options.path, options.size, options.content)


if __name__ == "__main__":
    main()

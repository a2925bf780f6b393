"""The main jobs of Lamina, for a child process: on another system, in a fresh installation, under another Python.

    python jobs.py FOLDER JOB...        the jobs: files, backing, tcp, unix, serve

Needs nothing but Lamina and the standard library. Each job works in FOLDER and raises AssertionError for a wrong result.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import lamina
from lamina.cli.main import main

MIB = 1 << 20


def expect(true: object, text: str = "") -> None:
    """As `assert`, which Python leaves out with -O."""
    if not true:
        raise AssertionError(text)


def content() -> bytes:
    """The first disk: data, zeros, and data that compresses."""
    return b"".join((os.urandom(100_000), bytes(MIB), b"lamina " * 40_000, bytes(300_000))).ljust(4 * MIB, b"\0")


def run(*arguments: object) -> str:
    """The standard output of `lamina ARGUMENTS`, in this process."""
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as told:
        status = main([str(each) for each in arguments])
    expect(status == 0, f"lamina {' '.join(map(str, arguments))} ended with {status}")
    told.seek(0)
    return told.read()


def stored(path: Path, format: str) -> bytes:
    with lamina.open(path, format=format) as image:
        return image.read(0, image.size)


def same(file: Path, format: str, expected: bytes) -> None:
    expect(stored(file, format) == expected, f"{file} differs")


def files(folder: Path) -> None:
    """Create, write, convert, map, check, info, explain, compare, resize, snapshot, inspect, copy: on files."""
    disk = content()
    raw, packed, back, new = (folder / name for name in ("disk.raw", "packed.qcow2", "back.raw", "new.qcow2"))
    raw.write_bytes(disk)
    run("convert", "-c", "-f", "raw", "-O", "qcow2", raw, packed)
    run("convert", "-c", "-o", "compression_type=zstd", "-f", "raw", "-O", "qcow2", raw, folder / "zstd.qcow2")
    same(folder / "zstd.qcow2", "qcow2", disk)
    run("check", "-f", "qcow2", packed)
    rows = json.loads(run("map", "--output=json", "-f", "qcow2", packed))
    expect(any(row["compressed"] for row in rows))
    expect(sum(row["length"] for row in rows) == len(disk))
    run("convert", "-f", "qcow2", "-O", "raw", packed, back)
    expect(back.read_bytes() == disk)
    run("convert", "-f", "qcow2", "-O", "raw", packed, back)  # over the existing file
    expect(back.read_bytes() == disk)
    run("compare", "-f", "qcow2", "-F", "raw", packed, back)

    run("create", "-f", "qcow2", new, "64M")
    expect(json.loads(run("info", "--output=json", "-f", "qcow2", new))["virtual-size"] == 64 * MIB)
    with lamina.open(new, format="qcow2", read_only=False) as image:
        image.write(MIB - 5, b"ten bytes!")
        image.zero(5 * MIB, MIB)
        image.flush()
        expect(image.read(MIB - 6, 12) == b"\0ten bytes!\0")
        expect(next(each.start for each in image.extents() if each.data) == MIB - 65536)
    run("snapshot", "-c", "first", "-f", "qcow2", new)
    run("resize", "-f", "qcow2", new, "80M")
    run("check", "-f", "qcow2", new)
    expect("header" in run("explain", "-f", "qcow2", new, 0))
    expect("safe" in run("inspect", new))
    run("copy", raw, folder / "copy.raw")
    expect((folder / "copy.raw").read_bytes() == disk)
    run("io", "-f", "raw", "-c", "write -P 7 0 512", "-c", "write -z 4096 8192", "-c", "flush", folder / "copy.raw")
    expect((folder / "copy.raw").read_bytes() == b"\7" * 512 + disk[512:4096] + bytes(8192) + disk[12288:])
    run("create", "-f", "raw", folder / "copy.raw", "1M")  # in place of the existing file
    expect((folder / "copy.raw").read_bytes() == bytes(MIB))
    left = [name for name in os.listdir(folder) if name.startswith(".lamina")]
    expect(not left, f"temporary files are left: {left}")
    with lamina.open({"driver": "memory", "size": MIB}, read_only=False) as image:
        image.write(17, b"memory")
        expect(image.read(16, 8) == b"\0memory\0")


def backing(folder: Path) -> None:
    """An overlay, found by the name inside it."""
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    run("create", "-f", "qcow2", base, "1M")
    run("io", "-f", "qcow2", "-c", "write -P 1 0 64k", base)
    run("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top)
    run("io", "-f", "qcow2", "-c", "write -P 2 64k 64k", top)
    expected = (b"\1" * 65536 + b"\2" * 65536).ljust(MIB, b"\0")
    same(top, "qcow2", expected)
    rows = json.loads(run("map", "--output=json", "-f", "qcow2", top))
    expect({row["depth"] for row in rows if row["data"]} == {0, 1})
    run("commit", "-f", "qcow2", top)
    same(base, "qcow2", expected)


def served(folder: Path, **where: Any) -> None:
    """A server in this process, its own client, and the commands that read an export."""
    from lamina.nbd import Export, Server

    disk = content()
    with lamina.open({"driver": "memory", "size": len(disk)}, read_only=False) as image:
        image.write(0, disk)
        with Server([Export(image, writable=True)], **where) as server:
            uri = server.uri
            expect("size" in run("info", uri))
            rows = json.loads(run("map", "--output=json", uri))
            expect(sum(row["length"] for row in rows) == len(disk))
            run("convert", "-f", "raw", "-O", "qcow2", uri, folder / "far.qcow2")
            same(folder / "far.qcow2", "qcow2", disk)
            run("copy", uri, folder / "far.raw")
            expect((folder / "far.raw").read_bytes() == disk)

            def reading(at: int) -> None:
                with lamina.open(uri, format="raw") as far:
                    for _ in range(50):
                        if far.read(at, 70_000) != disk[at : at + 70_000]:
                            wrong.append(at)

            wrong: list[int] = []
            readers = [threading.Thread(target=reading, args=(at,)) for at in (0, 50_000, 3 * MIB)]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
            expect(not wrong)
            with lamina.open(uri, format="raw", read_only=False) as far:
                far.write(2 * MIB, disk[:MIB])
                far.flush()
            expect(image.read(2 * MIB, MIB) == disk[:MIB])


def tcp(folder: Path) -> None:
    served(folder, port=0)


def unix(folder: Path) -> None:
    served(folder, unix=str(folder / "socket"))


def serve(folder: Path) -> None:
    """`lamina serve` with a client, until that leaves."""
    disk = content()
    (folder / "served.raw").write_bytes(disk)
    found: list[bytes] = []

    class Told(io.StringIO):
        def write(self, text: str) -> int:
            uri = next((word for word in text.split() if word.startswith("nbd:")), None)
            if uri is not None:
                client.append(threading.Thread(target=read, args=(uri,)))
                client[0].start()
            return len(text)

    def read(uri: str) -> None:
        with lamina.open(uri, format="raw") as image:
            found.append(image.read(0, image.size))

    client: list[threading.Thread] = []
    with contextlib.redirect_stdout(Told()):
        expect(main(["serve", "-f", "raw", "-p", "0", str(folder / "served.raw")]) == 0)
    client[0].join()
    expect(found == [disk])


JOBS = {"files": files, "backing": backing, "tcp": tcp, "unix": unix, "serve": serve}

if __name__ == "__main__":
    for name in sys.argv[2:]:
        JOBS[name](Path(sys.argv[1]))
        print(f"{name}: done")

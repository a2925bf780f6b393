"""The features of qcow2 compared with qemu-img: check of large images, compressed and encrypted reads, allocating writes.

`run.py` measures these groups with the others. A ratio is of times: at least 1.5 of a rate is at most 0.67 of a time. Nothing
is written by the reads: the target is a device without storage.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from .compare import Target, Targets
from .measure import Failed, Task, anything
from .peers import Peer

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

#: Writes of whole clusters to a new image, one after the other, and a flush.
WRITER = """\
import os, sys, lamina
path, count, data = sys.argv[1], int(sys.argv[2]), os.urandom(65536)
lamina.create(path, "qcow2", count * len(data))
with lamina.open(path, format="qcow2", read_only=False) as image:
    for number in range(count):
        image.write(number * len(data), data)
    image.flush()
"""
PEER_WRITER = """\
"$0" create -q -f qcow2 "$1" $(($2 * 65536)) && exec "$0" bench -q -w -f qcow2 -c $2 -s 65536 -d 1 -t writeback "$1"
"""
Image = Callable[..., Path]
#: A title, targets, tasks.
Work = tuple[str, Targets, Callable[[], list[Task]]]


def works(folder: Path, image: Image, lamina: list[str], others: list[Peer], small: bool) -> Iterator[Work]:
    """The works; `image` makes an image in `folder` once (see `run.plan`)."""
    clusters = (TIB >> 16) // (1024 if small else 1)

    def checks(every: int) -> list[Task]:
        path = image(f"check-{every}.qcow2", "alternating", "--count", str(clusters), "--every", str(every))
        arguments = ["check", "-q", "-f", "qcow2", str(path)]
        return [
            Task("lamina check", [*lamina, *arguments]),
            *(Task(other.name, [other.qemu_img, *arguments]) for other in others),
        ]

    for every, what in (2, "half"), (1, "fully"):
        yield (
            f"check, {clusters << 16 >> 30} GiB, {what} mapped",
            {"lamina check": [Target("cpu", 0.8)]},
            partial(checks, every),
        )

    size = (GIB // 16) if small else GIB

    def reads(kind: str) -> list[Task]:
        source = image("ext4-read.raw", "ext4", "--size", str(size), "--content", str(size * 3 // 8))
        path, options = _prepared(source, folder, kind, others[0])
        words = ["convert", "-n", *options, *_from(path, kind), "--target-image-opts"]
        return [
            Task("lamina convert", [*lamina, *words, f"driver=null,size={size}"]),
            *(Task(other.name, [other.qemu_img, *words, f"driver=null-co,size={size}"]) for other in others),
        ]

    if others:
        for title, kind, limit in (
            ("compressed reads, zlib", "compressed", 1 / 1.5),
            ("reads through LUKS, aes-256-xts", "luks", 1 / 0.7),
        ):
            yield title, {"lamina convert": [Target("wall", limit)]}, partial(reads, kind)

    count, made = 1024 if small else 16_384, folder / "written.qcow2"

    def writes() -> list[Task]:
        return [
            Task("lamina library", [sys.executable, "-c", WRITER, str(made), str(count)], anything, makes=made),
            *(
                Task(other.name, ["sh", "-c", PEER_WRITER, other.qemu_img, str(made), str(count)], anything, makes=made)
                for other in others
            ),
        ]

    yield "allocating writes of 64 KiB", {"lamina library": [Target("wall", 1.0)]}, writes


def _from(path: Path, kind: str) -> list[str]:
    """The options that name the source."""
    if kind == "compressed":
        return ["-f", "qcow2", str(path)]
    return ["--image-opts", f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"]


def _prepared(source: Path, folder: Path, kind: str, peer: Peer) -> tuple[Path, list[str]]:
    """The source as an image of this kind, made by the peer, and the options that open it."""
    path, secret = folder / f"{kind}.qcow2", folder / "secret"
    convert = [peer.qemu_img, "convert", "-f", "raw", "-O", "qcow2"]
    if kind == "compressed":
        if not path.exists():
            subprocess.run([*convert, "-c", source, path], check=True)
        return path, []
    secret.write_text("benchmark")
    options = ["--object", f"secret,id=s,file={secret}"]
    how = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100"
    for _ in range(60):  # it often cannot measure the speed of its key derivation, and gives up
        if path.exists():
            return path, options
        done = subprocess.run([*convert, *options, "-o", how, source, path], check=False, capture_output=True)
        if done.returncode:
            path.unlink(missing_ok=True)
    raise Failed("qemu-img makes no encrypted image")

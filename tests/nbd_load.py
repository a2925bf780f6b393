"""What the tests of a running NBD server share: disks worth serving, the server in a process of its own, and whether a server
gave back all that it took.
"""

from __future__ import annotations

import gc
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lamina
from lamina.bitmap import MemoryBitmap
from lamina.filters.delay import Delay
from lamina.image import Image
from lamina.limits import KIB, MIB, align_up
from lamina.nbd import Export, Server
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

from .nbd_raw import PATIENCE, dial

#: The size of the disks that `disks` gives, and of those that `fast` and `slow` give.
SIZE = 4 * MIB
DISK = 1 * MIB
#: What a server's threads are called.
_THREADS = ("nbd-accept", "nbd-answers", "nbd-client", "nbd-loop", "nbd-request")


class Disk(NamedTuple):
    """An image to serve, and the bytes that it holds."""

    image: Image
    content: bytes

    @property
    def minimum(self) -> int:
        return self.image.alignment

    def seen(self) -> bytes:
        """The bytes that clients see: padded to a multiple of the minimum block."""
        return self.content.ljust(align_up(len(self.content), self.minimum), b"\0")

    def now(self) -> bytes:
        """What the image holds now, padded likewise."""
        return self.image.read(0, self.image.size).ljust(len(self.seen()), b"\0")

    def extents(self) -> list[tuple[int, int, bool, bool, int]]:
        """(offset, length, hole, zero, depth) in multiples of the minimum block, straight from the image; depth counts from
        1, and is 0 where no layer has the bytes."""
        rounded = self.image.extents().align(self.minimum, len(self.seen()))
        return [(row.start, row.length, not row.data, row.zero, row.depth + 1 if row.present else 0) for row in rounded]


@contextmanager
def disks(folder: Path) -> Iterator[dict[str, Disk]]:
    """One disk of each kind, writable: "raw", "qcow2", "chain" (a qcow2 with 64 KiB clusters over one with 512 bytes over
    raw), "odd" (1000 bytes in blocks of 512)."""
    with ExitStack() as stack:
        found = {}
        for name, make in (("raw", _raw), ("qcow2", _qcow2), ("chain", _chain), ("odd", _odd)):
            image, content = make(folder)
            found[name] = Disk(stack.enter_context(image), content)
        yield found


def _raw(folder: Path) -> tuple[Image, bytes]:
    content = bytearray(SIZE)
    content[: 64 * KIB] = b"raw!" * (16 * KIB)
    content[MIB : MIB + 4 * KIB] = b"\x17" * (4 * KIB)
    path = folder / "disk.raw"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        file.write(content[: 64 * KIB])
        file.seek(MIB)
        file.write(content[MIB : MIB + 4 * KIB])
    return lamina.open(path, format="raw", read_only=False), bytes(content)


def _qcow2(folder: Path) -> tuple[Image, bytes]:
    path = folder / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE)
    image = lamina.open(path, format="qcow2", read_only=False)
    content = bytearray(SIZE)
    for offset, length in ((0, 100), (200 * KIB - 7, 64 * KIB), (3 * MIB + 512, 512)):
        _write(image, content, offset, b"q" * length)
    image.zero(2 * MIB, 256 * KIB)
    return image, bytes(content)


def _chain(folder: Path) -> tuple[Image, bytes]:
    base, middle, top = (folder / name for name in ("base.raw", "middle.qcow2", "top.qcow2"))
    content = bytearray(SIZE)
    content[: 256 * KIB] = b"base" * (64 * KIB)
    with open(base, "wb") as file:
        file.write(content[: 256 * KIB])
        file.truncate(SIZE)
    lamina.create(middle, "qcow2", SIZE, cluster_size=512, backing_file=base.name, backing_fmt="raw")
    with lamina.open(middle, format="qcow2", read_only=False) as image:
        for offset in range(512, 128 * KIB, 3 * 512):
            _write(image, content, offset, b"m" * 512)
        image.zero(192 * KIB + 512, 1024)
        content[192 * KIB + 512 : 192 * KIB + 1536] = bytes(1024)
        _write(image, content, 2 * MIB + 512, b"M" * 1536)
    lamina.create(top, "qcow2", SIZE, backing_file=middle.name, backing_fmt="qcow2")
    image = lamina.open(top, format="qcow2", read_only=False)
    _write(image, content, 64 * KIB, b"top." * (16 * KIB))
    _write(image, content, 3 * MIB, b"T")
    return image, bytes(content)


def _odd(folder: Path) -> tuple[Image, bytes]:
    path = folder / "odd"
    content = bytes(range(250)) * 4
    path.write_bytes(content)
    graph = {"driver": "blkdebug", "align": 512, "image": {"driver": "file", "filename": str(path)}}
    return lamina.open(graph, read_only=False), content


def _write(image: Image, content: bytearray, offset: int, data: bytes) -> None:
    image.write(offset, data)
    content[offset : offset + len(data)] = data


def exports_of(found: dict[str, Disk], *, writable: bool = True) -> list[Export]:
    """The disks as exports under their names, each with the bitmap "b0", in which the second 64 KiB are dirty."""
    bitmap = MemoryBitmap()
    bitmap.mark(64 * KIB, 64 * KIB)
    return [
        Export(disk.image, name, description=f"the {name} disk", writable=writable, bitmaps={"b0": bitmap})
        for name, disk in found.items()
    ]


# -- what a server takes


def server_threads() -> list[str]:
    """Names of the threads of all servers in this process."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(_THREADS)]


@contextmanager
def nothing_left(seconds: float = 20.0) -> Iterator[None]:
    """Fail if threads or descriptors of a server remain after the block, and some time to end."""
    gc.collect()
    before, threads = len(os.listdir("/proc/self/fd")), len(server_threads())
    yield
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        gc.collect()
        if len(server_threads()) <= threads and len(os.listdir("/proc/self/fd")) <= before:
            return
        time.sleep(0.01)
    after = len(os.listdir("/proc/self/fd"))
    raise AssertionError(f"left behind: threads {server_threads()}, and {after - before} more descriptors")


# -- servers in this process, with fast storage and with slow


class Gate:
    """The clock of a `delay` filter that stands still until `open` is set, and counts who waits."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.waiting = 0
        self.most = 0
        self._mutex = threading.Lock()

    def sleep(self, _: float) -> None:
        with self._mutex:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
        assert self.open.wait(PATIENCE)
        with self._mutex:
            self.waiting -= 1


def content(number: int = 0) -> bytes:
    return random.Random(number).randbytes(DISK)


def fast(name: str = "fast") -> Export:
    image = lamina.open({"driver": "memory", "size": DISK}, read_only=False)
    image.write(0, content())
    return Export(image, name, writable=True)


def slow(name: str, clock: Any, **milliseconds: int) -> Export:
    """The same content, behind a filter whose reads wait on `clock`."""
    storage = MemoryStorage(DISK)
    storage.write(0, memoryview(content()))
    waits = milliseconds or {"read_ms": 50}
    return Export(Image(Delay(Child(storage, "image"), clock=clock, **waits)), name, writable=True)


@contextmanager
def serving(where: Path, *exports: Export, **options: Any) -> Iterator[tuple[Server, Path]]:
    """A server on a Unix socket, that gave everything back in the end. By default a negotiation may take longer than the
    patience of every client: whoever is made to wait for one that dawdles fails."""
    path = where / "socket"
    options = {"handshake_time": 10 * PATIENCE, **options}
    with nothing_left(), ExitStack() as stack:
        for export in exports:
            stack.enter_context(export.image)
        yield stack.enter_context(Server(exports, unix=str(path), **options)), path


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for something that comes to pass in another thread."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def served_beside_others(path: Path) -> None:
    """A good client comes in, and reads, while the others do what they do: it does not wait for them."""
    with dial(path) as raw:
        raw.begin("fast", "structured")
        assert raw.read(4096, 64 * KIB) == content()[4096 : 68 * KIB]
        raw.disc()
        assert raw.ended()


# -- a server in a process of its own


class Process(NamedTuple):
    """A running `tests/nbd_serve.py`."""

    child: subprocess.Popen[str]
    socket: str

    def kill(self) -> None:
        """SIGKILL: it has no time for anything."""
        self.child.send_signal(signal.SIGKILL)
        self.child.wait(20)

    def end(self) -> dict[str, int]:
        """End it in good order; its counters, and "peak", the most memory that was resident, in bytes."""
        said, _ = self.child.communicate(timeout=30)
        assert self.child.returncode == 0
        found: dict[str, int] = json.loads(said)
        return found


@contextmanager
def served(socket: Path, *args: str, seconds: float = 30.0) -> Iterator[Process]:
    """`tests/nbd_serve.py` with these arguments, listening; killed in the end if it still runs."""
    command: Sequence[str] = [sys.executable, "-m", "tests.nbd_serve", str(socket), *args]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            assert child.stdout is not None
            assert select.select([child.stdout], [], [], seconds)[0], "the server does not start"
            assert child.stdout.readline() == "ready\n"
            yield Process(child, str(socket))
        finally:
            if child.poll() is None:
                child.kill()

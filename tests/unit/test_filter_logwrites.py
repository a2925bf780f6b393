"""The filter `logwrites`: its log is the one QEMU's blklogwrites writes, and replays to the same disk."""

from __future__ import annotations

import random
import shlex
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import BlockIOError, FormatError, OptionError
from lamina.filters.logwrites import LogWrites
from lamina.image import Image
from lamina.node import FUA, Node
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.persistence import crash_states
from lamina.testing.write_log import read_log, records, replay

MIB = 1 << 20


def over(node: Node, log: Path, **options: Any) -> LogWrites:
    """The filter over `node`, logging into the file `log`."""
    log.touch()
    spec = {"driver": "file", "filename": str(log)}
    from lamina.graph import Opener

    storage = Child(Opener(read_only=False).open(spec), "log", grows=True)
    return LogWrites(Child(node, "image", grows=True), storage, **options)


def spec(disk: Path, log: Path, **options: Any) -> dict[str, Any]:
    below = {"driver": "raw", "file": {"filename": str(disk)}}
    return {"driver": "logwrites", "image": below, "log": str(log), **options}


def shown(log: Path) -> list[tuple[Any, ...]]:
    return [(entry.kind, entry.offset, entry.length, entry.text) for entry in read_log(log)]


def test_the_bytes_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    node = over(MemoryStorage(MIB), log)
    with Image(node) as image:
        image.write(1024, b"a" * 1024)
        image.discard(4096, 512)
        node.mark("here")
        image.flush()
    raw = log.read_bytes()
    assert struct.unpack_from("<QQQI", raw) == (0x6A736677736872, 1, 4, 512)
    assert raw[512:1024] == struct.pack("<4Q", 2, 2, 0, 0).ljust(512, b"\0")
    assert raw[1024:2048] == b"a" * 1024
    assert raw[2048:2560] == struct.pack("<4Q", 8, 1, 4, 0).ljust(512, b"\0")
    assert raw[2560:3072] == (struct.pack("<4Q", 0, 0, 8, 4) + b"here").ljust(512, b"\0")
    assert raw[3072:] == struct.pack("<4Q", 0, 0, 1, 0).ljust(512, b"\0")


COMMANDS = [
    "write -P 65 0 64k",
    "write -P 66 100 1000",
    "flush",
    "write -z 8k 4k",
    "write -z -u 16k 12k",
    "discard 32k 8k",
    "write -P 67 1023k 1k",
    "flush",
    "write -P 68 511 2",
    "write -z 700k 300",
]


@pytest.mark.parametrize("sector", [512, 4096])
def test_the_log_is_the_one_that_qemu_writes(sector: int, qemu: Any, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder in (theirs, ours):
        folder.mkdir()
        (folder / "disk").write_bytes(bytes(MIB))
        (folder / "log").touch()
    options = (
        f"driver=blklogwrites,file.driver=file,file.filename={theirs / 'disk'},file.discard=unmap,"
        f"log.driver=file,log.filename={theirs / 'log'},log-sector-size={sector}"
    )
    qemu.io("--image-opts", options, *(word for command in COMMANDS for word in ("-c", command)))
    node = spec(ours / "disk", ours / "log", **{"log-sector-size": sector})
    with lamina.open(node, read_only=False) as image:
        for command in COMMANDS:
            name, *words = shlex.split(command)
            numbers = [parse(word) for word in words if not word.startswith("-")]
            if name == "flush":
                image.flush()
            elif name == "discard":
                image.discard(*numbers)
            elif "-z" in words:
                image.zero(*numbers, unmap="-u" in words)
            else:
                value, offset, length = numbers
                image.write(offset, bytes([value]) * length)
    # QEMU also flushes when nobody asked it to, before it closes; all else is the same, byte for byte.
    their_log, our_log = list(read_log(theirs / "log")), list(read_log(ours / "log"))
    assert [entry[1:] for entry in their_log if entry.kind != "flush"] == [
        entry[1:] for entry in our_log if entry.kind != "flush"
    ]
    assert [entry.kind for entry in our_log].count("flush") == 2
    disk = (ours / "disk").read_bytes()
    assert replay(our_log, bytes(MIB)) == replay(their_log, bytes(MIB)) == disk == (theirs / "disk").read_bytes()
    entry = struct.Struct("<4Q")
    first = our_log[0]
    for log in (ours / "log", theirs / "log"):
        raw = log.read_bytes()
        assert entry.unpack_from(raw, sector) == (0, 65536 // sector, 0, 0)
        assert raw[sector + entry.size : 2 * sector] == bytes(sector - entry.size)
        assert raw[2 * sector : 2 * sector + 65536] == first.data


def parse(word: str) -> int:
    return int(word.rstrip("k")) * (1024 if word.endswith("k") else 1)


def test_qemu_goes_on_with_our_log(qemu: Any, tmp_path: Path) -> None:
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.write_bytes(bytes(MIB))
    with lamina.open(spec(disk, log), read_only=False) as image:
        image.write(0, b"a" * 512)
        image.zero(4096, 8192)
        image.discard(0, 512)
        image.flush()
    options = (
        f"driver=blklogwrites,file.driver=file,file.filename={disk},log.driver=file,log.filename={log},log-append=on"
    )
    qemu.io("--image-opts", options, "-c", "write -P 98 64k 512", "-c", "flush")
    with lamina.open(spec(disk, log, **{"log-append": True}), read_only=False) as image:
        image.write(512, b"c" * 512)
    kinds = [(entry.kind, entry.offset) for entry in read_log(log) if entry.kind != "flush"]
    assert kinds == [("write", 0), ("write", 4096), ("discard", 0), ("write", 65536), ("write", 512)]


def test_a_replay_stops_at_a_mark_and_follows_sizes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    node = over(MemoryStorage(8192), log)
    with Image(node) as image:
        image.write(0, b"a" * 512)
        node.mark("one")
        image.write(0, b"b" * 512)
        image.truncate(4096)
        image.truncate(16384)
    entries = list(read_log(log))
    assert replay(entries, bytes(8192), until="one") == (b"a" * 512).ljust(8192, b"\0")
    assert replay(entries, bytes(8192)) == (b"b" * 512).ljust(16384, b"\0")
    assert [(entry.kind, entry.offset) for entry in entries][-2:] == [("resize", 4096), ("resize", 16384)]


def test_a_log_of_random_work_replays_to_the_disk(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    log = tmp_path / "log"
    size = 300_001
    node = over(MemoryStorage(size), log)
    with Image(node) as image:
        for _ in range(60):
            offset = rng.randrange(size)
            length = rng.randrange(min(size - offset, 5000) + 1)
            rng.choice(
                [
                    lambda at, n: image.write(at, rng.randbytes(n)),
                    lambda at, n: image.write(at, rng.randbytes(n), fua=True),
                    image.zero,
                    image.discard,
                ]
            )(offset, length)
        disk = image.read(0, size)
    assert replay(read_log(log), bytes(size))[:size] == disk


def test_the_order_of_threads_is_the_order_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    node = over(MemoryStorage(4096), log)
    with Image(node) as image:

        def work(value: int) -> None:
            for number in range(40):
                image.write((number * 7 + value) % 5 * 512, bytes([value]) * 1024)
                if number % 10 == 0:
                    image.flush()

        threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        disk = image.read(0, 4096)
    entries = list(read_log(log))
    assert replay(entries, bytes(4096)) == disk
    assert len(entries) == 4 * 44


class Held(MemoryStorage):
    """Its flush waits until it is told to return."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.inside, self.go = threading.Event(), threading.Event()

    def flush(self) -> None:
        self.inside.set()
        assert self.go.wait(10)


def test_what_returns_during_a_flush_is_logged_behind_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    below = Held(4096)
    with Image(over(below, log)) as image:
        image.write(0, b"a" * 512)
        flushing = threading.Thread(target=image.flush)
        flushing.start()
        assert below.inside.wait(10)
        writing = threading.Thread(target=image.write, args=(512, b"b" * 512))
        writing.start()
        # The range is held until the write is logged, so only the storage tells that it was written.
        byte = memoryview(bytearray(1))
        while not byte[0]:
            below.read_into(512, byte)
        below.go.set()
        flushing.join()
        writing.join()
    assert [kind for kind, *_ in shown(log)] == ["write", "flush", "write"]


class Failing(MemoryStorage):
    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        raise BlockIOError("no", errno=5, operation="write")

    def flush(self) -> None:
        raise BlockIOError("no", errno=5, operation="flush")


def test_what_fails_is_not_logged(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Image(over(Failing(4096), log)) as image:
        with pytest.raises(BlockIOError):
            image.write(0, b"a" * 512)
        with pytest.raises(BlockIOError):
            image.flush()
    assert shown(log) == []


def test_flags_and_intervals(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Image(over(MemoryStorage(4096), log, log_super_update_interval=2)) as image:
        image.root.write(0, memoryview(b"a" * 512), FUA)
        assert struct.unpack_from("<Q", log.read_bytes(), 16) == (0,)
        image.zero(512, 512, fua=True)
        assert struct.unpack_from("<Q", log.read_bytes(), 16) == (2,)
        image.write(1024, b"a")
        assert struct.unpack_from("<Q", log.read_bytes(), 16) == (2,)
    assert [entry.fua for entry in read_log(log)] == [True, True, False]


def test_a_large_zero_takes_no_room_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Image(over(MemoryStorage(1 << 30), log)) as image:
        image.zero(0, 1 << 30)
    assert log.stat().st_size == (1 << 30) + 1024
    assert log.stat().st_blocks * 512 < MIB


def test_a_reader_needs_no_log(tmp_path: Path) -> None:
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.write_bytes(b"x" * 512)
    with lamina.open(spec(disk, log)) as image:
        assert image.read(0, 512) == b"x" * 512
    assert not log.exists()


def test_options_that_cannot_be(tmp_path: Path) -> None:
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.write_bytes(bytes(512))
    with pytest.raises(OptionError, match="power of two"):
        lamina.open(spec(disk, log, **{"log-sector-size": 1000}), read_only=False)
    with pytest.raises(BlockIOError, match="cannot create the log"):
        lamina.open(spec(disk, tmp_path / "none" / "log"), read_only=False)
    node = over(MemoryStorage(512), log)
    with Image(node), pytest.raises(OptionError, match="481 bytes does not fit"):
        node.mark("x" * 481)


def test_appending_to_what_is_no_log(tmp_path: Path) -> None:
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.write_bytes(bytes(4096))
    log.write_bytes(b"something else, and long enough" * 100)
    with pytest.raises(FormatError, match="not a log of logwrites"):
        lamina.open(spec(disk, log, **{"log-append": True}), read_only=False)
    with lamina.open(spec(disk, log), read_only=False) as image:
        image.write(0, b"a" * 4096)
    with pytest.raises(FormatError, match="the log is 512 bytes, not 4096"):
        lamina.open(spec(disk, log, **{"log-append": True, "log-sector-size": 4096}), read_only=False)
    log.write_bytes(log.read_bytes()[:1024])
    with pytest.raises(FormatError, match="entry 0"):
        lamina.open(spec(disk, log, **{"log-append": True}), read_only=False)


@pytest.mark.parametrize("cut", [0, 20, 100, 600, 1030])
def test_a_log_that_ends_early(cut: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Image(over(MemoryStorage(4096), log)) as image:
        image.write(0, b"a" * 1024)
    log.write_bytes(log.read_bytes()[:cut])
    with pytest.raises(FormatError):
        list(read_log(log))


def test_a_log_feeds_the_power_loss_harness(tmp_path: Path) -> None:
    log = tmp_path / "log"
    node = over(MemoryStorage(1024), log)
    with Image(node) as image:
        image.write(0, b"a" * 512)
        image.flush()
        node.mark("flushed")
        image.write(512, b"b" * 512)
    found = {(state.content, state.begun) for state in crash_states(bytes(1024), list(records(read_log(log))))}
    a, b, zero = b"a" * 512, b"b" * 512, bytes(512)
    assert found == {(zero + zero, ()), (a + zero, ()), (a + b, ("flushed",))}

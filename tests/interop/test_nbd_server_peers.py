"""Our NBD server and QEMU's clients, old and new, fio and nbd-client: what they see is what the image holds."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.limits import KIB, MIB
from lamina.nbd import Server
from tests.conftest import NbdTools, Qemu
from tests.nbd_load import SIZE, Disk, disks, exports_of, nothing_left

DISKS = ("raw", "qcow2", "chain", "odd")
TRANSPORTS = ("unix", "tcp")


class ServedDisks:
    """A server with all disks, on a Unix socket and a port of the loopback interface."""

    def __init__(self, server: Server, found: dict[str, Disk]) -> None:
        self.server = server
        self.disks = found

    def uri(self, name: str, transport: str = "unix") -> str:
        unix, tcp = self.server.uris[:2]
        place = unix if transport == "unix" else tcp
        first, _, rest = place.rpartition("/raw")
        return f"{first}/{name}{rest}"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDisks]:
    with (
        nothing_left(),
        disks(tmp_path) as found,
        Server(exports_of(found), unix=str(tmp_path / "socket"), host="127.0.0.1", port=0) as server,
    ):
        yield ServedDisks(server, found)


def pattern(length: int, seed: int) -> bytes:
    """Random bytes with zeros between them, in stretches of 4 KiB."""
    source = random.Random(seed)
    return b"".join(
        source.randbytes(4 * KIB) if source.random() < 0.5 else bytes(4 * KIB) for _ in range(length // 4096)
    )


def status_rows(disk: Disk) -> list[tuple[int, int, bool, bool]]:
    """(offset, length, data, zero) as a client sees them, neighbours with the same status made one."""
    rows: list[tuple[int, int, bool, bool]] = []
    for offset, length, hole, zero, _ in disk.extents():
        if rows and rows[-1][2:] == (not hole, zero):
            rows[-1] = (rows[-1][0], rows[-1][1] + length, not hole, zero)
        else:
            rows.append((offset, length, not hole, zero))
        assert not zero or not any(disk.seen()[offset : offset + length])
    return rows


# -- QEMU


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", DISKS)
def test_qemu_reads_all_that_is_there(
    served: ServedDisks, qemu: Qemu, name: str, transport: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lamina.nbd")
    disk, uri = served.disks[name], served.uri(name, transport)
    details = json.loads(qemu.img("info", "--output=json", uri).stdout)
    assert details["virtual-size"] == len(disk.seen())
    rows = qemu.map(uri, "raw")
    assert [(row["start"], row["length"], row["data"], row["zero"]) for row in rows] == status_rows(disk)
    copy = tmp_path / "copy"
    qemu.img("convert", "-f", "raw", "-O", "raw", uri, copy)
    assert copy.read_bytes() == disk.seen()
    assert qemu.img("compare", "-f", "raw", "-F", "raw", uri, copy).stdout.strip() == "Images are identical."
    with open(copy, "r+b") as file:
        file.seek(len(disk.seen()) - 1)
        file.write(b"\xff")
    assert qemu.img("compare", "-f", "raw", "-F", "raw", uri, copy, check=False).returncode == 1
    manner = "extended headers" if qemu.version >= (8, 2) else "structured replies"
    opened = [record.getMessage() for record in caplog.records if " opened " in record.getMessage()]
    assert len(opened) == 5
    assert all(f"opened {name!r} ({manner})" in line for line in opened)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", DISKS)
def test_qemu_writes_a_whole_image(served: ServedDisks, qemu: Qemu, name: str, transport: str, tmp_path: Path) -> None:
    disk, uri = served.disks[name], served.uri(name, transport)
    content = pattern(SIZE, 1) if name != "odd" else pattern(4096, 1)[:1000] + bytes(24)
    source = tmp_path / "source"
    source.write_bytes(content)
    qemu.img("convert", "-n", "-f", "raw", "-O", "raw", source, uri)
    assert disk.now() == content
    assert "identical" in qemu.img("compare", "-f", "raw", "-F", "raw", source, uri).stdout


@pytest.mark.parametrize("name", ["raw", "qcow2", "chain"])
def test_qemu_io(served: ServedDisks, qemu: Qemu, name: str) -> None:
    """Patterns at any offset, zeros with and without room kept, discard, flush and FUA."""
    disk = served.disks[name]
    commands = [
        "write -P 0x41 1000 70000",
        "write -f -P 0x42 130k 3k",
        "write -z 64k 512",
        "write -z -u 256k 256k",
        "aio_write -P 0x43 1M 1M",
        "aio_write -P 0x44 2M 64k",
        "aio_flush",
        "discard 1536k 64k",
        "flush",
        "read -P 0x41 1000 64536",
        "read -P 0 64k 512",
        "read -P 0x41 66048 4952",
        "read -P 0x42 130k 3k",
        "read -P 0 256k 256k",
        "read -P 0x43 1M 512k",
        "readv -P 0x44 2M 1k 31k 32k",
    ]
    done = qemu.io("-f", "raw", served.uri(name), *(word for command in commands for word in ("-c", command)))
    assert "verification failed" not in done.stdout, done.stdout
    content = bytearray(disk.content)
    for offset, data in (
        (1000, b"\x41" * 70000),
        (130 * KIB, b"\x42" * 3 * KIB),
        (64 * KIB, bytes(512)),
        (256 * KIB, bytes(256 * KIB)),
        (MIB, b"\x43" * MIB),
        (2 * MIB, b"\x44" * 64 * KIB),
    ):
        content[offset : offset + len(data)] = data
    now = disk.now()
    # What was discarded may read as anything of this image's own; the rest is known.
    assert now[: 1536 * KIB] == content[: 1536 * KIB]
    assert now[1600 * KIB :] == content[1600 * KIB :]
    stats = served.server.stats()
    assert stats["FLUSH"] >= 2
    assert stats["TRIM"] >= 1
    assert stats["WRITE_ZEROES"] >= 2
    assert not stats["failed"]


def test_qemu_writes_blocks_over_an_odd_end(served: ServedDisks, qemu: Qemu) -> None:
    """The padding takes zeros, and what is not zero is refused: nothing is lost without a word."""
    disk, uri = served.disks["odd"], served.uri("odd")
    qemu.io("-f", "raw", "-c", "write -P 0x55 0 512", "-c", "write -z 512 512", "-c", "flush", uri)
    assert disk.now() == b"\x55" * 512 + bytes(512)
    refused = qemu.io("-f", "raw", "-c", "write -P 0x66 512 512", uri, check=False)
    assert "No space left" in refused.stdout + refused.stderr
    assert disk.now() == b"\x55" * 512 + bytes(512)


def test_qemu_sees_depth_and_dirty_bitmap(served: ServedDisks, qemu: Qemu) -> None:
    """Through the option of QEMU's client that shows a context's first bit as `data` (1 is shown as false)."""
    target = {"driver": "nbd", "export": "raw", "server.type": "unix", "server.path": served.server.uri.split("=")[-1]}
    words = ",".join(f"{key}={value}" for key, value in target.items())
    rows = qemu.map(f"{words},x-dirty-bitmap=qemu:dirty-bitmap:b0", None)
    assert [(row["start"], row["length"]) for row in rows if not row["data"]] == [(64 * KIB, 64 * KIB)]
    # Depth 1 everywhere: there is one layer.
    rows = qemu.map(f"{words},x-dirty-bitmap=qemu:allocation-depth", None)
    assert [(row["start"], row["length"], row["data"]) for row in rows] == [(0, SIZE, False)]


def test_what_one_qemu_writes_the_other_reads(served: ServedDisks, qemu7: Qemu, qemu10: Qemu) -> None:
    uri = served.uri("chain")
    for value, writer, reader in ((0x31, qemu7, qemu10), (0x32, qemu10, qemu7)):
        writer.io("-f", "raw", "-c", f"write -P {value} 100k 200k", "-c", "flush", uri)
        done = reader.io("-f", "raw", "-r", "-c", f"read -P {value} 100k 200k", uri)
        assert "verification failed" not in done.stdout


def test_read_only_is_told_and_held(tmp_path: Path, qemu: Qemu) -> None:
    with disks(tmp_path) as found, Server(exports_of(found, writable=False), unix=str(tmp_path / "s")) as server:
        refused = qemu.io("-f", "raw", "-c", "write 0 512", server.uri, check=False)
        assert refused.returncode
        assert any(word in refused.stderr.lower() for word in ("read-only", "permission denied"))
        qemu.io("-f", "raw", "-r", "-c", "read -P 0x72 0 1", server.uri)
        assert found["raw"].now() == found["raw"].content


# -- fio


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", ["raw", "qcow2", "chain"])
def test_fio_verifies_what_it_wrote(
    served: ServedDisks, nbd_tools: NbdTools, name: str, transport: str, tmp_path: Path
) -> None:
    """Random writes of mixed sizes, 16 in flight, each block with a checksum: every one is found again."""
    words: dict[str, Any] = {
        "name": "verify",
        "ioengine": "nbd",
        "uri": served.uri(name, transport),
        "rw": "randwrite",
        "bsrange": "512-64k",
        "bs_unaligned": 0,
        "iodepth": 16,
        "size": "4m",
        "verify": "crc32c",
        "verify_fatal": 1,
        "do_verify": 1,
        "fsync": 32,
        "output-format": "json",
        "aux-path": tmp_path,
        "verify_state_save": 0,
    }
    done = nbd_tools.run("fio", *(f"--{key}={value}" for key, value in words.items()))
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["write"]["io_bytes"] == SIZE
    assert job["read"]["io_bytes"] == SIZE
    stats = served.server.stats()
    assert stats["bytes_written"] == SIZE
    assert not stats["failed"]


def test_fio_four_jobs_of_one_image(served: ServedDisks, nbd_tools: NbdTools, tmp_path: Path) -> None:
    """Four connections, each with a quarter of the disk: nothing of one shows up in another's."""
    common = f"""[global]
ioengine=nbd
uri={served.uri("qcow2")}
rw=randwrite
bs=4k
iodepth=8
size=1m
offset_increment=1m
verify=crc32c
verify_fatal=1
verify_state_save=0
[quarters]
numjobs=4
"""
    job = tmp_path / "job"
    job.write_text(common)
    done = nbd_tools.run("fio", "--output-format=json", f"--aux-path={tmp_path}", str(job))
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert [one["error"] for one in report["jobs"]] == [0] * 4
    assert served.server.stats()["bytes_written"] == SIZE


# -- nbd-client


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nbd_client_lists_the_exports(served: ServedDisks, nbd_tools: NbdTools, transport: str) -> None:
    unix, tcp = served.server.uris[:2]
    port = tcp.rpartition("/")[0].rpartition(":")[2]
    where = ["-unix", unix.split("=")[-1]] if transport == "unix" else ["127.0.0.1", port]
    listed = nbd_tools.run("nbd-client", "-l", *where).stdout
    assert listed.splitlines()[-4:] == [f"{name}: the {name} disk" for name in DISKS]

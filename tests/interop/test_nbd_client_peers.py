"""The client against the servers that people run: qemu-nbd (both versions), nbdkit, nbd-server; plain and under TLS."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lamina
from lamina.errors import BlockIOError, LaminaError, NotFound, ReadOnly
from lamina.nbd.client import Client
from lamina.nbd.inspect import inspect, list_exports

from ..certificates import write_certificates
from ..conftest import Qemu
from ..nbd_peers import program, running

SIZE = 3 << 20
HOLE = slice(1 << 20, 2 << 20)
Run = Callable[..., None]


@pytest.fixture
def run() -> Iterator[Run]:
    """Start a server, and wait until it listens; all are ended after the test."""
    with contextlib.ExitStack() as stack:

        def start(*command: str | os.PathLike[str], ready: Path | int) -> None:
            stack.enter_context(running(command, ready))

        yield start


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file of 3 MiB, the middle of which is a hole."""
    path = tmp_path / "disk.img"
    rng = random.Random(3)
    with path.open("wb") as file:
        file.write(rng.randbytes(HOLE.start))
        file.seek(HOLE.stop)
        file.write(rng.randbytes(SIZE - HOLE.stop))
    return path


@pytest.fixture
def at(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def uri(at: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={at}"


def qemu_nbd(qemu: Qemu) -> Path:
    return Path(qemu.peer.qemu_img).with_name("qemu-nbd")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def exercise(client: Client, content: bytearray, *, plain: bool = False) -> None:
    """Reads of all sizes, pipelined, and, where that is allowed, changes, on a disk that holds `content`. `plain`: of these
    only writes."""
    assert client.size == len(content)
    assert client.read(0, client.size) == content
    rng = random.Random(5)
    views = []
    for _ in range(100):
        offset = rng.randrange(len(content))
        view = bytearray(rng.randrange(1, min(70_000, len(content) - offset) + 1))
        views.append((offset, view, client.start_read(offset, view)))
    for offset, view, pending in views:
        pending.wait()
        assert view == content[offset : offset + len(view)]
    if client.read_only:
        with pytest.raises(ReadOnly):
            client.write(0, b"x" * 512)
        return
    writes = []
    for number in range(40):
        # A block each, so that their order does not matter.
        offset, data = number * 65536 % (len(content) - 65536), bytes([number + 1]) * 4096
        content[offset : offset + 4096] = data
        writes.append(client.start_write(offset, data, fua=client.can_fua and not plain and number % 2 == 0))
    for pending in writes:
        pending.wait()
    if client.can_zero and not plain:
        client.zero(4096, 8192)
        client.zero(65536, 4096, no_hole=True)
        content[4096:12288], content[65536:69632] = bytes(8192), bytes(4096)
    if client.can_trim and not plain:
        client.trim(HOLE.start + 131072, 4096)
    if not plain:
        client.flush()
    keep = HOLE.start + 131072
    assert client.read(0, keep) == content[:keep]


@pytest.mark.parametrize("structured", [True, False])
def test_qemu_nbd(qemu: Qemu, run: Run, disk: Path, at: Path, structured: bool) -> None:
    run(qemu_nbd(qemu), "-f", "raw", "-t", "-e", "8", "-k", at, "-x", "disk", "-D", "a disk", disk, ready=at)
    new = qemu.version >= (8, 2)
    with Client.connect(uri(at, "disk"), structured=structured, extended=structured, connections=4) as client:
        assert client.mode == ("simple" if not structured else "extended" if new else "structured")
        assert client.connections == 4
        if structured:
            status = client.block_status(0, SIZE)["base:allocation"]
            assert status == [(1 << 20, 0), (1 << 20, 3), (1 << 20, 0)]
        exercise(client, bytearray(disk.read_bytes()))
        assert (client.description, client.handshake) == ("a disk", "newstyle-fixed")
        with pytest.raises(LaminaError):
            Client.connect(uri(at, "other"))
    assert list_exports(uri(at)) == [("disk", "a disk")]
    (found,) = inspect(uri(at), exports=True, content=True)
    assert found.details is not None
    assert found.details.available == ("base:allocation",)
    assert found.as_dict()["export-size"] == SIZE
    with pytest.raises(NotFound, match='no export "nope"'):
        Client.connect(uri(at, "nope"))


def test_qemu_nbd_bitmaps_and_depth(qemu: Qemu, run: Run, tmp_path: Path, at: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu.img("create", "-f", "qcow2", image, "1M")
    qemu.img("bitmap", "--add", image, "b0")
    qemu.io("-c", "write 64k 64k", image)
    run(qemu_nbd(qemu), "-f", "qcow2", "-r", "-t", "-A", "-B", "b0", "-k", at, image, ready=at)
    wanted = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"]
    with Client.connect(uri(at), contexts=wanted) as client:
        assert list(client.contexts) == wanted
        found = client.block_status(0, 1 << 20)
        assert found["base:allocation"][0] == (65536, 3)
        assert found["qemu:allocation-depth"] == [(65536, 0), (65536, 1), (917504, 0)]
        assert found["qemu:dirty-bitmap:b0"] == [(65536, 0), (65536, 1), (917504, 0)]
        # Where the server has a filter for that, it is used; the answer is the same.
        assert client.can_status_payload == (qemu.version >= (8, 2))
        only = client.block_status(65536, 4096, contexts=wanted[2:])
        assert only == {"qemu:dirty-bitmap:b0": [(4096, 1)]}


def test_qemu_nbd_goes_and_comes_back(qemu: Qemu, run: Run, disk: Path, at: Path) -> None:
    command = [str(qemu_nbd(qemu)), "-f", "raw", "-t", "-k", str(at), str(disk)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        with Client.connect(uri(at), open_timeout=20, reconnect=20) as client:
            client.write(0, b"before" * 100)
            client.flush()
            first.kill()
            first.wait()
            at.unlink()
            pending = client.start_read(0, view := bytearray(600))
            run(*command, ready=at)
            pending.wait()
            assert view == b"before" * 100
    finally:
        first.kill()
        first.wait()


NBDKIT = {
    "as it is": ((), (), "newstyle-fixed", "structured"),
    "no structured replies": (("--no-sr",), (), "newstyle-fixed", "simple"),
    "oldstyle": (("-o",), (), "oldstyle", "simple"),
    "newstyle that is not fixed": (("--mask-handshake=0",), (), "newstyle", "simple"),
    "newstyle with zeros": (("--mask-handshake=1",), (), "newstyle-fixed", "structured"),
    "delays": (("--filter=delay",), ("delay-read=5ms",), "newstyle-fixed", "structured"),
    "blocks of 512": (
        ("--filter=blocksize-policy",),
        ("blocksize-minimum=512", "blocksize-error-policy=error"),
        "newstyle-fixed",
        "structured",
    ),
}


@pytest.mark.parametrize("case", NBDKIT)
def test_nbdkit_file(run: Run, disk: Path, at: Path, case: str) -> None:
    before, after, handshake, mode = NBDKIT[case]
    run(program("nbdkit"), "-f", "-U", at, *before, "file", disk, *after, ready=at)
    with Client.connect(uri(at), connections=2, request_timeout=20) as client:
        assert (client.handshake, client.mode) == (handshake, mode)
        if client.contexts:
            status = client.block_status(0, SIZE)["base:allocation"]
            assert sum(size for size, _ in status) <= SIZE
        # nbdkit 1.32 announces FUA, FLUSH, TRIM and WRITE_ZEROES over oldstyle, and refuses them.
        exercise(client, bytearray(disk.read_bytes()), plain=case == "oldstyle")
    (found,) = inspect(uri(at))
    assert found.details is not None
    assert (found.details.size, found.details.handshake) == (SIZE, handshake)


def test_nbdkit_memory_under_the_image(run: Run, at: Path) -> None:
    run(program("nbdkit"), "-f", "-U", at, "memory", "16G", ready=at)
    with lamina.open(uri(at), format="raw", read_only=False) as image:
        assert image.size == 16 << 30
        assert [row.zero for row in image.extents()] == [True]
        image.write((8 << 30) - 5, b"0123456789")
        image.flush()
        assert image.read((8 << 30) - 6, 12) == b"\x000123456789\x00"
        assert [row.data for row in image.extents()] == [False, True, False]
        image.zero(0, 16 << 30)
        assert image.read((8 << 30) - 6, 12) == bytes(12)


def test_nbdkit_errors(run: Run, disk: Path, at: Path) -> None:
    options = ("error-pread=ENOSPC", "error-pread-rate=50%")
    run(program("nbdkit"), "-f", "-U", at, "--filter=error", "file", disk, *options, ready=at)
    content = disk.read_bytes()
    failed = 0
    with Client.connect(uri(at)) as client:
        for number in range(64):
            try:
                assert client.read(number * 512, 512) == content[number * 512 : number * 512 + 512]
            except BlockIOError as error:
                failed += 1
                found = error.errno
        assert 5 < failed < 60
        assert found == errno.ENOSPC


def test_nbdkit_errors_of_writes(run: Run, disk: Path, at: Path) -> None:
    """A write that failed says so, with the server's error; the others, and the connection, are not harmed."""
    options = ("error-pwrite=ENOSPC", "error-pwrite-rate=50%")
    run(program("nbdkit"), "-f", "-U", at, "--filter=error", "file", disk, *options, ready=at)
    content = bytearray(disk.read_bytes())
    with Client.connect(uri(at)) as client:
        blocks = [bytes([number + 1]) * 4096 for number in range(64)]
        pending = [client.start_write(number * 4096, block) for number, block in enumerate(blocks)]
        failed = 0
        for number, one in enumerate(pending):
            try:
                one.wait()
                content[number * 4096 : number * 4096 + 4096] = blocks[number]
            except BlockIOError as error:
                failed += 1
                found = error.errno
        assert found == errno.ENOSPC
        assert 5 < failed < 60
        assert client.read(0, SIZE) == content
    # A long write fails if one of its twelve pieces fails: that four succeed, once in 2**48 runs.
    with lamina.open(uri(at), format="raw", read_only=False) as image, pytest.raises(BlockIOError, match="No space"):
        _ = [image.write(0, bytes(SIZE)) for _ in range(4)]


def test_nbdkit_takes_only_so_much(run: Run, disk: Path, at: Path) -> None:
    """Requests are never longer than a server takes, though it refuses those that are."""
    policy = ("blocksize-minimum=512", "blocksize-maximum=65536", "blocksize-error-policy=error")
    run(program("nbdkit"), "-f", "-U", at, "--filter=blocksize-policy", "file", disk, *policy, ready=at)
    with Client.connect(uri(at)) as client:
        assert (client.max_transfer, client.details.maximum_told) == (65536, 65536)
        pattern = bytes(range(256)) * (SIZE // 256)
        client.write(0, pattern)
        assert client.read(0, SIZE) == pattern
        view = bytearray(SIZE - 513)
        client.start_read(513, view).wait()
        assert view == pattern[513:]
    with lamina.open(uri(at), format="raw", read_only=False) as image:
        image.write(100, b"z" * 600_000)
        assert image.read(0, SIZE) == pattern[:100] + b"z" * 600_000 + pattern[600_100:]


def test_nbdkit_refuses_the_tail_and_says_so(run: Run, tmp_path: Path, at: Path) -> None:
    """A size of 1000 with blocks of 512, where qemu-img 7.2 aborts: usable to the last byte where the server lets one."""
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(range(250)) * 4)
    for policy in ("allow", "error"):
        at = tmp_path / policy
        options = ("blocksize-minimum=512", f"blocksize-error-policy={policy}")
        run(program("nbdkit"), "-f", "-U", at, "--filter=blocksize-policy", "file", path, *options, ready=at)
        with Client.connect(uri(at)) as client:
            assert (client.size, client.minimum) == (1000, 512)
            assert client.read(3, 500) == path.read_bytes()[3:503]
            if policy == "allow":
                assert client.read(999, 1) == path.read_bytes()[999:]
            else:
                with pytest.raises(BlockIOError) as raised:
                    client.read(999, 1)
                assert raised.value.errno == errno.EINVAL
        with lamina.open(uri(at), format="raw", read_only=policy == "error") as image:
            assert image.size == 1000
            assert image.extents().end == 1000
            if policy == "allow":
                image.write(998, b"zz")
                image.flush()
                assert path.read_bytes()[-3:] == bytes([247]) + b"zz"


def test_nbdkit_names_what_is_there(run: Run, tmp_path: Path, at: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(name.encode() * 512)
    run(program("nbdkit"), "-f", "-r", "-U", at, "file", f"dir={tmp_path / 'files'}", ready=at)
    assert sorted(list_exports(uri(at))) == [("one", ""), ("two", "")]
    assert sorted(each.name for each in inspect(uri(at), exports=True)) == ["one", "two"]
    with Client.connect(uri(at, "two")) as client:
        assert client.read(0, 3) == b"two"
        assert client.read_only
    with pytest.raises(LaminaError):
        Client.connect(uri(at, "three"))
    with pytest.raises(ReadOnly, match="exports this read-only"):
        lamina.open(uri(at, "one"), format="raw", read_only=False)


def test_nbd_server(run: Run, disk: Path, tmp_path: Path) -> None:
    def started() -> str:
        port = free_port()
        config = tmp_path / f"config{port}"
        config.write_text(
            f"[generic]\nlistenaddr=127.0.0.1\nport={port}\nallowlist=true\n"
            f"[disk]\nexportname={disk}\nflush=true\nfua=true\ntrim=true\n"
            f"[fixed]\nexportname={disk}\nreadonly=true\n"
        )
        # With -d it stays in the foreground, takes one client, and ends.
        run(program("nbd-server"), "-d", "-C", config, ready=port)
        return f"nbd://127.0.0.1:{port}/"

    with Client.connect(started() + "disk") as client:
        assert client.handshake == "newstyle-fixed"
        exercise(client, bytearray(disk.read_bytes()))
    with Client.connect(started() + "fixed") as client:
        assert (client.mode, client.contexts, client.read_only) == ("simple", {}, True)
        exercise(client, bytearray(disk.read_bytes()))
    assert list_exports(started()) == [("disk", ""), ("fixed", "")]
    with pytest.raises(LaminaError) as raised:
        Client.connect(started() + "none")
    assert raised.value.errno != errno.ECONNREFUSED


@pytest.mark.parametrize("server", ["qemu7", "qemu10", "nbdkit"])
def test_tls(request: pytest.FixtureRequest, run: Run, disk: Path, tmp_path: Path, server: str) -> None:
    folder, other = write_certificates(tmp_path / "pki"), write_certificates(tmp_path / "other")
    port = free_port()
    if server == "nbdkit":
        tls = ("--tls=require", f"--tls-certificates={folder}", "--tls-verify-peer")
        run(program("nbdkit"), "-f", "-i", "127.0.0.1", "-p", str(port), *tls, "file", disk, ready=port)
    else:
        qemu = request.getfixturevalue(server)
        creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={folder},verify-peer=on"
        where = ("-b", "127.0.0.1", "-p", str(port), "--object", creds, "--tls-creds", "tls0")
        run(qemu_nbd(qemu), "-f", "raw", "-t", "-e", "4", *where, disk, ready=port)
    place = f"127.0.0.1:{port}/?tls-certificates="
    with Client.connect(f"nbds://{place}{folder}") as client:
        assert client.tls
        exercise(client, bytearray(disk.read_bytes()))
    with Client.connect(f"nbd://{place}{folder}") as client:
        assert client.tls, "it is allowed, and the server demands it"
    with pytest.raises(LaminaError, match="authority"):
        Client.connect(f"nbds://{place}{other}")
    with pytest.raises(LaminaError):
        Client.connect(f"nbds://{place}{folder}&tls-hostname=elsewhere.example")
    with pytest.raises(LaminaError, match="demands TLS"):
        Client.connect(f"nbd://127.0.0.1:{port}/")


def test_tls_is_not_done_without(run: Run, disk: Path, tmp_path: Path, at: Path) -> None:
    """CVE-2019-14842: a server that refuses TLS, or is too old for it, gets nothing said in the clear."""
    folder = write_certificates(tmp_path / "pki")
    for number, style in enumerate(((), ("-o",), ("--mask-handshake=0",))):
        at = tmp_path / f"socket{number}"
        run(program("nbdkit"), "-f", "-U", at, *style, "file", disk, ready=at)
        query = f"tls-certificates={folder}&tls-hostname=localhost&socket={at}"
        with pytest.raises(BlockIOError, match="TLS is required") as raised:
            Client.connect(f"nbds+unix:///?{query}")
        assert raised.value.errno == errno.EPERM
        with Client.connect(f"nbd+unix:///?{query}") as client:
            assert not client.tls

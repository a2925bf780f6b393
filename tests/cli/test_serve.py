"""`lamina serve` as a process: when it is ready, whom it serves, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.bitmap import MemoryBitmap
from lamina.cli.main import main
from lamina.filters.nozero import NoZero
from lamina.image import Image
from lamina.nbd import Client, Export, Server, wire
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from tests.certificates import write_certificates
from tests.conftest import Qemu

DATA = bytes(range(256)) * 4096

Serve = Callable[..., tuple[subprocess.Popen[str], dict[str, Any]]]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts `lamina serve` in the folder of the test; gives the process and what it said when it was ready."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.raw").write_bytes(DATA)
    started: list[subprocess.Popen[str]] = []

    def start(*args: str, **settings: Any) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        command = [sys.executable, "-m", "lamina", "serve", "--output=json", *args]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)
        started.append(process)
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        return process, json.loads(line)

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=10)


def ended(process: subprocess.Popen[str]) -> int:
    return process.wait(timeout=10)


def handshake(path: str) -> socket.socket:
    """A raw client, in transmission on the default export (EXPORT_NAME, simple replies)."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(path)
    assert len(sock.recv(18, socket.MSG_WAITALL)) == 18
    sock.sendall(wire.CLIENT_FLAGS.pack(flags=wire.FLAG_C_FIXED_NEWSTYLE | wire.FLAG_C_NO_ZEROES))
    sock.sendall(wire.OPTION.pack(option=wire.OPT_EXPORT_NAME, length=0))
    assert len(sock.recv(10, socket.MSG_WAITALL)) == 10
    return sock


def test_it_says_where_it_is_and_ends_with_its_last_client(serve: Serve, qemu: Qemu) -> None:
    process, ready = serve("-k", "s", "-f", "raw", "-D", "a disk", "disk.raw")
    assert ready == {
        "uri": "nbd+unix:///?socket=s",
        "uris": ["nbd+unix:///?socket=s"],
        "pid": process.pid,
        "exports": [{"name": "", "size": len(DATA), "read-only": True, "description": "a disk"}],
    }
    assert stat.S_IMODE(os.stat("s").st_mode) == 0o600
    qemu.img("compare", "-f", "raw", "-F", "raw", ready["uri"], "disk.raw")
    assert ended(process) == 0
    assert not os.path.exists("s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(serve: Serve, number: signal.Signals) -> None:
    process, _ = serve("-t", "-w", "-k", "s", "-f", "raw", "--stats", "counters", "disk.raw")
    with handshake("s") as sock:
        request = wire.REQUEST.pack(flags=0, type=wire.CMD_WRITE, cookie=7, offset=4096, length=512)
        sock.sendall(request + b"x" * 512)
        assert wire.SIMPLE_REPLY.unpack(sock.recv(16, socket.MSG_WAITALL))[1:] == (0, 7)
        process.send_signal(number)
        assert sock.recv(1) == b""
    assert ended(process) == 0
    assert not os.path.exists("s")
    assert Path("disk.raw").read_bytes()[4096:4608] == b"x" * 512
    counters = json.loads(Path("counters").read_text())
    assert counters["WRITE"] == 1
    assert counters["bytes_written"] == 512
    assert counters["connections"] == 1


def test_it_is_read_only_unless_told_otherwise(serve: Serve, qemu: Qemu) -> None:
    first, ready = serve("-t", "-k", "s", "-f", "raw", "disk.raw")
    failed = qemu.io("-f", "raw", "-c", "write 0 512", ready["uri"], check=False)
    assert failed.returncode != 0
    assert Path("disk.raw").read_bytes() == DATA
    first.terminate()
    assert ended(first) == 0
    _, ready = serve("-t", "-w", "-k", "w", "-f", "raw", "disk.raw")
    qemu.io("-f", "raw", "-c", "write -P 1 0 512", "-c", "flush", ready["uri"])
    assert Path("disk.raw").read_bytes() == b"\1" * 512 + DATA[512:]


def test_a_snapshot_is_forgotten(serve: Serve, qemu: Qemu) -> None:
    process, ready = serve("-s", "-k", "s", "-f", "raw", "disk.raw")
    qemu.io("-f", "raw", "-c", "write -P 1 0 512", "-c", "read -P 1 0 512", ready["uri"])
    assert ended(process) == 0
    assert Path("disk.raw").read_bytes() == DATA


def test_an_internal_snapshot_is_served_for_reading(serve: Serve, qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 1 << 20)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"\1" * 4096)
        image.create_snapshot("first")
        image.write(0, b"\2" * 4096)
    _, ready = serve("-k", "s", "-f", "qcow2", "-l", "first", str(path))
    qemu.io("-r", "-f", "raw", "-c", "read -P 1 0 4096", ready["uri"])
    assert qemu.io("-f", "raw", "-c", "write 0 512", ready["uri"], check=False).returncode
    _, ready = serve("-t", "-k", "now", "-f", "qcow2", str(path))
    qemu.io("-r", "-f", "raw", "-c", "read -P 2 0 4096", ready["uri"])


def test_several_exports(serve: Serve, qemu: Qemu) -> None:
    lamina.create("two.qcow2", "qcow2", size=1 << 20)
    Path("copy.raw").write_bytes(DATA)  # two opens of one file, one for writing, exclude each other
    Path("copy.qcow2").write_bytes(Path("two.qcow2").read_bytes())
    options = "name=part,file=copy.raw,format=raw,offset=4k,size=8k,description=a part,writable=on"
    _, ready = serve(
        "-t",
        "-k",
        "s",
        "disk.raw",
        "two.qcow2",
        "--export",
        options,
        "-f",
        "raw",
        "--export",
        "file=copy.qcow2,name=2,format=qcow2",
    )
    assert [(one["name"], one["size"], one["read-only"]) for one in ready["exports"]] == [
        ("disk.raw", len(DATA), True),
        ("two.qcow2", os.path.getsize("two.qcow2"), True),  # raw, as -f says
        ("part", 8192, False),
        ("2", 1 << 20, True),
    ]
    there = json.loads(qemu.img("info", "--output=json", "-f", "raw", "nbd+unix:///part?socket=s").stdout)
    assert there["virtual-size"] == 8192
    qemu.img("dd", "-f", "raw", "-O", "raw", "bs=4096", "if=nbd+unix:///part?socket=s", "of=part")
    assert Path("part").read_bytes() == DATA[4096 : 4096 + 8192]


def test_a_folder(serve: Serve, qemu: Qemu, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a").write_bytes(DATA)
    (images / ".hidden").write_bytes(DATA)
    (images / "below").mkdir()
    (images / "link").symlink_to(tmp_path / "disk.raw")
    _, _ready = serve("-t", "-k", "s", "--folder", "images", "-f", "raw")
    qemu.img("compare", "-f", "raw", "-F", "raw", "nbd+unix:///a?socket=s", "disk.raw")
    for name in (".hidden", "below", "link", "..%2Fdisk.raw", "%2E", "none", ""):
        assert qemu.img("info", "-f", "raw", f"nbd+unix:///{name}?socket=s", check=False).returncode, name


def test_in_the_background(serve: Serve, tmp_path: Path, qemu: Qemu) -> None:
    command = [
        sys.executable,
        "-m",
        "lamina",
        "serve",
        "--fork",
        "--pid-file",
        "pid",
        "-k",
        "s",
        "-f",
        "raw",
        "disk.raw",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.startswith("ready: nbd+unix:///?socket=s\n")
    pid = int(Path("pid").read_text())
    assert pid != os.getpid()
    assert os.getsid(pid) == pid
    qemu.img("compare", "-f", "raw", "-F", "raw", "nbd+unix:///?socket=s", "disk.raw")
    deadline = time.monotonic() + 10
    while os.path.exists("pid") or os.path.exists("s"):
        assert time.monotonic() < deadline, "the pid file or the socket is still there"
        time.sleep(0.02)


def test_sockets_of_a_service_manager(serve: Serve, qemu: Qemu) -> None:
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind("activated")
        listener.listen()
        # The variable must name the process that will be: a shell knows, and becomes it.
        script = 'exec 3<&"$1"; shift; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        command = [
            "bash",
            "-c",
            script,
            "-",
            str(listener.fileno()),
            sys.executable,
            "-m",
            "lamina",
            "serve",
            "-f",
            "raw",
        ]
        process = subprocess.Popen(
            [*command, "--output=json", "disk.raw"], stdout=subprocess.PIPE, text=True, pass_fds=[listener.fileno()]
        )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["uris"] == ["nbd+unix:///?socket=activated"]
        qemu.img("compare", "-f", "raw", "-F", "raw", "nbd+unix:///?socket=activated", "disk.raw")
        assert ended(process) == 0
        assert os.path.exists("activated"), "the socket belongs to the service manager"
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_tls(serve: Serve, tmp_path: Path, qemu: Qemu) -> None:
    write_certificates(tmp_path / "pki")
    _, ready = serve("-t", "-p", "0", "-f", "raw", "--tls-certificates", "pki", "disk.raw")
    port = ready["uris"][0].rpartition(":")[2].strip("/")
    assert ready["uri"].startswith("nbds://")
    creds = f"tls-creds-x509,id=t,dir={tmp_path / 'pki'},endpoint=client"
    source = f"driver=nbd,host=localhost,port={port},tls-creds=t"
    compared = qemu.img("compare", "--object", creds, "--image-opts", source, "driver=raw,file.filename=disk.raw")
    assert compared.returncode == 0
    plain = qemu.img("info", f"nbd://localhost:{port}", check=False)
    assert plain.returncode


class Watched(MemoryStorage):
    """Storage that offers a bitmap of what was written."""

    driver = "watched"

    def __init__(self, size: int = 0, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(size, name=name, read_only=read_only)
        self._bitmap = MemoryBitmap(4096)
        self._bitmap.mark(8192, 4096)

    @property
    def bitmaps(self) -> dict[str, MemoryBitmap]:
        return {"daily": self._bitmap}


def test_a_bitmap_that_a_node_offers(tmp_path: Path) -> None:
    """Through a filter that leaves bytes where they are, too."""
    with Image(NoZero(Child(Watched(1 << 20), "image"))) as image:
        export = Export(image, bitmaps={"daily": image.node.bitmaps["daily"]})
        context = "qemu:dirty-bitmap:daily"
        with (
            Server([export], unix=str(tmp_path / "s")) as server,
            Client.connect(server.uri, contexts=(context,)) as client,
        ):
            status = client.block_status(0, 1 << 20)
    assert status == {"qemu:dirty-bitmap:daily": [(8192, 0), (4096, 1), ((1 << 20) - 12288, 0)]}


MISTAKES = [
    (["-k", "s"], "no image is given"),
    (["-k", "s", "none.raw"], "none.raw"),
    (["-k", "s", "-w", "disk.raw"], "raw"),  # a format is never guessed for writing
    (["-k", "s", "-r", "-w", "disk.raw"], "-r and -w"),
    (["-k", "no/such/folder/s", "-f", "raw", "disk.raw"], "cannot listen"),
    (["-k", "s" * 200, "-f", "raw", "disk.raw"], "107 bytes"),
    (["-k", "s", "-B", "daily", "-f", "raw", "disk.raw"], "no bitmap daily"),
    (["-k", "s", "-f", "raw", "-o", "2M", "disk.raw"], "exceed the end"),
    (["-k", "s", "-f", "raw", "--partition", "1", "disk.raw"], "partition"),
    (["-p", "0", "-b", "0.0.0.0", "-f", "raw", "disk.raw"], "--insecure"),
    (["-p", "70000", "disk.raw"], "70000"),
    (["-k", "s", "--tls", "require", "disk.raw", "-f", "raw"], "certificates"),
    (["-k", "s", "--export", "name=a", "-f", "raw"], "has no file"),
    (["-k", "s", "--export", "file=disk.raw,colour=red"], "colour"),
    (["-k", "s", "--export", "file=disk.raw,writable=maybe"], "writable"),
    (["-k", "s", "--export", "file=disk.raw,format=raw,allow=dns:a"], "--tls-verify-peer"),
    (["-k", "s", "-x", "a", "disk.raw", "disk.raw", "-f", "raw"], "-x"),
    (["-k", "s", "disk.raw", "disk.raw", "-f", "raw"], "two exports"),
    (["-c", "/dev/nbd0", "disk.raw"], "nbd-client"),
    (["-n", "disk.raw"], "use --cache none"),
    (["-T", "x", "disk.raw"], "use -v"),
    (["--trace=x", "disk.raw"], "use -v"),
    (["--tls-hostname", "x", "disk.raw"], "lamina info --list"),
    (["-V", "disk.raw"], "lamina --version"),
    (["-k", "s", "--folder", "disk.raw"], "not a folder"),
    (["-k", "s", "-e", "0", "-f", "raw", "disk.raw"], "clients"),
]


@pytest.mark.parametrize(("args", "said"), MISTAKES, ids=[" ".join(args)[:40] for args, _ in MISTAKES])
def test_mistakes_are_told_before_anybody_is_served(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.raw").write_bytes(DATA)
    assert main(["serve", *args]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted(os.listdir()) == ["disk.raw"]

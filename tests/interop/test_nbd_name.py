"""Lamina under the name qemu-nbd, beside qemu-nbd: the same options serve the same, and end the same way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lamina.cli import program
from lamina.cli.main import main
from lamina.cli.personality import personality
from tests.certificates import write_certificates
from tests.conftest import Qemu
from tests.nbd_peers import PATIENCE, listens, running
from tests.nbd_peers import program as needed

from .command_folder import Images
from .test_nbd_client_peers import free_port, qemu_nbd

pytestmark = pytest.mark.peers

#: Options of a server, and the commands of a client.
SERVED = [
    ("-f raw raw", "write -P 1 0 64k", "read -P 1 0 64k", "write -z 512k 4k", "discard 0 64k", "read -v 0 16"),
    ("raw", "write -P 1 64k 64k", "read -P 1 64k 64k"),
    ("odd", "length", "write -P 1 512 512"),
    ("-r -f qcow2 disk", "read -P 1 1M 64k", "write 0 512", "length"),
    ("-f qcow2 disk", "write -P 3 0 64k", "write -z 1M 64k", "flush", "read -P 3 0 64k"),
    ("disk", "read -P 1 1M 64k"),
    ("third", "read -P 7 128k 64k", "write -P 1 0 512"),
    ("-s -f qcow2 disk", "write -P 3 0 64k", "read -P 3 0 64k"),
    ("-o 524288 -f raw raw", "length", "read -P 9 0 4k", "write -P 1 4k 4k"),
    ("-l one snap", "read -P 1 0 512k", "write 0 512"),
    ("-l snapshot.name=two snap", "read -P 2 0 512k"),
    ("--discard=unmap -f raw raw", "discard 0 64k", "read -P 0 0 64k"),
    ("--discard=unmap --detect-zeroes=unmap -f qcow2 disk", "write -P 0 1M 1M", "read -P 0 1M 1M"),
    ("-n -f raw raw", "write -P 1 0 64k"),
    ("--cache=none -f raw raw", "write -P 1 0 64k"),
    (
        "--cache=writethrough -f qcow2 disk",
        "write -P 1 0 64k",
        "write -z 64k 64k",
        "discard 0 64k",
        "read -P 0 64k 64k",
    ),
    ("--cache=directsync -f raw raw", "write -P 1 0 64k", "read -P 1 0 64k"),
    ("--cache=unsafe --aio=threads -f raw raw", "write -P 1 0 64k"),
    ("--image-opts driver=raw,offset=64k,size=64k,file.filename=raw", "length", "write -P 1 0 512"),
    ("-e 3 -v -f raw raw", "length"),
]

#: Command lines that both refuse.
REFUSED = [
    "",
    "--nosuch raw",
    "raw disk",
    "none",
    "-f nosuch raw",
    "-f qcow2 raw",
    "-e x raw",
    "-p x raw",
    "-B none disk",
]
REFUSED += ["-L disk", "--cache=nosuch raw", "--discard=nosuch raw", "--aio=nosuch raw", "--detect-zeroes=nosuch raw"]
REFUSED += [
    "-l none snap",
    "--tls-creds=none raw",
    "-o x raw",
    "--image-opts -f raw driver=raw,file.filename=raw",
    "-k s -p 1 raw",
]


@pytest.fixture(scope="module")
def images(qemu7: Qemu, tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(qemu7, tmp_path_factory.mktemp("images"))


@pytest.fixture
def shim(tmp_path: Path) -> Path:
    assert main(["shims", "-q", str(tmp_path / "bin")]) == 0
    return tmp_path / "bin" / "qemu-nbd"


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case[0])
def test_the_same_options_serve_the_same(
    tmp_path: Path, images: Images, shim: Path, qemu7: Qemu, case: tuple[str, ...]
) -> None:
    options, *commands = case
    told = []
    for server in (str(shim), needed("qemu-nbd", "qemu-utils")):
        folder = tmp_path / ("ours" if server == str(shim) else "theirs")
        folder.mkdir()
        images.write(folder, images.named_in([options]))
        path = folder / "s"
        with inside(folder), running([server, "-t", "-k", str(path), *options.split()], path) as uri:
            words = [part for command in commands for part in ("-c", command)]
            done = qemu7.io("-f", "raw", *words, uri, check=False)
            mapped = qemu7.map(uri, "raw")
            lines = [line for line in done.stdout.splitlines() if "ops;" not in line]
        told.append((done.returncode, lines, [{**row, "offset": 0} for row in mapped]))
        left = {file.name: qemu7.img("map", "--output=json", file).stdout for file in folder.iterdir()}
        told[-1] += (left,)
    ours, theirs = told
    assert ours[:2] == theirs[:2]
    # Bytes: the layout of qcow2 and the finer status of our server differ.
    for name in theirs[3]:
        assert qemu7.img("compare", "-q", tmp_path / "ours" / name, tmp_path / "theirs" / name).returncode == 0


@pytest.mark.parametrize(
    "options", ["-f raw raw", "-r -x one -D text -A -B b0 maps", "-x a'b -e 4 disk", "-l one snap"]
)
def test_the_list_of_exports(
    tmp_path: Path,
    images: Images,
    qemu: Qemu,
    options: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images.write(tmp_path, images.named_in([options]))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "s"
    with running([qemu_nbd(qemu), "-t", "-k", str(path), *options.split()], path):
        theirs = subprocess.run(
            [qemu_nbd(qemu), "-L", "-k", str(path)], capture_output=True, text=True, check=True, timeout=PATIENCE
        )
        version = "10.0" if qemu.version >= (10,) else "7.2"
        monkeypatch.setattr(program, "current", personality("qemu-nbd", {"LAMINA_COMPAT": version}))
        assert main(["-L", "-k", str(path)]) == 0
    assert capsys.readouterr().out == theirs.stdout


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused_there_is_refused_here(
    tmp_path: Path, images: Images, shim: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.write(tmp_path, images.named_in([line]))
    monkeypatch.chdir(tmp_path)
    done = [
        subprocess.run([server, *line.split()], capture_output=True, text=True, check=False, timeout=PATIENCE)
        for server in (shim, needed("qemu-nbd", "qemu-utils"))
    ]
    assert done[0].returncode == done[1].returncode == 1, done
    assert done[0].stdout == ""
    assert done[0].stderr.startswith("qemu-nbd: ")


def test_tls(
    tmp_path: Path,
    images: Images,
    shim: Path,
    qemu7: Qemu,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each is a client of the other, with the same objects."""
    images.write(tmp_path, ["raw"])
    monkeypatch.chdir(tmp_path)
    folder = write_certificates(tmp_path / "pki")
    of_client = ["--object", f"tls-creds-x509,id=t,dir={folder},endpoint=client"]
    of_server = ["--object", f"tls-creds-x509,id=t,dir={folder},endpoint=server,verify-peer=on", "--tls-creds", "t"]
    told = []
    for server in (str(shim), needed("qemu-nbd", "qemu-utils")):
        port = free_port()
        with running([server, "-t", "-b", "127.0.0.1", "-p", str(port), *of_server, "-f", "raw", "raw"], port):
            target = f"driver=nbd,host=localhost,port={port},tls-creds=t"
            if server == str(shim):
                qemu7.img("convert", "--image-opts", *of_client, "-O", "raw", target, "copy")
            else:
                with monkeypatch.context() as patch:
                    patch.setattr(program, "current", personality("qemu-img", {}))
                    assert main(["convert", "--image-opts", *of_client, "-O", "raw", target, "copy"]) == 0
                    patch.setattr(program, "current", personality("qemu-nbd", {}))
                    assert main(["-L", "-b", "localhost", "-p", str(port), *of_client, "--tls-creds", "t"]) == 0
                told.append(capsys.readouterr())
        assert (tmp_path / "copy").read_bytes() == images.content["raw"]
        (tmp_path / "copy").unlink()
    assert told[0].out.startswith("exports available: 1\n export: ''\n  size:  1048576\n")
    assert told[0].err == ""


def test_in_the_background(tmp_path: Path, images: Images, shim: Path, qemu7: Qemu) -> None:
    images.write(tmp_path, ["raw"])
    words = ["--fork", "--pid-file", "pid", "-t", "-k", "s", "-f", "raw", "raw"]
    started = subprocess.run(
        [shim, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
    process = int((tmp_path / "pid").read_text())
    try:
        with inside(tmp_path):
            assert "1 MiB" in qemu7.io("-f", "raw", "-c", "length", "nbd+unix:///?socket=s").stdout
    finally:
        os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "raw"]


def test_it_ends_with_its_last_client(tmp_path: Path, images: Images, shim: Path, qemu7: Qemu) -> None:
    images.write(tmp_path, ["raw"])
    path = tmp_path / "s"
    server = subprocess.Popen([sys.executable, shim, "-k", str(path), "-f", "raw", "raw"], cwd=tmp_path)
    deadline = time.monotonic() + PATIENCE
    while not listens(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "1 MiB" in qemu7.io("-f", "raw", "-c", "length", f"nbd+unix:///?socket={path}").stdout
    assert server.wait(PATIENCE) == 0

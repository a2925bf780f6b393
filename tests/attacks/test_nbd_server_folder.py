"""A folder that is served and that somebody else may write: names are paths, links are not followed, images are given back.

P22 and T19 of the safety policy. The tests run in a folder of their own; what a name could lead to lies beside it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import lamina
from lamina.image import Image
from lamina.limits import MIB
from lamina.nbd import Folder, Server
from lamina.nbd import wire as w

from ..nbd_load import nothing_left, server_threads, until
from ..nbd_raw import PATIENCE, dial, info, meta, option_bytes, sized

SECRET = b"secret!!" * 512
#: Rounds of the race between a client and somebody who swaps links; the soak has more.
ROUNDS = int(os.environ.get("LAMINA_HOSTILE_CLIENTS", "150"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(SECRET)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good").write_bytes(b"good" * 1024)
    return folder


@contextmanager
def lamina_serve(folder: Path, *args: str) -> Iterator[str]:
    """`lamina serve --folder .` in that folder."""
    path = folder.parent / "socket"
    command = [sys.executable, "-m", "lamina", "serve", "--output=json", "-t", "-k", str(path), "--folder", ".", *args]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert line, process.stderr.read()
            assert json.loads(line)["folder"] == "."
            yield str(path)
        finally:
            process.kill()


def opened(path: object, name: str) -> int:
    """What the server answers to GO."""
    with dial(path) as raw:
        raw.greet()
        return raw.option(w.OPT_GO, info(name))[-1][0]


@pytest.mark.parametrize("mode", ["read", "write", "probe"])
def test_the_name_of_a_file_is_no_options(folder: Path, mode: str) -> None:
    """A file called json:{...} is a file: neither served nor written is what its name says."""
    secret = folder.parent / "secret"
    names = [
        'json:{"driver":"raw","file":{"driver":"file","filename":"..\\u002fsecret"}}',
        "nbd:localhost:1",
        "blkdebug::good",
        "file:good",
        "host_device:good",
        "null-co:",
        "driver=raw,file.filename=good",
        "x:y",
        "-w",
    ]
    for name in names:
        (folder / name).write_bytes(b"own.." * 1024)
    options = {"read": ["-f", "raw"], "write": ["-f", "raw", "-w"], "probe": []}[mode]
    with lamina_serve(folder, *options) as path:
        for name in names:
            with dial(path) as raw:
                raw.begin(name)
                assert raw.read(0, 5) == b"own..", name
                assert raw.size == 5120
                if mode == "write":
                    assert not raw.write(0, b"NEW").error
                    assert not raw.ask(w.CMD_FLUSH).error
                    assert (folder / name).read_bytes().startswith(b"NEW.."), name
    assert secret.read_bytes() == SECRET
    assert (folder / "good").read_bytes() == b"good" * 1024


def test_nothing_but_regular_files(folder: Path) -> None:
    """Links, FIFOs, sockets, folders and devices are not there; nobody waits for one."""
    secret = folder.parent / "secret"
    (folder / "link").symlink_to(secret)
    (folder / "near").symlink_to("good")
    (folder / ".hidden").write_bytes(SECRET)
    (folder / "below").mkdir()
    (folder / "below" / "deep").write_bytes(SECRET)
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "sock"))
        with suppress(PermissionError):
            os.mknod(folder / "device", 0o600 | 0o020000, os.makedev(1, 5))
        with lamina_serve(folder, "-f", "raw") as path:
            with dial(path) as raw:
                raw.greet()
                assert [data for _, data in raw.option(w.OPT_LIST)] == [sized("good"), b""]
            for name in ("link", "near", ".hidden", "below", "below/deep", "fifo", "sock", "device", "..", ".", ""):
                assert opened(path, name) == w.REP_ERR_UNKNOWN, name
            assert opened(path, "good") == w.REP_ACK


@pytest.mark.parametrize("way", ["open", "open_fd"])
def test_a_link_that_is_swapped_in_serves_nothing(folder: Path, way: str) -> None:
    """A thread swaps a file and a link to a secret while clients ask for the name: what is served is the file, or nothing."""
    from lamina.graph import open_graph

    stop = threading.Event()
    (folder / "disk").write_bytes(b"mine" * 1024)

    def swap() -> None:
        while not stop.is_set():
            os.symlink(folder.parent / "secret", folder / ".next")
            os.replace(folder / ".next", folder / "disk")
            (folder / ".next").write_bytes(b"mine" * 1024)
            os.replace(folder / ".next", folder / "disk")

    if way == "open":
        served = Folder(folder, lambda path: lamina.open(path, format="raw"))
    else:

        def with_fd(path: str, fd: int) -> Image:
            return Image(open_graph({"file": {"driver": "file", "filename": path}}, format="raw", fd=fd))

        served = Folder(folder, open_fd=with_fd)
    got = dict.fromkeys(("served", "refused"), 0)
    swapping = threading.Thread(target=swap)
    with nothing_left(), Server(folder=served, unix=str(folder.parent / "socket")):
        swapping.start()
        try:
            for _ in range(ROUNDS):
                with dial(folder.parent / "socket") as raw:
                    raw.greet()
                    if raw.option(w.OPT_GO, info("disk"))[-1][0] != w.REP_ACK:
                        got["refused"] += 1
                        continue
                    assert raw.read(0, 4) == b"mine"
                    got["served"] += 1
        finally:
            stop.set()
            swapping.join()
    assert all(got.values()), f"the race was not run: {got}"


def test_a_write_through_a_swapped_link_reaches_nothing(folder: Path) -> None:
    stop = threading.Event()
    secret = folder.parent / "secret"

    def swap() -> None:
        while not stop.is_set():
            os.symlink(secret, folder / ".next")
            os.replace(folder / ".next", folder / "disk")
            (folder / ".next").write_bytes(b"mine" * 1024)
            os.replace(folder / ".next", folder / "disk")

    swapping = threading.Thread(target=swap)
    with lamina_serve(folder, "-f", "raw", "-w") as path:
        swapping.start()
        try:
            for _ in range(ROUNDS):
                with dial(path) as raw:
                    raw.greet()
                    if raw.option(w.OPT_GO, info("disk"))[-1][0] == w.REP_ACK:
                        raw.write(0, b"written")
        finally:
            stop.set()
            swapping.join()
    assert secret.read_bytes() == SECRET


class Counted:
    """A folder whose images are counted while they are open."""

    def __init__(self, folder: Path) -> None:
        self.open = self.most = self.ever = 0
        counted = self

        def opening(path: str) -> Image:
            image = lamina.open(path, format="raw")
            counted.open += 1
            counted.ever += 1
            counted.most = max(counted.most, counted.open)
            close = image.close

            def closing() -> None:
                counted.open -= 1
                close()

            image.close = closing  # type: ignore[method-assign]
            return image

        self.folder = Folder(folder, opening)


def test_who_only_asks_holds_nothing_open(folder: Path) -> None:
    """INFO and LIST_META_CONTEXT give back what they opened; a client has one image at a time."""
    for number in range(20):
        (folder / f"disk{number}").write_bytes(bytes(4096))
    counted = Counted(folder)
    with nothing_left(), Server(folder=counted.folder, unix=str(folder.parent / "socket")):
        with dial(folder.parent / "socket") as raw:
            raw.greet()
            raw.option(w.OPT_STRUCTURED_REPLY)
            for number in range(20):
                name = f"disk{number}"
                assert raw.option(w.OPT_INFO, info(name))[-1][0] == w.REP_ACK
                assert raw.option(w.OPT_LIST_META_CONTEXT, meta(name))[-1][0] == w.REP_ACK
                assert raw.option(w.OPT_LIST)[-1][0] == w.REP_ACK
                until(lambda: counted.open == 0, "it stays open")
                assert raw.option(w.OPT_SET_META_CONTEXT, meta(name, "base:allocation"))[-1][0] == w.REP_ACK
            assert counted.most == 1
            assert raw.option(w.OPT_GO, info("disk19"))[-1][0] == w.REP_ACK
            assert counted.ever == 60, "GO takes what SET_META_CONTEXT opened"
            assert counted.open == 1
        until(lambda: counted.open == 0, "it stays open when the client is gone")


def test_many_clients_share_one_image(folder: Path) -> None:
    counted = Counted(folder)
    with nothing_left(), Server(folder=counted.folder, unix=str(folder.parent / "socket"), clients=40):

        def visit() -> None:
            for _ in range(10):
                with dial(folder.parent / "socket") as raw:
                    raw.begin("good")
                    assert raw.read(0, 4) == b"good"

        threads = [threading.Thread(target=visit) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: counted.open == 0, "it stays open")
        until(lambda: "nbd-request" not in server_threads(), "threads stay when the image is closed")
        assert counted.most == 1
        assert counted.folder._entries == {}


def test_a_file_that_opens_slowly_holds_up_those_alone_who_want_it(folder: Path) -> None:
    (folder / "slow").write_bytes(bytes(4096))
    opening, go_on = threading.Event(), threading.Event()

    def slowly(path: str) -> Image:
        if path.endswith("slow"):
            opening.set()
            assert go_on.wait(PATIENCE)
        return lamina.open(path, format="raw")

    path = folder.parent / "socket"
    with nothing_left(), Server(folder=Folder(folder, slowly), unix=str(path)), dial(path) as stuck:
        stuck.greet()
        stuck.stream.send(option_bytes(w.OPT_GO, info("slow")))
        assert opening.wait(PATIENCE)
        for _ in range(3):
            assert opened(path, "good") == w.REP_ACK
        go_on.set()
        assert stuck.option_replies(w.OPT_GO)[-1][0] == w.REP_ACK


def test_an_image_that_cannot_be_opened_is_refused_and_forgotten(folder: Path) -> None:
    (folder / "broken").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(100))
    with lamina_serve(folder) as path:
        for _ in range(3):
            assert opened(path, "broken") == w.REP_ERR_UNKNOWN
        (folder / "broken").write_bytes(b"good" * 1024)
        assert opened(path, "broken") == w.REP_ACK


def test_a_qcow2_and_its_backing_file_in_a_folder(folder: Path) -> None:
    """The descriptor is that of the image; its backing file is opened as the policy grants it."""
    lamina.create(folder / "top", "qcow2", MIB, backing_file="good", backing_fmt="raw")
    with lamina_serve(folder, "-f", "qcow2") as path, dial(path) as raw:
        raw.begin("top")
        assert raw.read(0, 4) == b"good"


def test_the_images_of_a_folder_have_the_budget_of_the_command(folder: Path) -> None:
    """`--limits` holds for an image that a client names, too."""
    lamina.create(folder / "top", "qcow2", MIB, backing_file="good", backing_fmt="raw")
    lamina.create(folder / "alone", "qcow2", MIB)
    with lamina_serve(folder, "-f", "qcow2", "--limits", "chain-depth=0") as path:
        assert opened(path, "top") == w.REP_ERR_UNKNOWN
        assert opened(path, "alone") == w.REP_ACK


def test_a_snapshot_of_a_folder_opens_files_for_reading(folder: Path) -> None:
    os.chmod(folder / "good", 0o444)
    with lamina_serve(folder, "-f", "raw", "-s") as path, dial(path) as raw:
        raw.begin("good")
        assert not raw.write(0, b"new").error
        assert raw.read(0, 4) == b"newd"
    assert (folder / "good").read_bytes() == b"good" * 1024

"""Files that are written beside images: what is never followed, never emptied, and never waited for without end."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lamina import BlockIOError, OptionError
from lamina.cli.daemon import PidFile
from lamina.graph import Opener
from lamina.image import Image
from lamina.side_file import SideFile, make_side_file

SECRET = "somebody's file\n"


def write(path: Path) -> None:
    with SideFile(str(path), patience=0.2) as file:
        file.write("new")


def append(path: Path) -> None:
    with SideFile(str(path), append=True, patience=0.2) as file:
        file.write("new")


def pid(path: Path) -> None:
    with PidFile(str(path)):
        pass


def filter_with(option: str, driver: str) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        spec = {"driver": driver, option: str(path), "image": {"driver": "memory", "size": "1M"}}
        with Image(Opener(read_only=False).open(spec)) as image:
            image.write(0, b"x")

    return run


WRITERS = {
    "side-file": write,
    "append": append,
    "pid-file": pid,
    "report": filter_with("report", "stats"),
    "log": filter_with("log", "log"),
    "log of writes": filter_with("log", "logwrites"),
    "make": lambda path: make_side_file(str(path)),
}


@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "folder", "socket"])
def test_what_is_not_ours_stays_as_it_is(tmp_path: Path, how: str, kind: str) -> None:
    """P23: a link is not followed, a file with another name is not written, nor is what is no file."""
    secret, path = tmp_path / "secret", tmp_path / "out"
    secret.write_text(SECRET)
    before = secret.stat()
    sock = socket.socket(socket.AF_UNIX)
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "hard link":
        os.link(secret, path)
    elif kind == "folder":
        path.mkdir()
    else:
        sock.bind(str(path))
    with sock, pytest.raises(BlockIOError) as caught:
        WRITERS[how](path)
    assert caught.value.path == str(path)
    assert str(caught.value).count("\n") == 0
    assert secret.read_text() == SECRET
    assert secret.stat().st_mtime_ns == before.st_mtime_ns
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("how", WRITERS)
def test_another_users_file_stays_as_it_is(tmp_path: Path, how: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path = tmp_path / "out"
    path.write_text("17\n")
    os.chown(path, 65534, 65534)
    with pytest.raises(BlockIOError, match="another user"):
        WRITERS[how](path)
    assert path.read_text() == "17\n"


def test_an_own_file_is_emptied_or_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("long before")
    write(path)
    assert path.read_text() == "new"
    append(path)
    assert path.read_text() == "newnew"
    with SideFile(str(path), append=True) as file:
        assert path.read_text() == "newnew"
        file.empty()
        file.write("3")
    assert path.read_text() == "3"


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "out")
        with PidFile(str(tmp_path / "pid")):
            assert stat.S_IMODE((tmp_path / "pid").stat().st_mode) == 0o640
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_a_link_that_is_put_there_meanwhile_is_not_followed(tmp_path: Path) -> None:
    """Somebody who may write the folder swaps a file and a link, again and again."""
    secret, path = tmp_path / "secret", tmp_path / "out"
    secret.write_text(SECRET)
    stop = threading.Event()

    def swap() -> None:
        (tmp_path / "own").write_text("")
        while not stop.is_set():
            os.symlink(secret, tmp_path / "next")
            os.replace(tmp_path / "next", path)
            os.link(tmp_path / "own", tmp_path / "next")
            os.replace(tmp_path / "next", path)
            (tmp_path / "own").unlink()
            (tmp_path / "own").write_text("")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(500):
            try:
                write(path)
            except BlockIOError:
                continue
    finally:
        stop.set()
        thread.join()
    assert secret.read_text() == SECRET


def test_a_fifo_without_a_reader_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BlockIOError, match="no process reads"):
        write(tmp_path / "fifo")


def test_a_fifo_that_is_not_read_any_more_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with (
            SideFile(str(path), patience=0.2) as file,
            pytest.raises(BlockIOError, match="no process has read"),
        ):
            file.write("x" * (2 << 20))
    finally:
        os.close(reader)


@pytest.mark.parametrize(("driver", "option"), [("stats", "report"), ("log", "log")])
def test_a_fifo_with_a_reader_takes_all(tmp_path: Path, driver: str, option: str) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    said: list[bytes] = []
    thread = threading.Thread(target=lambda: said.append(path.read_bytes()))
    thread.start()
    filter_with(option, driver)(path)
    thread.join(20)
    assert not thread.is_alive()
    assert b"write" in said[0]


def test_descriptors_and_devices(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        write(Path(f"/dev/fd/{writer}"))
        assert os.read(reader, 100) == b"new"
    finally:
        os.close(reader)
        os.close(writer)
    write(Path("/dev/null"))
    with pytest.raises(OptionError):
        SideFile("a\0b")
    with pytest.raises(BlockIOError):
        SideFile("/dev/fd/999999999")


def test_a_dash_is_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for how in (write, append, filter_with("report", "stats")):
        how(Path("-"))
    out = capfd.readouterr().out
    assert out.startswith("newnew")
    assert "write" in out
    with pytest.raises(OptionError, match="standard output"):
        pid(Path("-"))
    assert os.listdir(tmp_path) == []


def test_a_pid_file_is_removed_only_while_it_is_the_one_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("123\n")  # of a server that crashed
    with PidFile(str(path)):
        assert int(path.read_text()) == os.getpid()
    assert not path.exists()
    with PidFile(str(path)):
        path.write_text("123\n")  # another server's
    assert path.read_text() == "123\n"
    with PidFile(str(path)):
        path.unlink()
        (tmp_path / "mine").write_text(f"{os.getpid()}\n")
        path.symlink_to(tmp_path / "mine")
    assert path.is_symlink()


def test_a_pid_file_replaces_nothing_but_a_pid(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"x" * 4096)
    with pytest.raises(BlockIOError, match="not a pid file"):
        pid(tmp_path / "disk.raw")
    assert (tmp_path / "disk.raw").read_bytes() == b"x" * 4096

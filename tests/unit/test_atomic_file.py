"""`AtomicFile`: a file appears when it is whole, and nothing is left over, whatever interrupts it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lamina import atomic_file
from lamina.atomic_file import AtomicFile, temporary_name, write_file
from lamina.errors import BlockIOError, Locked, OptionError
from tests.unit.replacing import OTHER, fail, no_tmpfile

# -- new files


@pytest.mark.usefixtures("tmpfile")
def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    with AtomicFile(target) as file:
        assert not file.in_place
        assert not file.replaces
        os.write(file.fd, b"whole")
        assert not target.exists()
        assert not os.get_inheritable(file.fd)
    assert target.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["disk"]


@pytest.mark.usefixtures("tmpfile")
@pytest.mark.parametrize("there", [False, True])
def test_an_error_leaves_nothing(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "disk"
    if there:
        target.write_bytes(b"old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), AtomicFile(target) as file:
            fail(file, error())
    assert os.listdir(tmp_path) == (["disk"] if there else [])
    assert not there or target.read_bytes() == b"old"


@pytest.mark.usefixtures("tmpfile")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_the_umask_is_the_systems_business(tmp_path: Path, mask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")
            write_file(tmp_path / "new", b"")
            write_file(tmp_path / "private", b"", mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600 & ~mask


@pytest.mark.usefixtures("tmpfile")
def test_a_file_that_another_made_meanwhile_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    with pytest.raises(BlockIOError, match="another program created a file of this name") as caught, AtomicFile(target):
        target.write_bytes(b"theirs")
    assert caught.value.path == str(target)
    assert target.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["disk"]


@pytest.mark.parametrize("links", [True, False], ids=["", "no hard links"])
def test_a_file_that_another_makes_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """A link cannot replace it, as a rename would. Where the file system has no links, the name is looked at before."""
    no_tmpfile(monkeypatch)
    target = tmp_path / "disk"
    link, calls = os.link, list[str]()

    def late(*arguments: Any, **named: Any) -> None:
        calls.append("link")
        target.write_bytes(b"theirs")
        if not links:
            raise OSError(errno.EPERM, "no links here")
        link(*arguments, **named)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(BlockIOError, match="another program created"), AtomicFile(target) as file:
        os.write(file.fd, b"ours")
    assert calls == ["link"]
    assert target.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["disk"]


def test_a_new_file_on_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_tmpfile(monkeypatch)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_file(tmp_path / "disk", b"whole")
    assert (tmp_path / "disk").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["disk"]


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("below/real")
    (tmp_path / "below").mkdir()
    write_file("plain", b"1")
    write_file("-o", b"2")
    write_file("link", b"3")  # a link that leads to nothing yet
    write_file("link", b"4")
    long = "x" * 255
    write_file(long, b"5")
    write_file(long, b"6")
    assert {name.name: name.read_bytes() for name in tmp_path.iterdir() if name.is_file()} == {
        "plain": b"1",
        "-o": b"2",
        "link": b"4",
        long: b"6",
    }
    assert (tmp_path / "link").is_symlink()
    assert os.listdir("below") == ["real"]
    for name in (long, "y" * 254 + "\u20ac"[:1], "x" * 254 + "y"):
        assert len(os.fsencode(temporary_name(name))) <= 255
    assert temporary_name(long) != temporary_name("x" * 254 + "y")
    with pytest.raises(OptionError, match="not a valid file name"):
        write_file("a\0b", b"")
    with pytest.raises(BlockIOError, match=r"below: it is a directory \(|below: it is a directory;"):
        write_file("below", b"")
    with pytest.raises(FileNotFoundError):
        write_file("none/x", b"")
    with pytest.raises(BlockIOError):
        write_file("y" * 256, b"")
    os.mkfifo("fifo")
    with pytest.raises(BlockIOError, match="neither a regular file nor a block device"):
        write_file("fifo", b"")


# -- a rename that fails, interrupts, forks, kills


@pytest.mark.usefixtures("tmpfile")
@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_rename_that_fails_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, when: str
) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"old")
    real = os.replace

    def fail(*names: Any, **folders: Any) -> None:
        if when == "after":
            real(*names, **folders)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises((BlockIOError, KeyboardInterrupt)) as caught:
            write_file(target, b"new")
    if isinstance(error, OSError):
        assert (
            str(caught.value)
            == f"{target}: the new file is complete, but cannot be renamed to its target: {os.strerror(errno.EIO)}"
        )
    assert os.listdir(tmp_path) == ["disk"]
    assert target.read_bytes() == (b"old" if when == "before" else b"new")


def test_a_target_that_becomes_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    with pytest.raises(BlockIOError), AtomicFile(target):
        target.mkdir()
    assert os.listdir(tmp_path) == ["disk"]


@pytest.mark.usefixtures("tmpfile")
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupt_anywhere(tmp_path: Path, there: bool) -> None:
    """KeyboardInterrupt at each function entry and each return from C, from the first line to the last."""
    target = tmp_path / "disk"
    module = os.path.dirname(atomic_file.__file__)
    at = left = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        # (What comes while an object is being collected is lost: Python says so, and goes on.)
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(module) and not collecting(frame):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    interrupted, before = True, descriptors()
    while interrupted:
        at += 1
        left = at
        if there:
            target.write_bytes(b"old")
        else:
            target.unlink(missing_ok=True)
        interrupted = False
        sys.setprofile(profile)
        try:
            write_file(target, b"new")
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.setprofile(None)
        assert os.listdir(tmp_path) in ([], ["disk"]), f"interrupted at {at}"
        content = target.read_bytes() if target.exists() else None
        assert content in (b"new", b"old" if there else None), f"interrupted at {at}"
        write_file(target, b"again")  # nothing stays locked
        for name in descriptors() - before:  # one that open returned as the interrupt came
            with suppress(OSError):
                os.close(int(name))
    assert at > 20


@pytest.mark.usefixtures("tmpfile")
def test_a_forked_child_does_nothing(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"old")
    pid = -1
    with AtomicFile(target) as file:
        os.write(file.fd, b"new")
        pid = os.fork()
        if pid:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert target.read_bytes() == b"old"
    if not pid:
        os._exit(0 if target.read_bytes() == b"old" else 1)
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["disk"]


def descriptors() -> set[str]:
    return {name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


def collecting(frame: Any) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from lamina.atomic_file import AtomicFile
{before}
with AtomicFile({target!r}) as file:
    os.write(file.fd, b"half")
    {inside}
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
NO_TMPFILE = "import lamina.atomic_file as module; module.O_TMPFILE = 0"


def killed(target: Path, before: str, inside: str) -> None:
    script = KILLED.format(path=sys.path, target=str(target), before=before, inside=inside)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("there", [False, True])
def test_what_a_kill_leaves(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "disk"
    listing = ["disk"] if there else []
    if there:
        target.write_bytes(b"old")
    killed(target, "", KILL)
    assert os.listdir(tmp_path) == listing
    if there:  # between the two steps of a replacement
        killed(target, f"os.replace = lambda *_, **named: {KILL}", "")
        assert sorted(os.listdir(tmp_path)) == sorted([*listing, temporary_name("disk")])
    killed(target, NO_TMPFILE, KILL)
    killed(target, NO_TMPFILE, KILL)  # once more: one file all the same
    assert sorted(os.listdir(tmp_path)) == sorted([*listing, temporary_name("disk")])
    assert not there or target.read_bytes() == b"old"
    write_file(target, b"new")
    assert os.listdir(tmp_path) == ["disk"]
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["fifo", "link", "hard link", "folder", "another user's"])
def test_what_is_not_known_to_be_left_over_is_not_touched(tmp_path: Path, kind: str) -> None:
    target, other, name = tmp_path / "disk", tmp_path / "other", tmp_path / temporary_name("disk")
    other.write_bytes(b"theirs")
    if kind == "fifo":
        os.mkfifo(name)
    elif kind == "link":
        name.symlink_to("other")
    elif kind == "hard link":
        os.link(other, name)
    elif kind == "folder":
        name.mkdir()
    elif os.geteuid() == 0:
        name.write_bytes(b"theirs")
        os.chown(name, OTHER, OTHER)
    else:
        pytest.skip("only the administrator can make files of other users")
    before = name.lstat()
    with pytest.raises(BlockIOError, match="the name of a temporary file") as caught:
        write_file(target, b"new")
    assert caught.value.path == str(name)
    assert os.path.samestat(before, name.lstat())
    assert other.read_bytes() == b"theirs"
    assert not target.exists()


def test_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_tmpfile(monkeypatch)
    target = tmp_path / "disk"
    with AtomicFile(target) as first:
        os.write(first.fd, b"first")
        with pytest.raises(Locked, match="another program is writing this file"):
            write_file(target, b"second")
    assert target.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["disk"]


def test_a_run_that_removes_what_was_just_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run finds the temporary file before it is locked, and removes it: it is made again."""
    no_tmpfile(monkeypatch)
    target, real, removed = tmp_path / "disk", fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        if not removed:
            (tmp_path / temporary_name("disk")).unlink()
            removed.append(fd)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    write_file(target, b"new")
    assert removed
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["disk"]

"""Where `create`, `convert` and `copy` write: files that are there, devices; and what is left when they are cut short."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lamina
from lamina.atomic_file import temporary_name
from lamina.cli.main import main
from lamina.creation import create, new_file, open_new, write_image
from lamina.errors import Locked
from lamina.registry import lookup
from tests.conftest import Qemu
from tests.unit.replacing import OTHER, needs_root

KIB, MIB = 1 << 10, 1 << 20
CONTENT = bytes(range(256)) * 4096 + bytes(3 * MIB) + b"end!" * 128


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.raw, of which each command makes its target."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.raw").write_bytes(CONTENT)
    return tmp_path


def run(*arguments: str, code: int = 0) -> str:
    """The command in a process of its own; what it says on standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "lamina", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stderr


def content_of(path: str, format: str) -> bytes:
    with lamina.open(path, format=format) as image:
        return image.read(0, image.size)


def interrupted(function: Callable[..., object], *arguments: object) -> None:
    function(*arguments)
    raise KeyboardInterrupt


# -- files that are there


@needs_root
@pytest.mark.parametrize(
    "command", [["convert", "-O", "qcow2", "a.raw"], ["convert", "a.raw"], ["copy", "a.raw"], ["create", "-f", "qcow2"]]
)
@pytest.mark.parametrize("linked", [False, True])
def test_a_users_file_gets_no_rights(folder: Path, command: list[str], linked: bool) -> None:
    """Written by the administrator over a program of a user that runs as that user, or as root's group."""
    target = folder / "target"
    target.write_bytes(b"#!/bin/sh\n")
    os.chown(target, OTHER, 0)
    target.chmod(0o6755)
    if linked:
        os.link(target, "second")
    told = run(*command, "target", *(["1M"] if command[0] == "create" else []))
    assert ("written in place, since the file has 2 names" in told) == linked
    status = target.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (OTHER, 0, 0o755)
    assert status.st_nlink == 1 + linked
    assert target.read_bytes()[:4] == (b"QFI\xfb" if "qcow2" in command else CONTENT[:4])


@pytest.mark.parametrize(
    ("format", "options"), [("raw", []), ("qcow2", []), ("qcow2", ["-o", "cluster_size=512"])], ids=str
)
def test_in_place(
    qemu10: Qemu, folder: Path, format: str, options: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "target").write_bytes(b"old" * 3 * MIB)
    os.link("target", "second")
    told = run("convert", "-O", format, *options, "a.raw", "target")
    assert told == (
        "target: written in place, since the file has 2 names (hard links): a failure before the end loses the old content\n"
    )
    assert content_of("second", format) == CONTENT
    if format == "qcow2":
        assert qemu10.check("target")[0] == 0
    qemu10.img("compare", "-f", "raw", "-F", format, "a.raw", "target")
    assert main(["copy", "a.raw", "target"]) == 0
    assert Path("second").read_bytes() == CONTENT
    assert main(["create", "-q", "-f", format, *options, "target", "1M"]) == 0
    assert content_of("second", format) == bytes(MIB)
    (folder / "empty").touch()
    assert main(["copy", "empty", "target"]) == 0
    assert [message.partition(",")[0] for message in caplog.messages] == ["target: written in place"] * 3
    assert Path("second").read_bytes() == b""


def test_half_of_an_image_in_place_is_none(folder: Path) -> None:
    """The header of the new image is not there, nor is the old one, until all else is on stable storage."""
    create("target", "qcow2", MIB)
    os.link("target", "second")
    with new_file("target") as file:
        kind = lookup("qcow2")
        values = kind.create_schema.parse({"size": MIB})
        storage = open_new(file)
        storage.close()
        assert lamina.detect("target").format == "qcow2"  # nothing was changed so far
        write_image(kind, file, values)
        assert lamina.detect("target").format == "raw"
        assert Path("target").read_bytes()[:4096] == bytes(4096)
        storage = open_new(file)
        seen = bytearray(8192)
        storage.read_into(0, memoryview(seen))
        assert seen[:4] == b"QFI\xfb"
        storage.zero(100, 1000)
        assert not storage.reads_zero(0, 1000)
        storage.write(4000, memoryview(b"x" * 200))
        storage.read_into(3900, memoryview(seen))
        assert seen[100:300] == b"x" * 200
        storage.truncate(50)
        storage.truncate(10_000)
        storage.read_into(0, memoryview(seen))
        assert seen[:4] == b"QFI\xfb"
        assert seen[50:] == bytes(8192 - 50)
        storage.close()
    assert Path("target").read_bytes()[:4] == b"QFI\xfb"
    with pytest.raises(KeyboardInterrupt), new_file("target") as file:
        interrupted(write_image, kind, file, values)
    assert Path("second").read_bytes() == b""


def test_what_is_wrong_is_found_before_the_old_content_is_gone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "target").write_bytes(b"old")
    os.link("target", "second")
    for arguments in (
        ["create", "-f", "qcow2", "-o", "cluster_size=512", "target", "1P"],
        ["convert", "-O", "qcow2", "-o", "cluster_size=512,size=1P", "a.raw", "target"],
        ["convert", "-O", "qcow2", "-B", "none", "-F", "raw", "a.raw", "target"],
    ):
        assert main(arguments) == 1
        assert Path("second").read_bytes() == b"old"


@pytest.mark.parametrize("linked", [False, True])
def test_a_target_in_use_is_left_alone(
    qemu: Qemu, folder: Path, linked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    create("target", "qcow2", MIB)
    if linked:
        os.link("target", "second")
    before = Path("target").read_bytes()
    with subprocess.Popen(
        [qemu.peer.qemu_io, "-f", "qcow2", "target"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write("length\n")
        user.stdin.flush()
        while "MiB" not in user.stdout.readline():
            assert user.poll() is None
        for arguments in (
            ["create", "-f", "raw", "target", "1M"],
            ["convert", "-O", "raw", "a.raw", "target"],
            ["copy", "a.raw", "target"],
        ):
            assert main(arguments) == 1
            assert "another process, or another image in this one" in capsys.readouterr().err
        user.stdin.close()
    assert Path("target").read_bytes() == before
    # And the other way: while it is written nobody opens it.
    with new_file("target") as file:
        assert file.in_place == linked
        refused = qemu.io("-f", "qcow2", "-c", "length", "target", check=False)
        assert "lock" in refused.stdout + refused.stderr
        with pytest.raises(Locked):
            lamina.open("target", format="qcow2")
        kind = lookup("qcow2")
        write_image(kind, file, kind.create_schema.parse({"size": MIB}))
    qemu.io("-f", "qcow2", "-c", "length", "target")


def test_over_its_own_backing_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create("base.qcow2", "qcow2", MIB)
    create("middle.qcow2", "qcow2", backing_file="base.qcow2", backing_fmt="qcow2")
    os.link("base.qcow2", "hard")
    (folder / "soft").symlink_to("base.qcow2")
    before = Path("base.qcow2").read_bytes()
    overlay = ["create", "-f", "qcow2", "-F", "qcow2"]
    for target in ("base.qcow2", "./base.qcow2", "hard", "soft"):
        assert main([*overlay, "-u", "-b", "base.qcow2", target, "1M"]) == 1
        assert "the backing file is the new image itself" in capsys.readouterr().err
        assert main([*overlay, "-b", "soft", target]) == 1
        assert main([*overlay, "-b", "middle.qcow2", target]) == 1  # of which it is the backing file
        assert "this is a backing file of the backing file" in capsys.readouterr().err
        for words in (
            ["-B", "middle.qcow2", "-F", "qcow2", "a.raw"],
            ["-B", "hard", "-F", "qcow2", "a.raw"],
            ["-f", "qcow2", "middle.qcow2"],
            ["-U", "-f", "qcow2", "middle.qcow2"],
        ):
            assert main(["convert", "-O", "qcow2", *words, target]) == 1
            assert capsys.readouterr().err.count("\n") == 1
    assert main([*overlay, "-u", "-b", "new", "new", "1M"]) == 1  # which is not there yet
    assert Path("base.qcow2").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["a.raw", "base.qcow2", "hard", "middle.qcow2", "soft"]


# -- what is left when something cuts them short

SLOW = "driver=delay,read-ms=2000,image.driver=raw,image.file.filename=a.raw"


def cut_short(folder: Path, how: signal.Signals, *, before: str = "") -> int:
    """A conversion that does not end, ended while its target is being written; its exit status."""
    script = f"import os, sys\n{before}\nfrom lamina.cli.main import run\nrun()"
    arguments = ["convert", "--image-opts", "-O", "qcow2", SLOW, "target"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        descriptors, deadline = Path(f"/proc/{process.pid}/fd"), time.monotonic() + 60
        while not any("(deleted)" in name or temporary_name("target") in name for name in links(descriptors)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(how)
        return process.wait(60)


def links(folder: Path) -> Iterator[str]:
    for name in os.listdir(folder):
        try:
            yield os.readlink(folder / name)
        except OSError:
            continue


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("there", [False, True])
def test_a_signal_leaves_nothing(folder: Path, how: signal.Signals, there: bool) -> None:
    if there:
        (folder / "target").write_bytes(b"old")
    assert cut_short(folder, how) not in (0, 1)
    assert sorted(os.listdir(folder)) == ["a.raw", *(["target"] if there else [])]
    assert not there or (folder / "target").read_bytes() == b"old"


def test_where_files_have_names_a_kill_leaves_one(folder: Path) -> None:
    (folder / "target").write_bytes(b"old")
    for _ in range(2):
        assert cut_short(folder, signal.SIGKILL, before="del os.O_TMPFILE") == -signal.SIGKILL
        assert sorted(os.listdir(folder)) == [temporary_name("target"), "a.raw", "target"]
    assert cut_short(folder, signal.SIGINT, before="del os.O_TMPFILE") == 130
    assert sorted(os.listdir(folder)) == ["a.raw", "target"]
    assert (folder / "target").read_bytes() == b"old"


# -- sizes of new images


def test_odd_sizes(qemu: Qemu, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "odd.raw").write_bytes(b"x" * 1000)
    told = "is rounded up to 1024, since a qcow2 disk consists of sectors of 512 bytes\n"
    assert run("create", "-q", "-f", "qcow2", "new", "1000") == f"new: the size 1000 {told}"
    assert run("create", "-q", "-f", "qcow2", "-b", "odd.raw", "-F", "raw", "over") == f"over: the size 1000 {told}"
    assert run("create", "-q", "exact", "1000") == ""
    assert Path("exact").stat().st_size == 1000
    for name in ("new", "over"):
        assert re.search(r"virtual size: 1 KiB \(1024 bytes\)", qemu.img("info", name).stdout)
    capsys.readouterr()
    assert main(["compare", "-f", "raw", "-F", "qcow2", "odd.raw", "over"]) == 0
    for size, below, above in ((1000, 512, 1024), (1, 0, 512)):
        assert main(["io", "-f", "qcow2", "-c", f"truncate {size}", "new"]) == 1
        assert f"choose {below} or {above}" in "".join(capsys.readouterr())
    with lamina.open("new", format="qcow2", read_only=False) as image:
        with pytest.raises(lamina.OptionError, match="choose 512 or 1024"):
            image.truncate(1023)
        assert image.size == 1024
        image.truncate(512)
    assert qemu.check("new")[0] == 0


def test_odd_images_that_exist(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create("odd", "qcow2", 1024)
    with open("odd", "r+b") as file:
        file.seek(24)
        file.write((1000).to_bytes(8, "big"))
    assert main(["check", "odd"]) == 0
    told = capsys.readouterr()
    assert told.err == "note: the disk has 1000 bytes, not a multiple of the sector size: QEMU shows 512\n"
    assert "No errors were found" in told.out
    with lamina.open("odd", format="qcow2", read_only=False) as image:
        assert image.size == 1000
        image.write(990, b"0123456789")
        image.truncate(1000)
        assert image.read(990, 10) == b"0123456789"
        image.truncate(1536)
        assert image.read(1000, 536) == bytes(536)


# -- block devices


def loop_device(size: int, content: bytes, sector: int = 512) -> Iterator[tuple[str, int]]:
    """A loop device over a file in memory, and the descriptor of that file. (On a disk that others use each sync may take
    seconds.)"""
    fd = os.memfd_create("disk")
    try:
        os.write(fd, content)
        os.truncate(fd, size)
        where = f"/proc/{os.getpid()}/fd/{fd}"
        try:
            command = ["losetup", "-f", "--show", "-b", str(sector), where]
            name = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no loop devices here: {error}")
        try:
            yield name, fd
        finally:
            subprocess.run(["losetup", "-d", name], check=True, timeout=60)
    finally:
        os.close(fd)


@pytest.fixture(params=[512, 4096])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A block device of 16 MiB with sectors of that size, full of what was there before."""
    for name, _ in loop_device(16 * MIB, b"before: " * (2 * MIB), request.param):
        yield name


def test_new_images_on_a_device(
    qemu10: Qemu, folder: Path, device: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["create", "-f", "qcow2", device, "32M"]) == 0
    assert qemu10.check(device)[0] == 0
    assert content_of(device, "qcow2") == bytes(32 * MIB)
    with lamina.open(device, format="qcow2", read_only=False) as image:
        image.write(5 * MIB + 7, b"x" * 100)  # in the middle of a cluster, where the device holds something else
        assert image.read(5 * MIB, 64 * KIB) == bytes(7) + b"x" * 100 + bytes(64 * KIB - 107)
    for target in ("qcow2", "raw"):
        assert main(["convert", "-O", target, "a.raw", device]) == 0
        assert content_of(device, target)[: len(CONTENT)] == CONTENT
        qemu10.img("compare", "-f", "raw", "-F", target, "a.raw", device, check=target == "qcow2")
    assert main(["convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", "a.raw", device]) == 0
    assert content_of(device, "qcow2") == CONTENT
    assert qemu10.check(device)[0] == 0
    assert main(["copy", "a.raw", device]) == 0
    assert content_of(device, "raw")[: len(CONTENT)] == CONTENT
    assert caplog.messages == []  # that a device is written in place nobody needs to be told


def test_an_old_image_on_a_device_is_not_probed_next(
    folder: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "secret").write_bytes(b"secret" * 1000)
    assert main(["create", "-f", "qcow2", "-b", str(folder / "secret"), "-F", "raw", device]) == 0
    assert lamina.detect(device).format == "qcow2"
    with open(device, "r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(b"conectix" + bytes(504))  # the footer of a VHD
    assert main(["create", "-f", "raw", device, "1M"]) == 0
    assert lamina.detect(device).format == "raw"
    with open(device, "rb") as file:
        assert file.read(4) == bytes(4)


def test_a_device_that_is_too_small(folder: Path, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(device).read_bytes()
    assert main(["create", "-f", "raw", device, "17M"]) == 1
    assert "does not fit" in capsys.readouterr().err
    assert Path(device).read_bytes() == before
    with open("a.raw", "ab") as file:
        file.write(os.urandom(16 * MIB))
    assert main(["convert", "-O", "qcow2", "a.raw", device]) == 1
    assert device in capsys.readouterr().err
    assert lamina.detect(device).format == "raw"  # half of an image is none


# -- power cuts


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A descriptor of a file that holds a file system, and where that is mounted."""
    place = tmp_path / "mounted"
    place.mkdir()
    for name, fd in loop_device(64 * MIB, b""):
        try:
            subprocess.run(["mkfs.ext4", "-q", name], check=True, capture_output=True, timeout=60)
            subprocess.run(["mount", name, place], check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"nothing can be mounted here: {error}")
        try:
            yield fd, place
        finally:
            subprocess.run(["umount", place], check=True, timeout=60)


def after_a_power_cut(disk: int, place: Path, name: str) -> bytes | None:
    """What is in the file `name` of that file system if the power goes now."""
    place.mkdir(exist_ok=True)
    for device, _ in loop_device(64 * MIB, os.pread(disk, 64 * MIB, 0)):
        subprocess.run(["mount", device, place], check=True, timeout=60)
        try:
            return (place / name).read_bytes() if (place / name).exists() else None
        finally:
            subprocess.run(["umount", place], check=True, timeout=60)
    raise AssertionError


def test_what_a_power_cut_leaves(folder: Path, mounted: tuple[int, Path], capsys: pytest.CaptureFixture[str]) -> None:
    disk, place = mounted
    target = str(place / "target")
    for arguments in (["convert", "--flush", "a.raw"], ["convert", "a.raw"], ["copy", "--flush", "a.raw"]):
        assert main([*arguments, target]) == 0
        assert after_a_power_cut(disk, folder / "after", "target") == CONTENT
    os.link(target, place / "second")
    assert main(["convert", "-O", "qcow2", "a.raw", target]) == 0
    for name in ("target", "second"):
        assert after_a_power_cut(disk, folder / "after", name) == Path(target).read_bytes()
    assert main(["create", "-f", "qcow2", str(place / "created"), "1M"]) == 0
    assert after_a_power_cut(disk, folder / "after", "created") == (place / "created").read_bytes()
    assert main(["copy", "--flush", "a.raw", str(place / "copied")]) == 0
    assert after_a_power_cut(disk, folder / "after", "copied") == CONTENT

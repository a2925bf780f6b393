"""What names found inside images may not open, and the words of the refusals."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

import pytest

from lamina.errors import (
    BlockIOError,
    LaminaError,
    NotFound,
    PolicyError,
)
from lamina.policy import Policy
from lamina.testing.interrupts import in_another_thread

from .reference_folders import INSIDE, OUTSIDE, Folders


def test_none_refuses_without_looking(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a file was looked at")

    with monkeypatch.context() as patch:
        for call in ("open", "stat", "lstat", "readlink"):
            patch.setattr(os, call, forbidden)
        with pytest.raises(PolicyError, match="no name inside an image") as caught:
            Policy.none().open_reference("base", referrer=folders.image)
    assert f"--references list:{folders.home}/base" in caught.value.command_text()


@pytest.mark.parametrize(
    "name",
    [
        "../outside/secret",
        "sub/../../outside/secret",
        "{outside}/secret",
        "/etc/passwd",
        "../home",
        ".",
        "..",
        "/",
        "../home-2/base",
        "missing/../../outside/secret",
        "base/../../outside/secret",
    ],
)
def test_beneath_refuses_what_leads_outside(folders: Folders, name: str) -> None:
    (folders.top / "home-2").mkdir()
    (folders.top / "home-2" / "base").write_bytes(OUTSIDE)
    with pytest.raises(PolicyError):
        folders.read(Policy.beneath(), name.format(outside=folders.outside))


@pytest.mark.parametrize("target", ["../outside/secret", "{outside}/secret", "/etc/passwd", "sub/up/outside/secret"])
def test_beneath_refuses_symlinks_that_lead_outside(folders: Folders, target: str) -> None:
    (folders.home / "sub" / "up").symlink_to("../..")
    (folders.home / "link").symlink_to(target.format(outside=folders.outside))
    with pytest.raises(PolicyError, match="leads outside"):
        folders.read(Policy.beneath(), "link")
    (folders.home / "dir").symlink_to(folders.outside)
    with pytest.raises(PolicyError, match="leads outside"):
        folders.read(Policy.beneath(), "dir/secret")


def test_refusals_do_not_tell_whether_a_file_outside_exists(folders: Folders) -> None:
    texts = set()
    for name in ("../outside/secret", "../outside/absent"):
        with pytest.raises(PolicyError) as caught:
            folders.read(Policy.beneath(), name)
        texts.add(str(caught.value).replace(os.path.basename(name), "NAME"))
    assert len(texts) == 1


@pytest.mark.parametrize("policy", [Policy.beneath(), Policy.any()], ids=str)
def test_only_regular_files_are_opened(folders: Folders, policy: Policy) -> None:
    os.mkfifo(folders.home / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        # A socket's address is at most 108 bytes: bound by its short name, from inside.
        back = os.getcwd()
        os.chdir(folders.home)
        try:
            server.bind("socket")
        finally:
            os.chdir(back)
        for name, title in (("fifo", "a FIFO"), ("socket", "a socket"), ("sub", "a directory")):
            (folders.home / f"{name}-link").symlink_to(name)
            for way in (name, f"{name}-link"):
                for writable in (False, True):
                    with pytest.raises(PolicyError, match=title) as caught:
                        folders.read(policy, way, writable=writable)
                    assert "Policy.any()" not in str(caught.value)


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero", "/dev/tty"])
def test_character_devices_are_never_opened(folders: Folders, name: str) -> None:
    for policy in (Policy.any(), Policy.listed([name]), Policy.beneath("/")):
        with pytest.raises(PolicyError, match="a character device"):
            folders.read(policy, name)


def test_block_devices_only_where_listed_or_any(folders: Folders) -> None:
    device = folders.home / "disk"
    try:
        os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(7, 250))
    except PermissionError:
        pytest.skip("making a device node needs root")
    for policy in (Policy.beneath(), Policy.beneath("/")):
        with pytest.raises(PolicyError, match=r"block device.*Policy\.listed"):
            folders.read(policy, "disk")
    for policy in (Policy.listed([device]), Policy.any()):
        # Whether there is such a device is for the system to say; what matters is that the policy does not refuse.
        with contextlib.suppress(BlockIOError):
            os.close(policy.open_reference("disk", referrer=folders.image).fd)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize(
    "spelling", ["/proc/self/fd/{fd}", "/dev/fd/{fd}", "/proc/{pid}/root{path}", "/proc/self/environ"]
)
def test_proc_is_never_entered(folders: Folders, spelling: str) -> None:
    with open(folders.home / "base", "rb") as granted:
        name = spelling.format(fd=granted.fileno(), pid=os.getpid(), path=folders.home / "base")
        (folders.home / "link").symlink_to(name)
        for policy in (Policy.any(), Policy.beneath(), Policy.beneath("/"), Policy.listed([name])):
            for way in (name, "link"):
                with pytest.raises(PolicyError):
                    folders.read(policy, way)


@pytest.mark.parametrize(
    "name",
    [
        "json:{}",
        'json:{"driver":"nbd","path":"/tmp/s"}',
        "nbd:localhost:10809",
        "nbd+unix:///x?socket=/tmp/s",
        "http://example.org/x",
        "fd:3",
        "fat:rw:/etc",
        "blkdebug::base",
        "host_device:/dev/sda",
        "C:\\disks\\base.vmdk",
    ],
)
@pytest.mark.parametrize("policy", [Policy.beneath(), Policy.any()], ids=str)
def test_names_are_never_urls_or_options(folders: Folders, name: str, policy: Policy) -> None:
    with pytest.raises(PolicyError, match="always a path"):
        folders.read(policy, name)
    # Not even where a file of that name exists: whoever reads the message must not be left guessing which was meant.
    if "/" not in name:
        (folders.home / name).write_bytes(INSIDE)
        with pytest.raises(PolicyError, match="always a path"):
            folders.read(policy, name)
        assert folders.read(policy, f"./{name}") == INSIDE


@pytest.mark.parametrize("name", ["a b:c", "2024-10-01T10:00.img", ":base", "sub/x:y", "é:x"])
def test_a_colon_alone_makes_no_url(folders: Folders, name: str) -> None:
    (folders.home / name).write_bytes(INSIDE)
    assert folders.read(Policy.beneath(), name) == INSIDE


def test_file_is_part_of_a_path(folders: Folders) -> None:
    with pytest.raises(NotFound):
        folders.read(Policy.any(), f"file:{folders.secret}")
    with pytest.raises(NotFound):
        folders.read(Policy.beneath(), "file:base")
    (folders.home / "file:base").write_bytes(b"literal")
    assert folders.read(Policy.beneath(), "file:base") == b"literal"


@pytest.mark.parametrize("name", ["", "base\0", "\0", "a" * 4097, "é" * 2049, "\ud800", "x/\udfff"])
def test_names_that_are_no_names(folders: Folders, name: str) -> None:
    for policy in (Policy.beneath(), Policy.any()):
        with pytest.raises(PolicyError) as caught:
            folders.read(policy, name)
        assert len(str(caught.value)) < 600 + len(folders.image)


def test_a_name_of_the_greatest_length_is_tried(folders: Folders) -> None:
    name = "./" * 2046 + "base"
    assert len(name) == 4096
    assert folders.read(Policy.beneath(), name) == INSIDE


def test_bytes_that_are_not_utf8_are_a_name_like_any_other(folders: Folders) -> None:
    name = os.fsdecode(b"base\xff")
    (folders.home / name).write_bytes(INSIDE)
    assert folders.read(Policy.beneath(), name) == INSIDE


def test_a_missing_file_names_image_and_reference(folders: Folders) -> None:
    with pytest.raises(NotFound) as caught:
        folders.read(Policy.beneath(), "sub/absent", what="data file")
    assert isinstance(caught.value, FileNotFoundError)
    text = str(caught.value)
    assert folders.image in text
    assert 'data file "sub/absent"' in text
    assert str(folders.home / "sub" / "absent") in text


def test_a_file_in_the_place_of_a_directory(folders: Folders) -> None:
    with pytest.raises(BlockIOError) as caught:
        folders.read(Policy.beneath(), "base/deeper")
    assert not isinstance(caught.value, NotFound)
    assert folders.image in str(caught.value)


@pytest.mark.parametrize("policy", [Policy.beneath(), Policy.any()], ids=str)
def test_loops_of_links(folders: Folders, policy: Policy) -> None:
    (folders.home / "a").symlink_to("b")
    (folders.home / "b").symlink_to("a")
    with pytest.raises(PolicyError):
        folders.read(policy, "a")


def test_links_that_grow_the_path_end_soon(folders: Folders) -> None:
    (folders.home / "sub" / "x").symlink_to("x/x/x/x/x/x/x/x")
    in_another_thread(lambda: _refused(folders, "sub/x"))


def _refused(folders: Folders, name: str) -> None:
    with pytest.raises(PolicyError):
        folders.read(Policy.beneath(), name)


def test_refusals_say_what_name_policy_and_way_out(folders: Folders) -> None:
    with pytest.raises(PolicyError) as caught:
        folders.read(Policy.beneath(), "/etc/passwd", what="data file")
    text = str(caught.value)
    assert "--references list:/etc/passwd" in caught.value.command_text()
    for part in (
        folders.image,
        'data file "/etc/passwd"',
        "same-dir",
        "references=Policy.listed(['/etc/passwd'])",
        str(folders.home),
    ):
        assert part in text
    assert isinstance(caught.value, PermissionError)
    assert caught.value.path == folders.image


def test_messages_are_safe_for_a_terminal(folders: Folders) -> None:
    for policy in (Policy.none(), Policy.beneath(), Policy.beneath("/x\x1b]0;y"), Policy.any()):
        for name in ("\x1b]0;owned\x07", "/\n\r\x1b[2J", "\x1b" * 5000, "fd:\x1b[2J"):
            with pytest.raises(LaminaError) as caught:
                folders.read(policy, name)
            assert str(caught.value).isprintable()

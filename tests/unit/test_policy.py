"""What names found inside images may open: grants, refusals, races and chains, on real files.

Longer than 500 lines: every test stands in the same house of files and links, and most are one line of a table of names.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import shlex
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lamina import policy as policy_module
from lamina.errors import (
    BlockIOError,
    CorruptImage,
    LaminaError,
    LimitExceeded,
    NotFound,
    OptionError,
    PolicyError,
)
from lamina.limits import Budget
from lamina.policy import Policy, Trail

INSIDE = b"granted"
OUTSIDE = b"secret"


class House:
    """A directory with an image and its base, and files outside of it that nobody granted."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.home = top / "home"
        self.outside = top / "outside"
        (self.home / "sub").mkdir(parents=True)
        self.outside.mkdir()
        self.image = str(self.home / "top.qcow2")
        for path in (Path(self.image), self.home / "base", self.home / "sub" / "base"):
            path.write_bytes(INSIDE)
        self.secret = self.outside / "secret"
        self.secret.write_bytes(OUTSIDE)

    def read(self, policy: Policy, name: str, **options: Any) -> bytes:
        reference = policy.open_reference(name, referrer=self.image, **options)
        try:
            assert os.path.samestat(os.fstat(reference.fd), os.stat(reference.path))
            assert os.path.realpath(reference.path) == reference.path
            return os.pread(reference.fd, 100, 0)
        finally:
            os.close(reference.fd)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    before = sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []
    yield House(Path(os.path.realpath(tmp_path)))
    if before:
        assert sorted(os.listdir("/proc/self/fd")) == before, "a descriptor was left open"


# --- what is granted


@pytest.mark.parametrize(
    "name", ["base", "./base", "sub/base", "sub/../base", "../home/base", "sub//base", "./sub/./base"]
)
def test_beneath_opens_files_below_the_directory_of_the_image(house: House, name: str) -> None:
    assert house.read(Policy.beneath(), name) == INSIDE


def test_beneath_takes_absolute_names_that_are_inside(house: House) -> None:
    assert house.read(Policy.beneath(), str(house.home / "sub" / "base")) == INSIDE


def test_beneath_takes_an_absolute_name_that_reaches_the_directory_by_another_way(house: House) -> None:
    (house.top / "alias").symlink_to(house.home)
    assert house.read(Policy.beneath(), str(house.top / "alias" / "base")) == INSIDE


@pytest.mark.parametrize("target", ["base", "sub/base", "../home/base", "sub/../base", "{home}/sub/base", "second"])
def test_symlinks_that_stay_inside_are_followed(house: House, target: str) -> None:
    (house.home / "second").symlink_to("sub/base")
    (house.home / "link").symlink_to(target.format(home=house.home))
    assert house.read(Policy.beneath(), "link") == INSIDE


def test_folders_that_are_links_are_followed_beneath_a_folder_that_was_named(house: House) -> None:
    (house.home / "dir").symlink_to("sub")
    policy = Policy.beneath(house.home)
    assert house.read(policy, "dir/base") == INSIDE
    assert house.read(policy, "dir/../base") == INSIDE


@pytest.mark.parametrize("name", ["dir/base", "dir/../base", "link", "{home}/dir/base"])
def test_the_own_folder_does_not_pass_folders_that_are_links(house: House, name: str) -> None:
    (house.home / "dir").symlink_to("sub")
    (house.home / "link").symlink_to("dir/base")
    with pytest.raises(PolicyError, match=r'through ".*/dir"') as caught:
        house.read(Policy.beneath(), name.format(home=house.home))
    assert f"list:{house.home}/" in str(caught.value)


@pytest.mark.parametrize(
    "name", [".hidden", ".ssh/base", "sub/.hidden", "sub/../.hidden", "link", "...", "{home}/.hidden"]
)
def test_the_own_folder_has_no_hidden_files(house: House, name: str) -> None:
    (house.home / ".ssh").mkdir()
    for path in (".hidden", ".ssh/base", "sub/.hidden", "..."):
        (house.home / path).write_bytes(OUTSIDE)
    (house.home / "link").symlink_to(".hidden")
    with pytest.raises(PolicyError, match="hidden"):
        house.read(Policy.beneath(), name.format(home=house.home))
    assert house.read(Policy.beneath(house.home), name.format(home=house.home)) == OUTSIDE


def test_the_own_folder_may_lie_in_a_hidden_one_or_behind_a_link(house: House) -> None:
    local = house.top / ".local" / "images"
    local.mkdir(parents=True)
    (house.top / "pool").symlink_to(local)
    for path in ("top", "base"):
        (local / path).write_bytes(INSIDE)
    house.image = str(local / "top")
    for name in ("base", str(local / "base"), str(house.top / "pool" / "base")):
        assert house.read(Policy.beneath(), name) == INSIDE


@pytest.mark.parametrize("odd", ["plain", "a b", "it's", "a:b", "a\\b", "$(touch x)", "-x"])
def test_the_grant_that_a_refusal_names_works(house: House, odd: str) -> None:
    """Typed into a shell it grants this file, and those that were granted before."""
    (house.outside / odd).write_bytes(OUTSIDE)
    policy = Policy.beneath()
    for name in (f"../outside/{odd}", "../outside/secret"):
        with pytest.raises(PolicyError) as caught:
            house.read(policy, name)
        words = shlex.split(str(caught.value).partition("to allow it, give ")[2].partition(" (in Python")[0])
        assert words[0] == "--references"
        policy = Policy.parse(words[1])
        assert policy.kind == "listed"
        assert house.read(policy, name) == OUTSIDE
    assert house.read(policy, f"../outside/{odd}") == OUTSIDE


def test_what_was_only_probed_opens_nothing(house: House) -> None:
    with pytest.raises(PolicyError, match="-f qcow2") as caught:
        house.read(Policy.probed("qcow2"), "base")
    assert f"--references list:{house.home}/base" in str(caught.value)


# --- what a site sets


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a user, and none of the system."""
    monkeypatch.delenv("LAMINA_REFERENCES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(policy_module, "SYSTEM_DEFAULT", str(tmp_path / "etc"))
    path = tmp_path / "config" / "lamina" / "references"
    path.parent.mkdir(parents=True)
    return path


def test_a_site_sets_its_default(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = Path(policy_module.SYSTEM_DEFAULT)
    assert Policy.default() == Policy.beneath()
    system.write_text("# all images lie here\n\n  beneath:/srv  \nany\n")
    assert Policy.default() == Policy.beneath("/srv")
    site.write_text("none\n")
    assert Policy.default() == Policy.none()
    monkeypatch.setenv("LAMINA_REFERENCES", "list:/a:/b")
    assert Policy.default() == Policy.listed(["/a", "/b"])
    monkeypatch.setenv("LAMINA_REFERENCES", "")
    assert Policy.default() == Policy.none()
    # With more rights than its user, a process trusts nothing that the user sets.
    monkeypatch.setenv("LAMINA_REFERENCES", "any")
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    assert Policy.default() == Policy.beneath("/srv")


def test_a_default_that_is_wrong_names_its_place(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.write_text("everything\n")
    with pytest.raises(OptionError, match=r"lamina/references: .everything. is not a policy"):
        Policy.default()
    monkeypatch.setenv("LAMINA_REFERENCES", "all")
    with pytest.raises(OptionError, match=r"LAMINA_REFERENCES: .all. is not a policy"):
        Policy.default()


def test_a_default_that_others_could_have_written_does_not_count(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.write_text("any\n")
    site.chmod(0o666)
    with pytest.raises(OptionError, match="others may write"):
        Policy.default()
    site.unlink()
    os.mkfifo(site)
    assert Policy.default() == Policy.beneath()
    site.unlink()
    site.write_text("any\n")
    if os.geteuid() == 0:
        os.chown(site, 12345, -1)
        assert Policy.default() == Policy.beneath()


def test_beneath_a_directory_resolves_names_from_the_image_and_judges_by_the_directory(house: House) -> None:
    policy = Policy.beneath(house.top)
    assert house.read(policy, "base") == INSIDE
    assert house.read(policy, "../outside/secret") == OUTSIDE
    with pytest.raises(PolicyError):
        house.read(Policy.beneath(house.outside), "base")


def test_beneath_the_root_is_everything_regular(house: House) -> None:
    assert house.read(Policy.beneath("/"), str(house.secret)) == OUTSIDE


def test_a_directory_is_resolved_when_the_policy_is_made(house: House) -> None:
    link = house.top / "pool"
    link.symlink_to(house.home)
    policy = Policy.beneath(link)
    link.unlink()
    link.symlink_to(house.outside)
    assert house.read(policy, "base") == INSIDE
    with pytest.raises(PolicyError):
        house.read(policy, str(house.secret))


def test_listed_grants_exactly_its_files(house: House) -> None:
    policy = Policy.listed([house.secret, house.home / "missing"])
    assert house.read(policy, str(house.secret)) == OUTSIDE
    assert house.read(policy, "../outside/secret") == OUTSIDE
    with pytest.raises(NotFound):
        house.read(policy, "missing")
    with pytest.raises(PolicyError, match="not in the list"):
        house.read(policy, "base")
    with pytest.raises(PolicyError, match="not in the list"):
        house.read(policy, str(house.outside))


def test_a_listed_link_is_resolved_when_the_policy_is_made(house: House) -> None:
    link = house.home / "link"
    link.symlink_to("base")
    policy = Policy.listed([link])
    assert house.read(policy, "link") == INSIDE
    link.unlink()
    link.symlink_to(house.secret)
    with pytest.raises(PolicyError):
        house.read(policy, "link")


def test_any_opens_regular_files_everywhere(house: House) -> None:
    assert house.read(Policy.any(), str(house.secret)) == OUTSIDE
    (house.home / "link").symlink_to(house.secret)
    assert house.read(Policy.any(), "link") == OUTSIDE


def test_a_relative_referrer_is_relative_to_the_working_directory(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(house.top)
    reference = Policy.beneath().open_reference("base", referrer="home/top.qcow2")
    os.close(reference.fd)
    assert reference.path == str(house.home / "base")


def test_the_descriptor_is_read_only_blocking_and_not_inherited(house: House) -> None:
    reference = Policy.beneath().open_reference("base", referrer=house.image)
    try:
        assert reference.path == str(house.home / "base")
        assert not os.get_inheritable(reference.fd)
        assert os.get_blocking(reference.fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(reference.fd, b"x", 0)
    finally:
        os.close(reference.fd)


def test_writable_opens_for_writing(house: House) -> None:
    reference = Policy.beneath().open_reference("base", referrer=house.image, writable=True)
    try:
        assert os.pwrite(reference.fd, b"G", 0) == 1
    finally:
        os.close(reference.fd)
    assert (house.home / "base").read_bytes() == b"Granted"


# --- what is refused


def test_none_refuses_without_looking(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a file was looked at")

    with monkeypatch.context() as patch:
        for call in ("open", "stat", "lstat", "readlink"):
            patch.setattr(os, call, forbidden)
        with pytest.raises(PolicyError, match="no name found inside an image") as caught:
            Policy.none().open_reference("base", referrer=house.image)
    assert f"--references list:{house.home}/base" in str(caught.value)


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
def test_beneath_refuses_what_leads_outside(house: House, name: str) -> None:
    (house.top / "home-2").mkdir()
    (house.top / "home-2" / "base").write_bytes(OUTSIDE)
    with pytest.raises(PolicyError):
        house.read(Policy.beneath(), name.format(outside=house.outside))


@pytest.mark.parametrize("target", ["../outside/secret", "{outside}/secret", "/etc/passwd", "sub/up/outside/secret"])
def test_beneath_refuses_symlinks_that_lead_outside(house: House, target: str) -> None:
    (house.home / "sub" / "up").symlink_to("../..")
    (house.home / "link").symlink_to(target.format(outside=house.outside))
    with pytest.raises(PolicyError, match="leads outside"):
        house.read(Policy.beneath(), "link")
    (house.home / "dir").symlink_to(house.outside)
    with pytest.raises(PolicyError, match="leads outside"):
        house.read(Policy.beneath(), "dir/secret")


def test_refusals_do_not_tell_whether_a_file_outside_exists(house: House) -> None:
    texts = set()
    for name in ("../outside/secret", "../outside/absent"):
        with pytest.raises(PolicyError) as caught:
            house.read(Policy.beneath(), name)
        texts.add(str(caught.value).replace(os.path.basename(name), "NAME"))
    assert len(texts) == 1


@pytest.mark.parametrize("policy", [Policy.beneath(), Policy.any()], ids=str)
def test_only_regular_files_are_opened(house: House, policy: Policy) -> None:
    os.mkfifo(house.home / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        # A socket's address is at most 108 bytes: bound by its short name, from inside.
        back = os.getcwd()
        os.chdir(house.home)
        try:
            server.bind("socket")
        finally:
            os.chdir(back)
        begun = time.monotonic()
        for name, title in (("fifo", "a FIFO"), ("socket", "a socket"), ("sub", "a directory")):
            (house.home / f"{name}-link").symlink_to(name)
            for way in (name, f"{name}-link"):
                for writable in (False, True):
                    with pytest.raises(PolicyError, match=title) as caught:
                        house.read(policy, way, writable=writable)
                    assert "Policy.any()" not in str(caught.value)
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero", "/dev/tty"])
def test_character_devices_are_never_opened(house: House, name: str) -> None:
    for policy in (Policy.any(), Policy.listed([name]), Policy.beneath("/")):
        with pytest.raises(PolicyError, match="a character device"):
            house.read(policy, name)


def test_block_devices_only_where_listed_or_any(house: House) -> None:
    device = house.home / "disk"
    try:
        os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(7, 250))
    except PermissionError:
        pytest.skip("making a device node needs root")
    for policy in (Policy.beneath(), Policy.beneath("/")):
        with pytest.raises(PolicyError, match=r"block device.*Policy\.listed"):
            house.read(policy, "disk")
    for policy in (Policy.listed([device]), Policy.any()):
        # Whether there is such a device is for the system to say; what matters is that the policy does not refuse.
        with contextlib.suppress(BlockIOError):
            os.close(policy.open_reference("disk", referrer=house.image).fd)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize(
    "spelling", ["/proc/self/fd/{fd}", "/dev/fd/{fd}", "/proc/{pid}/root{path}", "/proc/self/environ"]
)
def test_proc_is_never_entered(house: House, spelling: str) -> None:
    with open(house.home / "base", "rb") as granted:
        name = spelling.format(fd=granted.fileno(), pid=os.getpid(), path=house.home / "base")
        (house.home / "link").symlink_to(name)
        for policy in (Policy.any(), Policy.beneath(), Policy.beneath("/"), Policy.listed([name])):
            for way in (name, "link"):
                with pytest.raises(PolicyError):
                    house.read(policy, way)


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
def test_names_are_never_urls_or_options(house: House, name: str, policy: Policy) -> None:
    with pytest.raises(PolicyError, match="explicitly"):
        house.read(policy, name)
    # Not even where a file of that name exists: whoever reads the message must not be left guessing which was meant.
    if "/" not in name:
        (house.home / name).write_bytes(INSIDE)
        with pytest.raises(PolicyError, match="explicitly"):
            house.read(policy, name)
        assert house.read(policy, f"./{name}") == INSIDE


@pytest.mark.parametrize("name", ["a b:c", "2024-10-01T10:00.img", ":base", "sub/x:y", "é:x"])
def test_a_colon_alone_makes_no_url(house: House, name: str) -> None:
    (house.home / name).write_bytes(INSIDE)
    assert house.read(Policy.beneath(), name) == INSIDE


def test_file_is_part_of_a_path(house: House) -> None:
    with pytest.raises(NotFound):
        house.read(Policy.any(), f"file:{house.secret}")
    with pytest.raises(NotFound):
        house.read(Policy.beneath(), "file:base")
    (house.home / "file:base").write_bytes(b"literal")
    assert house.read(Policy.beneath(), "file:base") == b"literal"


@pytest.mark.parametrize("name", ["", "base\0", "\0", "a" * 4097, "é" * 2049, "\ud800", "x/\udfff"])
def test_names_that_are_no_names(house: House, name: str) -> None:
    for policy in (Policy.beneath(), Policy.any()):
        with pytest.raises(PolicyError) as caught:
            house.read(policy, name)
        assert len(str(caught.value)) < 600 + len(house.image)


def test_a_name_of_the_greatest_length_is_tried(house: House) -> None:
    name = "./" * 2046 + "base"
    assert len(name) == 4096
    assert house.read(Policy.beneath(), name) == INSIDE


def test_bytes_that_are_not_utf8_are_a_name_like_any_other(house: House) -> None:
    name = os.fsdecode(b"base\xff")
    (house.home / name).write_bytes(INSIDE)
    assert house.read(Policy.beneath(), name) == INSIDE


def test_a_missing_file_names_image_and_reference(house: House) -> None:
    with pytest.raises(NotFound) as caught:
        house.read(Policy.beneath(), "sub/absent", what="data file")
    assert isinstance(caught.value, FileNotFoundError)
    text = str(caught.value)
    assert house.image in text
    assert 'data file "sub/absent"' in text
    assert str(house.home / "sub" / "absent") in text


def test_a_file_in_the_place_of_a_directory(house: House) -> None:
    with pytest.raises(BlockIOError) as caught:
        house.read(Policy.beneath(), "base/deeper")
    assert not isinstance(caught.value, NotFound)
    assert house.image in str(caught.value)


@pytest.mark.parametrize("policy", [Policy.beneath(), Policy.any()], ids=str)
def test_loops_of_links(house: House, policy: Policy) -> None:
    (house.home / "a").symlink_to("b")
    (house.home / "b").symlink_to("a")
    with pytest.raises(PolicyError):
        house.read(policy, "a")


def test_links_that_grow_the_path_end_soon(house: House) -> None:
    (house.home / "sub" / "x").symlink_to("x/x/x/x/x/x/x/x")
    begun = time.monotonic()
    with pytest.raises(PolicyError):
        house.read(Policy.beneath(), "sub/x")
    assert time.monotonic() - begun < 1


def test_refusals_say_what_name_policy_and_way_out(house: House) -> None:
    with pytest.raises(PolicyError) as caught:
        house.read(Policy.beneath(), "/etc/passwd", what="data file")
    text = str(caught.value)
    for part in (
        house.image,
        'data file "/etc/passwd"',
        "same-dir",
        "--references list:/etc/passwd",
        "Policy.listed(['/etc/passwd'])",
        str(house.home),
    ):
        assert part in text
    assert isinstance(caught.value, PermissionError)
    assert caught.value.path == house.image


def test_messages_are_safe_for_a_terminal(house: House) -> None:
    for policy in (Policy.none(), Policy.beneath(), Policy.beneath("/x\x1b]0;y"), Policy.any()):
        for name in ("\x1b]0;owned\x07", "/\n\r\x1b[2J", "\x1b" * 5000, "fd:\x1b[2J"):
            with pytest.raises(LaminaError) as caught:
                house.read(policy, name)
            assert str(caught.value).isprintable()


# --- races


def after(monkeypatch: pytest.MonkeyPatch, method: str, action: Any) -> None:
    """Let `action` happen once, right after the policy's own `method` was satisfied."""
    original = getattr(policy_module._Case, method)
    done: list[bool] = []

    def wrapper(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if not done:
            done.append(True)
            action()
        return result

    monkeypatch.setattr(policy_module._Case, method, wrapper)


@pytest.mark.parametrize("step", ["judge_path", "judge_type"])
def test_a_file_swapped_for_a_link_is_not_followed(house: House, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def swap() -> None:
        (house.home / "base").unlink()
        (house.home / "base").symlink_to(house.secret)

    after(monkeypatch, step, swap)
    with pytest.raises(PolicyError, match="changed"):
        house.read(Policy.beneath(), "base")


@pytest.mark.parametrize("depth", ["sub", "deep/er"])
def test_a_directory_swapped_for_a_link_is_not_followed(
    house: House, monkeypatch: pytest.MonkeyPatch, depth: str
) -> None:
    directory = house.home / depth
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "secret").write_bytes(INSIDE)

    def swap() -> None:
        first = house.home / depth.split("/")[0]
        first.rename(house.home / "away")
        if depth != "sub":
            (house.outside / "er").mkdir()
            (house.outside / "er" / "secret").write_bytes(OUTSIDE)
        first.symlink_to(house.outside)

    after(monkeypatch, "judge_path", swap)
    with pytest.raises(LaminaError):
        house.read(Policy.beneath(), f"{depth}/secret")


@pytest.mark.parametrize("step", ["judge_path", "judge_type"])
def test_a_file_swapped_for_a_fifo_does_not_block(house: House, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def swap() -> None:
        (house.home / "base").unlink()
        os.mkfifo(house.home / "base")

    after(monkeypatch, step, swap)
    with pytest.raises(PolicyError, match="FIFO"):
        house.read(Policy.beneath(), "base")


def test_a_file_removed_in_between_is_not_found(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, "judge_type", lambda: (house.home / "base").unlink())
    with pytest.raises(NotFound):
        house.read(Policy.beneath(), "base")


def test_swapping_for_real_never_wins(house: House) -> None:
    """One thread turns a file and a directory into links to the outside and back, as fast as it can."""
    stop = threading.Event()
    (house.outside / "base").write_bytes(OUTSIDE)
    for name in ("base", "sub"):
        (house.home / f"good-{name}").symlink_to(f"real-{name}")
        (house.home / name).rename(house.home / f"real-{name}")
    plans = [("base", "real-base", house.secret), ("sub", "real-sub", house.outside)]

    def flip() -> None:
        while not stop.is_set():
            for name, good, bad in plans:
                for target in (good, bad):
                    fresh = house.home / "fresh"
                    fresh.symlink_to(target)
                    fresh.rename(house.home / name)
            # A real file in the place of the link, which is what the check before the open sees.
            os.link(house.home / "real-base", house.home / "fresh")
            (house.home / "fresh").rename(house.home / "base")

    thread = threading.Thread(target=flip)
    thread.start()
    opened = refused = 0
    try:
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            for name in ("base", "sub/base"):
                try:
                    fd = Policy.beneath().open_reference(name, referrer=house.image).fd
                except LaminaError:
                    refused += 1
                    continue
                opened += 1
                content = os.pread(fd, 100, 0)
                os.close(fd)
                assert content == INSIDE
    finally:
        stop.set()
        thread.join()
    assert opened
    assert refused


# --- any name at all


@given(
    st.lists(
        st.sampled_from(["..", ".", "", "sub", "base", "link", "up", "home", "outside", "secret", "proc", "etc", "x:"]),
        max_size=8,
    ).map("/".join)
    | st.text(max_size=30)
)
@example("/proc/self/cwd/../outside/secret")
@example("up/../../outside/secret")
def test_no_name_escapes_and_no_other_error_appears(name: str) -> None:
    with tempfile.TemporaryDirectory() as top:
        house = House(Path(os.path.realpath(top)))
        (house.home / "link").symlink_to("../outside")
        (house.home / "sub" / "up").symlink_to("..")
        with contextlib.suppress(LaminaError):
            assert house.read(Policy.beneath(), name) == INSIDE


# --- the object and its text


@pytest.mark.parametrize(
    "text", ["none", "same-dir", "any", "beneath:/", "beneath:/a:b", "list:/a", r"list:/a\:b:/c\\d"]
)
def test_text_and_back(text: str) -> None:
    policy = Policy.parse(text)
    assert str(policy) == text
    assert Policy.parse(str(policy)) == policy
    assert text in repr(policy) or "\\" in text


def test_parse_gives_what_the_constructors_give(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Policy.parse("none") == Policy.none()
    assert Policy.parse("any") == Policy.any()
    assert Policy.parse("same-dir") == Policy.beneath()
    monkeypatch.chdir(house.top)
    assert Policy.parse("beneath:home") == Policy.beneath(house.home)
    assert Policy.parse("list:home/base:outside/secret") == Policy.listed([house.secret, house.home / "base"])
    assert Policy.parse(r"list:/a\:b").paths == ("/a:b",)
    assert Policy.parse(r"list:/a\nb").paths == (r"/a\nb",)


@given(st.lists(st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1, max_size=6), min_size=1))
def test_every_list_survives_its_text(names: list[str]) -> None:
    policy = Policy.listed([f"/nowhere/{name}" for name in names])
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize(
    "text",
    ["", "None", "all", "any:", "none:x", "same-dir:x", "beneath", "beneath:", "list", "list:", "list:a:", "list::a"],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        Policy.parse(text)
    assert "same-dir" in str(caught.value)


def test_a_list_is_not_a_string() -> None:
    with pytest.raises(OptionError):
        Policy.listed("/etc/passwd")


def test_policies_are_values() -> None:
    assert Policy.none() == Policy.none()
    assert Policy.none() != Policy.any()
    assert Policy.any() != "any"
    assert len({Policy.any(), Policy.any(), Policy.beneath(), Policy.beneath("/")}) == 3
    with pytest.raises(AttributeError):
        Policy.any().kind = "none"  # type: ignore[misc]
    for policy in (Policy.beneath("/x"), Policy.probed("qcow2"), Policy.listed(["/a", "/b"])):
        assert pickle.loads(pickle.dumps(policy)) == policy
        assert copy.deepcopy(policy) == policy


@pytest.mark.parametrize("members", [{"chain_depth": 151}, {"chain_depth": -1}, {"memory": "1G"}, {"rows": 1.5}])
def test_budgets_that_cannot_be(members: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(members))):
        Budget(**members)
    with pytest.raises(OptionError):
        Budget()._replace(**members)


def test_a_budget_is_a_value() -> None:
    budget = Budget(chain_depth=150, memory=1)
    assert budget == Budget(150, memory=1)
    assert pickle.loads(pickle.dumps(budget)) == copy.deepcopy(budget) == budget


# --- chains


def test_a_trail_finds_itself() -> None:
    trail = Trail().enter(1, 10, "/top").enter(1, 11, "/middle").enter(2, 10, "/other-device")
    with pytest.raises(CorruptImage, match="contains itself") as caught:
        trail.enter(1, 10, "/link-to-top\n")
    assert "3 levels above" in str(caught.value)
    assert "/top" in str(caught.value)
    assert str(caught.value).isprintable()
    with pytest.raises(CorruptImage, match="1 level above"):
        trail.enter(2, 10, "/again")


def test_trails_are_immutable_and_share_parents() -> None:
    top = Trail(2).enter(1, 1, "/top")
    left = top.enter(1, 2, "/left")
    right = top.enter(1, 3, "/right")
    assert left.enter(1, 3, "/right") != right.enter(1, 2, "/left")
    assert top == Trail(2).enter(1, 1, "/top")


@pytest.mark.parametrize("limit", [0, 1, 64])
def test_a_trail_ends_at_its_limit(limit: int) -> None:
    trail = Trail(limit).enter(1, 0, "/top")
    for ino in range(1, limit + 1):
        trail = trail.enter(1, ino, f"/{ino}")
    with pytest.raises(LimitExceeded, match=f"limit of {limit} files"):
        trail.enter(1, limit + 1, "/below")

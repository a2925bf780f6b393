"""Files that are replaced stay what they were: owner, permissions, attributes; or are written in place, and said to be."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.atomic_file import HEADER_BYTES, AtomicFile, write_file
from lamina.errors import BlockIOError, LaminaError, Locked
from lamina.target_file import Target
from tests.unit.replacing import NOBODY, OTHER, as_user, fail, needs_root, no_tmpfile

# -- files that are replaced


@pytest.mark.usefixtures("tmpfile")
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"old")
    target.chmod(0o640)
    os.setxattr(target, "user.note", b"kept")
    inode = target.stat().st_ino
    with AtomicFile(target) as file:
        os.write(file.fd, b"new")
        assert stat.S_IMODE(os.fstat(file.fd).st_mode) == 0o640
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert target.stat().st_ino != inode
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert os.getxattr(target, "user.note") == b"kept"
    assert os.listdir(tmp_path) == ["disk"]


@needs_root
@pytest.mark.usefixtures("tmpfile")
@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o1644, 0o7777, 0o600])
def test_the_administrator_gives_no_rights_away(tmp_path: Path, mode: int) -> None:
    """Neither the user's content with root's rights, nor root's file to the user with more rights than before."""
    target = tmp_path / "disk"
    target.write_bytes(b"old")
    os.chown(target, OTHER, NOBODY)
    target.chmod(mode)
    os.setxattr(target, "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    write_file(target, b"new")
    status = target.stat()
    assert (status.st_uid, status.st_gid) == (OTHER, NOBODY)
    assert stat.S_IMODE(status.st_mode) == mode & 0o777
    assert "security.capability" not in os.listxattr(target)
    assert target.read_bytes() == b"new"


def acl(user: int, rights: int) -> bytes:
    """An access control list, as the system stores it: owner, one user, group, mask, others."""
    none = 0xFFFFFFFF
    rows = [(1, 6, none), (2, rights, user), (4, 0, none), (16, rights, none), (32, 0, none)]
    return (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + right.to_bytes(2, "little") + who.to_bytes(4, "little") for tag, right, who in rows
    )


@pytest.mark.usefixtures("tmpfile")
def test_access_control_lists(tmp_path: Path) -> None:
    """The list of the old file is kept; that which the folder has for new files is not given to one that had none."""
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl(NOBODY, 6))
    except OSError as error:
        pytest.skip(f"no access control lists on this file system: {error}")
    target, plain = tmp_path / "disk", tmp_path / "plain"
    for path in (target, plain):
        path.write_bytes(b"old")
        os.removexattr(path, "system.posix_acl_access")
        path.chmod(0o640)
    os.setxattr(target, "system.posix_acl_access", acl(OTHER, 4))
    mode = target.stat().st_mode
    write_file(target, b"new")
    write_file(plain, b"new")
    assert os.getxattr(target, "system.posix_acl_access") == acl(OTHER, 4)
    assert target.stat().st_mode == mode
    assert os.listxattr(plain) == []
    assert stat.S_IMODE(plain.stat().st_mode) == 0o640


def test_a_file_that_another_replaced_meanwhile_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"old")
    (tmp_path / "other").write_bytes(b"theirs")
    with pytest.raises(BlockIOError, match="replaced this file meanwhile"), AtomicFile(target):
        os.replace(tmp_path / "other", target)
    assert target.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["disk"]


@pytest.mark.usefixtures("tmpfile")
def test_the_old_file_is_held_until_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"old")
    told: list[str] = []

    def lock(fd: int, path: str) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert path == str(target)

    old = os.open(target, os.O_RDONLY)
    try:
        real = os.replace

        def replace(*names: Any, **folders: Any) -> None:
            real(*names, **folders)
            with pytest.raises(BlockingIOError):
                fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
            told.append("held")

        monkeypatch.setattr(os, "replace", replace)
        with AtomicFile(target, lock=lock) as file:
            os.write(file.fd, b"new")
        assert told == ["held"]
        fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(old)


# -- the order in which things become durable


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced, named and renamed, in order."""
    found: list[str] = []

    def record(name: str, tell: Callable[..., str]) -> None:
        real = getattr(os, name)

        def recorded(*arguments: Any, **named: Any) -> Any:
            found.append(tell(*arguments))
            return real(*arguments, **named)

        monkeypatch.setattr(os, name, recorded)

    record("fsync", lambda fd: "sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync file")
    record("replace", lambda *_: "rename")
    record("link", lambda *_: "link")
    record("pwrite", lambda fd, data, at: f"write {len(data)} at {at}")
    return found


@pytest.mark.parametrize("durable", [False, True])
def test_the_order_of_syncs(tmp_path: Path, calls: list[str], durable: bool) -> None:
    with AtomicFile(tmp_path / "disk", durable=durable):
        pass
    assert calls == (["sync file", "link", "sync folder"] if durable else ["link"])
    calls.clear()
    with AtomicFile(tmp_path / "disk", durable=durable):
        pass
    assert calls == ["sync file", "link", "rename", "sync folder"]  # the old content is at stake
    os.link(tmp_path / "disk", tmp_path / "second")
    calls.clear()
    with AtomicFile(tmp_path / "disk", durable=durable) as file:
        os.ftruncate(file.fd, 9000)
        file.begun = True
    assert calls == ["sync file", f"write {HEADER_BYTES} at 0", "sync file"]


def test_the_order_of_syncs_with_a_temporary_name(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_tmpfile(monkeypatch)
    for durable in (False, True, False):
        with AtomicFile(tmp_path / "disk", durable=durable):
            pass
    assert calls == ["link"] + ["sync file", "rename", "sync folder"] * 2


# -- what a rename would lose


def in_place(path: Path) -> str:
    """Write it; what was said before."""
    told: list[str] = []
    with AtomicFile(path, tell=told.append) as file:
        assert file.in_place
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"old"  # nothing was begun
    write_file(path, b"new" * 3000)
    assert path.read_bytes() == b"new" * 3000
    assert len(told) == 1
    return told[0]


def test_hard_links_stay(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"old")
    os.link(target, tmp_path / "second")
    assert "2 names (hard links)" in in_place(target)
    assert (tmp_path / "second").read_bytes() == b"new" * 3000
    assert target.samefile(tmp_path / "second")


def test_an_error_in_place_leaves_an_empty_file(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"old")
    os.link(target, tmp_path / "second")
    with pytest.raises(Locked, match="the old content is lost"), AtomicFile(target) as file:
        fail(file, Locked("no"))
    assert target.read_bytes() == b""


def test_the_header_comes_last(tmp_path: Path, calls: list[str]) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"old")
    os.link(target, tmp_path / "second")
    calls.clear()
    write_file(target, b"x" * 5000)
    assert calls == ["write 904 at 4096", "sync file", "write 4096 at 0", "sync file"]
    assert target.read_bytes() == b"x" * 5000
    write_file(target, b"short")
    assert target.read_bytes() == b"short"


def test_a_mount_point_is_written_in_place(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"old")
    (tmp_path / "other").write_bytes(b"old")
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
from lamina.atomic_file import AtomicFile, write_file
with AtomicFile({str(target)!r}, tell=print) as file:
    assert file.in_place
write_file({str(target)!r}, b"new")
"""
    command = f'mount --bind "{tmp_path / "other"}" "{target}" && exec "{sys.executable}" -c "$0"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, script], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode and "Error" not in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "it is a mount point" in done.stdout
    assert target.read_bytes() == b"old"
    assert (tmp_path / "other").read_bytes() == b"new"


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder that other users reach."""
    folder = tmp_path / "shared"
    folder.mkdir()
    for path in (folder, *folder.parents):
        if path != Path("/") and path.stat().st_uid == 0:
            path.chmod(path.stat().st_mode | 0o711)
    yield folder
    folder.chmod(0o700)


@needs_root
@pytest.mark.parametrize(
    ("folder_mode", "owner", "words"),
    [
        (0o1777, 0, "in a folder with the sticky bit"),
        (0o0777, 0, "its owner cannot be set"),
        (0o0755, NOBODY, "no file can be created in its folder"),
    ],
)
def test_where_a_user_cannot_replace(shared: Path, folder_mode: int, owner: int, words: str) -> None:
    target = shared / "disk"
    target.write_bytes(b"old")
    target.chmod(0o4666)
    os.chown(target, owner, NOBODY)
    shared.chmod(folder_mode)

    def run() -> int:
        return 0 if words in in_place(target) else 1

    assert as_user(NOBODY, [], run) == 0
    assert os.listdir(shared) == ["disk"]
    assert target.stat().st_uid == owner
    assert stat.S_IMODE(target.stat().st_mode) == 0o666  # its content is another's now


@needs_root
def test_a_group_that_cannot_be_given(shared: Path) -> None:
    target = shared / "disk"
    target.write_bytes(b"old")
    os.chown(target, NOBODY, OTHER)
    shared.chmod(0o777)
    assert as_user(NOBODY, [], lambda: "its group cannot be set" not in in_place(target)) == 0
    target.write_bytes(b"old")

    def run() -> int:
        write_file(target, b"new")
        return 0

    assert as_user(NOBODY, [OTHER], run) == 0
    assert (target.stat().st_uid, target.stat().st_gid) == (NOBODY, OTHER)


@needs_root
def test_without_the_right_to_write_it_there_is_an_error(shared: Path) -> None:
    target = shared / "disk"
    target.write_bytes(b"old")
    shared.chmod(0o777)

    def run() -> int:
        with pytest.raises(BlockIOError, match="cannot write the existing file: Permission denied") as caught:
            write_file(target, b"new")
        assert caught.value.path == str(target)
        return 0

    assert as_user(NOBODY, [], run) == 0
    assert target.read_bytes() == b"old"
    assert os.listdir(shared) == ["disk"]


@needs_root
def test_in_place_as_the_administrator_drops_privileges(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"old")
    os.link(target, tmp_path / "second")
    os.chown(target, OTHER, OTHER)
    target.chmod(0o6755)
    write_file(target, b"new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert target.stat().st_uid == OTHER


def test_a_target_holds_and_gives_back(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old")
    (tmp_path / "partial").write_bytes(b"new")

    def refuse(fd: int, path: str) -> None:
        raise Locked("in use", path=path)

    with pytest.raises(Locked):
        Target(str(path), refuse)
    with pytest.raises(LaminaError):
        Target(str(tmp_path))
    target = Target(str(path))
    try:
        assert target.obstacle() is None
        target.replace("partial")
    finally:
        target.close()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["disk"]


# -- names that lead elsewhere


@pytest.mark.parametrize("end", ["/", "/.", "//"])
def test_a_name_that_can_only_be_a_folder_makes_and_replaces_no_file(tmp_path: Path, end: str) -> None:
    (tmp_path / "there").write_bytes(b"old")
    for name in ("there", "new"):
        with pytest.raises(BlockIOError, match="folder"):
            write_file(f"{tmp_path}/{name}{end}", b"new")
    assert os.listdir(tmp_path) == ["there"]
    assert (tmp_path / "there").read_bytes() == b"old"


def test_a_link_that_the_system_refuses_to_follow_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fs.protected_symlinks the system follows no link of another user in a folder such as /tmp. That is a setting of
    the machine, so its answer is put in here."""
    link = tmp_path / "link"
    link.symlink_to("elsewhere")
    real = os.stat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if path == str(link) and options.get("follow_symlinks", True):
            raise PermissionError(13, "Permission denied", path)
        return real(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(BlockIOError, match="Permission denied"):
        write_file(str(link), b"new")
    assert os.listdir(tmp_path) == ["link"]


@pytest.mark.usefixtures("tmpfile")
def test_a_folder_that_is_renamed_meanwhile_gets_the_file_and_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    (folder / "disk").write_bytes(b"old")
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd))[1])
    with AtomicFile(folder / "disk") as file:
        os.write(file.fd, b"new")
        folder.rename(other)
    assert (other / "disk").read_bytes() == b"new"
    assert synced[-1] == other.stat().st_ino


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "page.html"
    target.write_bytes(b"old")
    monkeypatch.setattr("lamina.atomic_file.pwrite", full)
    with pytest.raises(BlockIOError, match="the file cannot be written") as caught:
        write_file(target, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.path == str(target)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["page.html"]

"""Files that name other files: rows 1 to 24 of the known attacks, and the rules of the safety policy that answer them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import Budget, CorruptImage, FormatError, LimitExceeded, NotFound, OptionError, Policy, PolicyError
from lamina.formats.qcow2 import layout as q

from .images import KIB, MIB, Victim, overlay, victim
from .oracle import inspect, opened_files, strangers, survives

SECRET = b"the secret of the host\n" * 100


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the host, outside the directory of the images."""
    path = tmp_path / "host" / "passwd"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


def guest_header(folder: Path, secret: Path) -> bytes:
    """What a hostile guest writes to its raw disk: an image whose backing file is a file of the host."""
    return overlay(folder, str(secret), name="crafted.qcow2", size=64 * KIB).read_bytes()


def raw_disk(folder: Path, content: bytes = b"", size: int = MIB) -> Path:
    path = folder / "disk.raw"
    lamina.create(path, "raw", size)
    if content:
        with lamina.open(path, format="raw", read_only=False) as image:
            image.write(0, content)
    return path


def test_row_01_cve_2008_2004_guest_writes_a_header_into_its_raw_disk(home: Path, secret: Path) -> None:
    header = guest_header(home, secret)
    disk = raw_disk(home, header)
    # Opened as what it is, it stays what it is.
    with lamina.open(disk, format="raw") as image:
        assert image.format == "raw"
        assert image.size == MIB
        assert image.read(0, len(header)) == header
    # Without a format it is not opened at all, and a guess never leads to the file of the host.
    with opened_files() as opened:
        with pytest.raises(OptionError, match="format"):
            lamina.open(disk)
        assert not opened
        with pytest.raises(PolicyError):
            lamina.open(disk, format="probe")
        with pytest.raises(PolicyError):
            lamina.open(disk, format="probe", read_only=False)
    assert not strangers(opened, [disk])


@pytest.mark.parametrize("source", ["plain", {"filename": "x"}, {"file": {"filename": "x"}}])
def test_row_03_cve_2010_3851_library_calls_never_probe(home: Path, source: Any) -> None:
    disk = raw_disk(home)
    if source == "plain":
        source = str(disk)
    elif "file" in source:
        source = {"file": {"filename": str(disk)}}
    else:
        source = {"filename": str(disk)}
    with opened_files() as opened, pytest.raises(OptionError, match="not guessed"):
        lamina.open(source)
    assert not opened


def test_row_02_cve_2010_2237_backing_format_is_never_probed(home: Path, secret: Path) -> None:
    """An overlay that does not say the format of its base, and a base that holds a header."""
    base = raw_disk(home, guest_header(home, secret))
    top = overlay(home, base.name, fmt=None)
    with opened_files() as opened, pytest.raises(FormatError, match="never guessed"):
        lamina.open(top, format="qcow2")
    assert not strangers(opened, [top, base])  # the magic of the base is looked at for the hint alone
    with opened_files() as opened, pytest.raises(FormatError, match="never guessed"):
        lamina.open(top, format="qcow2", references=Policy.none())
    assert not strangers(opened, [top])
    # Whoever says that it is raw reads the bytes of the guest.
    with lamina.open({"driver": "qcow2", "file": {"filename": str(top)}, "backing": {"driver": "raw"}}) as image:
        assert image.read(0, 4) == q.MAGIC
    survives(top, granted=[base])


def test_row_04_cve_2011_3147_qcow_version_1_with_a_backing_name(home: Path, secret: Path) -> None:
    name = str(secret).encode()
    old = home / "old.qcow"
    old.write_bytes(
        q.MAGIC + (1).to_bytes(4, "big") + (48).to_bytes(8, "big") + len(name).to_bytes(4, "big") + name * 90
    )
    with opened_files() as opened:
        for format in ("qcow2", "probe"):
            with pytest.raises(FormatError):
                lamina.open(old, format=format)
    assert not strangers(opened, [old])
    assert survives(old).errors == {"UnsupportedFeature"}


@pytest.mark.parametrize(
    "row",
    [
        "05_cve_2013_1922_server_restarts",
        "06_cve_2014_0134_cached_image",
        "07_cve_2015_1850_volume_is_attached_again",
        "09_cve_2015_7548_snapshot_of_a_raw_disk",
        "10_cve_2016_2140_migration",
        "19_cve_2026_27211_type_is_detected",
    ],
)
def test_rows_05_to_19_raw_stays_raw_each_time_it_is_opened(home: Path, secret: Path, row: str) -> None:
    header = guest_header(home, secret)
    disk = raw_disk(home)
    for _ in range(3):
        with opened_files() as opened, lamina.open(disk, format="raw", read_only=False) as image:
            image.write(0, header)
            image.flush()
            assert image.size == MIB
        with opened_files() as opened, lamina.open(disk, format="raw") as image:
            assert image.read(0, len(header)) == header
        assert not strangers(opened, [disk])
    assert survives(disk, format="raw").errors == set()


def test_row_18_cve_2026_24708_resize_without_a_format(home: Path, secret: Path) -> None:
    """A probed image that could be raw is never opened for writing, so it cannot be resized either."""
    disk = raw_disk(home)
    before = disk.stat()
    with pytest.raises(OptionError, match='format="raw"'):
        lamina.open(disk, format="probe", read_only=False)
    disk.write_bytes(guest_header(home, secret))
    with opened_files() as opened, pytest.raises(PolicyError):
        lamina.open(disk, format="probe", read_only=False)
    assert not strangers(opened, [disk])
    assert secret.read_bytes() == SECRET
    assert before.st_size == MIB


@pytest.mark.parametrize("name", ["absolute", "../host/passwd", "sub/../../host/passwd", "link"])
def test_row_08_cve_2015_5163_backing_file_leads_to_the_host(home: Path, secret: Path, name: str) -> None:
    if name == "link":
        (home / "link").symlink_to(secret)
    top = overlay(home, str(secret) if name == "absolute" else name)
    with opened_files() as opened:
        found = inspect(top)
    assert found["backing-filename"] == (str(secret) if name == "absolute" else name)
    assert not strangers(opened, [top])
    with opened_files() as opened:
        with pytest.raises(PolicyError):
            lamina.open(top, format="qcow2")
        with pytest.raises(PolicyError):
            lamina.open(top, format="qcow2", references=Policy.none())
        with pytest.raises(PolicyError):
            lamina.open(top, format="qcow2", references=Policy.listed([home / "other"]))
    assert not strangers(opened, [top])
    assert survives(top).errors == {"PolicyError"}
    with lamina.open(top, format="qcow2", references=Policy.any()) as image:
        assert image.read(0, len(SECRET)) == SECRET


def test_row_12_cve_2023_32684_base_image_with_a_backing_file(home: Path, secret: Path) -> None:
    """The second level is held to the same rule as the first."""
    overlay(home, str(secret), name="middle.qcow2")
    top = overlay(home, "middle.qcow2", fmt="qcow2", name="top.qcow2")
    with opened_files() as opened, pytest.raises(PolicyError):
        lamina.open(top, format="qcow2")
    assert not strangers(opened, [top, home / "middle.qcow2"])


@pytest.mark.parametrize("bit", [True, False])
def test_row_13_cve_2024_32498_external_data_file(home: Path, secret: Path, bit: bool) -> None:
    found = victim(home).extension(q.EXT_DATA_FILE, str(secret).encode())
    if bit:
        found.set(incompatible_features=q.DATA_FILE, autoclear_features=2)
    found.save()
    assert found.bytes[79] == (4 if bit else 0)
    with opened_files() as opened:
        assert inspect(found.path)["format-specific"]["data"]["data-file"] == str(secret)
        if bit:
            for policy in (None, Policy.none(), Policy.beneath(), Policy.listed([home / "other"])):
                for read_only in (True, False):
                    with pytest.raises(PolicyError, match="data file"):
                        lamina.open(found.path, format="qcow2", references=policy, read_only=read_only)
        else:  # a name that nothing refers to
            lamina.open(found.path, format="qcow2", references=Policy.any()).close()
    assert not strangers(opened, [found.path])
    survives(found.path, policy=Policy.beneath() if bit else Policy.any())


def test_row_13_a_data_file_is_written_by_permission_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image of a stranger, opened for writing in a folder with files of one's own, would overwrite one of them."""
    (home / "thesis").write_bytes(b"mine" * MIB)
    path = home / "of-a-stranger.qcow2"
    lamina.create(path, "qcow2", None, data_file="thesis", data_file_keep=True)

    def write(**options: Any) -> None:
        with lamina.open(path, format="qcow2", read_only=False, **options) as image:
            image.write(0, b"x")

    with lamina.open(path, format="qcow2") as image:  # it is read like a backing file
        assert image.read(0, 8) == b"mine" * 2
        with pytest.raises(PolicyError, match=r"would be written.*references=Policy.listed"):
            image.reopen(read_only=False)
        file = image.share(image.node.children["data-file"].node)
    with file, pytest.raises(PolicyError, match="would be written"):  # also where the image is closed
        file.reopen(read_only=False)
    with opened_files() as opened:
        for denied in (None, Policy.none(), Policy.listed([home / "other"])):
            with pytest.raises(PolicyError, match="data file"):
                write(references=denied)
        monkeypatch.setenv("LAMINA_REFERENCES", "none")
        with pytest.raises(PolicyError, match="data file"):
            write()
    assert not strangers(opened, [path])
    assert (home / "thesis").read_bytes() == b"mine" * MIB
    monkeypatch.setenv("LAMINA_REFERENCES", "same-dir")
    write()
    for granted in (Policy.beneath(), Policy.listed([home / "thesis"]), Policy.any()):
        write(references=granted)


def test_row_14_cve_2024_40767_declared_format_is_not_what_it_is(home: Path) -> None:
    others = {
        "vmdk": b'# Disk DescriptorFile\nversion=1\nRW 2048 FLAT "/etc/passwd" 0\n',
        "vmdk-sparse": b"KDMV" + bytes(508),
        "vdi": bytes(64) + b"\x7f\x10\xda\xbe",
        "vhdx": b"vhdxfile",
        "qed": b"QED\0",
        "raw": b"",
    }
    for name, content in others.items():
        path = home / f"{name}.img"
        path.write_bytes(content.ljust(64 * KIB, b"\0"))
        with opened_files() as opened, pytest.raises(FormatError):
            lamina.open(path, format="qcow2")
        assert not strangers(opened, [path])
        survives(path, costs=False)
    # Two formats at once are no format.
    both = victim(home).save()
    with both.open("ab") as file:
        file.write(b"conectix".ljust(512, b"\0"))
    with pytest.raises(FormatError, match="qcow2, vpc"):
        lamina.open(both, format="probe")
    # Declared raw is legal: whoever says so wants the bytes.
    with lamina.open(both, format="raw") as image:
        assert image.read(0, 4) == q.MAGIC


def test_row_15_cve_2024_44082_inspection_needs_no_open(home: Path, secret: Path) -> None:
    """Everything that decides about an image is known before anything that it names is touched."""
    found = Victim(overlay(home, str(secret)))
    found.extension(q.EXT_DATA_FILE, b"json:{}").set(incompatible_features=q.DATA_FILE | 1 << 40, nb_snapshots=0).save()
    with opened_files() as opened:
        seen = inspect(found.path)
    assert opened == [str(found.path)]
    assert seen["backing-filename"] == str(secret)
    assert seen["unsupported"] == ["unknown incompatible feature 40"]


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"nbd","host":"127.0.0.1"}',
        'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
        "nbd:localhost:10809",
        "nbd+unix:///x?socket=/tmp/x",
        "http://127.0.0.1/x",
        "fd:3",
        "blkdebug::disk.raw",
        "null-co://",
        "fat:rw:/",
        "ssh://host/x",
        "driver=raw,file.filename=/etc/passwd",
    ],
)
def test_row_16_cve_2024_4467_names_are_paths_and_nothing_else(home: Path, name: str) -> None:
    top = overlay(home, name)
    data = victim(home, "data.qcow2").extension(q.EXT_DATA_FILE, name.encode())
    data.set(incompatible_features=q.DATA_FILE).save()
    with opened_files() as opened:
        assert inspect(top)["backing-filename"] == name
        assert inspect(data.path)["format-specific"]["data"]["data-file"] == name
        for policy in (Policy.beneath(), Policy.any()):
            with pytest.raises((PolicyError, NotFound)):
                lamina.open(top, format="qcow2", references=policy)
            with pytest.raises((PolicyError, NotFound)):
                lamina.open(data.path, format="qcow2", references=policy)
    assert not strangers(opened, [top, data.path, home / name])
    survives(top)


@pytest.mark.parametrize("name", ["file:///etc/passwd", "file:/etc/passwd", "file:disk.raw"])
def test_row_17_cve_2025_44021_file_url_is_no_path(home: Path, name: str) -> None:
    raw_disk(home)
    with opened_files() as opened, pytest.raises((PolicyError, NotFound)):
        lamina.open(overlay(home, name), format="qcow2", references=Policy.any())
    assert not [path for path in opened if path.startswith("/etc")]


def test_row_21_a_path_object_opens_no_more_than_a_string(home: Path, secret: Path) -> None:
    top = overlay(home, str(secret))
    for source in (top, str(top), {"driver": "qcow2", "file": {"filename": str(top)}}):
        with opened_files() as opened, pytest.raises(PolicyError):
            lamina.open(source, format="qcow2")
        assert not strangers(opened, [top])


def test_row_23_an_image_that_is_its_own_backing_file(home: Path) -> None:
    for name in ("overlay.qcow2", "./overlay.qcow2", "../images/overlay.qcow2", "alias.qcow2", "hard.qcow2"):
        top = overlay(home, name, fmt="qcow2")
        if name == "alias.qcow2":
            (home / name).symlink_to(top)
        elif name == "hard.qcow2":
            os.link(top, home / name)
        with pytest.raises(CorruptImage, match="contains itself"):
            lamina.open(top, format="qcow2")
        assert survives(top, granted=[home / name]).errors <= {"CorruptImage"}


def test_row_23_a_cycle_of_two(home: Path) -> None:
    overlay(home, "b.qcow2", fmt="qcow2", name="a.qcow2")
    top = overlay(home, "a.qcow2", fmt="qcow2", name="b.qcow2")
    with pytest.raises(CorruptImage, match="contains itself"):
        lamina.open(top, format="qcow2")
    assert survives(top, granted=[home / "a.qcow2"]).errors == {"CorruptImage"}


def test_row_23_a_chain_of_a_thousand(home: Path) -> None:
    (home / "0.img").write_bytes(b"\x42" * (64 * KIB))
    names = ["0.img"]
    for index in range(1, 100):
        names.append(f"{index}.img")
        overlay(home, names[-2], fmt="raw" if index == 1 else "qcow2", name=names[-1], size=64 * KIB)
    files = [home / name for name in names]
    with lamina.open(files[64], format="qcow2") as image:  # 64 files below the top
        assert image.read(0, 16) == b"\x42" * 16
        assert image.extents()[0].depth == 64
    for top in (65, 99):
        with pytest.raises(LimitExceeded, match="deeper"):
            lamina.open(files[top], format="qcow2")
    with pytest.raises(LimitExceeded, match="limit of 3"):
        lamina.open(files[5], format="qcow2", budget=Budget(chain_depth=3))
    assert survives(files[99], granted=files, costs=False).errors == {"LimitExceeded"}


# -- the policy's own rules


def test_policy_p2_probed_raw_is_never_written(home: Path) -> None:
    disk = raw_disk(home)
    with lamina.open(disk, format="probe") as image:
        assert image.format == "raw"
        with pytest.raises(lamina.ReadOnly):
            image.write(0, b"QFI\xfb")
    with pytest.raises(OptionError):
        lamina.open(disk, format="probe", read_only=False)


def test_policy_p3_a_probe_reads_the_ends_only(home: Path) -> None:
    disk = home / "large.raw"
    disk.touch()
    os.truncate(disk, 1 << 40)
    with disk.open("r+b") as file:
        file.seek(1 << 39)
        file.write(b"QFI\xfb\0\0\0\3" * 64)
    assert lamina.detect(disk).format == "raw"
    with lamina.open(disk, format="probe") as image:
        assert image.format == "raw"


def test_policy_p5_a_file_whose_name_looks_like_a_protocol(home: Path) -> None:
    """It exists, beneath the directory, and still its name is not taken for granted; with ./ it is a path."""
    (home / "nbd:x").write_bytes(b"\x11" * 512)
    with pytest.raises(PolicyError, match="URL"):
        lamina.open(overlay(home, "nbd:x"), format="qcow2")
    with lamina.open(overlay(home, "./nbd:x"), format="qcow2") as image:
        assert image.read(0, 512) == b"\x11" * 512


@pytest.mark.parametrize(
    "fmt", ["", "file", "blkdebug", "null", "memory", "nbd", "json:{}", "vmdk", "\x1b]0;x\x07", "r" * 4000]
)
def test_policy_p6_a_backing_format_is_a_format(home: Path, fmt: str) -> None:
    """The image may ask for a format: never for a filter, for storage, or for what does not exist."""
    raw_disk(home)
    found = Victim(overlay(home, "disk.raw", fmt=None))
    found.extension(q.EXT_BACKING_FORMAT, fmt.encode()) if len(fmt) < 1000 else found.set(backing_file_offset=0)
    found.save()
    if len(fmt) < 1000:
        with opened_files() as opened, pytest.raises((OptionError, FormatError)):
            lamina.open(found.path, format="qcow2")
        assert not strangers(opened, [found.path])
    survives(found.path, costs=False)


def test_policy_p6_create_needs_the_format_of_the_backing_file(home: Path) -> None:
    raw_disk(home)
    with pytest.raises(OptionError, match="format"):
        lamina.create(home / "top.qcow2", "qcow2", MIB, backing_file="disk.raw")
    assert not (home / "top.qcow2").exists()


def test_policy_p8_layers_below_are_read_only(home: Path) -> None:
    base = raw_disk(home, b"\x33" * 512)
    overlay(home, base.name, name="middle.qcow2")
    top = overlay(home, "middle.qcow2", fmt="qcow2", name="top.qcow2")
    before = [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in (base, home / "middle.qcow2")]
    with lamina.open(top, format="qcow2", read_only=False) as image:
        node = image.node
        depth = 0
        while "backing" in node.children:
            node = node.children["backing"].node
            assert node.read_only
            assert node.children["file"].node.read_only
            with pytest.raises(lamina.ReadOnly):
                node.children["file"].write(0, memoryview(b"x"))
            depth += 1
        assert depth == 2
        image.write(0, b"new")
        image.discard(0, MIB)
        image.zero(0, MIB, unmap=True)
        image.truncate(2 * MIB)
    assert [(path, path.read_bytes(), path.stat().st_mtime_ns) for path, _, _ in before] == before


@pytest.mark.parametrize("kind", ["fifo", "directory", "proc", "device"])
def test_policy_p4_only_regular_files_are_opened(home: Path, kind: str) -> None:
    names = {"fifo": "pipe", "directory": ".", "proc": "/proc/self/mem", "device": "/dev/zero"}
    os.mkfifo(home / "pipe")
    top = overlay(home, names[kind])
    with opened_files() as opened, pytest.raises(PolicyError):
        lamina.open(top, format="qcow2", references=Policy.any())
    assert not strangers(opened, [top])


def test_policy_p17_names_do_not_drive_a_terminal(home: Path) -> None:
    """Whatever an image says, each message is one printable line."""
    evil = b"\x1b]0;owned\x07\n\r\x9b2J\xff"
    found = victim(home).extension(q.EXT_FEATURE_NAMES, b"\0\x3f" + evil.ljust(46, b"\0"))
    found.set(incompatible_features=1 << 63).save()
    with pytest.raises(FormatError) as caught:
        lamina.open(found.path, format="qcow2")
    assert str(caught.value).isprintable()
    assert "owned" in str(caught.value)
    for policy in (Policy.beneath(), Policy.any(), Policy.none()):
        named = Victim(overlay(home, "x" * len(evil)))
        at = named.bytes.index(b"x" * len(evil))
        named.bytes[at : at + len(evil)] = evil
        named.save()
        with pytest.raises((PolicyError, NotFound)) as refused:
            lamina.open(named.path, format="qcow2", references=policy)
        assert str(refused.value).isprintable()


def test_policy_p4_a_link_that_is_changed_meanwhile(home: Path, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is opened through a link, which then leads to the host. What the base names is still looked for where the
    base was found, and not beneath the new target's directory."""
    overlay(home, secret.name, name="base.qcow2")
    (home / "link").symlink_to("base.qcow2")
    top = overlay(home, "link", fmt="qcow2", name="top.qcow2")
    real = Policy.open_reference

    def race(self: Policy, name: str, **place: Any) -> Any:
        found = real(self, name, **place)
        if name == "link":
            (home / "link").unlink()
            (home / "link").symlink_to(secret.parent / "decoy")
        return found

    monkeypatch.setattr(Policy, "open_reference", race)
    with opened_files() as opened, pytest.raises(NotFound):
        lamina.open(top, format="qcow2")
    assert str(secret) not in opened

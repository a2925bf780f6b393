"""Version, backing file and data file of an image that change in place, judged by QEMU, and under a power cut."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.creation import create_driver
from lamina.errors import BlockIOError, LimitExceeded, OptionError
from lamina.formats.qcow2.header import Header
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.image_checks import check_whole
from lamina.testing.persistence import Bounds, CrashState, Persistence
from lamina.testing.power_loss import record
from lamina.testing.recorder import Marks, Recorder
from tests.conftest import Qemu
from tests.crash.workloads import open_on

pytestmark = pytest.mark.usefixtures("granted")
SIZE = 1 << 20


def told(qemu: Qemu, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu.img("info", "--output=json", "-f", "qcow2", path).stdout)
    return found


def qemu_bytes(qemu: Qemu, path: Path) -> bytes:
    out = path.with_name("out")
    qemu.img("convert", "-f", "qcow2", "-O", "raw", path, out)
    return out.read_bytes()


def amended(path: Path, **values: Any) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.amend(**values)


@pytest.mark.peers
@pytest.mark.parametrize("cluster", [512, 4096, 65_536])
@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_the_version_changes_up_and_down(tmp_path: Path, qemu: Qemu, cluster: int, backing: bool, whose: str) -> None:
    path, rng = tmp_path / "disk.qcow2", random.Random(f"{cluster}{backing}")
    (tmp_path / "base").write_bytes(rng.randbytes(SIZE - 70_000))
    if whose == "ours":
        below = {"backing_file": "base", "backing_fmt": "raw"} if backing else {}
        lamina.create(path, "qcow2", SIZE, cluster_size=cluster, **below)
    else:
        named = ("-b", "base", "-F", "raw") if backing else ()
        qemu.img("create", "-q", "-f", "qcow2", *named, "-o", f"cluster_size={cluster}", path, str(SIZE))
    disk = random_work(path, rng)
    for compat in ("0.10", "1.1", "v2", "v3"):
        amended(path, compat=compat)
        version = "0.10" if compat in ("0.10", "v2") else "1.1"
        assert told(qemu, path)["format-specific"]["data"]["compat"] == version
        qemu.img("check", path)
        assert lamina.check(path, format="qcow2").clean
        assert qemu_bytes(qemu, path) == disk
        disk = random_work(path, rng, zeros=version == "1.1")
        assert qemu_bytes(qemu, path) == disk
        qemu.img("check", path)


def random_work(path: Path, rng: random.Random, *, zeros: bool = True) -> bytes:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for number in range(12):
            offset = rng.randrange(SIZE)
            length = min(rng.choice((1, 5000, 60_000)), SIZE - offset)
            if zeros and number % 3 == 2:
                image.zero(offset, length, unmap=number % 2 == 0)
            else:
                image.write(offset, rng.randbytes(length))
        return image.read(0, SIZE)


@pytest.mark.peers
def test_the_version_and_the_width_of_counts_change_together(tmp_path: Path, qemu: Qemu) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, compat="0.10")
    disk = random_work(path, random.Random(1), zeros=False)
    amended(path, compat="1.1", refcount_bits=64, lazy_refcounts=True)
    assert told(qemu, path)["format-specific"]["data"]["refcount-bits"] == 64
    assert qemu_bytes(qemu, path) == disk
    with pytest.raises(OptionError, match="version 2"):
        amended(path, compat="0.10")
    amended(path, compat="0.10", refcount_bits=16)
    qemu.img("check", path)
    assert told(qemu, path)["format-specific"]["data"]["compat"] == "0.10"
    assert qemu_bytes(qemu, path) == disk
    with pytest.raises(OptionError, match="version 2"):
        amended(path, refcount_bits=8)
    with pytest.raises(OptionError, match="version 2"):
        amended(path, lazy_refcounts=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"extended_l2": True}, "extended L2"),
        ({"compression_type": "zstd"}, "compression"),
        ({"data_file": "data"}, "external data file"),
        ({"refcount_bits": 1}, "reference counts"),
    ],
)
def test_what_version_2_lacks_is_refused_before_anything_changes(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, **options)
    before = path.read_bytes()
    with pytest.raises(OptionError, match=match):
        amended(path, compat="0.10", size=2 * SIZE)
    assert path.read_bytes() == before
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.add_bitmap("one", 65_536)
    with pytest.raises(OptionError):
        amended(path, compat="0.10")


@pytest.mark.peers
@pytest.mark.parametrize("cluster", [512, 65_536])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_the_backing_file_is_named_anew(tmp_path: Path, qemu: Qemu, cluster: int, whose: str) -> None:
    """As `qemu-img rebase -u`: the content is up to the caller."""
    path, rng = tmp_path / "disk.qcow2", random.Random(cluster)
    first, second = rng.randbytes(SIZE), rng.randbytes(SIZE)
    (tmp_path / "base").write_bytes(first)
    long = "b" * 200
    (tmp_path / long).write_bytes(second)
    if whose == "ours":
        lamina.create(path, "qcow2", SIZE, cluster_size=cluster, backing_file="base", backing_fmt="raw")
    else:
        qemu.img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "-o", f"cluster_size={cluster}", path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(70_000, b"own")
        image.amend(backing_file=long)
        assert image.read(0, 4096) == first[:4096], "it is opened the next time"
    qemu.img("create", "-q", "-f", "qcow2", "-b", long, "-F", "raw", tmp_path / "two.qcow2")
    amended(path, backing_file="two.qcow2", backing_fmt="qcow2")
    found = told(qemu, path)
    assert (found["backing-filename"], found["backing-filename-format"]) == ("two.qcow2", "qcow2")
    lies = 70_000 // cluster * cluster  # the rest of the cluster was copied from the first one
    own = first[lies:70_000] + b"own" + first[70_003 : lies + cluster]
    assert qemu_bytes(qemu, path) == second[:lies] + own + second[lies + cluster :]
    amended(path, backing_file=long, backing_fmt="raw")
    assert told(qemu, path)["backing-filename"] == long
    amended(path, backing_file="")
    assert "backing-filename" not in told(qemu, path)
    assert not any(qemu_bytes(qemu, path)[:65_536])
    qemu.img("check", path)
    with pytest.raises(OptionError, match="belong together"):
        amended(path, backing_file="base")
    amended(path, backing_file="base", backing_fmt="raw")
    assert qemu_bytes(qemu, path)[:65_536] == first[:65_536]
    if cluster == 512:
        before = path.read_bytes()
        with pytest.raises(LimitExceeded):
            amended(path, backing_file="c" * 500)
        assert path.read_bytes() == before


@pytest.mark.peers
def test_the_data_file_is_named_anew_and_need_not_be_raw(tmp_path: Path, qemu: Qemu) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, data_file=str(tmp_path / "data"), data_file_raw=True)
    disk = random_work(path, random.Random(2))
    (tmp_path / "data").rename(tmp_path / "moved")
    spec = {
        "driver": "qcow2",
        "file": {"filename": str(path)},
        "data-file": {"filename": str(tmp_path / "moved")},
    }
    with lamina.open(spec, read_only=False) as image:
        image.amend(data_file=str(tmp_path / "moved"), data_file_raw=False)
    assert told(qemu, path)["format-specific"]["data"]["data-file"] == str(tmp_path / "moved")
    assert not told(qemu, path)["format-specific"]["data"]["data-file-raw"]
    assert qemu_bytes(qemu, path) == disk
    qemu.img("check", path)
    with pytest.raises(OptionError, match="become raw"):
        amended(path, data_file_raw=True)
    with pytest.raises(OptionError, match="is empty"):
        amended(path, data_file="")
    lamina.create(tmp_path / "plain.qcow2", "qcow2", SIZE)
    with pytest.raises(OptionError, match="no external data file"):
        amended(tmp_path / "plain.qcow2", data_file="x")


def test_fields_that_other_programs_added_stay(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE)
    raw = bytearray(path.read_bytes())
    raw[100:104] = (128).to_bytes(4, "big")
    raw[112:136] = bytes(range(1, 17)) + bytes(8)
    path.write_bytes(raw)
    (tmp_path / "base").write_bytes(bytes(512))
    amended(path, backing_file="base", backing_fmt="raw")
    after = path.read_bytes()
    assert after[112:128] == bytes(range(1, 17))
    with lamina.open(path, format="qcow2") as image:
        assert image.node.children["backing"].node.size == 512


def over_base(folder: Path, **options: Any) -> Path:
    """A new image; and a file "base" without a zero, which some name as the backing file."""
    (folder / "base").write_bytes(b"b" * SIZE)
    lamina.create(folder / "disk.qcow2", "qcow2", SIZE, **options)
    return folder / "disk.qcow2"


def test_zeros_do_not_show_a_backing_file_that_is_not_open_when_the_version_changes(tmp_path: Path) -> None:
    path = over_base(tmp_path, backing_file="base", backing_fmt="raw")
    spec = {"driver": "qcow2", "file": {"filename": str(path)}, "backing": None}
    with lamina.open(spec, read_only=False) as image:
        image.zero(0, 196_608)
        image.amend(compat="0.10")
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, SIZE) == bytes(196_608) + b"b" * (SIZE - 196_608)
    with lamina.open(spec, read_only=False) as image:
        image.zero(327_680, 196_608, unmap=True)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(327_680, 196_608) == bytes(196_608), "version 2 writes them"


def test_zeros_do_not_show_a_backing_file_that_is_named_when_the_version_changes(tmp_path: Path) -> None:
    path = over_base(tmp_path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"a" * 262_144)
        image.zero(65_536, 131_072)
        image.amend(compat="0.10", backing_file="base", backing_fmt="raw")
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 262_144) == b"a" * 65_536 + bytes(131_072) + b"a" * 65_536


def test_a_name_that_no_image_can_have_is_refused_before_anything_changes(tmp_path: Path) -> None:
    path = over_base(tmp_path)
    before = path.read_bytes()
    with pytest.raises(OptionError, match="longer than 1023 bytes"):
        amended(path, backing_file="b" * 1024, backing_fmt="raw")
    assert path.read_bytes() == before
    amended(path, backing_file="b" * 1023, backing_fmt="raw")
    assert lamina.info(path, format="qcow2").backing_filename == "b" * 1023


class FailsOnce(MemoryStorage):
    """A storage of which a flush fails, after a write to its beginning that took place."""

    fails = False
    begun = False

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        super().write(offset, view, flags)
        self.begun |= self.fails and not offset

    def flush(self) -> None:
        if self.begun:
            self.fails = self.begun = False
            raise BlockIOError("a flush fails", errno=errno.EIO)
        super().flush()


def test_after_a_change_that_failed_the_file_has_the_header_that_is_in_memory() -> None:
    """Else flags that version 2 lacks would come into an image of version 2."""
    node = FailsOnce()
    kind = create_driver("qcow2")
    options = {"cluster_size": 4096, "backing_file": "base", "backing_fmt": "raw", "size": SIZE}
    kind.create(Child(node, "file", grows=True), SIZE, kind.creation_schema().parse(options))
    spec = {"driver": "qcow2", "file": Child(node, "file", grows=True), "backing": None}
    with lamina.open(spec, read_only=False) as image:
        node.fails = True
        with pytest.raises(BlockIOError, match="a flush fails"):
            image.amend(compat="0.10")
        image.zero(0, SIZE)
        image.flush()
        found = Header.read(image.node.children["file"])
        assert (found.version, found.backing_file, found.backing_format) == (3, "base", "raw")
        image.amend(compat="0.10")
        found = Header.read(image.node.children["file"])
        assert (found.version, found.backing_file, found.backing_format) == (2, "base", "raw")


@pytest.mark.parametrize("long", [False, True])
def test_a_power_cut_leaves_the_old_header_or_the_new_one(long: bool) -> None:
    """With a name of the backing file that goes behind the first sector as well."""
    node = Recorder()
    kind = create_driver("qcow2")
    names = ["base", "x" * 900 if long else "other"]
    options = {"cluster_size": 4096, "backing_file": names[0], "backing_fmt": "raw", "compat": "0.10", "size": SIZE}
    kind.create(Child(node, "file", grows=True), SIZE, kind.creation_schema().parse(options))

    def workload(storage: Recorder, marks: Marks) -> None:
        with open_on(storage, read_only=False, backing=b"") as image:
            image.write(5000, b"a")
            marks.begin(1)
            image.amend(backing_file=names[1], backing_fmt="qcow2", compat="1.1")
            marks.durable(1)
            marks.begin(2)
            image.amend(backing_file=names[0], backing_fmt="raw")
            marks.durable(2)
            marks.begin(3)
            image.amend(compat="v2")
            marks.durable(3)

    wanted = [(names[0], "raw", 2), (names[1], "qcow2", 3), (names[0], "raw", 3), (names[0], "raw", 2)]

    def verify(content: bytes, state: CrashState) -> None:
        header = Header.read(Child(Recorder(content), "file"))
        low = state.durable[-1] if state.durable else 0
        high = state.begun[-1] if state.begun else 0
        found = (header.backing_file, header.backing_format, header.version)
        assert found in wanted[low : high + 1], found
        with open_on(Recorder(content), read_only=True, backing=b"") as image:
            check_whole(image)

    recording = record(workload, start=bytes(node.content), model=Persistence.P4, bounds=Bounds(at_cut=60))
    assert recording.examine(verify) > 20


def test_a_bitmap_that_is_not_stored_yet_keeps_the_version(tmp_path: Path) -> None:
    """Else it would be stored in an image of version 2, which has none."""
    path = over_base(tmp_path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.add_bitmap("new")
        with pytest.raises(OptionError, match="version 2 has no dirty bitmaps"):
            image.amend(compat="0.10")
    found = lamina.info(path, format="qcow2").to_json()["format-specific"]["data"]
    assert (found["compat"], [one["name"] for one in found["bitmaps"]]) == ("1.1", ["new"])
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.remove_bitmap("new")
        image.amend(compat="0.10")
    assert lamina.check(path, format="qcow2").clean

"""Converting: every byte arrives, zeros become holes, and whatever goes wrong leaves nothing behind."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import lamina
from lamina.creation import create
from lamina.errors import BlockIOError, Cancelled, LaminaError, OptionError
from lamina.jobs.beneath import layers_above
from lamina.jobs.convert import convert, convert_to_file
from lamina.jobs.progress import Monitor
from lamina.storage.file import FileStorage
from lamina.target_file import Target

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB


def patched(length: int, seed: int, *, density: int = 6) -> bytes:
    """Bytes with runs of data and of zeros of all lengths."""
    dice = random.Random(seed)
    content = bytearray(length)
    for _ in range(density):
        at = dice.randrange(length)
        run = dice.choice([1, 511, 4096, CLUSTER, 300 * KIB])
        content[at : at + run] = dice.randbytes(min(run, length - at))
    return bytes(content)


def image(path: Path, content: bytes, format: str = "qcow2", **options: object) -> Path:
    """An image that holds `content`, written piece by piece where it is not zero."""
    create(path, format, len(content), **options)
    with lamina.open(path, format=format, read_only=False) as disk:
        for at in range(0, len(content), 4096):
            part = content[at : at + 4096]
            if part != disk.read(at, len(part)):
                disk.write(at, part)
    return path


def content_of(path: Path, format: str) -> bytes:
    with lamina.open(path, format=format) as disk:
        return disk.read(0, disk.size)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length", [3 * MIB + 77, CLUSTER, 1])
def test_there_and_back(tmp_path: Path, seed: int, length: int) -> None:
    content = patched(length, seed)
    (tmp_path / "a.raw").write_bytes(content)
    with lamina.open(tmp_path / "a.raw", format="raw") as source:
        convert_to_file(source, str(tmp_path / "b.qcow2"), "qcow2", {"cluster_size": 512 << seed})
    content += bytes(-length % 512)  # a qcow2 disk is whole sectors
    assert content_of(tmp_path / "b.qcow2", "qcow2") == content
    with lamina.open(tmp_path / "b.qcow2", format="qcow2") as source:
        assert source.node.check().clean  # type: ignore[attr-defined]
        convert_to_file(source, str(tmp_path / "c.raw"), "raw", {})
    assert (tmp_path / "c.raw").read_bytes() == content


def test_a_target_owns_no_cluster_without_data(tmp_path: Path) -> None:
    content = bytearray(64 * CLUSTER)
    for cluster in (0, 7, 8, 40):
        content[cluster * CLUSTER + 5000] = 1
    (tmp_path / "a.raw").write_bytes(content)  # no holes at all: the zeros are found by looking
    with lamina.open(tmp_path / "a.raw", format="raw") as source:
        result = convert_to_file(source, str(tmp_path / "b.qcow2"), "qcow2", {})
    assert result.read == len(content)
    assert result.written == 4 * 4096
    with lamina.open(tmp_path / "b.qcow2", format="qcow2") as made:
        assert made.extents().totals().data == 4 * CLUSTER


def test_only_what_is_stored_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.raw").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"x" * 4096)
    with lamina.open(tmp_path / "a.raw", format="raw") as source:
        result = convert_to_file(source, str(tmp_path / "b.raw"), "raw", {})
    assert result.read == result.written == 4096
    assert (tmp_path / "b.raw").stat().st_size == 1 << 40


def test_a_smallest_hole_of_nothing_stores_everything(tmp_path: Path) -> None:
    with (tmp_path / "a.raw").open("wb") as file:
        file.truncate(5 * CLUSTER + 9)
    with lamina.open(tmp_path / "a.raw", format="raw") as source:
        convert_to_file(source, str(tmp_path / "b.qcow2"), "qcow2", {}, smallest_hole=0)
        convert_to_file(source, str(tmp_path / "b.raw"), "raw", {}, smallest_hole=0)
    with lamina.open(tmp_path / "b.qcow2", format="qcow2") as made:
        assert made.extents().totals().data == made.size
    assert (tmp_path / "b.raw").stat().st_blocks * 512 >= 5 * CLUSTER


def test_short_runs_of_zeros_are_written_where_only_long_ones_count(tmp_path: Path) -> None:
    content = bytearray(b"\1" * (8 * CLUSTER))
    content[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
    content[4 * CLUSTER : 7 * CLUSTER] = bytes(3 * CLUSTER)
    (tmp_path / "a.raw").write_bytes(content)
    with lamina.open(tmp_path / "a.raw", format="raw") as source:
        result = convert_to_file(source, str(tmp_path / "b.raw"), "raw", {}, smallest_hole=2 * CLUSTER)
    assert result.written == 5 * CLUSTER
    assert (tmp_path / "b.raw").read_bytes() == content


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("seed", range(3))
def test_what_was_in_an_existing_target_is_gone(tmp_path: Path, format: str, seed: int) -> None:
    content, old = patched(MIB, seed), patched(MIB + 5 * KIB, seed + 100, density=30)
    (tmp_path / "a.raw").write_bytes(content)
    target = image(tmp_path / "b", old, format)
    with (
        lamina.open(tmp_path / "a.raw", format="raw") as source,
        lamina.open(target, format=format, read_only=False) as there,
    ):
        convert(source, there)
    # What lies beyond the source is not touched.
    assert content_of(target, format) == content + old[len(content) :]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_zeros_over_what_reads_as_zero_already(tmp_path: Path, format: str, seed: int) -> None:
    """Where a stretch of the target is known to be zero, zeros that are found in the source are left out."""
    dice = random.Random(seed)
    length = 16 * MIB + 700
    for _ in range(3):
        content = patched(length, dice.randrange(1 << 30), density=20)
        (tmp_path / "a.raw").write_bytes(content)
        create(tmp_path / "b", format, length)
        with lamina.open(tmp_path / "b", format=format, read_only=False) as target:
            for _ in range(3):
                target.write(dice.randrange(length - 100_000), b"o" * dice.choice([1, 5000, 100_000]))
            with lamina.open(tmp_path / "a.raw", format="raw") as source:
                result = convert(source, target, smallest_hole=dice.choice([4096, 512]), parallel=dice.choice([1, 3]))
        assert content_of(tmp_path / "b", format)[:length] == content  # a qcow2 disk is whole sectors
        assert result.written + result.zeroed < result.read


def test_a_target_that_is_too_small_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"1234")
    with (
        lamina.open(tmp_path / "a", format="raw") as source,
        lamina.open(tmp_path / "b", format="raw", read_only=False) as there,
        pytest.raises(OptionError, match="4 bytes and the source 5"),
    ):
        convert(source, there)
    assert (tmp_path / "b").read_bytes() == b"1234"


def test_a_device_is_not_taken_for_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "is_device", True)
    monkeypatch.setattr(FileStorage, "growable", False)
    (tmp_path / "a").write_bytes(bytes(MIB) + b"x" * MIB)
    (tmp_path / "device").write_bytes(b"old" * MIB)
    with lamina.open(tmp_path / "a", format="raw") as source:
        convert_to_file(source, str(tmp_path / "device"), "raw", {})
    assert (tmp_path / "device").read_bytes()[: 2 * MIB] == bytes(MIB) + b"x" * MIB


# -- overlays


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path, Path]:
    """base <- middle <- top, of 16 clusters: cluster n is written by base (n < 8), middle (4 <= n < 12), top (n even)."""
    base, middle, top = (tmp_path / name for name in ("base.qcow2", "middle.qcow2", "top.qcow2"))
    create(base, "qcow2", 16 * CLUSTER)
    create(middle, "qcow2", backing_file="base.qcow2", backing_fmt="qcow2")
    create(top, "qcow2", backing_file="middle.qcow2", backing_fmt="qcow2")
    for path, clusters, value in ((base, range(8), b"b"), (middle, range(4, 12), b"m"), (top, range(0, 16, 2), b"t")):
        with lamina.open(path, format="qcow2", read_only=False) as disk:
            for number in clusters:
                disk.write(number * CLUSTER, value * CLUSTER)
            if path == top:
                disk.zero(0, CLUSTER)  # hides what the base has there
    return base, middle, top


def owned(path: Path) -> list[int]:
    """The clusters that the top layer owns, as data or as zeros."""
    with lamina.open(path, format="qcow2") as disk:
        mine = disk.extents().where(present=True, depth=0)
        return [at // CLUSTER for extent in mine for at in range(extent.start, extent.end, CLUSTER)]


def test_over_a_layer_of_the_source_what_lies_above_it_is_copied(chain: tuple[Path, Path, Path]) -> None:
    base, middle, top = chain
    whole = content_of(top, "qcow2")
    expected = {base: sorted({*range(4, 12), *range(0, 16, 2)}), middle: list(range(0, 16, 2))}
    for backing, clusters in expected.items():
        target = top.with_name("out.qcow2")
        with lamina.open(top, format="qcow2") as source:
            convert_to_file(source, str(target), "qcow2", {}, backing=backing.name, backing_format="qcow2")
        assert content_of(target, "qcow2") == whole
        assert owned(target) == clusters
        with lamina.open(target, format="qcow2") as made:
            assert made.node.check().clean  # type: ignore[attr-defined]


def test_over_another_file_only_what_differs_is_copied(chain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, top = chain
    copy = tmp_path / "copy.raw"
    copy.write_bytes(content_of(base, "qcow2")[: 15 * CLUSTER])  # shorter than the source, too
    target = tmp_path / "out.qcow2"
    with lamina.open(top, format="qcow2") as source:
        convert_to_file(source, str(target), "qcow2", {}, backing=copy.name, backing_format="raw")
    assert content_of(target, "qcow2") == content_of(top, "qcow2")
    assert owned(target) == sorted({*range(4, 12), *range(0, 16, 2)})


def test_layers_are_found_beneath_filters(chain: tuple[Path, Path, Path]) -> None:
    base, middle, top = chain
    file = {"driver": "qcow2", "file": {"driver": "file", "filename": str(top)}}
    with lamina.open({"driver": "blkdebug", "image": file}) as disk:
        for depth, path in enumerate((top, middle, base)):
            with lamina.open(path, format="qcow2") as layer:
                assert layers_above(disk.node, layer.node) == depth
        with lamina.open(__file__, format="raw") as other:
            assert layers_above(disk.node, other.node) is None


# -- when it goes wrong


@pytest.mark.parametrize("bad", [0, 5 * MIB])
def test_a_read_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    (tmp_path / "a.raw").write_bytes(b"x" * (20 * MIB))
    (tmp_path / "b.qcow2").write_bytes(b"what was there")
    real = FileStorage.read_into

    def read_into(self: FileStorage, offset: int, view: memoryview) -> None:
        if self.filename.endswith("a.raw") and offset + len(view) > bad:
            raise BlockIOError("broken on purpose", offset=offset)
        real(self, offset, view)

    monkeypatch.setattr(FileStorage, "read_into", read_into)
    with (
        lamina.open(tmp_path / "a.raw", format="raw") as source,
        pytest.raises(BlockIOError, match="broken on purpose"),
    ):
        convert_to_file(source, str(tmp_path / "b.qcow2"), "qcow2", {})
    assert sorted(os.listdir(tmp_path)) == ["a.raw", "b.qcow2"]
    assert (tmp_path / "b.qcow2").read_bytes() == b"what was there"


def test_a_write_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.raw").write_bytes(b"x" * (20 * MIB))
    writes = []
    real = FileStorage.write

    def write(self: FileStorage, offset: int, view: memoryview, flags: int = 0) -> None:
        writes.append(offset)
        if len(writes) > 3:
            raise BlockIOError("full on purpose", errno=28)
        real(self, offset, view, flags)

    monkeypatch.setattr(FileStorage, "write", write)
    with lamina.open(tmp_path / "a.raw", format="raw") as source, pytest.raises(LaminaError, match="full on purpose"):
        convert_to_file(source, str(tmp_path / "b.raw"), "raw", {})
    assert len(writes) > 3
    assert os.listdir(tmp_path) == ["a.raw"]


def test_it_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"x" * (20 * MIB))
    monitor = Monitor(lambda done, total: monitor.cancel() if done < total else None)
    with lamina.open(tmp_path / "a.raw", format="raw") as source, pytest.raises(Cancelled):
        convert_to_file(source, str(tmp_path / "b.raw"), "raw", {}, monitor=monitor)
    assert os.listdir(tmp_path) == ["a.raw"]


def test_it_tells_how_far_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"x" * (20 * MIB))
    told: list[tuple[int, int]] = []
    with lamina.open(tmp_path / "a.raw", format="raw") as source:
        convert_to_file(source, str(tmp_path / "b.raw"), "raw", {}, monitor=Monitor(lambda *at: told.append(at)))
    assert told == sorted(told)
    assert told[-1] == (20 * MIB, 20 * MIB)


def test_the_images_may_be_closed_meanwhile(tmp_path: Path) -> None:
    """The job has roots of its own; the files are closed at its end."""
    content = patched(9 * MIB, 1, density=40)
    one = lamina.open(image(tmp_path / "one.qcow2", content), format="qcow2")
    other = lamina.open(image(tmp_path / "other.qcow2", bytes(9 * MIB)), format="qcow2", read_only=False)
    nodes = [one.node, other.node]
    told: list[int] = []

    def close(done: int, size: int) -> None:
        one.close()
        other.close()
        told.append(done)

    convert(one, other, monitor=Monitor(close))
    assert told[0] < len(content)
    assert not any(node.held or node.parents() for node in nodes)
    assert content_of(tmp_path / "other.qcow2", "qcow2") == content

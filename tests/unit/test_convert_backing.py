"""convert over a backing file: whatever graph the source is, the overlay reads as it does, and holds no more than it must."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.bitmap import MemoryBitmap
from lamina.creation import create
from lamina.image import Image
from lamina.jobs.convert import Result, convert_to_file
from lamina.storage.file import FileStorage

KIB, MIB = 1 << 10, 1 << 20
#: How many random graphs one run of the test tries; `make soak` sets more.
GRAPHS = int(os.environ.get("LAMINA_SOAK_BACKING", "120"))

Spec = dict[str, Any]


def file(path: Path) -> Spec:
    return {"driver": "file", "filename": str(path)}


def content_of(path: Path) -> bytes:
    with lamina.open(path, format="qcow2") as disk:
        assert disk.node.check().clean  # type: ignore[attr-defined]
        return disk.read(0, disk.size)


def fill(disk: Image, dice: random.Random, times: int) -> None:
    """Data, zeros that are stored, and zeros that are known, of all lengths and at any place."""
    for _ in range(times):
        at = dice.randrange(disk.size)
        length = min(dice.choice([1, 512, 700, 4 * KIB, 20 * KIB, 64 * KIB]), disk.size - at)
        what = dice.randrange(4)
        if what == 0:
            disk.zero(at, length, unmap=dice.random() < 0.5)
        else:
            disk.write(at, bytes(length) if what == 1 else dice.randbytes(1) * length)


class Graphs:
    """Random chains of files in a folder. `files`: each with the formats that it may be a base in."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.dice = folder, random.Random(seed)
        self.files: list[tuple[Path, str]] = []

    def size(self) -> int:
        return self.dice.choice([1, 60, 100, 128, 200]) * KIB + self.dice.choice([0, 0, 0, 1, 300, 512])

    def new(self, backing: tuple[Path, str] | None) -> tuple[Path, str]:
        dice = self.dice
        path = self.folder / f"{len(self.files)}.img"
        format = "raw" if backing is None and dice.random() < 0.4 else "qcow2"
        options: Spec = {} if format == "raw" else {"cluster_size": dice.choice([512, 4 * KIB, 64 * KIB])}
        if format == "qcow2" and dice.random() < 0.2:
            options["compat"] = "0.10"
        if backing is not None:
            options |= {"backing_file": backing[0].name, "backing_fmt": backing[1]}
        create(path, format, self.size(), **options)
        with lamina.open(path, format=format, read_only=False) as disk:
            fill(disk, dice, dice.randrange(8))
        self.files.append((path, format))
        return path, format

    def chain(self) -> Spec:
        """The graph of a chain of one to four layers, with something between them here and there."""
        dice = self.dice
        path, format = self.new(None)
        node = self.over({"driver": format, "file": self.beneath(path)})
        base = (path, format)
        for _ in range(dice.randrange(4)):
            path, format = self.new((base[0], "raw" if dice.random() < 0.1 else base[1]))
            said = dice.random()
            spec: Spec = {"driver": format, "file": self.beneath(path)}
            if said < 0.5:
                spec["backing"] = node
            elif said < 0.6:
                spec["backing"] = {"driver": "raw"}  # the same file in another format
            elif said < 0.7:
                spec["backing"] = None
            node = self.over(spec)
            base = (path, format)
        return node

    def beneath(self, path: Path) -> Spec:
        """The storage of a format."""
        if self.dice.random() < 0.1:
            return {"driver": "blkdebug", "image": file(path)}
        return file(path)

    def over(self, node: Spec) -> Spec:
        """`node`, mostly as it is."""
        dice = self.dice
        kind = dice.randrange(16)
        if kind == 0:
            return {"driver": "offset", "offset": dice.choice([1, 512, 700]), "image": node}
        if kind == 1:
            return {"driver": "truncate", "size": self.size(), "image": node}
        if kind == 2 and node["driver"] == "raw":
            return node | {"offset": 512} | ({"size": 256} if dice.random() < 0.5 else {})
        if kind == 3:
            return {"driver": "cow", "image": node}
        if kind == 4:
            return {"driver": "noextents", "image": node}
        if kind in (5, 6, 7):
            return {"driver": dice.choice(["blkdebug", "throttle", "stats", "copy_on_read", "retry"]), "image": node}
        if kind == 8:
            return {"driver": "raw", "file": node} | ({"offset": 512} if dice.random() < 0.5 else {})
        return node


def test_the_overlay_of_any_graph_reads_as_its_source(tmp_path: Path, seed: int) -> None:
    compared = owned = 0
    for number in range(GRAPHS):
        folder = tmp_path / str(number)
        folder.mkdir()
        graphs = Graphs(folder, seed + number)
        dice = graphs.dice
        spec = graphs.chain()
        if dice.random() < 0.3:
            graphs.new(None)  # a file that the source has nothing to do with
        base, format = dice.choice(graphs.files)
        if dice.random() < 0.15:
            format = "raw"
        options: Spec = {"cluster_size": dice.choice([512, 4 * KIB, 64 * KIB, 2 * MIB])}
        target = folder / "out.qcow2"
        how: Spec = {"compress": dice.random() < 0.25, "smallest_hole": dice.choice([0, 512, 4096, 4096])}
        how["offload"] = dice.choice(["", "", "share", "copy"])
        with lamina.open(spec) as source:
            expected = source.read(0, source.size)
            if dice.random() < 0.3:
                options["size"] = source.size + dice.choice([1, 512, 64 * KIB, MIB])
                expected += bytes(options["size"] - source.size)
            result = convert_to_file(
                source, str(target), "qcow2", options, backing=base.name, backing_format=format, **how
            )
        owned += not result.written
        compared += result.read > result.written
        found = content_of(target)
        assert found[: len(expected)] == expected, f"graph {number}: {spec} over {base} as {format}, {options}, {how}"
        assert not any(found[len(expected) :])
        for path in sorted(folder.iterdir(), reverse=True):
            path.unlink()
    assert owned
    assert compared


# -- how the smallest cases went wrong


@pytest.fixture
def based(tmp_path: Path) -> Path:
    """A raw file of sectors that differ, and an overlay of it."""
    (tmp_path / "base.raw").write_bytes(b"".join(bytes([n]) * 512 for n in range(256)))
    create(tmp_path / "top.qcow2", "qcow2", backing_file="base.raw", backing_fmt="raw", cluster_size=512)
    return tmp_path


@pytest.mark.parametrize(
    "over",
    [
        lambda node: {"driver": "offset", "offset": 512, "image": node},
        lambda node: {"driver": "offset", "offset": 512, "size": 2048, "image": node},
        lambda node: {"driver": "truncate", "size": 1024, "image": node},
        lambda node: {"driver": "truncate", "size": 300 * KIB, "image": node},
        lambda node: {"driver": "raw", "offset": 1024, "file": node},
        lambda node: {"driver": "faults", "image": node},
    ],
)
@pytest.mark.parametrize("place", ["above", "below", "between"])
@pytest.mark.parametrize("size", [None, 512 * KIB])
def test_a_window_between_source_and_base(
    based: Path, over: Callable[[Spec], Spec], place: str, size: int | None
) -> None:
    base: Spec = {"driver": "raw", "file": file(based / "base.raw")}
    top: Spec = {"driver": "qcow2", "file": file(based / "top.qcow2")}
    if place == "above":
        spec = over(top | {"backing": base})
    elif place == "between":
        spec = top | {"backing": over(base)}
    else:
        spec = top | {"backing": {"driver": "raw", "file": over(file(based / "base.raw"))}}
    target = based / "out.qcow2"
    options = {} if size is None else {"size": size}
    with lamina.open(spec) as source:
        expected = source.read(0, source.size)
        convert_to_file(source, str(target), "qcow2", options, backing="base.raw", backing_format="raw")
    found = content_of(target)
    assert found[: len(expected)] == expected
    assert not any(found[len(expected) :])


def test_a_base_in_another_format_is_another_base(tmp_path: Path) -> None:
    """The base of the source is a qcow2, that of the target the same file as raw bytes; and the other way."""
    create(tmp_path / "base", "qcow2", MIB)
    with lamina.open(tmp_path / "base", format="qcow2", read_only=False) as disk:
        disk.write(0, b"inside" * 1000)
    for mine, theirs in (("qcow2", "raw"), ("raw", "qcow2")):
        create(tmp_path / "top", "qcow2", backing_file="base", backing_fmt=mine)
        with lamina.open(tmp_path / "top", format="qcow2") as source:
            expected = source.read(0, source.size)
            convert_to_file(source, str(tmp_path / "out"), "qcow2", {}, backing="base", backing_format=theirs)
        assert content_of(tmp_path / "out") == expected


def test_what_a_longer_base_has_beyond_the_source_stays_hidden(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * MIB)
    (tmp_path / "short.raw").write_bytes(b"b" * (300 * KIB + 5))
    create(tmp_path / "short.qcow2", "qcow2", 300 * KIB, backing_file="base.raw", backing_fmt="raw")
    for name, format in (("short.raw", "raw"), ("short.qcow2", "qcow2")):
        with lamina.open(tmp_path / name, format=format) as source:
            expected = source.read(0, source.size)
            convert_to_file(
                source, str(tmp_path / "o"), "qcow2", {"size": 2 * MIB}, backing="base.raw", backing_format="raw"
            )
        assert content_of(tmp_path / "o") == expected + bytes(2 * MIB - len(expected))


def test_the_base_is_looked_for_where_the_file_lies(tmp_path: Path) -> None:
    """The target is named through a link: names inside it are relative to the folder of the file."""
    for folder, byte in (("here", b"h"), ("there", b"t")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "base.raw").write_bytes(byte * MIB)
    (tmp_path / "here" / "out").symlink_to(tmp_path / "there" / "out")
    with lamina.open(tmp_path / "here" / "base.raw", format="raw") as source:
        convert_to_file(source, str(tmp_path / "here/out"), "qcow2", {}, backing="base.raw", backing_format="raw")
    assert content_of(tmp_path / "there" / "out") == b"h" * MIB
    (tmp_path / "there" / "base.raw").write_bytes(b"t" * 2 * MIB)
    create(tmp_path / "here" / "out", "qcow2", backing_file="base.raw", backing_fmt="raw")  # as large as its base
    assert content_of(tmp_path / "there" / "out") == b"t" * 2 * MIB


# -- how much is stored, read and written


class Counted(FileStorage):
    """A file whose reads are counted."""

    reads = 0

    def read_into(self, offset: int, view: memoryview) -> None:
        type(self).reads += len(view)
        super().read_into(offset, view)


def over_base(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> tuple[Result, int]:
    """Convert a raw file over base.raw; what was done, and how many bytes the base was read."""
    kind = type("Base", (Counted,), {"reads": 0})
    opened = FileStorage.open.__func__  # type: ignore[attr-defined]

    def open(cls: type[FileStorage], options: dict[str, Any], opener: Any) -> FileStorage:
        chosen = kind if options["filename"].endswith("base.raw") else cls
        return opened(chosen, options, opener)  # type: ignore[no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(FileStorage, "open", classmethod(open))
        with lamina.open(source, format="raw") as disk:
            target = str(tmp_path / "out.qcow2")
            result = convert_to_file(disk, target, "qcow2", backing="base.raw", backing_format="raw", **how)
    with lamina.open(source, format="raw") as disk, lamina.open(tmp_path / "out.qcow2", format="qcow2") as made:
        for at in range(0, disk.size, 16 * MIB):
            length = min(16 * MIB, disk.size - at)
            assert disk.read(at, length) == made.read(at, length)
        assert made.node.check().clean  # type: ignore[attr-defined]
    return result, kind.reads


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("cluster", [64 * KIB, 2 * MIB])
def test_known_zeros_are_neither_read_nor_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: int, compress: bool
) -> None:
    for name in ("base.raw", "a.raw"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 128 * MIB)
    how: Any = {"options": {"cluster_size": cluster}, "compress": compress}
    result, reads = over_base(tmp_path, tmp_path / "a.raw", monkeypatch, **how)
    assert result == Result(0, 0, 0, 0)
    assert not reads
    assert (tmp_path / "out.qcow2").stat().st_size < 6 * cluster
    # Zeros over data: the base is read, once, and hidden without storing a byte.
    (tmp_path / "base.raw").write_bytes(bytes(MIB) + b"x" * (31 * MIB))
    result, reads = over_base(tmp_path, tmp_path / "a.raw", monkeypatch, **how)
    assert (result.read, result.written) == (0, 0)
    assert result.zeroed == 32 * MIB - MIB // cluster * cluster
    assert reads == 32 * MIB
    assert (tmp_path / "out.qcow2").stat().st_size < 6 * cluster
    # And data over known zeros.
    (tmp_path / "base.raw").rename(tmp_path / "b.raw")
    (tmp_path / "base.raw").touch()
    result, reads = over_base(tmp_path, tmp_path / "b.raw", monkeypatch, **how)
    assert result.zeroed == 0
    assert not reads


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("cluster", [4 * KIB, 64 * KIB, 2 * MIB])
def test_differences_are_stored_in_whole_clusters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, cluster: int, compress: bool
) -> None:
    dice = random.Random(seed)
    content = bytearray(dice.randbytes(16 * MIB))
    (tmp_path / "base.raw").write_bytes(content)
    changed = {dice.randrange(len(content)) for _ in range(5)} | set(range(9 * MIB, 12 * MIB, 4096))
    for at in changed:
        content[at] ^= 1
    (tmp_path / "a.raw").write_bytes(content)
    writes: list[tuple[int, int]] = []
    plain = Image.write

    def write(self: Image, offset: int, data: Any, **how: Any) -> None:
        writes.append((offset, len(data)))
        plain(self, offset, data, **how)

    monkeypatch.setattr(Image, "write", write)
    options = {"cluster_size": cluster}
    result, reads = over_base(tmp_path, tmp_path / "a.raw", monkeypatch, options=options, compress=compress)
    clusters = {at // cluster for at in changed}
    assert result.written == len(clusters) * cluster
    assert result.read == 16 * MIB
    assert reads == 16 * MIB  # no cluster is filled up from the base
    assert all(offset % cluster == length % cluster == 0 for offset, length in writes)
    assert len(writes) <= len(clusters - {number + 1 for number in clusters}) + 16 * MIB // (2 * MIB)


@pytest.mark.parametrize("layers", [0, 1])
def test_a_snapshot_is_not_the_disk_of_its_file(tmp_path: Path, layers: int) -> None:
    """The same file, opened in two ways, is two disks: the overlay over the present one must show the earlier one."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    lamina.create(base, "qcow2", MIB)
    with lamina.open(base, format="qcow2", read_only=False) as disk:
        disk.write(0, b"\1" * 64 * KIB)
        id = disk.create_snapshot("then").id
        disk.write(0, b"\2" * 64 * KIB)
    then: Spec = {"driver": "qcow2", "file": file(base), "snapshot-id": id}
    if layers:
        lamina.create(top, "qcow2", MIB, backing_file="base.qcow2", backing_fmt="qcow2")
        then = {"driver": "qcow2", "file": file(top), "backing": then}
    with lamina.open(then) as source:
        convert_to_file(source, tmp_path / "new.qcow2", "qcow2", {}, backing=str(base), backing_format="qcow2")
        assert content_of(tmp_path / "new.qcow2") == source.read(0, MIB)
        assert source.read(0, 1) == b"\1"


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 200 * KIB), st.integers(1, 70 * KIB), st.sampled_from([0, 0, 5, 6])), max_size=8),
    st.sampled_from([512, 4 * KIB, 64 * KIB]),
)
def test_what_a_bitmap_knows_is_all_that_is_looked_at(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, int, int]], granularity: int
) -> None:
    """The overlay reads as the source where the bitmap is dirty, and as the backing file elsewhere, even where the source
    differs."""
    folder = tmp_path_factory.mktemp("since")
    dice = random.Random(len(writes))
    base = dice.randbytes(100 * KIB) + bytes(50 * KIB) + dice.randbytes(50 * KIB)
    (folder / "base").write_bytes(base)
    lamina.create(folder / "source", "qcow2", len(base))
    bitmap = MemoryBitmap(granularity)
    with lamina.open(folder / "source", format="qcow2", read_only=False) as source:
        source.write(0, b"other" * (len(base) // 5))
        for at, length, value in writes:
            at, length = min(at, len(base) - 1), min(length, len(base) - min(at, len(base) - 1))
            bitmap.mark(at, length)
            source.write(at, bytes([value]) * length)
            if not value:
                source.zero(at, length)
        disk = source.read(0, len(base))
    with lamina.open(folder / "source", format="qcow2") as source:
        options = {"cluster_size": 4096}
        backing = {"backing": str(folder / "base"), "backing_format": "raw"}
        convert_to_file(source, folder / "new", "qcow2", options, **backing, changed=bitmap)  # type: ignore[arg-type]
    wanted = bytearray(base)
    for lo, hi in bitmap.dirty(0, len(base)):
        wanted[lo:hi] = disk[lo:hi]
    assert content_of(folder / "new") == wanted

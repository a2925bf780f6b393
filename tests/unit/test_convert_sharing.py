"""Converting by copies of host ranges: the same bytes as by reading, never past a filter that reads must meet, and where
the file system shares nothing the same file as without."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import BlockIOError, Cancelled
from lamina.jobs import sharing as module
from lamina.jobs.convert import Offload, Result, convert, convert_to_file
from lamina.jobs.progress import Monitor
from tests.unit.copying import Sharing, no_copy, says

KIB, MIB = 1 << 10, 1 << 20
SIZE = 6 * MIB + 300 * KIB + 512


@pytest.fixture
def disk(tmp_path: Path, seed: int) -> bytes:
    """Data and zeros of many lengths, in tmp_path as a.raw (with holes) and a.qcow2."""
    dice = random.Random(seed)
    content = bytearray(SIZE)
    for _ in range(12):
        at = dice.randrange(0, SIZE, 512)
        part = dice.randbytes(dice.choice([512, 5 * KIB, 130 * KIB, 700 * KIB]))[: SIZE - at]
        content[at : at + len(part)] = part
    content[2 * MIB : 3 * MIB] = dice.randbytes(MIB)
    with (tmp_path / "a.raw").open("wb") as file:
        file.truncate(SIZE)
        for at in range(0, SIZE, 4 * KIB):
            if any(part := content[at : at + 4 * KIB]):
                file.seek(at)
                file.write(part)
    with lamina.open(tmp_path / "a.raw", format="raw") as source:
        convert_to_file(source, str(tmp_path / "a.qcow2"), "qcow2", {})
    return bytes(content)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Sharing:
    calls = Sharing()
    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", calls)
    monkeypatch.setattr(os, "copy_file_range", no_copy)
    return calls


def unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", says(errno.EOPNOTSUPP))


def to(source: str | Path, path: Path, format: str, options: dict[str, Any] | None = None, **how: Any) -> Result:
    with lamina.open(source, format=Path(source).suffix[1:]) as image:
        return convert_to_file(image, str(path), format, options or {}, **({"offload": "share"} | how))


def content_of(path: Path) -> bytes:
    with lamina.open(path, format=path.suffix[1:]) as image:
        if path.suffix == ".qcow2":
            assert image.node.check().clean  # type: ignore[attr-defined]
        return image.read(0, image.size)


@pytest.mark.parametrize("source", ["a.raw", "a.qcow2"])
@pytest.mark.parametrize(
    ("format", "options"), [("raw", {}), ("qcow2", {}), ("qcow2", {"cluster_size": 512}), ("qcow2", {"cluster_size": MIB})]
)  # fmt: skip
@pytest.mark.parametrize("step", [64 * MIB, 128 * KIB])
def test_shared_blocks_hold_the_same_disk(
    tmp_path: Path, disk: bytes, shared: Sharing, monkeypatch: pytest.MonkeyPatch,
    source: str, format: str, options: dict[str, Any], step: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "_STEP", step if options.get("cluster_size") != MIB else 64 * MIB)
    result = to(tmp_path / source, tmp_path / f"b.{format}", format, options)
    assert content_of(tmp_path / f"b.{format}") == disk
    if options.get("cluster_size") == 512:  # these lie anywhere, while blocks of 4 KiB are shared: most of it is read
        assert result.copied <= sum(shared.shared)
    else:
        assert result.copied == sum(shared.shared) > 0
    assert result.read + result.copied >= sum(map(bool, (disk[at : at + KIB] for at in range(0, SIZE, KIB))))
    assert result.copied + result.read <= SIZE


@pytest.mark.parametrize("source", ["a.raw", "a.qcow2"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_copied_by_the_system(
    tmp_path: Path, disk: bytes, monkeypatch: pytest.MonkeyPatch, source: str, format: str
) -> None:
    unshared(monkeypatch)
    result = to(tmp_path / source, tmp_path / f"b.{format}", format, offload="copy")
    assert result.copied > MIB
    assert content_of(tmp_path / f"b.{format}") == disk


@pytest.mark.parametrize("source", ["a.raw", "a.qcow2"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL])
def test_where_nothing_can_be_shared_the_file_is_the_same_as_without(
    tmp_path: Path, disk: bytes, monkeypatch: pytest.MonkeyPatch, source: str, format: str, number: int
) -> None:
    monkeypatch.setattr(os, "copy_file_range", no_copy)
    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", says(number))
    result = to(tmp_path / source, tmp_path / f"b.{format}", format)
    plain = to(tmp_path / source, tmp_path / f"c.{format}", format, offload="")
    # An attempt to share names data alone; a plan without one reads short gaps between data as well.
    assert 0 <= plain.read - result.read < result.read // 20
    assert result._replace(read=0) == plain._replace(read=0)
    assert result.copied == 0
    assert (tmp_path / f"b.{format}").read_bytes() == (tmp_path / f"c.{format}").read_bytes()


def test_a_file_that_refused_once_is_not_asked_again(
    tmp_path: Path, disk: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(*arguments: Any) -> None:
        asked.append(arguments)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", refuse)
    to(tmp_path / "a.raw", tmp_path / "b.raw", "raw")
    assert len(asked) == 1


def test_a_refusal_in_between_is_read_and_written(
    tmp_path: Path, disk: bytes, shared: Sharing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def now_and_then(fd: int, request: int, argument: Any = 0) -> Any:
        if len(shared.shared) % 2:
            shared.shared.append(0)
            raise OSError(errno.EXDEV, "no")
        return shared(fd, request, argument)

    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", now_and_then)
    monkeypatch.setattr(module, "_STEP", 128 * KIB)
    result = to(tmp_path / "a.raw", tmp_path / "b.qcow2", "qcow2")
    assert content_of(tmp_path / "b.qcow2") == disk
    assert 0 < result.copied < SIZE
    assert shared.shared.count(0) > 0


def test_into_what_is_there(tmp_path: Path, disk: bytes, shared: Sharing) -> None:
    for format in ("raw", "qcow2"):
        path = tmp_path / f"there.{format}"
        lamina.create(path, format, SIZE + MIB)
        with (
            lamina.open(path, format=format, read_only=False) as target,
            lamina.open(tmp_path / "a.raw", format="raw") as source,
        ):
            target.write(0, b"\xee" * (SIZE + MIB))
            assert convert(source, target, offload="share").copied > 0
        assert content_of(path) == disk + b"\xee" * MIB


def test_an_overlay_gets_what_the_layers_above_own(tmp_path: Path, disk: bytes, shared: Sharing) -> None:
    top = {"backing_file": "a.qcow2", "backing_fmt": "qcow2"}
    lamina.create(tmp_path / "top.qcow2", "qcow2", SIZE, **top)
    with lamina.open(tmp_path / "top.qcow2", format="qcow2", read_only=False) as image:
        image.write(MIB, b"top" * (100 * KIB))
        after = image.read(0, SIZE)
    with lamina.open(tmp_path / "top.qcow2", format="qcow2") as source:
        result = convert_to_file(
            source,
            str(tmp_path / "flat.qcow2"),
            "qcow2",
            {},
            backing="a.qcow2",
            backing_format="qcow2",
            offload="share",
        )
        assert 0 < result.copied <= 320 * KIB
        # Compared with another file, all of it is read.
        other = convert_to_file(
            source, str(tmp_path / "other.qcow2"), "qcow2", {}, backing="a.raw", backing_format="raw", offload="copy"
        )
        assert other.copied == 0
    for name in ("flat.qcow2", "other.qcow2"):
        assert content_of(tmp_path / name) == after


@pytest.mark.parametrize("offload", ["share", "copy"])
@pytest.mark.parametrize("name", ["faults", "blkdebug"])
@pytest.mark.parametrize("kind", ["read", "write"])
def test_no_rule_is_got_round(
    tmp_path: Path, disk: bytes, monkeypatch: pytest.MonkeyPatch, offload: Offload, name: str, kind: str
) -> None:
    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", lambda *_: pytest.fail("shared past a filter"))
    monkeypatch.setattr(os, "copy_file_range", lambda *_: pytest.fail("copied past a filter"))
    lamina.create(tmp_path / "b.raw", "raw", SIZE)
    if name == "faults":
        rules: dict[str, Any] = {"rules": [{"kind": kind, "start": 2 * MIB, "length": MIB, "error": "EIO"}]}
    else:
        rules = {"inject-error": [{"event": "none", "iotype": kind, "sector": (2 * MIB + 64 * KIB) // 512}]}

    def plain(path: Path) -> dict[str, Any]:
        return {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}

    def broken(path: Path) -> dict[str, Any]:
        return {"driver": "raw", "file": {"driver": name, "image": plain(path)["file"], **rules}}

    source, target = tmp_path / "a.raw", tmp_path / "b.raw"
    with (
        lamina.open((broken if kind == "read" else plain)(source)) as first,
        lamina.open((broken if kind == "write" else plain)(target), read_only=False) as second,
        pytest.raises(BlockIOError) as caught,
    ):
        convert(first, second, offload=offload)
    assert caught.value.errno == errno.EIO


def test_a_source_that_may_change_is_read(tmp_path: Path, disk: bytes, shared: Sharing) -> None:
    with lamina.open(tmp_path / "a.qcow2", format="qcow2", read_only=False) as source:
        assert convert_to_file(source, str(tmp_path / "b.raw"), "raw", {}, offload="share").copied == 0
    assert content_of(tmp_path / "b.raw") == disk
    assert shared.shared == []


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_error_while_sharing_ends_the_job(
    tmp_path: Path, disk: bytes, shared: Sharing, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    def full(fd: int, request: int, argument: Any = 0) -> Any:
        if len(shared.shared) == 2:
            raise OSError(errno.ENOSPC, "full")
        return shared(fd, request, argument)

    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", full)
    monkeypatch.setattr(module, "_STEP", 64 * KIB)
    with pytest.raises(BlockIOError) as caught:
        to(tmp_path / "a.raw", tmp_path / f"b.{format}", format)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / f"b.{format}").exists()


def test_progress_is_told_and_can_stop_it(
    tmp_path: Path, disk: bytes, shared: Sharing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEP", 64 * KIB)
    told = []
    monitor = Monitor(lambda done, total: told.append(done))
    to(tmp_path / "a.raw", tmp_path / "b.raw", "raw", monitor=monitor)
    assert told == sorted(told)
    assert told[-1] == SIZE
    stopped = Monitor()
    stopped.cancel()
    with pytest.raises(Cancelled):
        to(tmp_path / "a.raw", tmp_path / "c.raw", "raw", monitor=stopped)
    assert not (tmp_path / "c.raw").exists()


def test_all_of_it_stored(tmp_path: Path, disk: bytes, shared: Sharing) -> None:
    result = to(tmp_path / "a.raw", tmp_path / "b.qcow2", "qcow2", smallest_hole=0)
    assert 0 < result.copied < SIZE
    with lamina.open(tmp_path / "b.qcow2", format="qcow2") as image:
        assert image.extents().data.all()
    assert content_of(tmp_path / "b.qcow2") == disk


def test_unasked_all_of_it_is_read(tmp_path: Path, disk: bytes, shared: Sharing) -> None:
    assert to(tmp_path / "a.raw", tmp_path / "b.raw", "raw", offload="").copied == 0
    assert shared.shared == []

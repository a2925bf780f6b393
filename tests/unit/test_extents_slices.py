"""Slices of `Extents`, and extents that go to another process."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lamina
from lamina.extents import DATA, PRESENT, ZERO, Extent, Extents, HostPath
from lamina.storage.memory import MemoryStorage

from .test_extents import BACK, Disk, stored


@pytest.fixture
def rows() -> Extents:
    """Ten rows of 100 bytes from offset 1000 on, of which the odd ones are zeros."""
    number = np.arange(10)
    flags = np.where(number % 2, ZERO, DATA | PRESENT)
    offset = np.where(number % 2, -1, number * 1000)
    return Extents.from_columns(1000 + number * 100, 100, flags, depth=number % 3, offset=offset, files=(BACK,))


SLICES = [slice(3, 7), slice(None), slice(None, 4), slice(-3, None), slice(8, 50), slice(1, None, 3), slice(-4, -2)]


@pytest.mark.parametrize("which", SLICES, ids=str)
def test_a_slice_has_these_rows(rows: Extents, which: slice) -> None:
    found = rows[which]
    assert isinstance(found, Extents)
    assert list(found) == list(rows)[which]
    assert found.begin == found[0].start
    assert found.contiguous is (which.step is None)
    with pytest.raises(ValueError, match="read-only"):
        found.start[0] = 1


def test_parts_join_to_the_whole(rows: Extents) -> None:
    for cut in range(len(rows) + 1):
        assert Extents.concat([rows[:cut], rows[cut:]]) == rows


@pytest.mark.parametrize(("which", "begin"), [((3, 3), 1300), ((7, 2), 1700), ((10, 20), 2000), ((0, 0), 1000)])
def test_an_empty_slice_knows_its_place(rows: Extents, which: tuple[int, int], begin: int) -> None:
    found = rows[slice(*which)]
    assert len(found) == 0
    assert found.begin == found.end == begin
    assert found.files == (BACK,)


def test_what_is_no_slice(rows: Extents) -> None:
    with pytest.raises(ValueError, match="step of the slice is -1"):
        rows[::-1]
    with pytest.raises(ValueError, match="zero"):
        rows[::0]
    with pytest.raises(TypeError):
        rows["start"]  # type: ignore[call-overload]
    assert rows[np.int64(2)] == list(rows)[2]


def test_a_slice_of_a_slice_with_gaps(rows: Extents) -> None:
    gaps = rows.where(data=True)
    assert list(gaps[1:4]) == list(gaps)[1:4]
    assert list(gaps[1:4][::2]) == list(gaps)[1:4:2]


# Copies and other processes


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_has_the_same_columns(rows: Extents, protocol: int) -> None:
    for one in (rows, rows[2:5], rows[::2], rows[4:4], Extents.empty(7)):
        sent = pickle.loads(pickle.dumps(one, protocol))
        assert [row._replace(file=None) for row in sent] == [row._replace(file=None) for row in one]
        assert sent.begin == one.begin
        assert {row.file for row in sent} - {None} == {HostPath(row.file.filename) for row in one if row.file}
        assert pickle.loads(pickle.dumps(sent, protocol)) == sent
        assert copy.copy(sent) is copy.deepcopy(sent) is sent


def test_a_pickle_of_a_slice_holds_only_its_rows() -> None:
    many = Extents.from_columns(np.arange(100_000), 1, DATA)
    assert len(pickle.dumps(many[10:20])) < 2000


def test_buffers_outside_the_pickle(rows: Extents) -> None:
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(rows, 5, buffer_callback=buffers.append)
    assert buffers
    sent = pickle.loads(text, buffers=[bytes(buffer) for buffer in buffers])  # as another process gets them: read-only
    assert sent == pickle.loads(pickle.dumps(rows))


def test_two_nodes_of_one_name_become_one_path() -> None:
    one, other, third = Disk("same"), Disk("same"), Disk("third")
    pieces = [stored(0, 10, 0, one), stored(10, 10, 500, third), stored(20, 10, 20, other)]
    whole = Extents.concat(pieces)
    assert len(whole.files) == 3
    sent = pickle.loads(pickle.dumps(whole))
    assert sent.files == (HostPath("same"), HostPath("third"))
    assert [row.file.filename for row in sent if row.file] == ["same", "third", "same"]
    assert sent == Extents.from_extents(row._replace(file=HostPath(row.file.filename)) for row in whole if row.file)


def test_a_path_is_no_node(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    path = HostPath(str(tmp_path / "file"))
    assert os.fspath(path) == path.filename
    with open(path, "rb") as file:
        assert file.read() == b"text"
    with pytest.raises(AttributeError, match=r"has no copyable: these extents were pickled.*open the image"):
        path.copyable  # noqa: B018
    assert not hasattr(path, "children")
    with pytest.raises(AttributeError, match=r"file a\\x1bb has"):
        HostPath("a\x1bb").size  # noqa: B018
    storage = MemoryStorage(100)
    with pytest.raises(lamina.NotSupported):
        storage.copy_from(0, path, 0, 10)


def data_of(extents: Extents) -> list[tuple[str, bytes]]:
    """Runs in another process: the data where the extents say that it is."""
    found = []
    for row in extents.where(data=True, compressed=False):
        assert row.file is not None
        assert row.offset is not None
        with open(row.file, "rb") as file:  # type: ignore[call-overload]
            file.seek(row.offset)
            found.append((row.file.filename, file.read(row.length)))
    return found


def test_other_processes_read_where_the_extents_say(tmp_path: Path) -> None:
    """Each process gets a part of a chain, as the workers of `multiprocessing` and of Dask do."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    lamina.create(base, "qcow2", size=1 << 20)
    with lamina.open(base, format="qcow2", read_only=False) as image:
        image.write(0, b"B" * (256 << 10))
    lamina.create(top, "qcow2", size=1 << 20, backing_file="base.qcow2", backing_fmt="qcow2")
    with lamina.open(top, format="qcow2", read_only=False) as image:
        image.write(65536, b"T" * 65536)
        image.write(512 << 10, b"T" * 65536)
        image.flush()
        extents = image.extents()
    assert len(extents.where(data=True)) == 4
    parts = [extents[at : at + 2] for at in range(0, len(extents), 2)]
    work = f"import pickle, sys; from {__name__} import data_of as work"
    send = "sys.stdout.buffer.write(pickle.dumps(work(pickle.load(sys.stdin.buffer))))"
    found = []
    for part in parts:
        command = [sys.executable, "-c", f"{work}; {send}"]
        done = subprocess.run(command, input=pickle.dumps(part), stdout=subprocess.PIPE, check=True, timeout=60)
        found += pickle.loads(done.stdout)
    assert found == [
        (str(base), b"B" * 65536),
        (str(top), b"T" * 65536),
        (str(base), b"B" * (128 << 10)),
        (str(top), b"T" * 65536),
    ]


# JSON


def test_json_has_the_names_of_map(rows: Extents) -> None:
    status = {"depth": 0, "present": True, "zero": False, "data": True, "compressed": False}
    assert rows[0].to_json() == {"start": 1000, "length": 100, **status, "offset": 0}
    assert "offset" not in rows[1].to_json()
    assert rows.to_json() == [row.to_json() for row in rows]
    assert json.loads(json.dumps(rows.to_json())) == rows.to_json()
    assert Extents.empty(3).to_json() == []
    assert Extent(0, 10, zero=True).to_json()["zero"] is True

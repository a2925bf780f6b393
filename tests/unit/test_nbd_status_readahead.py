"""Readahead of BLOCK_STATUS: a client that walks over a disk is told what the image answers then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.image import Image
from lamina.nbd import Client, Export, Server, wire
from lamina.nbd.server import readahead as readahead_module
from lamina.nbd.server.contexts import CONTEXTS
from lamina.nbd.server.readahead import StatusReadahead
from lamina.nbd.server.transmission import Request

UNIT, COUNT = 65536, 40


def sparse(path: Path, kinds: str) -> Path:
    with path.open("wb") as file:
        file.truncate(UNIT * len(kinds))
        for number, kind in enumerate(kinds):
            if kind == "d":
                os.pwrite(file.fileno(), b"d" * UNIT, number * UNIT)
    return path


def question(offset: int, length: int = 1 << 30) -> Request:
    return Request(wire.CMD_BLOCK_STATUS, wire.CMD_FLAG_REQ_ONE, 1, offset, length)


def begun(image: Image) -> StatusReadahead:
    """Where a client was told of the first two extents, of one UNIT each."""
    readahead = StatusReadahead(Export(image), CONTEXTS[wire.BASE_ALLOCATION])
    readahead.told(0, UNIT)
    readahead.told(UNIT, 2 * UNIT)
    assert readahead.walks
    readahead.fetch()
    return readahead


@pytest.fixture(autouse=True)
def columns_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead_module, "_WITHOUT_COLUMNS", 0)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return sparse(tmp_path / "disk.raw", "d." * (COUNT // 2))


def test_what_follows_is_known(raw: Path) -> None:
    with lamina.open(raw, format="raw") as image:
        readahead = begun(image)
        assert readahead.reply(question(2 * UNIT)) == (UNIT, 0)
        assert readahead.reply(question(3 * UNIT)) == (UNIT, wire.STATE_HOLE | wire.STATE_ZERO)
        # What the client does not ask about is passed over, and the rest of an extent is told.
        assert readahead.reply(question(6 * UNIT + 512)) == (UNIT - 512, 0)
        assert readahead.reply(question(7 * UNIT, 512)) is None
        assert readahead.reply(question(7 * UNIT)._replace(flags=0)) is None
        assert readahead.reply(question(5 * UNIT)) is None


def test_the_end_of_the_disk_ends_the_last_extent(raw: Path) -> None:
    with lamina.open(raw, format="raw") as image:
        readahead = begun(image)
        at, found = 2 * UNIT, 0
        while at < image.size:
            if not readahead.known:
                readahead.fetch()
            reply = readahead.reply(question(at))
            assert reply == (UNIT, 3 if at // UNIT % 2 else 0)
            at += reply[0]
            found += 1
        readahead.fetch()
        assert (found, readahead.known, readahead.walks) == (COUNT - 2, readahead.known.__class__(), False)


def test_a_hole_that_another_program_filled_is_not_told(raw: Path) -> None:
    with lamina.open(raw, format="raw") as image:
        readahead = begun(image)
        assert readahead.reply(question(2 * UNIT)) == (UNIT, 0)
        with raw.open("r+b") as file:
            os.pwrite(file.fileno(), b"x" * 4096, 3 * UNIT)
        assert readahead.reply(question(3 * UNIT)) is None
        readahead.told(3 * UNIT, 4 * UNIT)
        readahead.fetch()
        assert readahead.reply(question(4 * UNIT)) == (UNIT, 0)


def test_an_edit_makes_it_void(raw: Path) -> None:
    with lamina.open(raw, format="raw") as image:
        readahead = begun(image)
        with image.edit() as edit:
            edit.insert("throttle", {"bps-total": "50M"})
        assert readahead.reply(question(2 * UNIT)) is None
        readahead.told(2 * UNIT, 3 * UNIT)
        readahead.told(3 * UNIT, 4 * UNIT)
        readahead.fetch()
        assert not readahead.known  # a filter may do as it likes: nothing is known ahead


def test_a_reopening_and_a_write_make_it_void(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", UNIT * COUNT)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for number in range(0, COUNT, 2):
            image.write(number * UNIT, b"d" * UNIT)
    with lamina.open(path, format="qcow2") as image:
        readahead = begun(image)
        assert readahead.reply(question(2 * UNIT)) == (UNIT, 0)
        image.reopen(read_only=False)
        image.write(3 * UNIT, b"x" * UNIT)
        assert readahead.reply(question(3 * UNIT)) is None
        readahead.told(3 * UNIT, 4 * UNIT)
        readahead.fetch()
        assert not readahead.known  # any request may change it now
        image.reopen(read_only=True)


@pytest.mark.parametrize("filter_", ["blkdebug", "stats"])
def test_a_graph_in_which_questions_have_an_effect_is_not_asked_ahead(raw: Path, filter_: str) -> None:
    with lamina.open(raw, format="raw") as image:
        with image.edit() as edit:
            edit.insert(filter_)
        assert not begun(image).known


def test_a_closed_image_answers_nothing(raw: Path) -> None:
    image = lamina.open(raw, format="raw")
    readahead = begun(image)
    image.close()
    assert readahead.reply(question(2 * UNIT)) is None


@pytest.mark.parametrize("name", [wire.BASE_ALLOCATION, wire.ALLOCATION_DEPTH])
def test_a_walk_is_told_what_the_image_answers(tmp_path: Path, name: str) -> None:
    """Of a server, by one extent at a time; and most of it was read ahead."""

    @settings(max_examples=10)
    @given(st.text("dz.", min_size=200, max_size=200), st.data())
    def law(kinds: str, data: st.DataObject) -> None:
        path = tmp_path / "disk.qcow2"
        path.unlink(missing_ok=True)
        lamina.create(path, "qcow2", 4096 * len(kinds), cluster_size=4096)
        with lamina.open(path, format="qcow2", read_only=False) as image:
            for number, kind in enumerate(kinds):
                if kind == "d":
                    image.write(number * 4096, b"d" * 4096)
                elif kind == "z":
                    image.zero(number * 4096, 4096)
        with (
            lamina.open(path, format="qcow2") as image,
            Server([Export(image)], unix=str(tmp_path / "s")) as server,
            Client.connect(server.uri, contexts=[name]) as client,
        ):
            context = CONTEXTS[name]
            told: list[int] = []
            while (at := len(told) * 4096) < client.size:
                if data.draw(st.booleans()):
                    client.read(at, 512)
                ((length, status),) = client.block_status(at, client.size - at, one=True)[name]
                assert length % 4096 == 0
                told += [status] * (length // 4096)
            expected: list[int] = []
            for row in image.node.first_extents(0, image.size, 1000):
                expected += [context.status(row.flags, row.depth)] * (row.length // 4096)
            assert told == expected

    law()


def test_an_extent_that_must_be_rounded_is_not_known(raw: Path) -> None:
    with lamina.open(raw, format="raw") as image:
        export = Export(image)
        export.minimum = 4 * UNIT
        readahead = StatusReadahead(export, CONTEXTS[wire.BASE_ALLOCATION])
        readahead.told(0, 4 * UNIT)
        readahead.told(4 * UNIT, 8 * UNIT)
        readahead.fetch()
        assert not readahead.known


def test_rows_and_columns_tell_the_same(tmp_path: Path) -> None:
    @settings(max_examples=30)
    @given(st.text("d.", min_size=12, max_size=12), st.sampled_from([1, UNIT, 2 * UNIT, 4 * UNIT]), st.integers(0, 2))
    def law(kinds: str, minimum: int, begin: int) -> None:
        path = tmp_path / "disk.raw"
        path.unlink(missing_ok=True)
        with lamina.open(sparse(path, kinds), format="raw") as image:
            export = Export(image)
            export.minimum = minimum
            told = []
            for columns in (False, True):
                readahead = StatusReadahead(export, CONTEXTS[wire.BASE_ALLOCATION])
                readahead.told(0, begin * 4 * UNIT)
                length = export.size - begin * 4 * UNIT
                if columns:
                    readahead._learn_columns(image.root.extents(begin * 4 * UNIT, length))
                else:
                    readahead._learn(export.first_rows(begin * 4 * UNIT, length, 100))
                told.append(list(readahead.known))
            assert told[0] == told[1]

    law()


def test_a_hole_is_verified_wherever_it_was_read_ahead(raw: Path) -> None:
    """Also far behind the first rows, where columns were read."""
    with lamina.open(raw, format="raw") as image:
        readahead = begun(image)
        for number in range(2, COUNT - 3):
            assert readahead.reply(question(number * UNIT)) is not None
            if not readahead.known:
                readahead.fetch()
        with raw.open("r+b") as file:
            os.pwrite(file.fileno(), b"x", (COUNT - 3) * UNIT + 7)
        assert readahead.reply(question((COUNT - 3) * UNIT)) is None

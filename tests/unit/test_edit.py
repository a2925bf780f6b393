"""Graphs are changed while requests run: nothing is lost, nothing is seen in between, limits are asked again."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.filters.blkdebug import Blkdebug
from lamina.format_node import FormatNode
from lamina.gate import Gate, Holder
from lamina.node import FUA, MAY_UNMAP

KIB = 1024
SIZE = 512 * KIB


@pytest.fixture
def image(tmp_path: Path) -> Iterator[lamina.Image]:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=4096)
    with lamina.open(path, format="qcow2", read_only=False) as opened:
        yield opened


def qcow2(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}


class Users:
    """Threads that write and read back their own part of a disk, and know what it must hold."""

    def __init__(self, image: lamina.Image, seed: int, count: int = 4) -> None:
        self.image = image
        self.model = bytearray(SIZE)
        self.errors: list[BaseException] = []
        self.done = 0
        self._stop = threading.Event()
        part = SIZE // count
        self._threads = [
            threading.Thread(target=self._work, args=(number * part, part, random.Random(f"{seed}/{number}")))
            for number in range(count)
        ]

    def _work(self, start: int, length: int, rng: random.Random) -> None:
        try:
            while not self._stop.is_set():
                at = start + rng.randrange(length - 1)
                size = min(rng.randrange(1, 9000), start + length - at)
                kind = rng.random()
                if kind < 0.5:
                    data = rng.randbytes(size)
                    self.image.write(at, data)
                    self.model[at : at + size] = data
                elif kind < 0.6:
                    self.image.zero(at, size)
                    self.model[at : at + size] = bytes(size)
                elif kind < 0.65:
                    self.image.flush()
                else:
                    assert self.image.read(at, size) == self.model[at : at + size]
                self.done += 1
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits for this one
            self.errors.append(error)

    def __enter__(self) -> Users:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def after(self, requests: int) -> None:
        """Wait until so many more requests are done."""
        goal = self.done + requests
        while self.done < goal and not self.errors:
            self._stop.wait(0.0005)


def test_filters_come_and_go_under_load(image: lamina.Image, seed: int) -> None:
    rng = random.Random(seed)
    with Users(image, seed) as users:
        for _ in range(12):
            with image.edit() as edit:
                node = edit.insert("blkdebug", {"align": rng.choice([512, 4096, 65536])})
            users.after(20)
            with image.edit() as edit:
                edit.remove(node)
            users.after(5)
    assert not users.errors, users.errors
    assert image.read(0, SIZE) == users.model
    assert image.format == "qcow2"
    assert image.node.check().clean  # type: ignore[attr-defined]


@pytest.mark.parametrize("detect", ["off", "on", "unmap"])
def test_a_request_passes_the_gate_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detect: str) -> None:
    """At a second time it would stand behind an edit that waits for it to leave: both for ever."""
    lamina.create(tmp_path / "disk.qcow2", "qcow2", SIZE, cluster_size=4096)
    passed = 0

    class Counted(dict[object, Any]):
        def __setitem__(self, token: object, root: Any) -> None:
            nonlocal passed
            passed += 1
            super().__setitem__(token, root)

    take = Gate.take

    def counted_take(gate: Gate, holder: Holder) -> None:
        nonlocal passed
        passed += 1
        take(gate, holder)

    monkeypatch.setattr(Gate, "take", counted_take)  # by a request that runs alone
    with lamina.open({**qcow2(tmp_path / "disk.qcow2"), "detect-zeroes": detect}, read_only=False) as image:
        root, room = image.root, memoryview(bytearray(10_000))
        root.gate.inside = root._inside = Counted()
        requests: list[Callable[[], object]] = [
            lambda: root.write(5000, memoryview(b"data" * 100)),
            lambda: root.write(9000, memoryview(bytes(7000))),
            lambda: root.write(8192, memoryview(bytes(4096)), FUA),
            lambda: root.zero(4200, 50),
            lambda: root.zero(30_000, 9000),
            lambda: root.zero(5000, 20_000, MAY_UNMAP | FUA),
            lambda: root.discard(100, 20_000),
            lambda: root.read_into(3, room),
            lambda: root.reads_zero(3, 9000),
            lambda: root.extents(0, SIZE),
            lambda: root.flush(),
            lambda: root.truncate(2 * SIZE),
        ]
        for number, ask in enumerate(requests):
            before = passed
            ask()
            assert passed == before + 1, f"request {number}"


def test_overlays_are_stacked_under_load(image: lamina.Image, tmp_path: Path, seed: int) -> None:
    with Users(image, seed) as users:
        for number in range(5):
            path = tmp_path / f"overlay{number}.qcow2"
            lamina.create(path, "qcow2", SIZE, cluster_size=1024 << number % 3)
            users.after(40)
            with image.edit() as edit:
                edit.overlay(qcow2(path))
        users.after(40)
    assert not users.errors, users.errors
    assert image.read(0, SIZE) == users.model
    depths = set(image.extents().depth.tolist())
    assert max(depths) <= 5
    node: Any = image.node
    for _ in range(5):
        assert node.check().clean
        node = node.children["backing"].node


def test_limits_are_asked_again_all_the_way_up(image: lamina.Image) -> None:
    with image.edit() as edit:
        top = edit.insert("blkdebug", {"align": 512})
    assert image.alignment == 512
    with image.edit() as edit:
        below = edit.insert("blkdebug", {"align": 4096}, above=top.children["image"])
    assert (image.alignment, below.limits.request_alignment) == (4096, 4096)
    image.write(100, b"written through both")
    assert image.read(100, 20) == b"written through both"
    with image.edit() as edit:
        edit.remove(below)
    assert image.alignment == 512
    assert image.read(100, 20) == b"written through both"


def test_a_backing_node_is_exchanged(tmp_path: Path) -> None:
    for name, byte in (("one", b"1"), ("two", b"2")):
        (tmp_path / name).write_bytes(byte * SIZE)
    lamina.create(tmp_path / "top.qcow2", "qcow2", backing_file="one", backing_fmt="raw")
    with lamina.open(tmp_path / "top.qcow2", format="qcow2", read_only=False) as image:
        image.write(0, b"own")
        assert image.read(65536, 4) == b"1111"
        with image.edit() as edit:
            edit.set_backing(image.node, {"driver": "raw", "file": {"filename": str(tmp_path / "two")}})
        assert image.read(65536, 4) == b"2222"
        assert image.read(0, 4) == b"own1"
        with image.edit() as edit:
            edit.set_backing(image.node, None)
        assert image.read(65536, 4) == bytes(4)
        assert isinstance(image.node, FormatNode)


def test_what_cannot_be_leaves_the_graph_as_it_was(image: lamina.Image, tmp_path: Path) -> None:
    before = repr(image.node)
    with pytest.raises(lamina.OptionError), image.edit() as edit:
        edit.insert("blkdebug", {"align": 3})
    with pytest.raises(lamina.OptionError), image.edit() as edit:
        edit.remove(image.node)
    with pytest.raises(lamina.NotFound), image.edit() as edit:
        edit.overlay(qcow2(tmp_path / "missing.qcow2"))
    with pytest.raises(lamina.LaminaError), image.edit() as edit:
        edit.remove(Blkdebug(edit.root))
    assert repr(image.node) == before
    image.write(0, b"still here")
    assert image.read(0, 10) == b"still here"


class Somebody:
    """A user of a gate."""

    closing = False


def test_a_gate_that_is_held_is_empty(seed: int) -> None:
    gate, user = Gate(), Somebody()
    inside = [0] * 4
    stop = threading.Event()

    def pass_through(number: int) -> None:
        while not stop.is_set():
            token = object()
            gate.enter(token, user)
            inside[number] = 1
            inside[number] = 0
            gate.inside.pop(token, None)

    threads = [threading.Thread(target=pass_through, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            holder = Holder("edits")
            gate.take(holder)
            assert not any(inside)
            gate.release(holder)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_who_is_turned_away_does_not_stand_for_one_inside() -> None:
    gate, user = Gate(), Somebody()
    staying, holder = object(), Holder("edits")
    gate.enter(staying, user)
    taken = threading.Event()
    editor = threading.Thread(target=lambda: (gate.take(holder), taken.set()))
    editor.start()
    while gate.holder() is not holder:
        pass
    for _ in range(100):  # what one that comes, sees the gate shut and goes away again leaves behind
        passing = object()
        gate.inside[passing] = user
        gate.inside.pop(passing, None)
        gate.inside.pop(passing, None)
        assert not gate.enter(object(), user, wait=False)
    assert not taken.wait(0.05)
    gate.inside.pop(staying, None)
    assert taken.wait(20)
    editor.join()


def test_only_who_holds_a_gate_releases_it() -> None:
    gate, holder = Gate(), Holder("edits")
    gate.take(holder)
    gate.release(Holder("edits"))
    assert gate.holder() is holder
    gate.release(holder)
    gate.release(holder)
    assert gate.enter(object(), Somebody())


def test_a_holder_that_does_not_stop_requests_lets_them_pass_and_others_wait() -> None:
    gate, user = Gate(), Somebody()
    closing, editing = Holder("closes", stops=False), Holder("edits")
    gate.take(closing)
    assert gate.enter(1.5, user, wait=False)
    gate.inside.pop(1.5, None)
    taken = threading.Event()
    editor = threading.Thread(target=lambda: (gate.take(editing), taken.set()))
    editor.start()
    while len(gate.holders) < 2:
        pass
    assert gate.enter(1.5, user, wait=False)  # the edit's turn has not come
    assert not taken.wait(0.02)
    gate.release(closing)
    assert not taken.wait(0.02)
    gate.inside.pop(1.5, None)
    assert taken.wait(20)
    editor.join()
    assert not gate.enter(object(), user, wait=False)
    gate.release(editing)


def test_a_started_request_is_finished_by_another_thread() -> None:
    gate, user, token = Gate(), Somebody(), object()
    gate.enter(token, user)
    gate.enter(object(), user)  # the same thread may start more
    user.closing = True
    with pytest.raises(lamina.Closed):
        gate.enter(object(), user)
    thread = threading.Thread(target=gate.inside.clear)
    thread.start()
    thread.join()
    gate.drain(user)


def test_a_thread_that_edits_is_told_not_to_wait_for_itself(image: lamina.Image) -> None:
    with image.edit():
        for ask in (lambda: image.read(0, 1), image.close, image.flush, lambda: image.edit().__enter__()):
            with pytest.raises(lamina.LaminaError, match="edits the graph"):
                ask()
    assert image.read(0, 1) == b"\0"


def test_a_thread_inside_a_request_is_told_not_to_wait_for_itself(image: lamina.Image) -> None:
    said: list[str] = []

    class Calling(Blkdebug):
        """Does what a signal handler might do in the middle of a request."""

        def read_into(self, offset: int, view: memoryview) -> None:
            for ask in (image.close, lambda: image.edit().__enter__(), lambda: image.read(0, 1), image.share):
                try:
                    ask()
                except lamina.LaminaError as error:
                    said.append(error.message)
            super().read_into(offset, view)

    with image.edit() as edit:
        node = edit.insert("blkdebug")
    node.__class__ = Calling
    assert image.read(0, 1) == b"\0"
    assert len(said) == 4
    assert all("inside a request" in text for text in said)
    node.__class__ = Blkdebug
    image.write(0, b"x")
    assert image.read(0, 1) == b"x"

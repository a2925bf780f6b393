"""Many users of one graph against a model: images, exports and edits, one after the other (a state machine) and from eight
threads at once, closed in random order. No node is closed under a user, and none stays open after the last.

`LAMINA_ROOTS=N` runs N times as many (20 takes a few minutes)."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import lamina
from lamina.image import Image
from lamina.nbd.server.export import Export
from lamina.nbd.server.server import Server
from lamina.node import Node

SIZE = 256 * 1024
PATIENCE = 20.0
MORE = int(os.environ.get("LAMINA_ROOTS", "1"))
FILTERS: list[tuple[str, dict[str, Any]]] = [
    ("blkdebug", {"align": 4096}),
    ("cache", {}),
    ("stats", {}),
    ("throttle", {}),
    ("compress", {}),
]


def qcow2(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}


class Served:
    """A user behind an export: a server with its own root on the graph, and a client of it."""

    def __init__(self, image: Image, where: Path) -> None:
        self.server = Server([Export(image, writable=True)], unix=str(where)).start()
        try:
            self.image = lamina.open({"driver": "nbd", "path": str(where)}, read_only=False)
        except BaseException:
            self.server.close()
            raise

    def close(self) -> None:
        try:
            self.image.close()
        finally:
            self.server.close()


class Users(RuleBasedStateMachine):
    """Users of a growing stack of overlays and filters. `model`: the bytes on top; `frozen`: users of a node that lies under
    an overlay by now, and what they read for ever."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.number = 0
        lamina.create(self.new_path(), "qcow2", SIZE, cluster_size=4096)
        self.spec = qcow2(self.path)
        self.model = bytearray(SIZE)
        self.images: list[Image] = [lamina.open(self.spec, read_only=False)]
        self.exports: list[Served] = []
        self.filters: list[Node] = []
        self.frozen: list[tuple[Image, bytes]] = []
        self.nodes: set[Node] = set(self.images[0].node.beneath())

    def new_path(self) -> Path:
        self.number += 1
        self.path = self.folder / f"{self.number}.qcow2"
        return self.path

    def user(self, number: int) -> Image:
        users = [*self.images, *(export.image for export in self.exports)]
        return users[number % len(users)]

    @rule(number=st.integers(0, 99))
    def share(self, number: int) -> None:
        if len(self.images) < 5:
            self.images.append(self.images[number % len(self.images)].share())

    @rule(number=st.integers(0, 99))
    def serve(self, number: int) -> None:
        if len(self.exports) < 2:
            self.number += 1
            self.exports.append(Served(self.images[number % len(self.images)], self.folder / f"{self.number}.sock"))

    @rule(
        number=st.integers(0, 99), at=st.integers(0, SIZE - 1), length=st.integers(1, 9000), value=st.integers(0, 255)
    )
    def write(self, number: int, at: int, length: int, value: int) -> None:
        data = bytes([value]) * min(length, SIZE - at)
        self.user(number).write(at, data)
        self.model[at : at + len(data)] = data

    @rule(number=st.integers(0, 99), at=st.integers(0, SIZE - 1), length=st.integers(1, 50_000))
    def zero(self, number: int, at: int, length: int) -> None:
        length = min(length, SIZE - at)
        self.user(number).zero(at, length, unmap=bool(length % 2))
        self.model[at : at + length] = bytes(length)

    @rule(number=st.integers(0, 99), at=st.integers(0, SIZE - 1), length=st.integers(1, 50_000))
    def read(self, number: int, at: int, length: int) -> None:
        length = min(length, SIZE - at)
        assert self.user(number).read(at, length) == self.model[at : at + length]

    @rule(number=st.integers(0, 99))
    def flush(self, number: int) -> None:
        self.user(number).flush()

    @rule(number=st.integers(0, 99), kind=st.sampled_from(FILTERS))
    def insert(self, number: int, kind: tuple[str, dict[str, Any]]) -> None:
        if len(self.filters) < 3:
            with self.images[number % len(self.images)].edit() as edit, suppress(lamina.UnsupportedFeature):
                self.filters.append(edit.insert(*kind))
                self.nodes.add(self.filters[-1])

    @precondition(lambda self: self.filters)
    @rule(number=st.integers(0, 99), which=st.integers(0, 99))
    def remove(self, number: int, which: int) -> None:
        node = self.filters.pop(which % len(self.filters))
        with self.images[number % len(self.images)].edit() as edit:
            edit.remove(node)
        self.nodes.discard(node)

    @rule(number=st.integers(0, 99))
    def overlay(self, number: int) -> None:
        """Filters stay below it; one user keeps the disk of before."""
        if self.number > 12 or self.filters:
            return
        image = self.images[number % len(self.images)]
        below = image.node
        lamina.create(self.new_path(), "qcow2", SIZE, cluster_size=1024)
        with image.edit() as edit:
            node = edit.overlay(qcow2(self.path))
            frozen = image.share(below)
        self.spec = {**qcow2(self.path), "backing": self.spec}
        self.nodes.update(node.beneath())
        self.frozen.append((frozen, bytes(self.model)))

    @precondition(lambda self: self.frozen)
    @rule(number=st.integers(0, 99))
    def look_back(self, number: int) -> None:
        image, model = self.frozen[number % len(self.frozen)]
        assert image.read_only
        assert image.read(0, SIZE) == model

    @precondition(lambda self: self.frozen)
    @rule(number=st.integers(0, 99))
    def forget(self, number: int) -> None:
        self.frozen.pop(number % len(self.frozen))[0].close()

    @rule(number=st.integers(0, 99))
    def close_image(self, number: int) -> None:
        if len(self.images) > 1:
            self.images.pop(number % len(self.images)).close()

    @precondition(lambda self: self.exports)
    @rule(number=st.integers(0, 99))
    def close_export(self, number: int) -> None:
        self.exports.pop(number % len(self.exports)).close()

    @invariant()
    def nobody_lost_a_node(self) -> None:
        if hasattr(self, "images"):
            assert all(image.node is self.images[0].node for image in self.images)
            assert all(node.parents() for node in self.images[0].node.beneath())

    def teardown(self) -> None:
        if not hasattr(self, "images"):
            return
        ends: list[Any] = [*self.images, *self.exports, *(image for image, _ in self.frozen)]
        random.Random(len(self.nodes) + len(ends)).shuffle(ends)
        last = ends.pop()
        for end in ends:
            end.close()
        content = None if isinstance(last, Served) else last
        if content is not None:
            model = next((model for image, model in self.frozen if image is last), self.model)
            assert last.read(0, SIZE) == model
        last.close()
        assert not [node for node in self.nodes if node.held]
        with lamina.open(self.spec) as image:
            assert image.read(0, SIZE) == self.model
        shutil.rmtree(self.folder)


TestUsers = Users.TestCase
TestUsers.settings = settings(
    max_examples=30 * MORE, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


class Worker(threading.Thread):
    """Uses its own part of the disk, through images and exports that it opens and closes, and edits the graph."""

    def __init__(self, number: int, image: Image, pool: list[Image], folder: Path, seed: str, steps: int) -> None:
        super().__init__(daemon=True)
        self.number, self.pool, self.folder, self.steps = number, pool, folder, steps
        self.rng = random.Random(seed)
        self.image = image.share()
        self.served: Served | None = None
        self.model = bytearray(SIZE // 8)
        self.filters: list[Node] = []
        self.error: BaseException | None = None
        pool.append(self.image)

    def run(self) -> None:
        try:
            for step in range(self.steps):
                self.step(step)
            while self.filters:
                self.edit()
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits for this one
            self.error = error
        finally:
            self.pool.remove(self.image)
            if self.served is not None:
                self.served.close()
            self.image.close()

    def step(self, step: int) -> None:
        rng, kind = self.rng, self.rng.random()
        if kind < 0.1:
            self.move()
        elif kind < 0.16:
            self.edit()
        elif kind < 0.2 and self.served is None:
            self.served = Served(self.image, self.folder / f"{self.number}.{step}.sock")
        elif kind < 0.24 and self.served is not None:
            self.served.close()
            self.served = None
        else:
            image = self.served.image if self.served is not None and rng.random() < 0.7 else self.image
            length = rng.randrange(1, 9000)
            at = rng.randrange(len(self.model) - length)
            first = self.number * len(self.model)
            if kind < 0.6:
                data = rng.randbytes(length)
                image.write(first + at, data)
                self.model[at : at + length] = data
            elif kind < 0.68:
                image.zero(first + at, length, unmap=True)
                self.model[at : at + length] = bytes(length)
            elif kind < 0.7:
                image.flush()
            else:
                assert image.read(first + at, length) == self.model[at : at + length]

    def move(self) -> None:
        """Be another user: of the image of some other thread, which may be closed just now."""
        try:
            image = self.rng.choice(list(self.pool)).share()
        except lamina.Closed:
            image = self.image.share()
        old, self.image = self.image, image
        self.pool.append(image)
        self.pool.remove(old)
        old.close()

    def edit(self) -> None:
        with self.image.edit() as edit:
            if self.filters and self.rng.random() < 0.6:
                edit.remove(self.filters.pop())
            elif len(self.filters) < 2:
                with suppress(lamina.UnsupportedFeature):  # compress, over a filter that hides that the format can
                    self.filters.append(edit.insert(*self.rng.choice(FILTERS)))


@pytest.mark.parametrize("number", range(2 * MORE))
def test_eight_threads(tmp_path: Path, seed: int, number: int) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=4096)
    image = lamina.open(path, format="qcow2", read_only=False)
    nodes = list(image.node.beneath())
    pool: list[Image] = []
    workers = [Worker(one, image, pool, tmp_path, f"{seed}/{number}/{one}", 150) for one in range(8)]
    for worker in workers:
        worker.start()
    image.close()
    for worker in workers:
        worker.join(PATIENCE)
        assert not worker.is_alive(), "a thread waits for ever"
    for worker in workers:
        if worker.error is not None:
            raise worker.error
    assert not any(node.held for node in nodes)
    with lamina.open(path, format="qcow2", read_only=False) as again:
        assert again.read(0, SIZE) == b"".join(worker.model for worker in workers)
        assert again.node.check().clean  # type: ignore[attr-defined]

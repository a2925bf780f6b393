"""Several users of one graph: images, exports, edits. They see one another's bytes, and are closed in any order."""

from __future__ import annotations

import gc
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.format_node import FormatNode
from lamina.image import Image
from lamina.nbd.server.export import Export
from lamina.nbd.server.server import Server
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

SIZE = 256 * 1024
PATIENCE = 20.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=4096)
    return path


@pytest.fixture
def image(path: Path) -> Iterator[Image]:
    spec = {
        "driver": "qcow2",
        "node-name": "disk",
        "file": {"driver": "file", "filename": str(path), "node-name": "file0"},
    }
    with lamina.open(spec, read_only=False) as image:
        yield image


def test_images_on_one_node_see_the_same_bytes_and_close_in_any_order(path: Path) -> None:
    for first in (0, 1, 2):
        image = lamina.open(path, format="qcow2", read_only=False)
        images = [image, image.share(), image.share(read_only=True)]
        node = image.node
        image.write(0, b"written %d" % first)
        assert all(one.read(0, 9) == b"written %d" % first for one in images)
        with pytest.raises(lamina.ReadOnly):
            images[2].write(0, b"x")
        images.pop(first).close()
        assert node.held
        for one in images:
            assert one.read(0, 9) == b"written %d" % first
            one.flush()
        images[0].close()
        assert images[1].read(0, 9) == b"written %d" % first
        images[1].close()
        assert not node.held
        with lamina.open(path, format="qcow2", read_only=False) as again:
            assert again.read(0, 9) == b"written %d" % first


def test_all_of_them_see_an_edit(image: Image, tmp_path: Path) -> None:
    with image.share() as other, image.share() as third:
        with other.edit() as edit:
            node = edit.insert("blkdebug", {"align": 4096})
        assert [one.alignment for one in (image, other, third)] == [4096] * 3
        third.write(100, b"abc")
        lamina.create(tmp_path / "overlay.qcow2", "qcow2", SIZE)
        with third.edit() as edit:
            edit.overlay({"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "overlay.qcow2")}})
        image.write(200, b"above")
        assert other.read(100, 105)[100:] == b"above"
        with other.edit() as edit:
            edit.remove(node)
        assert third.read(100, 3) == b"abc"
        frozen = image.share("disk")
        assert frozen.read(200, 5) == bytes(5)
        with pytest.raises(lamina.ReadOnly):  # the overlay lies on it
            frozen.write(0, b"x")
        frozen.close()
        assert image.read(200, 5) == b"above"


def test_a_node_below_outlives_the_nodes_above(image: Image) -> None:
    below = image.share("file0")
    image.write(0, b"x" * 5000)
    with pytest.raises(lamina.ReadOnly):
        below.write(0, b"x")
    image.close()
    assert below.read(0, 4) == b"QFI\xfb"
    assert below.graph.nodes == {"file0": below.node}
    below.close()
    assert not below._root


def test_one_gate_for_all(path: Path) -> None:
    image = lamina.open(path, format="qcow2", read_only=False)
    other = image.share()
    done = threading.Event()

    def ask() -> None:
        other.read(0, 1)
        done.set()

    with image.edit():
        thread = threading.Thread(target=ask)
        thread.start()
        assert not done.wait(0.05)
    assert done.wait(PATIENCE)
    thread.join()
    other.truncate(2 * SIZE)
    assert image.size == 2 * SIZE
    image.close()
    with pytest.raises(lamina.Closed):
        image.read(0, 1)
    with pytest.raises(lamina.Closed):
        image.share()
    with other.edit() as edit:
        edit.insert("blkdebug")
    assert other.share().read(0, 1) == b"\0"  # forgotten, and so no user any more
    other.close()


def test_names_refer_to_nodes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 4096)
    file = {"driver": "file", "filename": str(tmp_path / "a"), "node-name": "disk0"}
    with lamina.open({"driver": "raw", "file": file, "node-name": "top"}) as image:
        assert sorted(image.graph.nodes) == ["disk0", "top"]
        with lamina.open({"driver": "raw", "file": "disk0", "offset": 512}, graph=image.graph) as other:
            assert other.read(0, 1) == b"a"
            assert other.node.children["file"].node is image.node.children["file"].node
            assert other.graph is image.graph
            image.close()
            assert other.read(0, 1) == b"a"
    spec = {"driver": "quorum", "vote-threshold": 2, "children": [{**file, "node-name": "one"}, "one"]}
    with lamina.open(spec) as image:
        assert image.read(0, 2) == b"aa"
        nodes = [child.node for child in image.node.children.values()]
        assert nodes[0] is nodes[1]
    assert not nodes[0].held


@pytest.mark.parametrize("name", ["", "1st", "a b", "a/b", "x#1", "a" * 256, 5])
def test_a_name_is_a_word(name: Any) -> None:
    with pytest.raises(lamina.OptionError, match="node-name"):
        lamina.open({"driver": "memory", "size": 512, "node-name": name})


def test_a_name_is_given_once(image: Image) -> None:
    for spec in ({"driver": "memory", "size": 512, "node-name": "disk"},):
        with pytest.raises(lamina.OptionError, match="another node of this graph has that name"):
            lamina.open(spec, graph=image.graph)
    with lamina.open({"driver": "memory", "size": 512, "node-name": "disk"}):
        pass  # another graph
    with pytest.raises(lamina.OptionError, match="has no node"):
        image.share("nobody")
    graph = image.graph
    image.close()
    with lamina.open({"driver": "memory", "size": 512, "node-name": "disk"}, graph=graph):
        pass  # free again


def test_a_node_that_another_one_writes_to_is_not_shared(image: Image) -> None:
    """The same rules as those of the locks of files, between nodes."""
    graph = image.graph
    for spec, read_only in (
        ({"driver": "raw", "file": "file0"}, True),  # qcow2 writes to it
        ({"driver": "raw", "file": "file0"}, False),
        ({"driver": "throttle", "image": "disk"}, False),  # so may the image
        ({"driver": "throttle", "image": "disk"}, True),
    ):
        with pytest.raises(lamina.OptionError, match="excludes a second node"):
            lamina.open(spec, graph=graph, read_only=read_only)
    image.write(0, b"still here")
    with lamina.open({"driver": "memory", "size": 512, "node-name": "m"}, read_only=True, graph=graph) as memory:
        spec = {"driver": "throttle", "image": "m"}
        with lamina.open(spec, graph=graph) as one, lamina.open(spec, graph=graph) as two:
            assert one.read(0, 1) == two.read(0, 1) == memory.read(0, 1)
        with pytest.raises(lamina.OptionError, match="read-only"):
            lamina.open({"driver": "throttle", "image": "m"}, graph=graph, read_only=False)
    assert image.read(0, 10) == b"still here"


def test_a_backing_node_is_named_in_an_edit(image: Image, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    base = {"driver": "file", "filename": str(tmp_path / "base"), "node-name": "base"}
    with lamina.open(base, graph=image.graph) as below:
        with image.edit() as edit:
            edit.set_backing(image.node, "base")
        assert image.read(0, 4) == b"bbbb"
        below.close()
        assert image.read(0, 4) == b"bbbb"
        with image.edit() as edit:
            edit.set_backing(image.node, None)
    assert "base" not in image.graph.nodes


def test_two_graphs_in_use_are_not_joined_by_hand() -> None:
    with Image(MemoryStorage(512)) as one, Image(MemoryStorage(512)) as two:
        from lamina.filters.blkverify import Blkverify

        with pytest.raises(lamina.LaminaError, match="two graphs"):
            Image(Blkverify(Child(one.node, "image"), Child(two.node, "raw")))


def test_an_export_is_a_user_by_itself(path: Path, tmp_path: Path) -> None:
    where = tmp_path / "nbd.sock"
    for server_first in (True, False):
        image = lamina.open(path, format="qcow2", read_only=False)
        node = image.node
        server = Server([Export(image, writable=True), Export(image, "ro")], unix=str(where)).start()
        try:
            with (
                lamina.open({"driver": "nbd", "path": str(where)}, read_only=False) as client,
                lamina.open({"driver": "nbd", "path": str(where), "export": "ro"}) as reader,
            ):
                client.write(0, b"through it")
                assert image.read(0, 10) == reader.read(0, 10) == b"through it"
                with image.edit() as edit:
                    edit.insert("cache")
                client.write(8, b"everywhere")
                assert image.read(0, 18) == reader.read(0, 18) == b"through everywhere"
                if not server_first:
                    image.close()
                assert node.held
                client.write(0, b"afterwards")
        finally:
            server.close()
        if server_first:
            assert image.read(0, 10) == b"afterwards"
            image.close()
        assert not node.held
        with lamina.open(path, format="qcow2", read_only=False) as again:
            assert again.read(0, 10) == b"afterwards"
            assert isinstance(again.node, FormatNode)


def test_a_signal_handler_inside_a_request_is_told(image: Image) -> None:
    """It would wait for a range that its own thread holds."""
    said: list[str] = []
    other = image.share()

    class Signalling(MemoryStorage):
        serialise = 4096

        def read_into(self, offset: int, view: memoryview) -> None:
            if not said:
                signal.raise_signal(signal.SIGUSR1)
            super().read_into(offset, view)

    with Image(Signalling(SIZE)) as slow, slow.share() as beside:

        def handler(*_: object) -> None:
            for ask in (
                lambda: slow.write(0, b"x"),
                lambda: beside.write(0, b"x"),
                slow.flush,
                beside.close,
                slow.share,
            ):
                try:
                    ask()
                except lamina.LaminaError as error:
                    said.append(error.message)
            other.write(0, b"another graph")

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            assert slow.read(0, 1) == b"\0"
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert len(said) == 5
        assert all("inside a request" in text for text in said)
        slow.write(0, b"x")
        assert beside.read(0, 1) == b"x"
    assert image.read(0, 13) == b"another graph"
    other.close()


def test_a_forgotten_user_is_none_any_more(path: Path) -> None:
    image = lamina.open(path, format="qcow2", read_only=False)
    other = image.share()
    node = image.node
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del other
        gc.collect()
        image.close()
    assert not node.held


def test_the_last_user_that_is_forgotten_is_told(path: Path) -> None:
    image = lamina.open(path, format="qcow2", read_only=False)
    keep = [image.share()]
    keep[0].write(0, b"written")
    image.close()
    del image
    with pytest.warns(ResourceWarning, match=r"disk\.qcow2, opened at .*test_roots\.py"):
        keep.clear()
    done = threading.Event()
    for _ in range(2000):
        try:
            with lamina.open(path, format="qcow2", read_only=False) as again:
                assert again.read(0, 7) == b"written"
                return
        except lamina.Locked:
            done.wait(0.01)
    pytest.fail("it is never closed")

"""Images that nobody closes: forgotten ones, and those that are open when the program ends."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import lamina
from lamina.filters.cache import Cache
from lamina.graph import open_graph
from lamina.image import Image
from lamina.node import FilterNode
from lamina.request import Child

SIZE = 1 << 20
PATIENCE = 20.0


def made(path: Path) -> Path:
    lamina.create(path, "qcow2", SIZE, cluster_size=4096)
    return path


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock of this image."""
    try:
        with lamina.open(path, format="qcow2", read_only=False):
            return True
    except lamina.Locked:
        return False


def wait_until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.002)


def forget(*keeping: list[object]) -> None:
    for keep in keeping:
        keep.clear()
    gc.collect()


def content(path: Path, length: int = 7) -> bytes:
    with lamina.open(path, format="qcow2") as image:
        assert image.node.check().clean  # type: ignore[attr-defined]
        return image.read(0, length)


def test_a_forgotten_image_is_closed_and_the_warning_names_the_line(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    image = lamina.open(path, format="qcow2", read_only=False)
    line = sys._getframe().f_lineno - 1
    image.write(0, b"written")
    keep: list[object] = [image]
    del image
    with pytest.warns(
        ResourceWarning, match=rf"disk\.qcow2, opened at .*test_never_closed\.py:{line}, was never closed"
    ) as caught:
        forget(keep)
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)  # so that filters of warnings find it
    wait_until(lambda: is_free(path))
    assert content(path) == b"written"


def test_so_is_a_graph_without_an_image_and_one_in_a_cycle(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    node = open_graph(str(path), format="qcow2", read_only=False)
    Child(node, "root").write(0, memoryview(b"written"))
    cycle: list[object] = [node]
    cycle.append(cycle)
    del node, cycle
    with pytest.warns(ResourceWarning, match="was never closed"):
        gc.collect()
    wait_until(lambda: is_free(path))
    assert content(path) == b"written"


def test_the_top_of_now_is_closed_after_edits(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    image = lamina.open(path, format="qcow2", read_only=False)
    with image.edit() as edit:
        edit.insert("cache")
    with image.edit() as edit:
        node = edit.insert("blkdebug")
    image.write(0, b"written")
    with image.edit() as edit:
        edit.remove(node)
    image.write(3, b"!!!")
    keep: list[object] = [image]
    del node, edit, image
    with pytest.warns(ResourceWarning, match="test_never_closed.py"):
        forget(keep)
    wait_until(lambda: is_free(path))
    assert content(path) == b"wri!!!n"


def test_an_image_that_shares_a_graph_is_forgotten_without_harm(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    node = lamina.open(path, format="qcow2", read_only=False).node
    gc.collect()
    with Image(Cache(Child(node, "image"))) as image:
        image.write(0, b"written")
    gc.collect()
    assert content(path) == b"written"


def test_an_edge_that_outlives_the_image_does_not_keep_its_file_open(tmp_path: Path) -> None:
    """As an interrupt leaves it, between an edge and the node that would own it."""
    path = made(tmp_path / "disk.qcow2")
    image = lamina.open(path, format="qcow2", read_only=False)
    keep: list[object] = [Child(image.node, "image")]
    image.write(0, b"written")
    image.close()
    del image
    assert not is_free(path)
    with pytest.warns(ResourceWarning, match="test_never_closed.py"):
        forget(keep)
    wait_until(lambda: is_free(path))
    assert content(path) == b"written"


@pytest.mark.parametrize("first", [True, False], ids=["the image below is closed first", "and last"])
def test_a_forgotten_image_above_another_one_is_closed_from_the_top(tmp_path: Path, first: bool) -> None:
    """The node in the middle has buffered bytes, which its settling writes to the file below."""
    path = made(tmp_path / "disk.qcow2")
    below = lamina.open(path, format="qcow2", read_only=False)
    node = below.node
    above = Image(Late(Child(node, "image")))
    where = node.opened_at
    assert where is not None
    assert above.node.opened_at == where
    if first:
        below.close()
        assert node.opened_at is None
    above.write(0, b"written")
    keep: list[object] = [above]
    keep.append(keep)
    del above
    with pytest.warns(ResourceWarning, match="test_never_closed.py") as warned:
        forget(keep)
    wait_until(lambda: len(node.parents()) == (0 if first else 1))
    assert len(warned) == 1
    below.close()
    wait_until(lambda: is_free(path))
    assert content(path) == b"written"


class Late(FilterNode):
    """It writes everything when it is settled."""

    driver = "late"

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.kept = (offset, bytes(view))

    def settle(self) -> None:
        offset, data = self.kept
        self.image.write(offset, memoryview(data))


def test_nothing_is_said_of_what_was_closed_or_holds_nothing(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = lamina.open(path, format="qcow2")
        image.close()
        memory = lamina.open({"driver": "memory", "size": SIZE}, read_only=False)
        memory.write(0, b"x")
        node = open_graph(str(path), format="qcow2")
        node.close()
        with pytest.raises(lamina.LaminaError):
            lamina.open({"driver": "qcow2", "file.filename": str(path), "backing": {"driver": "no-such-driver"}})
        del image, memory, node
        gc.collect()
    assert is_free(path)


def test_collected_inside_a_request(tmp_path: Path) -> None:
    """Garbage is collected inside any allocation: here under the locks of another graph."""
    path, other = made(tmp_path / "disk.qcow2"), made(tmp_path / "other.qcow2")

    class Collecting(FilterNode):
        driver = "collecting"

        def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
            gc.collect()
            super().write(offset, view, flags)

    forgotten = lamina.open(path, format="qcow2", read_only=False)
    forgotten.write(0, b"written")
    cycle: list[object] = [forgotten]
    cycle.append(cycle)
    file = open_graph({"driver": "file", "filename": str(other)}, read_only=False)
    below = Child(Collecting(Child(file, "image", grows=True)), "file", grows=True)
    with Image(open_graph({"driver": "qcow2", "file": below}, read_only=False)) as image:
        del forgotten, cycle
        with pytest.warns(ResourceWarning, match="disk.qcow2"):
            image.write(0, b"written")
    wait_until(lambda: is_free(path))
    assert content(path) == content(other) == b"written"


def test_what_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = made(tmp_path / "disk.qcow2")
    node = open_graph({"driver": "cache", "image": {"driver": "qcow2", "file.filename": str(path)}}, read_only=False)
    Image(node).write(0, b"held back")
    with open(os.devnull, "rb") as null:  # nothing can be written there
        os.dup2(null.fileno(), node.children["image"].node.children["file"].node._fd)  # type: ignore[attr-defined]
    keep: list[object] = [node]
    del node
    with pytest.warns(ResourceWarning):
        forget(keep)
    wait_until(lambda: "could not be written" in caplog.text)


# -- the end of the program

RUN = """
import sys, threading
import lamina
image = lamina.open(sys.argv[1], format="qcow2", read_only=False)
image.write(0, b"written")
"""


def run(path: Path, more: str = "", *options: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", RUN + more, path],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        cwd=path.parent,
    )
    assert done.returncode == status, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise ValueError", 1),
        ("cycle = [image]; cycle.append(cycle); del image, cycle", 0),
        ("sys.keep = image; import builtins; builtins.keep = image", 0),
        ("import signal, os\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: pass", 0),
    ],
)
def test_what_is_open_at_the_end_is_flushed(tmp_path: Path, more: str, status: int) -> None:
    path = made(tmp_path / "disk.qcow2")
    run(path, more, status=status)
    assert content(path) == b"written"


def test_the_end_warns(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    said = run(path, "", "-W", "default")
    assert "ResourceWarning" in said
    assert "disk.qcow2, opened at <string>:4, was never closed" in said
    assert not run(path)  # not by default


def test_threads_that_go_on_after_the_main_thread_lose_nothing(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    more = """
import time
def work():
    time.sleep(0.2)
    image.write(4, b"...")
threading.Thread(target=work).start()
"""
    run(path, more)
    assert content(path) == b"writ..."


def test_a_pool_of_threads_at_the_end(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    more = """
from concurrent.futures import ThreadPoolExecutor
import time
pool = ThreadPoolExecutor(2)
def work():
    time.sleep(0.2)
    image.write(4, b"...")
pool.submit(work)
"""
    run(path, more)
    assert content(path) == b"writ..."


def test_a_daemon_thread_inside_a_request_holds_up_the_end_for_a_while_at_most(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    more = """
import lamina.lifecycle
lamina.lifecycle._PATIENCE = 0.2
with image.edit() as edit:
    edit.insert("delay", {"read-ms": 600000})
threading.Thread(target=lambda: image.read(0, 1), daemon=True).start()
while not image.root.gate.inside: pass
"""
    run(path, more)
    assert content(path) == b"written"

"""A forked child reads through the images of its parent, and neither changes nor settles them.

`LAMINA_FORKS=N` forks so many children beside writers (a few seconds for every hundred)."""

from __future__ import annotations

import os
import random
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import lifecycle
from lamina.filters.cow import Cow
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import open_graph
from lamina.image import Image
from lamina.nbd.server import Server
from lamina.nbd.server.export import Export
from lamina.request import Child
from lamina.storage.file import FileStorage
from lamina.storage.memory import MemoryStorage
from tests.conftest import Qemu
from tests.nbd_raw import Gone, SocketStream, dial

SIZE = 1 << 20
PATIENCE = 20.0
ROUNDS = int(os.environ.get("LAMINA_FORKS", "15"))


def in_child(work: Callable[[], None]) -> None:
    """Do it in a forked child, which ends as an interpreter does; fail the test if it failed there, or does not end."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            lifecycle._flush_all()
            lifecycle._close_all()
            status = 0
        except BaseException:  # noqa: BLE001 - the child has nobody to tell but its standard error
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + PATIENCE
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            pytest.fail("the child does not end")
        time.sleep(0.002)
    assert status == 0


def refused(*asked: Callable[[], Any]) -> None:
    for ask in asked:
        with pytest.raises(lamina.LaminaError, match="another process opened it"):
            ask()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=4096)
    return path


def test_a_child_that_leaves_every_with_writes_nothing(path: Path, qemu: Qemu) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"flushed")
        image.flush()
        for number in range(40):
            image.write(4096 * (number + 1), b"not flushed")
        before = path.read_bytes()

        def child() -> None:
            with image:
                assert image.read(0, 7) == b"flushed"
                assert image.read(4096 * 40, 11) == b"not flushed"

        in_child(child)
        assert path.read_bytes() == before
        # The parent's locks are still there.
        assert qemu.img("resize", "-f", "qcow2", path, "2M", check=False).returncode != 0
        image.write(0, b"again")
        image.flush()
        after = path.read_bytes()
        in_child(lambda: None)  # the end of a child flushes nothing either
        assert path.read_bytes() == after
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 7) == b"agained"
        assert image.read(4096 * 40, 11) == b"not flushed"
    assert qemu.check(path)[0] == 0


def test_children_beside_writers(path: Path, qemu: Qemu, seed: int) -> None:
    """Whatever the parent's threads do at the moment of the fork: the child reads what was there for long, and ends."""
    lasting = SIZE - 64 * 1024
    spec = {
        "driver": "stats",
        "image": {"driver": "cache", "blocks": 6, "image": {"driver": "qcow2", "file.filename": str(path)}},
    }
    written: list[dict[int, bytes]] = [{}, {}, {}]
    with lamina.open(spec, read_only=False) as image:
        image.write(lasting, b"lasting" * 1000)
        image.flush()
        stop = threading.Event()

        def work(number: int) -> None:
            rng = random.Random(f"{seed}/{number}")
            while not stop.is_set():
                at = (rng.randrange(lasting // 1536) * 3 + number) * 512
                written[number][at] = data = rng.randbytes(512)
                image.write(at, data)
                if rng.random() < 0.02:
                    image.flush()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        try:

            def child() -> None:
                with image:
                    assert image.read(lasting, 7000) == b"lasting" * 1000
                    assert image.read(lasting + 100, 10) == (b"lasting" * 20)[100:110]

            for _ in range(ROUNDS):
                in_child(child)
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
    with lamina.open(path, format="qcow2") as image:
        for part in written:
            for at, data in part.items():
                assert image.read(at, 512) == data
    assert qemu.check(path)[0] == 0


def test_what_a_child_may_not_do(path: Path) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"written")
        before = path.read_bytes()

        def child() -> None:
            refused(
                lambda: image.write(0, b"x"),
                lambda: image.write(0, b"x", fua=True),
                lambda: image.zero(0, 4096),
                lambda: image.discard(0, 4096),
                image.flush,
                lambda: image.truncate(SIZE),
                lambda: image.truncate(2 * SIZE),
                lambda: image.node.flush(),
                lambda: image.node.children["file"].node.flush(),
                lambda: image.node.children["file"].write(0, memoryview(b"x")),
            )
            assert image.extents().length.sum() == SIZE
            assert image.as_file().read(7) == b"written"
            image.close()
            try:
                image.read(0, 1)
            except lamina.Closed:
                return
            raise AssertionError("a closed image was read")

        in_child(child)
        assert path.read_bytes() == before
        assert image.read(0, 7) == b"written"


def test_locks_that_threads_of_the_parent_hold(tmp_path: Path, path: Path) -> None:
    """Each lock of the graph is held by another thread at the time of the fork."""
    storage = open_graph(str(path), format="qcow2", read_only=False)
    with Image(Cow(Child(storage, "image"))) as image:
        node: Any = storage
        file: Any = node.children["file"].node
        locks = [node.tables.lock, node._compression._cache_lock, node._compression._allocating, file._growing]
        locks += [image.node._mutex, image.node._changed._mutex]  # type: ignore[attr-defined]
        ready, over = threading.Event(), threading.Event()

        def hold() -> None:
            for lock in locks:
                lock.acquire()
            image.root.gate.inside["a request"] = image.root
            node.ranges.exclusive(0, SIZE, image.node.ranges.exclusive, 0, SIZE, wait)
            del image.root.gate.inside["a request"]
            for lock in locks:
                lock.release()

        def wait() -> None:
            ready.set()
            over.wait(PATIENCE)

        thread = threading.Thread(target=hold)
        thread.start()
        assert ready.wait(PATIENCE)
        try:

            def child() -> None:
                with image:
                    assert image.read(0, 7) == bytes(7)

            in_child(child)
        finally:
            over.set()
            thread.join(PATIENCE)


def test_filters_that_write_when_they_are_closed_do_not(tmp_path: Path, path: Path) -> None:
    log, report, writes = tmp_path / "log", tmp_path / "stats.json", tmp_path / "writes"
    writes.write_bytes(b"")
    spec: dict[str, Any] = {"driver": "qcow2", "file.filename": str(path)}
    for driver, options in (
        ("cache", {}),
        ("logwrites", {"log": {"driver": "file", "filename": str(writes)}}),
        ("stats", {"report": str(report)}),
        ("log", {"log": str(log)}),
        ("copy_on_read", {}),
    ):
        spec = {"driver": driver, "image": spec, **options}
    with lamina.open(spec, read_only=False) as image:
        image.write(0, b"held back")

        def all_bytes() -> list[bytes]:
            return [file.read_bytes() for file in (path, writes, report) if file.exists()]

        before = all_bytes()

        def child() -> None:
            with image:
                assert image.read(0, 9) == b"held back"

        in_child(child)
        assert all_bytes() == before
        assert " close " not in log.read_text()
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 9) == b"held back"


def test_a_file_that_is_longer_than_its_disk_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1000))
    spec = {"driver": "preallocate", "image": {"driver": "file", "filename": str(path)}}
    with lamina.open(spec, read_only=False) as image:
        image.node.write(1000, memoryview(b"x"))
        length = path.stat().st_size
        assert length > 1001

        def child() -> None:
            image.close()

        in_child(child)
        assert path.stat().st_size == length
    assert path.stat().st_size == 1001


def test_a_child_forgets_an_image_without_a_word(path: Path) -> None:
    keep = [lamina.open(path, format="qcow2", read_only=False)]
    keep[0].write(0, b"written")
    before = path.read_bytes()

    def child() -> None:
        import gc
        import warnings

        warnings.simplefilter("error")
        keep.clear()
        gc.collect()

    in_child(child)
    assert path.read_bytes() == before
    keep[0].close()


def raw_images(folder: Path) -> list[Image]:
    paths = [folder / f"{number}.raw" for number in range(8)]
    for path in paths:
        path.write_bytes(bytes(512))
    return [lamina.open(path, format="raw", read_only=False) for path in paths]


class Broken(MemoryStorage):
    def after_fork(self) -> None:
        super().after_fork()
        raise AttributeError("a part that its opening never made")


def test_a_node_that_fails_leaves_no_other_one_armed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the order in which they are told."""
    broken = [Broken(512) for _ in range(8)]
    images = raw_images(tmp_path)

    def child() -> None:
        assert all(node.foreign for node in broken)
        assert len(caplog.messages) == len(broken), "a failure that nobody hears of"
        refused(*(partial(image.write, 0, b"x") for image in images))

    in_child(child)
    for image in images:
        image.close()


def test_a_node_whose_opening_failed_says_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Whoever keeps the exception keeps the node that was half made."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Qcow2, "_load_tables", fail)
    with pytest.raises(KeyboardInterrupt) as kept:
        lamina.open(path, format="qcow2")

    def child() -> None:
        assert any(isinstance(node, Qcow2) for node in lifecycle.nodes)
        assert not caplog.messages

    in_child(child)
    del kept


def test_a_signal_amid_the_fork_leaves_no_node_armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = raw_images(tmp_path)
    done = FileStorage.after_fork
    interrupts = iter([None] * 5)

    def interrupted(node: FileStorage) -> None:
        for _ in interrupts:
            raise KeyboardInterrupt
        done(node)

    monkeypatch.setattr(FileStorage, "after_fork", interrupted)
    in_child(lambda: refused(*(partial(image.write, 0, b"x") for image in images)))
    for image in images:
        image.close()


def test_an_export_is_the_parents_alone(tmp_path: Path) -> None:
    where = tmp_path / "nbd.sock"
    with Image(MemoryStorage(SIZE)) as memory, Server([Export(memory, writable=True)], unix=str(where)) as server:
        server.start()
        with lamina.open({"driver": "nbd", "path": str(where)}, read_only=False) as image:
            image.write(0, b"written")
            number = image.node.client._links[0]._channel.fileno()  # type: ignore[attr-defined]

            def child() -> None:
                with image:
                    refused(
                        lambda: image.read(0, 7),
                        lambda: image.write(0, b"x"),
                        image.flush,
                        image.extents,
                        lambda: image.root.reads_zero(0, 512),
                    )
                try:
                    os.fstat(number)
                except OSError:
                    return
                raise AssertionError("the child has the connection still")

            in_child(child)
            assert image.read(0, 7) == b"written"
            image.flush()


def test_a_server_is_the_parents_alone(tmp_path: Path) -> None:
    """A child that leaves the `with` of a server neither ends its connections nor removes its name, whatever locks threads of
    the parent hold; and one that lives on keeps no client waiting."""
    where = tmp_path / "nbd.sock"
    with Image(MemoryStorage(SIZE)) as memory:
        server = Server([Export(memory, "disk", writable=True)], unix=str(where), port=0)
        with server, dial(where) as raw:
            raw.begin("disk")
            raw.write(0, b"written")
            mine = [server._wake.fileno(), *(sock.fileno() for sock in server._listeners)]
            mine += [connection._plain.fileno() for connection in server._connections]

            def child() -> None:
                server.wait()
                server.wait(last_client=True)
                for number in mine:
                    with pytest.raises(OSError, match="Bad file descriptor"):
                        os.fstat(number)
                assert server.stats()["transmitting"] == 0
                assert server.uris == []
                server.__exit__(None, None, None)
                with pytest.raises(lamina.Closed, match="another process's"):
                    server.start()

            with server._mutex:
                in_child(child)
            assert where.exists()
            assert not select.select([server._woken], [], [], 0)[0], "the parent's threads were woken up"
            assert raw.read(0, 7) == b"written"
            with dial(where) as other:
                other.begin("disk")
                assert other.read(0, 7) == b"written"
            lives, ends = os.pipe()
            there, ready = os.pipe()
            pid = os.fork()
            if not pid:
                os.close(ends)
                assert isinstance(raw.stream, SocketStream)
                raw.stream.sock.close()
                os.close(ready)
                os.read(lives, 1)
                os._exit(0)
            os.close(lives)
            os.close(ready)
            assert os.read(there, 1) == b""
            os.close(there)
            try:
                family, port = server._listeners[-1].family, server._listeners[-1].getsockname()
                server.close()
                with pytest.raises(Gone):
                    raw.read(0, 7)
                with socket.socket(family) as late, pytest.raises(ConnectionRefusedError):
                    late.connect(port)
            finally:
                os.close(ends)
                os.waitpid(pid, 0)


def test_an_image_that_is_handed_over(path: Path) -> None:
    image = lamina.open(path, format="qcow2", read_only=False)
    with lifecycle.handing_over():
        pid = os.fork()
    if not pid:
        try:
            image.write(0, b"the child's")
            image.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    image.node.children["file"].node.close()  # nothing of it is written by this process
    with lamina.open(path, format="qcow2") as again:
        assert again.read(0, 11) == b"the child's"

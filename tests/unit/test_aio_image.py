"""`lamina.aio`: an image for asyncio does what a `lamina.Image` does, a bounded number of requests at once."""

from __future__ import annotations

import asyncio
import os
import random
import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import lamina
import lamina.aio
from lamina import lifecycle
from lamina.nbd import Export, Server
from lamina.storage.memory import MemoryStorage

from .aio_storage import PATIENCE, Gated, until_begun
from .test_fork import in_child

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> str:
    name = str(tmp_path / "disk.qcow2")
    lamina.create(name, "qcow2", 16 * MIB)
    return name


def gated(size: int = MIB, requests: int | None = None) -> tuple[Gated, lamina.aio.Image]:
    storage = Gated(size)
    return storage, lamina.aio.Image(lamina.Image(storage), requests=requests)


def test_every_operation(path: str) -> None:
    async def work() -> None:
        async with lamina.aio.open(path, format="qcow2", read_only=False) as image:
            assert (image.size, image.format, image.filename, image.read_only) == (16 * MIB, "qcow2", path, False)
            await image.write(1000, b"begin", fua=True)
            await image.write(3 * MIB, bytearray(b"x" * 100_000))
            await image.zero(3 * MIB, 1000, unmap=True)
            await image.discard(8 * MIB, MIB)
            await image.flush()
            buffer = bytearray(7)
            await image.read_into(999, buffer)
            assert buffer == b"\0begin\0"
            assert await image.read(3 * MIB + 998, 4) == b"\0\0xx"
            whole = await image.extents()
            assert list(whole) == list(image.sync.extents())
            assert [part.begin async for part in image.windows()] == [part.begin for part in image.sync.windows()]
            assert sum([len(part) async for part in image.windows(MIB, MIB)]) == len(await image.extents(MIB, MIB))
            await image.truncate(32 * MIB)
            assert image.size == 32 * MIB
            found = await image.run(lamina.Image.create_snapshot, "before")
            assert [one.id for one in await image.run(lamina.Image.snapshots)] == [found.id]
            other = await image.share(read_only=True)
            async with other:
                assert await other.read(1000, 5) == b"begin"
                with pytest.raises(lamina.ReadOnly):
                    await other.write(0, b"x")
            assert repr(image).startswith("<aio.Image <qcow2")
        assert repr(image) == "<aio.Image closed>"

    asyncio.run(work())
    with lamina.open(path, format="qcow2") as image:
        assert image.read(1000, 5) == b"begin"
        assert image.size == 32 * MIB


def test_errors_are_those_of_the_image(path: str, tmp_path: Path) -> None:
    async def work() -> None:
        with pytest.raises(lamina.NotFound):
            await lamina.aio.open(str(tmp_path / "none"), format="raw")
        with pytest.raises(lamina.OptionError, match="format"):
            await lamina.aio.open(path)
        with pytest.raises(lamina.OptionError, match="1 to 64"):
            await lamina.aio.open(path, format="qcow2", requests=0)
        async with lamina.aio.open(path, format="qcow2") as image:
            with pytest.raises(lamina.OutOfRange):
                await image.read(16 * MIB - 1, 2)
            with pytest.raises(lamina.OutOfRange):
                await image.read(0, 1 << 60)
            with pytest.raises(lamina.ReadOnly):
                await image.write(0, b"x")
            with pytest.raises(TypeError):
                await image.write(0, "text")  # type: ignore[arg-type,unused-ignore]
            with pytest.raises(lamina.OutOfRange):
                async for _ in image.windows(0, 17 * MIB):
                    pass
        for again in (image.read(0, 1), image.flush(), image.extents(), image.run(lamina.Image.snapshots)):
            with pytest.raises(lamina.Closed):
                await again
        await image.close()

    asyncio.run(work())


def test_an_exception_inside_the_block_closes_the_image() -> None:
    storage, image = gated()

    async def work() -> None:
        async with image:
            await image.write(0, b"x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(work())
    assert not storage.parents()


def test_so_many_requests_are_in_progress_and_the_others_wait() -> None:
    storage, image = gated(requests=3)

    async def work() -> None:
        async with image:
            storage.shut()
            tasks = [asyncio.create_task(image.read(number * 512, 512)) for number in range(200)]
            await until_begun(storage, 3)
            for _ in range(20):
                await asyncio.sleep(0)
            assert storage.begun == 3
            storage.open_gate()
            assert await asyncio.gather(*tasks) == [bytes(512)] * 200
            assert storage.begun == 200
            assert storage.most == 3

    asyncio.run(work())


def test_tasks_get_their_turn_in_order() -> None:
    storage, image = gated(requests=1)

    async def work() -> None:
        async with image:
            storage.shut()
            tasks = [asyncio.create_task(image.write(0, bytes([number]) * 512)) for number in range(20)]
            await until_begun(storage)
            storage.open_gate()
            await asyncio.gather(*tasks)
            assert await image.read(0, 512) == bytes([19]) * 512

    asyncio.run(work())


def test_overlapping_writes_leave_blocks_of_one_of_them(path: str, seed: int) -> None:
    rng = random.Random(seed)

    async def work() -> None:
        async with lamina.aio.open(path, format="qcow2", read_only=False) as image:
            writes = [(rng.randrange(64) * 512, rng.randrange(1, 64) * 512, number) for number in range(1, 200)]
            await asyncio.gather(*(image.write(at, bytes([number]) * length) for at, length, number in writes))
            for block in range(128):
                found = set(await image.read(block * 512, 512))
                writers = {number for at, length, number in writes if at <= block * 512 < at + length}
                assert len(found) == 1
                assert found <= (writers or {0})

    asyncio.run(work())


def test_reads_of_an_export_overlap(tmp_path: Path) -> None:
    """Each waits until eight have arrived at the server."""
    together = threading.Barrier(8, timeout=PATIENCE)

    class Meeting(MemoryStorage):
        driver = "meeting"
        far = True  # the server does not make its requests in the thread of the connection

        def read_into(self, offset: int, view: memoryview) -> None:
            together.wait()
            super().read_into(offset, view)

    socket = str(tmp_path / "socket")

    async def work() -> None:
        async with lamina.aio.open(f"nbd+unix:///?socket={socket}", format="raw") as image:
            await asyncio.gather(*(image.read(number * 4096, 4096) for number in range(16)))

    with lamina.Image(Meeting(MIB)) as disk, Server([Export(disk)], unix=socket):
        asyncio.run(work())


def test_close_completes_what_is_in_progress_and_refuses_the_rest() -> None:
    storage, image = gated(requests=2)

    async def work() -> None:
        storage.shut()
        writes = [asyncio.create_task(image.write(number * 512, b"w" * 512)) for number in range(8)]
        await until_begun(storage, 2)
        closing = [asyncio.create_task(image.close()) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in closing)
        with pytest.raises(lamina.Closed):
            await image.read(0, 1)
        storage.open_gate()
        await asyncio.gather(*closing)
        done = await asyncio.gather(*writes, return_exceptions=True)
        assert [one for one in done[:2] if one is not None] == []
        assert all(isinstance(one, lamina.Closed) for one in done[2:])

    asyncio.run(work())
    assert storage.ended == 2
    assert not storage.parents()


def test_an_error_of_close_is_raised_and_all_threads_end() -> None:
    class Failing(MemoryStorage):
        driver = "failing-close"

        def close(self) -> None:
            super().close()
            raise lamina.BlockIOError("no room")

    async def work() -> None:
        image = lamina.aio.Image(lamina.Image(Failing(MIB)))
        await image.read(0, 512)
        with pytest.raises(lamina.BlockIOError, match="no room"):
            await image.close()
        await image.close()

    asyncio.run(work())


def test_several_loops_use_one_image(path: str) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as opened:
        image = lamina.aio.Image(opened)

        async def work(number: int) -> None:
            at = number * MIB
            await asyncio.gather(*(image.write(at + step * 4096, bytes([number + 1]) * 4096) for step in range(32)))
            assert await image.read(at, 32 * 4096) == bytes([number + 1]) * (32 * 4096)

        threads = [threading.Thread(target=asyncio.run, args=(work(number),)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        for number in range(4):  # and a loop after those
            assert opened.read(number * MIB, 3) == bytes([number + 1]) * 3
            asyncio.run(work(number))
        asyncio.run(image.close())


def test_a_forked_child_reads_with_a_loop_of_its_own(path: str) -> None:
    """The requests of the parent are not its own, those in progress at the fork included."""
    storage, busy = gated()

    async def read(image: lamina.aio.Image) -> bytes:
        async with image:
            with pytest.raises(lamina.LaminaError):
                await image.write(0, b"x")
            return await image.read(0, 6)

    async def work() -> None:
        async with lamina.aio.open(path, format="qcow2", read_only=False) as image, busy:
            await image.write(0, b"parent")
            storage.shut()
            waiting = asyncio.create_task(busy.read(0, 512))
            await until_begun(storage)

            def child() -> None:
                assert asyncio.run(read(image)) == b"parent"
                asyncio.run(busy.close())

            await asyncio.to_thread(in_child, child)
            storage.open_gate()
            await waiting
            await image.write(0, b"after!")

    asyncio.run(work())
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 6) == b"after!"


@pytest.mark.filterwarnings("always::ResourceWarning")
@pytest.mark.parametrize("share", [False, True])
def test_a_forgotten_image_names_the_line_that_opened_it(path: str, share: bool) -> None:
    here = threading.local()

    async def work() -> None:
        image = await lamina.aio.open(path, format="qcow2")
        here.line = work.__code__.co_firstlineno + 1
        if share:
            assert image.sync.root.opened_at == f"{__file__}:{here.line}"
            other = await image.share()
            assert other.sync.root.opened_at == f"{__file__}:{here.line + 4}"
            await other.close()
        del image

    with pytest.warns(ResourceWarning, match="was never closed") as warned:
        asyncio.run(work())
    lifecycle._close_forgotten()
    assert re.search(rf"opened at {re.escape(__file__)}:{here.line},", str(warned[0].message))


def test_the_context_of_a_task_reaches_its_request() -> None:
    from contextvars import ContextVar

    current = ContextVar("current", default="none")
    seen = []

    class Seeing(MemoryStorage):
        driver = "seeing"

        def read_into(self, offset: int, view: memoryview) -> None:
            seen.append(current.get())
            super().read_into(offset, view)

    async def work() -> None:
        current.set("a task")
        async with lamina.aio.Image(lamina.Image(Seeing(MIB))) as image:
            await image.read(0, 512)

    asyncio.run(work())
    assert seen == ["a task"]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, StopIteration])
def test_exceptions_that_asyncio_treats_specially_reach_the_task(kind: type[BaseException]) -> None:
    def fail(image: lamina.Image) -> None:
        raise kind

    async def work() -> None:
        async with lamina.aio.Image(lamina.Image(MemoryStorage(MIB))) as image:
            with pytest.raises(RuntimeError if kind is StopIteration else kind):
                await image.run(fail)
            assert await image.read(0, 1) == b"\0"

    asyncio.run(work())


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process has reached its limit of threads, the loop's own thread makes the request."""
    import _thread

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    async def work() -> None:
        image = lamina.aio.Image(lamina.Image(MemoryStorage(MIB)))
        monkeypatch.setattr(_thread, "start_new_thread", refuse)
        operations: list[Callable[[], Awaitable[object]]] = [lambda: image.write(0, b"x"), lambda: image.read(0, 1)]
        for operation in operations:
            await operation()
        await image.close()

    asyncio.run(work())


def test_the_process_has_no_asyncio_without_it() -> None:
    import subprocess
    import sys

    script = "import sys, lamina, lamina.jobs.convert, lamina.cli.main; sys.exit('asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=os.environ, check=False).returncode == 0

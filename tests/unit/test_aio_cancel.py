"""Cancelled tasks of `lamina.aio`, dropped coroutines, and event loops that are closed with requests in progress."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import lamina
import lamina.aio
from lamina import lifecycle, registry

from .aio_storage import PATIENCE, Gated, SlowOpen, until_begun
from .test_aio_image import MIB, gated

CHANGES: dict[str, Callable[[lamina.aio.Image], Awaitable[object]]] = {
    "write": lambda image: image.write(0, b"new" * 100),
    "read_into": lambda image: image.read_into(0, bytearray(100)),
    "flush": lambda image: image.flush(),
    "run": lambda image: image.run(lamina.Image.write, 0, b"new" * 100),
}


@pytest.mark.parametrize("operation", CHANGES.values(), ids=CHANGES)
def test_what_has_begun_ends_before_the_await_does(operation: Callable[[lamina.aio.Image], Awaitable[object]]) -> None:
    storage, image = gated()

    async def work() -> None:
        async with image:
            storage.shut()
            task = asyncio.ensure_future(operation(image))
            await until_begun(storage)
            for _ in range(3):  # a second one does not end it either
                task.cancel()
                await asyncio.sleep(0.002)
                assert not task.done()
            storage.open_gate()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert storage.ended == storage.begun == 1

    asyncio.run(work())


@pytest.mark.parametrize("leave", [lambda image: image.read(0, 512), lambda image: anext(image.windows())])
def test_a_read_is_left_behind_and_close_waits_for_it(leave: Callable[[lamina.aio.Image], Awaitable[object]]) -> None:
    class Slow(Gated):
        def extents(self, offset: int, length: int) -> Any:
            self._pass()
            self._end()
            return super().extents(offset, length)

    storage = Slow(MIB)
    image = lamina.aio.Image(lamina.Image(storage), requests=1)

    async def work() -> None:
        storage.shut()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await leave(image)
        await until_begun(storage)
        assert storage.ended == 0
        waiting = asyncio.create_task(image.read(0, 512))  # the pool has one thread, which is not free
        closing = asyncio.create_task(image.close())
        await asyncio.sleep(0.01)
        assert storage.begun == 1
        assert not closing.done()
        storage.open_gate()
        await closing
        with pytest.raises(lamina.Closed):
            await waiting
        assert storage.ended == 1

    asyncio.run(work())


def test_what_has_not_begun_is_never_made() -> None:
    storage, image = gated(requests=1)

    async def work() -> None:
        async with image:
            storage.shut()
            first = asyncio.create_task(image.write(0, b"first"))
            await until_begun(storage)
            others = [asyncio.ensure_future(operation(image)) for operation in CHANGES.values()]
            await asyncio.sleep(0)
            for task in others:
                task.cancel()
            done = await asyncio.gather(*others, return_exceptions=True)
            assert all(isinstance(one, asyncio.CancelledError) for one in done)
            storage.open_gate()
            await first
            assert await image.read(0, 5) == b"first"
            assert storage.begun == 2

    asyncio.run(work())


def test_a_timeout_ends_after_the_write_that_it_cancels() -> None:
    storage, image = gated()

    async def work() -> None:
        async with image:
            storage.shut()
            asyncio.get_running_loop().call_later(0.05, storage.open_gate)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await image.write(0, b"done")
            assert await image.read(0, 4) == b"done"

    asyncio.run(work())


def test_the_error_of_a_cancelled_request_is_its_cause() -> None:
    class Failing(Gated):
        def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
            super().write(offset, view, flags)
            raise lamina.BlockIOError("no room")

    storage = Failing(MIB)

    async def work() -> None:
        async with lamina.aio.Image(lamina.Image(storage)) as image:
            storage.shut()
            task = asyncio.create_task(image.write(0, b"x"))
            await until_begun(storage)
            task.cancel()
            await asyncio.sleep(0)
            storage.open_gate()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert isinstance(caught.value.__cause__, lamina.BlockIOError)

    asyncio.run(work())


def test_a_buffer_is_not_touched_after_the_await() -> None:
    """Tasks are cancelled at random moments; each buffer then has what the caller puts into it."""
    storage, image = gated(64 * 1024, requests=4)
    rng = random.Random(7)

    async def fill(number: int) -> None:
        buffer = bytearray(65536)
        try:
            await image.read_into(0, buffer)
        finally:
            buffer[:] = b"m" * len(buffer)
            await asyncio.sleep(0.002)
            assert buffer.count(b"m") == len(buffer)

    async def work() -> None:
        async with image:
            tasks = [asyncio.create_task(fill(number)) for number in range(100)]
            while not all(task.done() for task in tasks):
                rng.choice(tasks).cancel()
                await asyncio.sleep(0)
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(one is None or isinstance(one, asyncio.CancelledError) for one in done)

    asyncio.run(work())
    assert storage.begun == storage.ended


def test_random_cancellations_leave_blocks_of_whole_writes(tmp_path: Path, seed: int) -> None:
    """Each task writes its own clusters, one write after the other; after a cancelled one it knows two possible contents."""
    path = str(tmp_path / "disk.qcow2")
    lamina.create(path, "qcow2", 16 * MIB, cluster_size=4096)
    rng = random.Random(seed)
    expected: dict[int, set[bytes]] = {}

    async def write(image: lamina.aio.Image, number: int) -> None:
        for step in range(40):
            at = (number * 40 + step % 7) * 4096
            data = bytes([number + 1, step + 1]) * 2048
            try:
                async with asyncio.timeout(rng.random() * 0.004):
                    await image.write(at, data)
                expected[at] = {data}
            except TimeoutError:
                expected[at] = {*expected.get(at, {bytes(4096)}), data}

    async def work() -> None:
        async with lamina.aio.open(path, format="qcow2", read_only=False) as image:
            await asyncio.gather(*(write(image, number) for number in range(16)))
            for at, contents in expected.items():
                assert await image.read(at, 4096) in contents

    asyncio.run(work())
    found = lamina.check(path, format="qcow2")
    assert found.corruptions == 0
    assert found.leaks == 0


def test_a_cancellation_at_any_step_leaves_nothing_open(tmp_path: Path) -> None:
    """The whole life of an image, cancelled at its first step of the event loop, at the second, and so on."""
    path = str(tmp_path / "disk.qcow2")
    lamina.create(path, "qcow2", 4 * MIB)

    async def life() -> None:
        async with lamina.aio.open(path, format="qcow2", read_only=False) as image:
            await image.write(0, b"x" * 70_000)
            await asyncio.gather(image.read(0, 512), image.flush(), image.zero(MIB, 4096))
            async for _ in image.windows():
                await image.read(512, 512)
            async with await image.share() as other:
                await other.read(0, 5)
        await lamina.aio.info(path)

    async def cancelled_after(steps: int) -> bool:
        task = asyncio.create_task(life())
        while steps and not task.done():
            await asyncio.sleep(0)
            steps -= 1
        if task.done():
            await task
            return True
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        return False

    steps = ends = 0
    while ends < 3:
        ends += asyncio.run(cancelled_after(steps))
        # No other user is left: each open for writing takes the locks of the file.
        with lamina.open(path, format="qcow2", read_only=False):
            pass
        steps += 1 + steps // 10
    assert steps > 5


@pytest.fixture
def slow_open(own_drivers: None) -> type[SlowOpen]:
    """The driver "slow-open", registered for one test."""
    registry.register("slow-open", "storage", "tests.unit.aio_storage:SlowOpen", "waits while it is opened")
    SlowOpen.control, SlowOpen.made = Gated(512), []
    return SlowOpen


def test_a_cancelled_open_closes_the_image_first(slow_open: type[SlowOpen]) -> None:
    async def work() -> None:
        slow_open.control.shut()

        async def use() -> None:
            async with lamina.aio.open({"driver": "raw", "file": {"driver": "slow-open"}}):
                pytest.fail("the task was cancelled")

        task = asyncio.create_task(use())
        await until_begun(slow_open.control)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        slow_open.control.open_gate()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not slow_open.made[0].parents()

    asyncio.run(work())


def test_an_interrupt_ends_the_program_after_the_request() -> None:
    """Ctrl-C cancels the main task, which waits for its write and closes the image."""
    storage, image = gated()

    async def work() -> None:
        async with image:
            storage.shut()
            asyncio.get_running_loop().call_later(0.02, storage.open_gate)
            interrupt = asyncio.create_task(until_begun(storage))
            interrupt.add_done_callback(lambda _: os.kill(os.getpid(), signal.SIGINT))
            await image.write(0, b"x")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(work())
    assert storage.begun == storage.ended == 1
    assert not storage.parents()


def test_a_cancelled_close_closes_first() -> None:
    storage, image = gated()

    async def work() -> None:
        storage.shut()
        left = asyncio.create_task(image.read(0, 512))
        await until_begun(storage)
        task = asyncio.create_task(image.close())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0.005)
        assert not task.done()
        storage.open_gate()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not storage.parents()
        assert await left == bytes(512)

    asyncio.run(work())


def abandon(loop: asyncio.AbstractEventLoop, begun: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Close the loop as a careless program does: tasks are neither cancelled nor awaited."""
    loop.set_exception_handler(lambda *_: None)
    loop.run_until_complete(begun())
    loop.close()


def test_a_loop_is_closed_with_requests_in_progress() -> None:
    """They are completed; the image goes on, with another loop."""
    storage, image = gated(requests=2)
    tasks: list[asyncio.Task[Any]] = []
    buffer = bytearray(512)

    async def begin() -> None:
        storage.shut()
        tasks.append(asyncio.create_task(image.write(0, b"w" * 512)))
        tasks.append(asyncio.create_task(image.read_into(4096, buffer)))
        tasks.append(asyncio.create_task(image.read(0, 512)))
        await until_begun(storage, 2)

    abandon(asyncio.new_event_loop(), begin)
    storage.open_gate()

    async def work() -> None:
        async with image:
            while storage.ended < 3:
                await asyncio.sleep(0.001)
            assert await image.read(0, 512) == b"w" * 512

    asyncio.run(work())
    assert storage.begun == storage.ended == 4
    tasks.clear()
    gc.collect()


def test_a_loop_is_closed_during_an_open(slow_open: type[SlowOpen]) -> None:
    """The image is closed, since nobody can take it."""
    tasks: list[asyncio.Task[Any]] = []

    async def begin() -> None:
        slow_open.control.shut()

        async def use() -> lamina.aio.Image:
            return await lamina.aio.open({"driver": "raw", "file": {"driver": "slow-open"}})

        tasks.append(asyncio.create_task(use()))
        await until_begun(slow_open.control)

    abandon(asyncio.new_event_loop(), begin)
    slow_open.control.open_gate()
    for _ in range(int(PATIENCE * 1000)):
        if slow_open.made and not slow_open.made[0].parents():
            break
        asyncio.run(asyncio.sleep(0.001))
    assert not slow_open.made[0].parents()
    tasks.clear()
    gc.collect()


def test_a_dropped_coroutine_withdraws_its_request() -> None:
    storage, image = gated(requests=1)

    async def work() -> None:
        async with image:
            storage.shut()
            first = asyncio.create_task(image.write(0, b"first"))
            await until_begun(storage)
            dropped = image.write(0, b"never")
            dropped.send(None)  # it waits now
            dropped.close()
            storage.open_gate()
            await first
            assert await image.read(0, 5) == b"first"

    asyncio.run(work())


def test_the_program_ends_with_an_image_open(tmp_path: Path) -> None:
    """`asyncio.run` cancels the tasks that are left; the end of the program closes the image."""
    import subprocess
    import sys

    path = str(tmp_path / "disk.qcow2")
    lamina.create(path, "qcow2", MIB)
    script = """
import asyncio, sys, lamina, lamina.aio
async def main():
    global image
    image = await lamina.aio.open(sys.argv[1], format="qcow2", read_only=False)
    for number in range(1, 100):
        asyncio.ensure_future(image.write(number * 512, b"x" * 512))
    await image.write(0, b"last")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert lamina.check(path, format="qcow2").corruptions == 0
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 4) == b"last"
    assert not lifecycle._forgotten

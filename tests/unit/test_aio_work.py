"""Whole-image work that is awaited: the same results, progress in the event loop, and no half file after a cancellation."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import lamina
import lamina.aio
from lamina.aio import work
from lamina.jobs.convert import convert_to_file
from lamina.jobs.progress import Monitor

from .aio_storage import PATIENCE
from .test_aio_image import MIB

#: Functions of `lamina` that have another form in `lamina.aio`, or none: `tree` and `json_schema` read nothing, and
#: `probe` is an old name of `detect`.
OTHERWISE = {"open", "diff", "json_schema", "probe", "tree"}


@pytest.fixture
def source(tmp_path: Path) -> str:
    name = str(tmp_path / "source.raw")
    with open(name, "wb") as file:
        for number in range(32):
            file.write(bytes([number + 1]) * MIB)
    return name


def test_the_functions_of_the_package_have_the_same_names_and_arguments() -> None:
    functions = {name for name in lamina.__all__ if inspect.isfunction(getattr(lamina, name))}
    assert functions - OTHERWISE == set(lamina.aio._FUNCTIONS), "add a new function to lamina.aio as well"
    for name in lamina.aio._FUNCTIONS:
        one = getattr(lamina.aio, name)
        assert inspect.iscoroutinefunction(one)
        assert inspect.signature(one) == inspect.signature(getattr(lamina, name))
        assert one.__doc__ == getattr(lamina, name).__doc__
    assert set(lamina.aio.__all__) >= set(lamina.aio._FUNCTIONS)
    assert dir(lamina.aio) == sorted(lamina.aio.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = lamina.aio.nothing


def test_the_types_that_a_checker_sees_are_those_of_the_same_functions() -> None:
    text = Path(lamina.aio.__file__).read_text()
    assert [
        name for name in lamina.aio._FUNCTIONS if f"@awaitable_as(lamina.{name})\n    def {name}()" not in text
    ] == []


def test_results_are_those_of_the_functions(tmp_path: Path) -> None:
    path = str(tmp_path / "new.qcow2")

    async def main() -> None:
        await lamina.aio.create(path, "qcow2", MIB, cluster_size=4096)
        assert await lamina.aio.info(path) == lamina.info(path)
        assert await lamina.aio.check(path, format="qcow2") == lamina.check(path, format="qcow2")
        assert (await lamina.aio.detect(path)).format == "qcow2"
        with pytest.raises(lamina.NotFound):
            await lamina.aio.info(str(tmp_path / "none"))
        found = await asyncio.gather(*(lamina.aio.info(path) for _ in range(100)))
        assert set(map(repr, found)) == {repr(lamina.info(path))}

    asyncio.run(main())


@pytest.mark.parametrize("replaced", [False, True])
def test_a_cancelled_job_leaves_no_half_file(source: str, tmp_path: Path, replaced: bool) -> None:
    target = tmp_path / "folder" / "target.qcow2"
    target.parent.mkdir()
    if replaced:
        target.write_bytes(b"what was there")
    begun = threading.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        started = asyncio.Event()

        def report(done: int, total: int) -> None:
            if not begun.is_set():
                begun.set()
                loop.call_soon_threadsafe(started.set)

        with lamina.open(source, format="raw") as image:
            job = lamina.aio.run(convert_to_file, image, str(target), "qcow2", {}, rate=MIB, monitor=Monitor(report))
            task = asyncio.create_task(job)
            async with asyncio.timeout(PATIENCE):
                await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert caught.value.__cause__ is None
            assert os.listdir(target.parent) == ([target.name] if replaced else [])
        if replaced:
            assert target.read_bytes() == b"what was there"

    asyncio.run(main())


def test_a_timeout_ends_a_job_that_was_given_no_monitor(source: str, tmp_path: Path) -> None:
    async def main() -> None:
        with lamina.open(source, format="raw") as image:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await lamina.aio.run(convert_to_file, image, str(tmp_path / "x.raw"), "raw", {}, rate=MIB)
            assert not (tmp_path / "x.raw").exists()

    asyncio.run(main())


def test_a_conversion_is_cancelled_by_its_progress(source: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()

    async def main() -> None:
        started = asyncio.Event()
        job = lamina.aio.convert(
            source, folder / "x", "qcow2", format="raw", rate="1M", progress=lambda *_: started.set()
        )
        task = asyncio.create_task(job)
        async with asyncio.timeout(PATIENCE):
            await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert os.listdir(folder) == []
        done = await lamina.aio.convert(source, folder / "x", "qcow2", format="raw")
        assert done.read == 32 * MIB
        assert (await lamina.aio.compare(source, folder / "x", first_format="raw", second_format="qcow2")).identical

    asyncio.run(main())


def test_a_server_is_closed_if_its_task_was_cancelled(source: str, tmp_path: Path) -> None:
    async def main() -> None:
        server = await lamina.aio.serve(source, format="raw", socket=tmp_path / "socket")
        async with lamina.aio.open(server.uri, format="raw") as image:
            assert await image.read(MIB, 2) == b"\2\2"
        await lamina.aio.run(server.close)
        for _ in range(5):
            task = asyncio.create_task(lamina.aio.serve(source, format="raw", socket=tmp_path / "other"))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not (tmp_path / "other").exists()

    asyncio.run(main())


def test_jobs_of_many_tasks_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def job(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.001)
        with lock:
            running -= 1
        return number

    async def main() -> None:
        assert await asyncio.gather(*(lamina.aio.run(job, number) for number in range(500))) == list(range(500))

    asyncio.run(main())
    assert 1 < most <= work.AT_ONCE


def test_a_value_that_nobody_takes_is_closed() -> None:
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    class Server:
        def close(self) -> None:
            closed.set()

    def serve() -> Server:
        begun.set()
        go_on.wait(PATIENCE)
        return Server()

    async def main() -> None:
        task = asyncio.create_task(work.awaitable(serve)())
        while not begun.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed.is_set()

    asyncio.run(main())


# Functions with `progress` and `cancel`


def counting(total: int, *, progress: Callable[[int, int], None] | None = None, cancel: Any = None) -> int:
    """A job of the form that all have: it reports each step, and asks before each whether it is to stop."""
    for done in range(total):
        if cancel is not None and cancel.is_set():
            raise lamina.Cancelled("the job was stopped")
        if progress is not None:
            progress(done, total)
        threading.Event().wait(0.0005)
    return total


def test_progress_is_told_in_the_event_loop_before_the_result() -> None:
    told: list[int] = []

    async def main() -> None:
        here = threading.get_ident()

        def progress(done: int, total: int) -> None:
            assert threading.get_ident() == here
            assert asyncio.get_running_loop().is_running()
            told.append(done)

        assert await lamina.aio.run(counting, 20, progress=progress) == 20
        assert told == list(range(20))

    asyncio.run(main())


def test_an_exception_of_progress_stops_the_job() -> None:
    async def main() -> None:
        def progress(done: int, total: int) -> None:
            if done == 3:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await lamina.aio.run(counting, 1_000_000, progress=progress)

    asyncio.run(main())


def test_a_job_is_stopped_by_its_task_or_by_the_event_of_the_caller() -> None:
    async def main() -> None:
        task = asyncio.create_task(lamina.aio.run(counting, 1_000_000))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        event = threading.Event()
        task = asyncio.create_task(lamina.aio.run(counting, 1_000_000, cancel=event))
        await asyncio.sleep(0.01)
        event.set()
        with pytest.raises(lamina.Cancelled):
            await task

    asyncio.run(main())


def test_a_loop_is_closed_with_a_job_in_progress() -> None:
    """The coroutine is dropped, and the job is told to stop."""
    begun, ended = threading.Event(), threading.Event()

    def job(*, cancel: Any = None) -> None:
        begun.set()
        while not cancel.is_set():
            threading.Event().wait(0.001)
        ended.set()

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    coroutine = lamina.aio.run(job)
    task = loop.create_task(coroutine)
    while not begun.is_set():
        loop.run_until_complete(asyncio.sleep(0.001))
    loop.close()
    coroutine.close()
    assert ended.wait(PATIENCE)
    del task


# Iterators


@pytest.fixture
def images(tmp_path: Path) -> Iterator[tuple[lamina.Image, lamina.Image]]:
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(bytes(8 * MIB))
    with (
        lamina.open(tmp_path / "first", format="raw") as first,
        lamina.open(tmp_path / "second", format="raw", read_only=False) as second,
    ):
        for number in range(1000):
            second.write(number * 8192, b"x")
        yield first, second


def test_items_of_an_iterator(images: tuple[lamina.Image, lamina.Image]) -> None:
    async def main() -> None:
        expected = list(lamina.diff(*images))
        assert len(expected) == 1000
        assert [part async for part in lamina.aio.iterate(lamina.diff, *images)] == expected
        with pytest.raises(lamina.OptionError):
            async for _ in lamina.aio.iterate(lamina.diff, *images, granularity=3):
                pass

    asyncio.run(main())


def test_a_loop_that_ends_early_closes_the_iterator(images: tuple[lamina.Image, lamina.Image]) -> None:
    async def main() -> None:
        async with aclosing(lamina.aio.iterate(lamina.diff, *images)) as parts:
            async for part in parts:
                assert part == (0, 4096)
                break
        assert len(images[1].graph.roots) == 1, "the job has given up its own user of the image"

    asyncio.run(main())


def test_a_cancelled_iteration_closes_the_iterator(images: tuple[lamina.Image, lamina.Image]) -> None:
    async def main() -> None:
        seen = asyncio.Event()

        async def use() -> None:
            async for _ in lamina.aio.iterate(lamina.diff, *images):
                seen.set()
                await asyncio.sleep(PATIENCE)

        task = asyncio.create_task(use())
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())  # closes what the loop knows of asynchronous generators
    assert len(images[1].graph.roots) == 1


def test_functions_of_c_without_a_signature() -> None:
    async def main() -> None:
        assert await lamina.aio.run(max, 1, 2) == 2
        assert await lamina.aio.run(int, "3") == 3
        assert [item async for item in lamina.aio.iterate(range, 3)] == [0, 1, 2]

    asyncio.run(main())

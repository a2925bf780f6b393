"""Interrupts and cancellations of `lamina.aio` at any moment: afterwards nothing is open, no thread is left, no half file.

A KeyboardInterrupt that strikes a coroutine does what a cancellation does; it is raised at every function entry and C return
in the thread of the event loop (with `LAMINA_INTERRUPTS=all` at all of them, else at a share that the seed draws).
`LAMINA_AIO_CANCELS=N` cancels each job N times, at random moments.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import lamina
import lamina.aio
from lamina.testing.interrupts import interrupts
from tests import evidence

from .remains import PATIENCE, Remains, require_free

MIB = 1 << 20
ALL = os.environ.get("LAMINA_INTERRUPTS") == "all"
STEP = 1 if ALL else 3
pytestmark = pytest.mark.usefixtures("no_collection")

CANCELS = int(os.environ.get("LAMINA_AIO_CANCELS", "25"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = random.Random(5)
    with (tmp_path / "a.raw").open("wb") as file:
        for _ in range(8):
            file.write(rng.randbytes(64 << 10) * 8)
            file.seek(MIB // 2, os.SEEK_CUR)
        file.truncate(8 * MIB)
    lamina.convert(tmp_path / "a.raw", tmp_path / "a.qcow2", "qcow2", format="raw")
    return tmp_path


async def life(folder: Path) -> None:
    async with lamina.aio.open(folder / "a.qcow2", format="qcow2", read_only=False) as image:
        data = await image.read(0, 1000)
        await image.write(0, data)
        async with await image.share() as other:
            await asyncio.gather(other.read(0, 512), image.flush())


async def opened_and_closed(folder: Path) -> None:
    image = await lamina.aio.open(folder / "a.qcow2", format="qcow2", read_only=False)
    try:
        try:
            await image.read(0, 10)
        finally:
            await image.close()
    finally:
        await image.close()


async def convert(folder: Path, **how: Any) -> None:
    await lamina.aio.convert(folder / "a.qcow2", folder / "out", "qcow2", format="qcow2", **how)


async def copy(folder: Path, **how: Any) -> None:
    await lamina.aio.copy(folder / "a.raw", folder / "out", request_size="64k", **how)


async def compare(folder: Path, **how: Any) -> None:
    names = (folder / "a.raw", folder / "a.qcow2")
    await lamina.aio.compare(*names, first_format="raw", second_format="qcow2", **how)


async def diff(folder: Path) -> None:
    names = (folder / "a.raw", folder / "a.qcow2")
    async for _ in lamina.aio.iterate(lamina.diff, *names, first_format="raw", second_format="qcow2"):
        pass


JOBS = [convert, copy, compare]
Work = Callable[..., Coroutine[Any, Any, None]]


def require_whole(folder: Path) -> None:
    """A new file that has its name is complete."""
    target = folder / "out"
    if target.exists():
        form = "qcow2" if target.read_bytes()[:4] == b"QFI\xfb" else "raw"
        assert lamina.compare(target, folder / "a.raw", first_format=form, second_format="raw").identical
        target.unlink()


@pytest.mark.parametrize("work", [life, opened_and_closed, diff, *JOBS])
def test_nothing_is_left_after_an_interrupt_anywhere(
    work: Work, folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(work(folder))
    require_whole(folder)
    remains = Remains(folder, monkeypatch, ("out",))
    tried = 0
    for interrupt in interrupts(seed % STEP, STEP):
        interrupt.run(lambda: asyncio.run(work(folder)))
        where = f"{work.__name__}, interrupted at {interrupt.struck}"
        if interrupt.struck is not None and interrupt.struck.endswith(("__aenter__ (call)", "__aexit__ (call)")):
            # The block is not entered yet, or left already, and `async with` calls nothing else.
            interrupt.error = None
            remains.await_finalizers(where)
        else:
            remains.require_none(where)
        interrupt.error = None
        require_free(folder / "a.raw", folder / "a.qcow2")
        require_whole(folder)
        tried += 1
    assert tried > 5
    evidence.count("interrupts", tried)


@pytest.mark.parametrize("work", JOBS)
def test_nothing_is_left_after_a_cancellation_at_any_moment(
    work: Work, folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    begun = time.monotonic()
    asyncio.run(work(folder))
    longest = time.monotonic() - begun
    require_whole(folder)
    remains = Remains(folder, monkeypatch, ("out",))

    async def cancelled(seconds: float) -> bool:
        """Whether the task was cancelled before it had ended."""
        inside = Remains(folder, monkeypatch, ("out",))  # the event loop has descriptors, too
        task = asyncio.create_task(work(folder))
        await asyncio.sleep(seconds)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            # At once: nothing goes on behind the caller's back.
            inside.require_none("cancelled")
            return True
        return False

    count = 0
    for _ in range(CANCELS):
        count += asyncio.run(cancelled(rng.random() * longest))
        remains.require_none("cancelled, or too late")
        require_free(folder / "a.raw", folder / "a.qcow2")
        require_whole(folder)
    assert count
    evidence.count("cancellations", CANCELS)


class Stop(BaseException):
    """No error, like CancelledError."""


@pytest.mark.parametrize("moment", ["first", "last"])
@pytest.mark.parametrize("kind", [asyncio.CancelledError, ZeroDivisionError, Stop, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("work", JOBS)
def test_whatever_progress_raises_stops_the_job(
    work: Work, kind: type[BaseException], moment: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without an event loop: the job takes no further step, not even the one that gives a complete file its name."""
    remains = Remains(folder, monkeypatch)
    told: list[int] = []

    def progress(done: int, total: int) -> None:
        told.append(done)
        if moment == "first" or done >= total:
            raise kind

    with pytest.raises(kind):
        asyncio.run(work(folder, progress=progress))
    if moment == "first":
        assert len(told) == 1
    remains.require_none(f"{kind.__name__} at the {moment} report")
    require_free(folder / "a.raw", folder / "a.qcow2")


@pytest.mark.parametrize("work", JOBS)
def test_ctrl_c_stops_the_job(work: Work, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`asyncio.run` cancels its task, and raises KeyboardInterrupt when that has ended."""
    remains = Remains(folder, monkeypatch)
    slowly: dict[str, Any] = {} if work is compare else {"rate": MIB}  # else it may be complete before it is cancelled
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(work(folder, progress=lambda *_: os.kill(os.getpid(), signal.SIGINT), **slowly))
    remains.require_none("Ctrl-C")
    require_free(folder / "a.raw", folder / "a.qcow2")


@pytest.mark.parametrize("work", JOBS)
def test_a_job_whose_event_loop_was_closed_ends(work: Work, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is stopped in the middle, and closed: nobody can take the result, and `progress` can no longer be called."""
    remains = Remains(folder, monkeypatch, ("out",))
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    coroutine = work(folder, progress=lambda *_: loop.stop())
    task = loop.create_task(coroutine)
    loop.run_forever()
    loop.close()
    remains.await_end("the loop was closed")
    require_free(folder / "a.raw", folder / "a.qcow2")
    require_whole(folder)
    coroutine.close()
    del task


def test_a_process_that_is_forked_during_a_job_leaves_it_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child has an event loop of its own, reads the images, and its end removes nothing of what its parent makes. (The
    locks of the new file belong to both until the child has ended.)"""
    remains = Remains(folder, monkeypatch, ("out",))
    children: list[int] = []

    def fork(done: int, total: int) -> None:
        if children:
            return
        pid = os.fork()
        if pid:
            children.append(pid)
            return
        status = 1
        try:
            asyncio.set_event_loop(None)
            asyncio.events._set_running_loop(None)  # that of the parent
            asyncio.run(compare(folder))
            asyncio.run(opened(folder))
            gc.collect()
            status = 0
        except BaseException:  # noqa: BLE001 - nobody but standard error can be told
            traceback.print_exc()
        finally:
            os._exit(status)

    async def opened(folder: Path) -> None:
        async with lamina.aio.open(folder / "a.raw", format="raw") as image:
            assert len(await image.read(0, 4096)) == 4096

    asyncio.run(convert(folder, progress=fork))
    deadline = time.monotonic() + PATIENCE
    done, status = 0, 0
    while not done and time.monotonic() < deadline:
        done, status = os.waitpid(children[0], os.WNOHANG)
        time.sleep(0.001)
    if not done:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)
    assert done, "the child does not end"
    assert os.waitstatus_to_exitcode(status) == 0
    assert (folder / "out").exists()
    require_whole(folder)
    remains.require_none("a fork")
    require_free(folder / "a.raw", folder / "a.qcow2")


def test_a_job_waits_for_progress(folder: Path) -> None:
    """It takes no step meanwhile, so what `progress` is told is true while it runs."""
    running = threading.Event()

    def job(*, progress: Callable[[int], None]) -> None:
        for number in range(5):
            progress(number)
            assert not running.is_set()

    def progress(number: int) -> None:
        running.set()
        time.sleep(0.002)
        running.clear()

    asyncio.run(lamina.aio.run(job, progress=progress))

"""Cancellation of the public functions, from the callback and from another thread, and callbacks that raise.

The job ends with Cancelled (or that error), in the thread that called it, and leaves no half file and no open one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import lamina

from .api_images import MIB, Counter, content, disk, overlay


class Work(NamedTuple):
    """One job: `run` starts it, with `progress` and `cancel`; `unchanged` fails if it left anything behind."""

    run: Callable[..., Any]
    unchanged: Callable[[], None]


def _convert(folder: Path, **slowly: Any) -> Work:
    source, target = disk(folder / "a.raw", "raw", 64 * MIB), folder / "b.qcow2"
    names = sorted(os.listdir(folder))

    def unchanged() -> None:
        assert sorted(os.listdir(folder)) == names

    return Work(lambda **how: lamina.convert(source, target, "qcow2", format="raw", **slowly, **how), unchanged)


def _convert_over(folder: Path, **slowly: Any) -> Work:
    """A new image in place of a file that is there."""
    source, target = disk(folder / "a.raw", "raw", 64 * MIB), disk(folder / "b.qcow2", seed=50)
    before, names = content(target, "qcow2"), sorted(os.listdir(folder))

    def unchanged() -> None:
        assert content(target, "qcow2") == before
        assert sorted(os.listdir(folder)) == names

    return Work(lambda **how: lamina.convert(source, target, "qcow2", format="raw", **slowly, **how), unchanged)


def _copy(folder: Path, **slowly: Any) -> Work:
    source, target = disk(folder / "a.raw", "raw", 64 * MIB), folder / "b.raw"
    names = sorted(os.listdir(folder))

    def unchanged() -> None:
        assert sorted(os.listdir(folder)) == names

    return Work(lambda **how: lamina.copy(source, target, **slowly, **how), unchanged)


def _compare(folder: Path, **slowly: Any) -> Work:
    first, second = disk(folder / "a.raw", "raw", 64 * MIB), disk(folder / "b.qcow2", "qcow2", 64 * MIB)

    def unchanged() -> None:
        assert lamina.compare(first, second, first_format="raw", second_format="qcow2").identical

    return Work(
        lambda **how: lamina.compare(
            _throttled(first, "raw", slowly), _throttled(second, "qcow2", slowly), **_format(slowly), **how
        ),
        unchanged,
    )


def _format(slowly: dict[str, Any]) -> dict[str, Any]:
    return {} if slowly else {"first_format": "raw", "second_format": "qcow2"}


def _throttled(path: Path, format: str, slowly: dict[str, Any]) -> Any:
    """The image at so many bytes per second, since a comparison has no limit of its own."""
    if not slowly:
        return path
    image = {"driver": format, "file": {"driver": "file", "filename": str(path)}}
    return {"driver": "throttle", "bps-total": slowly["rate"], "image": image}


def _commit(folder: Path, **slowly: Any) -> Work:
    top = overlay(folder / "top.qcow2", disk(folder / "base.qcow2", size=64 * MIB))
    with lamina.open(top, format="qcow2", read_only=False) as image:
        image.write(0, b"c" * (32 * MIB))
    before = content(top, "qcow2")

    def unchanged() -> None:
        assert content(top, "qcow2") == before
        assert lamina.info(top).backing_filename == "base.qcow2"
        lamina.commit(top, format="qcow2")  # it can be done again, and then to its end
        assert content(folder / "base.qcow2", "qcow2") == content(top, "qcow2") == before

    return Work(lambda **how: lamina.commit(top, format="qcow2", **slowly, **how), unchanged)


def _rebase(folder: Path, **slowly: Any) -> Work:
    top = overlay(folder / "top.qcow2", disk(folder / "base.qcow2", size=64 * MIB))
    before = content(top, "qcow2")
    reads = {"driver": "qcow2", "file": {"driver": "file", "filename": str(top)}}
    if slowly:  # a rebase has no limit of its own: it reads the old backing file slowly
        base = {"driver": "qcow2", "file": {"driver": "file", "filename": str(folder / "base.qcow2")}}
        reads["backing"] = {"driver": "throttle", "bps-total": slowly["rate"], "image": base}

    def unchanged() -> None:
        assert content(top, "qcow2") == before
        assert lamina.info(top).backing_filename == "base.qcow2"
        lamina.rebase(top, None, format="qcow2")
        assert content(top, "qcow2") == before

    return Work(lambda **how: lamina.rebase(reads, None, **how), unchanged)


def _flatten(folder: Path, **slowly: Any) -> Work:
    work = _rebase(folder, **slowly)
    reads = {"driver": "qcow2", "file": {"driver": "file", "filename": str(folder / "top.qcow2")}}
    if slowly:
        base = {"driver": "qcow2", "file": {"driver": "file", "filename": str(folder / "base.qcow2")}}
        reads["backing"] = {"driver": "throttle", "bps-total": slowly["rate"], "image": base}
    return Work(lambda **how: lamina.flatten(reads, **how), work.unchanged)


def _compact(folder: Path, **slowly: Any) -> Work:
    path = disk(folder / "a.qcow2", "qcow2", 64 * MIB)
    before = content(path, "qcow2")
    file: dict[str, Any] = {"driver": "file", "filename": str(path)}
    if slowly:
        file = {"driver": "throttle", "bps-total": slowly["rate"], "image": file}

    def unchanged() -> None:
        assert content(path, "qcow2") == before
        assert lamina.check(path, format="qcow2").clean

    return Work(lambda **how: lamina.compact({"driver": "qcow2", "file": file}, **how), unchanged)


def _bench(folder: Path, **slowly: Any) -> Work:
    path = disk(folder / "a.raw", "raw", 64 * MIB)

    def unchanged() -> None:
        assert lamina.bench(path, format="raw", count=1).requests == 1

    source = _throttled(path, "raw", slowly)
    return Work(
        lambda **how: lamina.bench(source, size=MIB, depth=2, **({} if slowly else {"format": "raw"}), **how), unchanged
    )


WORKS = (_convert, _convert_over, _copy, _compare, _commit, _rebase, _flatten, _compact, _bench)


def _nothing_open() -> list[str]:
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd))


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("make", WORKS)
def test_cancelled_from_the_callback(make: Callable[..., Work], tmp_path: Path) -> None:
    work, event = make(tmp_path), threading.Event()
    before = _nothing_open()
    progress = Counter(first=event.set)
    with pytest.raises(lamina.Cancelled):
        work.run(progress=progress, cancel=event)
    assert len(progress.calls) == 1, "the job went on after it was cancelled"
    assert _nothing_open() == before
    work.unchanged()


@pytest.mark.parametrize("make", WORKS)
def test_cancelled_from_another_thread(make: Callable[..., Work], tmp_path: Path) -> None:
    """The job would take many seconds, and is cancelled when it has begun."""
    work, event, begun = make(tmp_path, rate=4 * MIB), threading.Event(), threading.Event()
    before = _nothing_open()

    def cancel() -> None:
        begun.wait()
        event.set()

    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        with pytest.raises(lamina.Cancelled):
            work.run(progress=Counter(first=begun.set), cancel=event)
    finally:
        begun.set()
        thread.join()
    assert _nothing_open() == before
    work.unchanged()


@pytest.mark.parametrize("make", WORKS)
def test_a_callback_that_raises_ends_the_job(make: Callable[..., Work], tmp_path: Path) -> None:
    work = make(tmp_path)

    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Enough

    before = _nothing_open()
    with pytest.raises(Enough):
        work.run(progress=stop)
    assert _nothing_open() == before
    work.unchanged()


@pytest.mark.parametrize("make", WORKS)
def test_cancelled_before_it_began(make: Callable[..., Work], tmp_path: Path) -> None:
    class Always:
        def is_set(self) -> bool:
            return True

    work = make(tmp_path)
    with pytest.raises(lamina.Cancelled):
        work.run(cancel=Always())
    work.unchanged()


@pytest.mark.parametrize("make", WORKS)
def test_the_event_stays_that_of_the_caller(make: Callable[..., Work], tmp_path: Path) -> None:
    work, event = make(tmp_path), threading.Event()
    seen: list[threading.Thread] = []
    work.run(progress=lambda done, total: seen.append(threading.current_thread()), cancel=event)
    assert not event.is_set()
    assert {*seen} == {threading.current_thread()}


def test_an_open_image_stays_usable_after_a_cancellation(tmp_path: Path) -> None:
    path, event = disk(tmp_path / "a.raw", "raw", 64 * MIB), threading.Event()
    with lamina.open(path, format="raw") as image:
        with pytest.raises(lamina.Cancelled):
            lamina.convert(image, tmp_path / "b", "raw", progress=Counter(first=event.set), cancel=event)
        assert image.read(0, 1) == b"\1"
        event.clear()
        lamina.convert(image, tmp_path / "b", "raw", cancel=event)
        assert (tmp_path / "b").read_bytes() == path.read_bytes()


def test_an_existing_target_is_said_to_be_partly_overwritten(tmp_path: Path) -> None:
    source, target = disk(tmp_path / "a.raw", "raw", 64 * MIB), disk(tmp_path / "b.raw", "raw", 64 * MIB)
    event = threading.Event()
    how: dict[str, Any] = {"progress": Counter(first=event.set), "cancel": event}
    with pytest.raises(lamina.Cancelled, match=r"b\.raw is partly overwritten"):
        lamina.convert(source, target, "raw", format="raw", create=False, **how)
    event.clear()
    how["progress"] = Counter(first=event.set)
    with (
        lamina.open(target, format="raw", read_only=False) as image,
        pytest.raises(lamina.Cancelled, match=r"of the target, the first .* bytes .* are copied"),
    ):
        lamina.copy(source, image, **how)


def test_one_event_stops_several_jobs(tmp_path: Path) -> None:
    paths, event = [disk(tmp_path / f"{name}.raw", "raw", 64 * MIB) for name in "ab"], threading.Event()
    begun, errors = threading.Barrier(3), []

    def run(path: Path) -> None:
        try:
            lamina.convert(
                path, f"{path}.copy", "raw", format="raw", rate="4M", cancel=event, progress=Counter(first=begun.wait)
            )
        except lamina.Cancelled as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    begun.wait()
    event.set()
    for thread in threads:
        thread.join()
    assert len(errors) == 2
    assert sorted(os.listdir(tmp_path)) == ["a.raw", "b.raw"]

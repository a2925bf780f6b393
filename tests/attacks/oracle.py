"""The oracle of every attack: what must hold for any input bytes whatever.

Each call ends within its budget of time and memory, and either succeeds or raises a `LaminaError`. It opens no file but
those granted, changes nothing in an image that is opened read-only, leaks no descriptor, and gives the same answer twice.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from lamina.errors import LaminaError
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener, open_graph, probe
from lamina.image import Image
from lamina.policy import Policy, site_files
from lamina.request import Child

MIB = 1 << 20

#: Processor time of one call, in seconds; wall time says more about what else the machine does.
MAX_SECONDS = 2.0
#: A call that is not done after this long by the clock on the wall hangs.
MAX_WALL = 60
#: Memory of one call, numpy's included.
MAX_MEMORY = 64 * MIB

#: Bytes at each end of a disk that are read, and written in a copy.
_SPAN = 256 << 10
#: What one question for extents may cover: callers that do not trust an image ask in windows.
_WINDOW = 64 * MIB

# Modules and the data of installed packages are named by the import system, not by an image.
_OWN = tuple({os.path.join(os.path.realpath(place), "") for place in (sys.prefix, sys.base_prefix, *sys.path) if place})
_DIRECTORY = os.O_DIRECTORY | getattr(os, "O_PATH", 0)
_FORBIDDEN = ("socket.connect", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "pickle.find_class")

_watching: list[str] | None = None
_hooked = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is None:
        return
    if event in _FORBIDDEN:
        _watching.append(f"{event} {arguments[0]!r}")
    elif event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or (isinstance(flags, int) and flags & _DIRECTORY):
            return  # a descriptor that is open already; a step on the way to a file
        name = os.fsdecode(path)
        if name in site_files():  # named by the site, not by an image
            return
        if not os.path.realpath(name).startswith(_OWN) and not os.path.isdir(name):
            _watching.append(name)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The names of all files that are opened meanwhile (and "event argument" for what is never allowed)."""
    global _watching, _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # there is no way to take one away
        _hooked = True
    before, _watching = _watching, []
    try:
        yield _watching
    finally:
        found, _watching = _watching, before
        if before is not None:
            before += found


def strangers(opened: Collection[str], granted: Collection[os.PathLike[str] | str]) -> list[str]:
    """Which of the files that were opened were not granted. The policy opens step by step, and the last by its bare name."""
    paths = {os.path.realpath(path) for path in granted}
    names = {os.path.basename(path) for path in paths}
    return [name for name in opened if not (os.path.realpath(name) in paths or ("/" not in name and name in names))]


class Cost(NamedTuple):
    """What a call took: processor time in seconds, and the most memory (bytes) over what was in use before."""

    seconds: float
    memory: int


def measure(action: Callable[[], object]) -> Cost:
    """Run `action` once for its cost in time, and once more for that in memory: tracing is slow."""
    start = time.process_time()
    action()
    seconds = time.process_time() - start
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start(1)
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        action()
        memory = tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()
    return Cost(seconds, memory)


class Answer(NamedTuple):
    """How a call ended: an error's class and text, or what it returned."""

    error: str | None
    text: str
    value: Any = None


def ask(action: Callable[[], Any]) -> Answer:
    """What `action` answers. Any exception that is not a `LaminaError` passes through, and fails the test."""
    try:
        return Answer(None, "", action())
    except LaminaError as error:
        answer = Answer(type(error).__name__, str(error))
    assert answer.text.isprintable(), f"a message that drives a terminal: {answer.text!r}"
    return answer


@contextmanager
def no_hang() -> Iterator[None]:
    """TimeoutError once this takes longer than `MAX_WALL`."""

    def tell(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {MAX_WALL} seconds")

    before = signal.signal(signal.SIGALRM, tell)
    signal.alarm(MAX_WALL)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def inspect(path: Path) -> dict[str, Any]:
    """What `info` says of a qcow2 image: nothing but the file itself is opened."""
    opener = Opener(policy=Policy.none(), no_references=True)
    storage = Child(opener.open({"driver": "file", "filename": str(path)}, storage=True), "file")
    try:
        return Qcow2.inspect(storage, {}).to_json()
    finally:
        storage.close()


def look(path: Path, policy: Policy | None = None, format: str = "qcow2") -> list[Answer]:
    """Everything that only reads: the probe, info, reads, status and check."""
    answers = [ask(lambda: _probe(path))]
    if format == "qcow2":
        answers.append(ask(lambda: inspect(path)))
    opened = ask(lambda: Image(open_graph(str(path), format=format, policy=policy)))
    if opened.error:
        return [*answers, opened]
    with opened.value as image:
        answers.append(Answer(None, "", image.size))
        for at, length in spans(image.size, _SPAN):
            answers.append(ask(lambda at=at, length=length: hashlib.sha256(image.read(at, length)).hexdigest()))
            answers.append(ask(lambda at=at, length=length: image.root.reads_zero(at, length)))
        for at, length in spans(image.size, _WINDOW):
            answers.append(ask(lambda at=at, length=length: list(image.extents(at, length).flags)))
        if isinstance(image.node, Qcow2):
            answers.append(ask(lambda: _check(image.node)))
    return answers


def disturb(path: Path, policy: Policy | None = None, format: str = "qcow2") -> list[Answer]:
    """Everything that writes: write, zero, discard, truncate, flush, close."""
    opened = ask(lambda: Image(open_graph(str(path), format=format, policy=policy, read_only=False)))
    if opened.error:
        return [opened]
    image = opened.value
    answers = []
    try:
        for at, length in spans(image.size, _SPAN):
            short = min(length, 700)
            third = max(length // 3, 1)
            answers += [
                ask(lambda at=at, short=short: image.write(at, b"\xa5" * short)),
                ask(lambda at=at, length=length, third=third: image.zero(at + length - third, third, unmap=True)),
                ask(lambda at=at, length=length, third=third: image.zero(at + length // 2, third)),
                ask(lambda at=at, length=length, third=third: image.discard(at + third, third)),
                ask(lambda at=at, length=length, third=third: image.write(at + third, b"\x5a" * third)),
            ]
        answers.append(ask(image.flush))
        answers.append(ask(lambda: image.truncate(image.size + 4096)))
        answers.append(ask(lambda: image.truncate(max(image.size - 8192, 0))))
        answers.append(ask(image.flush))
    finally:
        answers.append(ask(image.close))
    return answers


def spans(size: int, length: int) -> list[tuple[int, int]]:
    """The first and the last `length` bytes of a disk, or all of it."""
    if size <= 2 * length:
        return [(0, size)] if size else []
    return [(0, length), (size - length, length)]


class Survival(NamedTuple):
    """What a hostile image was answered: by the calls that read, by those that write (to a copy), and then by those that
    read that copy."""

    read: list[Answer]
    written: list[Answer]
    after: list[Answer]

    @property
    def errors(self) -> set[str]:
        return {answer.error for answer in (*self.read, *self.written) if answer.error}


def survives(
    path: Path,
    *,
    granted: Collection[Path] = (),
    policy: Policy | None = None,
    format: str = "qcow2",
    costs: bool = True,
    write: bool = True,
) -> Survival:
    """Hold the oracle over the image at `path`. `granted`: the files that it may open besides itself."""
    copy = path.with_name(path.name + ".copy")
    allowed = [path, copy, *granted]
    before = _state(path)
    descriptors = _descriptors()
    with no_hang(), opened_files() as opened:
        if costs:
            _within_budget("reading", measure(lambda: look(path, policy, format)))
        read = look(path, policy, format)
        again = look(path, policy, format)
        assert _comparable(read) == _comparable(again), "two opens gave different answers"
        assert _state(path) == before, "an image that was only read has changed"
        written, after = [], read
        if write:
            _copy(path, copy)
            try:
                written = disturb(copy, policy, format)
                after = look(copy, policy, format)
                if costs:
                    _copy(path, copy)
                    _within_budget("writing", measure(lambda: disturb(copy, policy, format)))
            finally:
                copy.unlink()
    assert not strangers(opened, allowed), f"files were opened that nobody granted: {strangers(opened, allowed)}"
    assert _descriptors() <= descriptors, "descriptors leaked"
    return Survival(read, written, after)


def _within_budget(what: str, cost: Cost) -> None:
    assert cost.seconds < MAX_SECONDS, f"{what} took {cost.seconds:.1f} s of processor time"
    assert cost.memory < MAX_MEMORY, f"{what} took {cost.memory / MIB:.0f} MiB"


def _comparable(answers: list[Answer]) -> list[str]:
    return [repr(answer) for answer in answers]


def _probe(path: Path) -> str:
    storage = Child(Opener().open({"driver": "file", "filename": str(path)}, storage=True), "file")
    try:
        return probe(storage).format
    finally:
        storage.close()


def _check(node: Qcow2) -> tuple[int, int, int]:
    report = node.check()
    return report.corruptions, report.leaks, report.check_errors


def _state(path: Path) -> tuple[int, int, int, str]:
    status = path.stat()
    content = hashlib.sha256(path.read_bytes()).hexdigest() if status.st_size < 64 * MIB else ""
    return status.st_size, status.st_mtime_ns, status.st_blocks, content


def _copy(source: Path, target: Path) -> None:
    if source.stat().st_size < MIB:
        target.write_bytes(source.read_bytes())
        return
    shutil.copyfile(source, target)


def _descriptors() -> int:
    folder = "/proc/self/fd"
    return len(os.listdir(folder)) if os.path.isdir(folder) else 0

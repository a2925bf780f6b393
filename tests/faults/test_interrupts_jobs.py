"""An interrupt at any opcode of a job: no thread goes on, nothing waits for ever, no half file stays, images stay usable."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

import lamina
from lamina import workers
from lamina.errors import Locked
from lamina.jobs import requests
from lamina.jobs.bench import Load, bench
from lamina.jobs.compact import compact
from lamina.jobs.compare import compare
from lamina.jobs.convert import convert, convert_to_file
from lamina.jobs.convert_streams import convert_to_pipe
from lamina.jobs.copy import Copy, Plan
from lamina.jobs.copy_ends import StorageSource, StorageTarget
from lamina.jobs.copy_journal import Journal
from lamina.jobs.diff import diff
from lamina.jobs.flatten import flatten
from lamina.request import Child
from lamina.testing.interrupts import in_another_thread, interrupted_at_opcode
from tests import evidence

KIB, MIB = 1 << 10, 1 << 20
PATIENCE = 20.0
#: The works that make a raw image.
RAW = ("convert_by_sharing", "convert_salvaging")
#: How many places of each job are tried in one run of the test; `make soak` sets more.
PLACES = int(os.environ.get("LAMINA_SOAK_JOBS", "20"))
FOLDER = os.path.dirname(requests.__file__)
STANDARD = tuple(
    os.path.join(os.path.dirname(os.__file__), name) for name in ("threading.py", "queue.py", "concurrent" + os.sep)
)
CONTENT = random.Random(3).randbytes(300 * KIB) * 25


def counting(functions: set[str] | None, standard: bool) -> Callable[[CodeType], bool]:
    """Code of `lamina.jobs` and of the threads that work for it, or of these functions there; with `standard`, of the
    standard library too, as far as it is called here."""

    def counts(code: CodeType) -> bool:
        if standard and code.co_filename.startswith(STANDARD):
            return True
        ours = os.path.dirname(code.co_filename) == FOLDER or code.co_filename == workers.__file__
        return ours and (functions is None or code.co_name in functions)

    return counts


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than are there at once: whoever reads waits for whoever writes."""
    monkeypatch.setattr("lamina.jobs.convert_transfer.BUFFER", 256 * KIB)


class Work:
    """The images of a test: a source with data and zeros, a target of its size, and a folder that must stay as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = lamina.open(folder / "source.raw", format="raw")
        self.target = lamina.open({"driver": "memory", "size": len(CONTENT)}, read_only=False)
        #: What must hold after the work, whether it was interrupted or not.
        self.after: Callable[[], None] | None = None

    def close(self) -> None:
        self.source.close()
        self.target.close()

    def convert_to_file(self) -> None:
        convert_to_file(self.source, str(self.folder / "out"), "qcow2", {}, parallel=3, in_order=False)
        (self.folder / "out").unlink()

    def convert_over_a_base(self) -> None:
        how: dict[str, Any] = {"backing": "base.raw", "backing_format": "raw"}
        convert_to_file(self.source, str(self.folder / "out"), "qcow2", {}, **how)
        (self.folder / "out").unlink()

    def convert_by_sharing(self) -> None:
        convert_to_file(self.source, str(self.folder / "out"), "raw", {}, offload="copy")
        (self.folder / "out").unlink()

    def convert_into(self) -> None:
        convert(self.source, self.target, parallel=2)

    def convert_salvaging(self) -> None:
        convert_to_file(self.source, str(self.folder / "out"), "raw", {}, salvage=True, rate=1 << 40)
        (self.folder / "out").unlink()

    def convert_to_pipe(self) -> None:
        with (self.folder / "pipe").open("wb") as file:
            try:
                convert_to_pipe(self.source, file.fileno(), "qcow2", {}, salvage=True)
            finally:
                (self.folder / "pipe").unlink()

    def compare(self) -> None:
        compare(self.source, self.target, parallel=3)

    def compact(self) -> None:
        lamina.create(self.folder / "out", "qcow2", 2 * MIB)
        content = CONTENT[: 400 * KIB] + bytes(600 * KIB) + CONTENT[: 300 * KIB]
        with lamina.open(self.folder / "out", format="qcow2", read_only=False) as image:
            image.write(0, content)
        self.after = lambda: self._require_whole(content)
        with lamina.open(self.folder / "out", format="qcow2", read_only=False) as image:
            compact(image, parallel=3)

    def flatten(self) -> None:
        lamina.create(self.folder / "out", "qcow2", len(CONTENT), backing_file="base.raw", backing_fmt="raw")
        self.after = lambda: self._require_whole(CONTENT[: 4 * MIB])
        with lamina.open(self.folder / "out", format="qcow2", read_only=False) as image:
            flatten(image)

    def _require_whole(self, content: bytes) -> None:
        """The image `out` holds together, and begins with `content`."""
        with lamina.open(self.folder / "out", format="qcow2") as image:
            assert image.node.check().corruptions == 0  # type: ignore[attr-defined]
            assert image.read(0, len(content)) == content
            assert not image.read(len(content), image.size - len(content)).strip(b"\0")
        (self.folder / "out").unlink()

    def diff(self) -> None:
        for _ in diff(self.source, self.target, parallel=3):
            pass

    def bench(self) -> None:
        bench(self.target, Load(5, 2, 64 * KIB, write=True, flush_interval=3))

    def copy(self) -> None:
        target = StorageTarget(Child(self.target.node, "target"), "there", blank=False, grows=False)
        journal = Journal(str(self.folder / "journal"), {})
        try:
            Copy(StorageSource(self.source), target, Plan(64 * KIB, 4), journal=journal).run()
        finally:
            (self.folder / "journal").unlink(missing_ok=True)


WORKS = ["convert_to_file", "convert_over_a_base", "convert_by_sharing", "convert_into", "compare", "copy"]
WORKS += ["convert_salvaging", "convert_to_pipe", "diff", "compact", "flatten", "bench"]


def threads() -> list[str]:
    return [name for name in workers.names.values() if name.startswith("lamina-")]


class Trials:
    """Runs one job again and again, each time interrupted at another place, and looks at what is left."""

    def __init__(self, folder: Path, name: str, functions: set[str] | None = None, *, standard: bool = False) -> None:
        self.folder, self.name, self.counts = folder, name, counting(functions, standard)
        (folder / "source.raw").write_bytes(CONTENT[: 5 * MIB] + bytes(MIB) + CONTENT[6 * MIB :])
        (folder / "base.raw").write_bytes(CONTENT[: 4 * MIB])
        self.total = self.struck = 0
        in_another_thread(lambda: self._once(-1))
        assert not self.struck

    def at(self, number: int) -> None:
        print(f"opcode {number} of {self.total}")
        in_another_thread(lambda: self._once(number))
        evidence.count("interrupts")

    def _once(self, number: int) -> None:
        with ExitStack() as stack:
            work = Work(self.folder)
            stack.callback(work.close)
            try:
                with interrupted_at_opcode(number, self.counts) as seen:
                    getattr(work, self.name)()
            except KeyboardInterrupt:
                self.struck += 1
            if work.after is not None:
                _when_unlocked(work.after)
            if number < 0:
                self.total = seen[0]
            deadline = time.monotonic() + PATIENCE
            while threads() and time.monotonic() < deadline:
                time.sleep(0.001)  # one that was never handed its work is just being started
            assert not threads()
            assert set(os.listdir(self.folder)) <= {"source.raw", "base.raw", "out"}
            if (self.folder / "out").exists():  # interrupted after it was whole
                with lamina.open(self.folder / "out", format="raw" if self.name in RAW else "qcow2") as made:
                    assert compare(made, work.source) is None
                (self.folder / "out").unlink()
            # The images are as good as before.
            assert work.source.read(5 * MIB - 10, 20) == CONTENT[5 * MIB - 10 : 5 * MIB] + bytes(10)
            work.target.write(5, b"x")
            assert work.target.read(5, 1) == b"x"


def _when_unlocked(work: Callable[[], None]) -> None:
    """Call `work` when nothing has its file open to write: an image may have been left to its finalizer (see below)."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return work()
        except Locked:
            if time.monotonic() > deadline:
                raise
            gc.collect()
            time.sleep(0.01)


# An interrupt between an open and its `with` leaves an image to its finalizer, which closes it and says so.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", WORKS)
def test_a_job_that_is_interrupted_anywhere_has_ended(tmp_path: Path, seed: int, name: str) -> None:
    trials = Trials(tmp_path, name)
    dice = random.Random(seed)
    places = range(1, trials.total + 1)
    for number in places if len(places) <= PLACES else dice.sample(places, PLACES):
        trials.at(number)
    assert trials.struck


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", ["convert_into", "compare", "bench"])
def test_where_threads_begin_and_end(tmp_path: Path, name: str) -> None:
    """Every opcode of the functions that start threads and wait for their end."""
    trials = Trials(tmp_path, name, {"run", "_end", "close", "cancel", "start", "_start"})
    for number in range(1, trials.total + 1):
        trials.at(number)
    assert trials.struck


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", ["convert_into", "compare"])
def test_locks_of_the_standard_library_do_not_matter(tmp_path: Path, name: str) -> None:
    """Queues, conditions and threads that are written in Python stay locked where an exception strikes between two of their
    steps: nothing that a job waits for is made of them."""
    trials = Trials(tmp_path, name, {"run", "_end", "close", "cancel", "start", "_start"}, standard=True)
    for number in range(1, trials.total + 1):
        trials.at(number)
    assert trials.struck

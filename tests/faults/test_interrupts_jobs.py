"""An interrupt at any opcode of a job: no thread goes on, nothing waits for ever, no half file stays, images stay usable."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import lamina
from lamina.jobs import lanes
from lamina.jobs.compare import compare
from lamina.jobs.convert import convert, convert_to_file
from lamina.jobs.copy import Copy, Plan
from lamina.jobs.copy_ends import StorageSource, StorageTarget
from lamina.jobs.copy_journal import Journal
from lamina.request import Child

KIB, MIB = 1 << 10, 1 << 20
PATIENCE = 20.0
#: How many places of each job are tried in one run of the test; `make soak` sets more.
PLACES = int(os.environ.get("LAMINA_SOAK_JOBS", "20"))
FOLDER = os.path.dirname(lanes.__file__)
CONTENT = random.Random(3).randbytes(300 * KIB) * 25


@contextmanager
def interrupted_at(number: int, functions: set[str] | None = None) -> Iterator[list[int]]:
    """KeyboardInterrupt at that opcode, counted from 1, of all that `lamina.jobs`, or these functions of it, run in this
    thread; how many ran."""
    seen = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if os.path.dirname(code.co_filename) != FOLDER or (functions and code.co_name not in functions):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            seen[0] += 1
            if seen[0] == number:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than are there at once: whoever reads waits for whoever writes."""
    monkeypatch.setattr("lamina.jobs.convert._BUFFER", 256 * KIB)


class Work:
    """The images of a test: a source with data and zeros, a target of its size, and a folder that must stay as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = lamina.open(folder / "source.raw", format="raw")
        self.target = lamina.open({"driver": "memory", "size": len(CONTENT)}, read_only=False)

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
        convert_to_file(self.source, str(self.folder / "out"), "raw", {}, unread="copy")
        (self.folder / "out").unlink()

    def convert_into(self) -> None:
        convert(self.source, self.target, parallel=2)

    def compare(self) -> None:
        compare(self.source, self.target, parallel=3)

    def copy(self) -> None:
        target = StorageTarget(Child(self.target.node, "target"), "there", blank=False, grows=False)
        journal = Journal(str(self.folder / "journal"), {})
        try:
            Copy(StorageSource(self.source), target, Plan(64 * KIB, 4), journal=journal).run()
        finally:
            (self.folder / "journal").unlink(missing_ok=True)


WORKS = ["convert_to_file", "convert_over_a_base", "convert_by_sharing", "convert_into", "compare", "copy"]


def in_another_thread(work: Callable[[], None]) -> None:
    """Do it there; fail the test if it does not come to its end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits for this one
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="test")
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it waits for ever"
    if errors:
        raise errors[0]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lamina-")]


class Trials:
    """Runs one job again and again, each time interrupted at another place, and looks at what is left."""

    def __init__(self, folder: Path, name: str, functions: set[str] | None = None) -> None:
        self.folder, self.name, self.functions = folder, name, functions
        (folder / "source.raw").write_bytes(CONTENT[: 5 * MIB] + bytes(MIB) + CONTENT[6 * MIB :])
        (folder / "base.raw").write_bytes(CONTENT[: 4 * MIB])
        self.total = self.struck = 0
        in_another_thread(lambda: self._once(-1))
        assert not self.struck

    def at(self, number: int) -> None:
        print(f"opcode {number} of {self.total}")
        in_another_thread(lambda: self._once(number))

    def _once(self, number: int) -> None:
        with ExitStack() as stack:
            work = Work(self.folder)
            stack.callback(work.close)
            try:
                with interrupted_at(number, self.functions) as seen:
                    getattr(work, self.name)()
            except KeyboardInterrupt:
                self.struck += 1
            if number < 0:
                self.total = seen[0]
            deadline = time.monotonic() + PATIENCE
            while threads() and time.monotonic() < deadline:
                time.sleep(0.001)  # one that was never handed its work is just being started
            assert not threads()
            assert set(os.listdir(self.folder)) <= {"source.raw", "base.raw", "out"}
            if (self.folder / "out").exists():  # interrupted after it was whole
                with lamina.open(self.folder / "out", format="raw" if "sharing" in self.name else "qcow2") as made:
                    assert compare(made, work.source) is None
                (self.folder / "out").unlink()
            # The images are as good as before.
            assert work.source.read(5 * MIB - 10, 20) == CONTENT[5 * MIB - 10 : 5 * MIB] + bytes(10)
            work.target.write(5, b"x")
            assert work.target.read(5, 1) == b"x"


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
@pytest.mark.parametrize("name", ["convert_into", "compare"])
def test_where_threads_begin_and_end(tmp_path: Path, name: str) -> None:
    """Every opcode of the functions that start threads and wait for their end."""
    trials = Trials(tmp_path, name, {"run", "_end", "close", "call_off"})
    for number in range(1, trials.total + 1):
        trials.at(number)
    assert trials.struck


def test_an_errand_that_is_called_off_never_runs() -> None:
    ran: list[int] = []
    errand = lanes.Errand(ran.append, 1)
    errand.call_off()
    errand.call_off()
    errand()
    assert not ran
    errand.call_off()
    other = lanes.Errand(ran.append, 2)
    other()
    other.call_off()
    assert ran == [2]

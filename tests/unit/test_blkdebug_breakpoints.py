"""Requests that stop at an event of `blkdebug` and are let go on: by the library, and by the commands of `lamina io`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lamina.cli.main import main
from lamina.errors import OptionError
from lamina.filters.blkdebug.rules import Injection, Rules, Transition

#: Seconds after which a thread that should have gone on is a failure.
PATIENCE = 10.0


@contextmanager
def beside(*actions: Callable[[], None]) -> Iterator[list[threading.Thread]]:
    """Each of these in a thread of its own; all have ended when the block does."""
    threads = [threading.Thread(target=action, daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "it was never let go"


def test_a_request_stops_and_goes_on() -> None:
    rules = Rules()
    rules.add_break("write_aio", "A")
    with beside(lambda: rules.fire("write_aio")) as (thread,):
        assert rules.wait_break("A", PATIENCE)
        assert thread.is_alive()
        assert (rules.stopped, rules.sleeping) == (("A",), 1)
        assert not rules.resume("B")
        assert rules.resume("A")
    assert (rules.stopped, rules.sleeping) == ((), 0)
    assert not rules.resume("A")


def test_a_breakpoint_stops_one_request() -> None:
    rules = Rules()
    rules.add_break("write_aio", "A")
    with beside(lambda: rules.fire("write_aio")):
        assert rules.wait_break("A", PATIENCE)
        rules.fire("write_aio")  # passes
        assert rules.resume("A")
    assert not rules.remove_break("A")


def test_two_breakpoints_at_one_event_are_two_reasons_to_sleep() -> None:
    rules = Rules()
    rules.add_break("write_aio", "A")
    rules.add_break("write_aio", "B")
    with beside(lambda: rules.fire("write_aio")) as (thread,):
        assert rules.wait_break("A", PATIENCE)
        assert rules.stopped == ("B", "A"), "the last that was set comes first"
        assert rules.sleeping == 1
        assert rules.resume("B")
        time.sleep(0.05)
        assert thread.is_alive()
        assert rules.resume("A")


def test_the_latest_of_a_name_is_let_go_first() -> None:
    rules = Rules()
    done: list[str] = []

    def request(event: str) -> None:
        rules.fire(event)
        done.append(event)

    for event in ("write_aio", "read_aio"):
        rules.add_break(event, "A")
    with beside(lambda: request("write_aio")):
        assert rules.wait_break("A", PATIENCE)
        with beside(lambda: request("read_aio")):
            while rules.sleeping < 2:
                time.sleep(0.001)
            assert rules.resume("A")
        assert done == ["read_aio"]
        assert rules.resume("A")
    assert done == ["read_aio", "write_aio"]


def test_remove_break_forgets_rules_and_wakes_all() -> None:
    rules = Rules()
    rules.add_break("read_aio", "A")
    assert rules.remove_break("A")
    rules.fire("read_aio")
    assert not rules.remove_break("A")
    for event in ("write_aio", "cow_read", "cow_write"):
        rules.add_break(event, "A")
    with beside(lambda: rules.fire("write_aio"), lambda: rules.fire("cow_read")):
        while rules.sleeping < 2:
            time.sleep(0.001)
        assert rules.remove_break("A")
    rules.fire("cow_write")


def test_a_breakpoint_counts_in_every_state_and_the_state_changes_before_the_sleep() -> None:
    rules = Rules([Injection("write_aio"), Transition("write_aio", 1, 5)])
    rules.add_break("write_aio", "A")
    with beside(lambda: rules.fire("write_aio")):
        assert rules.wait_break("A", PATIENCE)
        assert rules.state == 5
        assert rules.active, "armed before the sleep, too"
        rules.resume("A")
    rules.add_break("write_aio", "A")
    with beside(lambda: rules.fire("write_aio")):
        assert rules.wait_break("A", PATIENCE)
        rules.release()


def test_unknown_event() -> None:
    with pytest.raises(OptionError, match="did you mean write_aio"):
        Rules().add_break("write_ai", "A")


def test_wait_break_gives_up_in_time() -> None:
    assert not Rules().wait_break("A", 0.01)


def test_whoever_refuses_to_be_told_does_not_stop() -> None:
    rules = Rules()

    def tell(what: str, tag: str) -> None:
        raise OptionError("not here")

    rules.tell = tell
    rules.add_break("write_aio", "A")
    with pytest.raises(OptionError, match="not here"):
        rules.fire("write_aio")
    assert rules.stopped == ()
    rules.fire("write_aio")


# -- the commands


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    monkeypatch.chdir(tmp_path)
    return path


def io(capfd: pytest.CaptureFixture[str], *lines: str, name: str = "blkdebug::disk.raw") -> tuple[int, list[str], str]:
    words = [word for line in lines for word in ("-c", line)]
    status = main(["io", "-f", "raw", *words, name])
    said = capfd.readouterr()
    return status, [line for line in said.out.splitlines() if " ops; " not in line], said.err


def test_commands_stop_a_request(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = ["break pwritev A", "aio_write -P 7 0 512", "wait_break A", "read -P 0 0 512", "resume A", "aio_flush"]
    status, said, complaint = io(capfd, *lines, "read -P 7 0 512")
    assert said == [
        "blkdebug: Suspended request 'A'",
        "read 512/512 bytes at offset 0",
        "blkdebug: Resuming request 'A'",
        "wrote 512/512 bytes at offset 0",
        "read 512/512 bytes at offset 0",
    ]
    assert (status, complaint) == (0, "")


def test_resume_waits_for_a_request_that_is_on_its_way(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, _, complaint = io(capfd, "break pwritev A", "aio_write 0 512", "resume A", "aio_flush")
    assert (status, complaint) == (0, "")
    assert disk.read_bytes()[:512] == b"\xcd" * 512


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["break bogus A"], "no event 'bogus'"),
        (["resume A"], "no request is stopped at 'A'"),
        (["remove_break A"], "no breakpoint 'A'"),
        (["wait_break A"], "no request in progress"),
        (["break pwritev A", "wait_break A"], "no request in progress"),
        (["break pwritev A", "aio_write 0 512", "wait_break B"], "no request in progress can stop at 'B'"),
        (["break pwritev A", "write 0 512"], "use aio_read or aio_write"),
        (["break pwritev A", "aio_write 0 512", "aio_flush"], "a request is stopped at 'A'"),
        (["break pwritev A", "aio_write 0 512", "truncate 2M"], "a request is stopped at 'A'"),
        (["break pwritev"], "usage: break EVENT TAG"),
    ],
)
def test_what_would_wait_for_ever_is_refused(
    disk: Path, lines: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status, _, complaint = io(capfd, *lines)
    assert status == 1
    assert words in complaint


def test_without_a_blkdebug_nothing_stops(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for line in ("break pwritev A", "resume A", "remove_break A", "wait_break A"):
        status, _, complaint = io(capfd, line, name="disk.raw")
        assert status == 1
        assert "breakpoints need a blkdebug" in complaint


def test_closing_lets_go_what_is_stopped(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, said, _ = io(capfd, "break pwritev A", "aio_write 0 512", "wait_break A", "break pwritev B", "quit")
    assert status == 0
    assert said[-1] == "wrote 512/512 bytes at offset 0"
    assert disk.read_bytes()[:512] == b"\xcd" * 512

"""The loop that serves several clients from one thread: all are served, none is held up by another, each gets its own thread
back when that is due."""

from __future__ import annotations

import errno
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from lamina.nbd.server import loop as room
from lamina.nbd.server.loop import ExecutionLock, Loop

PATIENCE = 20.0
#: An interval after which no test waits any more: what comes back did not do so because it was idle.
NEVER = 3 * PATIENCE


class Echo:
    """A member that sends back what comes, and `gives_up` after so many steps. `before` is called in each."""

    def __init__(self, gives_up: int = 1 << 30, before: Callable[[], None] = lambda: None) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.theirs.settimeout(PATIENCE)
        self.gives_up, self.before, self.steps = gives_up, before, 0
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.loop: Loop | None = None

    def fileno(self) -> int:
        return self.ours.fileno()

    def step(self) -> bool:
        self.steps += 1
        self.before()
        self.ours.send(self.ours.recv(100))
        return self.steps < self.gives_up

    def join(self, loop: Loop) -> Echo:
        self.loop = loop

        def serve() -> None:
            try:
                loop.serve(self)
            except OSError as error:
                self.error = error

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        return self

    def ask(self) -> bool:
        """Whether the loop answered. False: it is back, and nobody would."""
        self.theirs.send(b"echo")
        while not select.select([self.theirs], [], [], 0.02)[0]:
            if self.is_back(0) and not select.select([self.theirs], [], [], 0)[0]:
                return False
        return self.theirs.recv(100) == b"echo"

    def is_back(self, seconds: float = PATIENCE) -> bool:
        assert self.thread is not None
        self.thread.join(seconds)
        return not self.thread.is_alive()


class Hang:
    """Storage that answers when it is `over`; somebody is `inside`."""

    def __init__(self) -> None:
        self.inside, self.over = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.inside.set()
        assert self.over.wait(PATIENCE)


Members = Callable[..., Echo]


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> Iterator[Members]:
    monkeypatch.setattr(room, "_SWEEP_INTERVAL", NEVER)
    made: list[Echo] = []

    def make(**options: object) -> Echo:
        made.append(Echo(**options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for echo in made:
        echo.theirs.close()
        echo.ours.close()
        assert echo.thread is None or echo.is_back()
    for loop in {echo.loop for echo in made if echo.loop is not None}:
        last = Echo(gives_up=1).join(loop)  # the loop, which may wait for its members, sees that it has none
        last.theirs.send(b"x")
        assert last.is_back()
        last.theirs.close()
        last.ours.close()
    until(lambda: not loops())


def loops() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "nbd-loop"]


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_all_are_served_by_one_thread(members: Members) -> None:
    loop = Loop()
    threads = set()
    crowd = [members(before=lambda: threads.add(threading.current_thread().name)).join(loop) for _ in range(5)]
    for _ in range(200):
        for echo in crowd:
            echo.theirs.send(b"echo")
        for echo in crowd:
            assert echo.theirs.recv(100) == b"echo"
    assert threads == {"nbd-loop"}
    assert len(loops()) == 1


def test_who_cannot_go_on_gets_its_thread_back(members: Members) -> None:
    loop = Loop()
    ends, stays = members(gives_up=3).join(loop), members().join(loop)
    for _ in range(3):
        assert ends.ask()
        assert stays.ask()
    assert ends.is_back()
    assert ends.steps == 3
    assert stays.ask()


def test_an_error_is_for_the_member_whose_it_is(members: Members) -> None:
    def fail() -> None:
        raise OSError("of this one")

    loop = Loop()
    fails, stays = members(before=fail).join(loop), members().join(loop)
    fails.theirs.send(b"x")
    assert fails.is_back()
    assert str(fails.error) == "of this one"
    assert stays.ask()
    assert stays.error is None


def test_one_that_joins_just_after_the_last_one_left_stays(members: Members) -> None:
    """Between the moment at which the loop sees that it has no member, and its end."""

    class Entries(dict[int, Any]):
        def __len__(self) -> int:
            found = super().__len__()
            if not found and joins:
                joins.pop().join(loop)
                until(super().__len__)
            return found

    loop = Loop()
    joins: list[Echo] = []
    loop._entries = Entries()
    last, next_one = members(gives_up=1).join(loop), members()
    until(lambda: dict.__len__(loop._entries))
    joins.append(next_one)
    last.theirs.send(b"x")
    assert last.is_back()
    assert next_one.ask()


def test_the_silent_and_the_last_one_get_their_threads_back_and_the_loop_ends(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_SWEEP_INTERVAL", 0.1)
    loop = Loop()
    busy, also_busy, silent = (members().join(loop) for _ in range(3))
    while not silent.is_back(0) and busy.ask() and also_busy.ask():
        pass
    assert silent.is_back(), "it is kept, and others who were busy are not"
    while busy.ask():  # then also_busy is silent, and busy alone
        pass
    assert also_busy.is_back()
    assert busy.is_back()
    until(lambda: not loops())
    # And it begins again.
    monkeypatch.setattr(room, "_SWEEP_INTERVAL", NEVER)
    busy.ours.close()
    again, other = members().join(loop), members().join(loop)
    assert again.ask()
    assert other.ask()


def test_nobody_waits_for_one_that_stands_still(members: Members) -> None:
    """Storage of one client hangs: the others go on in threads of their own, and do not come back meanwhile."""
    loop = Loop()
    hang = Hang()
    others = [members().join(loop) for _ in range(3)]
    hangs = members(before=hang).join(loop)
    for echo in others:
        assert echo.ask()
    hangs.theirs.send(b"echo")
    assert hang.inside.wait(PATIENCE)
    for echo in others:
        assert echo.is_back()
        assert echo.join(loop).is_back(), "it waits where nobody is served"
    assert not hangs.is_back(0)
    hang.over.set()
    assert hangs.theirs.recv(100) == b"echo"
    until(lambda: loop._current is None)
    for echo in others:
        echo.join(loop)
    for echo in others:
        assert echo.ask()


def test_what_is_pending_of_one_that_left_is_not_touched(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket was ready, too, while the loop stood still: by then it is its own thread's."""
    monkeypatch.setattr(room, "_SWEEP_INTERVAL", 0.1)
    loop = Loop()
    hang = Hang()
    hangs, other = members(before=hang), members()
    hangs.theirs.send(b"echo")
    other.theirs.send(b"echo")
    first = [hangs.join(loop), other.join(loop)]
    assert hang.inside.wait(PATIENCE)
    assert other.is_back()
    steps = other.steps
    hang.over.set()
    assert hangs.theirs.recv(100) == b"echo"
    until(lambda: hangs.is_back(0))  # alone
    assert other.steps == steps
    assert all(echo.error is None for echo in first)


def test_a_member_that_is_closed_comes_back(members: Members) -> None:
    loop = Loop()
    closed, stays = members().join(loop), members().join(loop)
    assert closed.ask()
    closed.ours.close()
    assert closed.is_back()
    # Its number may be the next one's.
    again = members().join(loop)
    for _ in range(50):
        assert again.ask()
        assert stays.ask()
    assert members().join(loop).thread is not None
    shut = members()
    shut.ours.close()
    assert shut.join(loop).is_back()


def test_without_what_the_loop_needs_everyone_goes_on_alone(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, one = Loop(), members()

    class None_:
        def __init__(self, **_: object) -> None: ...

        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    def no_descriptor() -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(room.threading, "Thread", None_)
        loop.serve(one)
    with monkeypatch.context() as patch:
        patch.setattr(room.select, "epoll", no_descriptor)
        loop.serve(one)
    with monkeypatch.context() as patch:
        numbers = iter([one.fileno()])  # closed after the first look
        patch.setattr(one, "fileno", lambda: next(numbers, -1))
        loop.serve(one)
    assert one.join(loop).ask()


def test_a_turn_is_one_thread_s_and_nobody_waits_long() -> None:
    turn = ExecutionLock()
    first, alone = turn.take()
    assert alone
    assert first.locked()
    second, alone = turn.take()  # the first stands still: a new line
    assert not alone
    assert second is not first
    second.release()
    first.release()
    third, alone = turn.take()
    assert alone
    assert third is second
    third.release()

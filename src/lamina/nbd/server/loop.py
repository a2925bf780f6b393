"""The loop: one thread that executes the requests of several busy clients.

A single client is served best by a thread of its own. The threads of several clients compete for the interpreter at every
system call: a request of four clients then takes 7 us instead of 5. So the loop serves clients that are busy at once,
while their own threads sleep. A client returns to its own thread for requests that may take long, and when the other clients
are idle.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from typing import Any, Final, Protocol

#: The seconds for which a thread waits for the lock before it makes a new one.
_LOCK_TIMEOUT: Final = 0.002
#: The seconds of one step after which the loop counts as blocked (by slow storage), and its other clients leave it.
_BLOCKED: Final = 0.02
#: The interval in seconds at which idle clients leave the loop.
_SWEEP_INTERVAL: Final = 0.1


class ExecutionLock:
    """A lock under which one thread at a time executes requests. If its holder is blocked (by slow storage, or by a client
    that does not read), the other threads go on with a new lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def take(self) -> tuple[threading.Lock, bool]:
        """Acquire the lock. Returns it, for the caller to release, and whether it was free."""
        lock = self._lock
        if lock.acquire(blocking=False):
            return lock, True
        if not lock.acquire(timeout=_LOCK_TIMEOUT):
            lock = self._lock = threading.Lock()
            lock.acquire()
        return lock, False


class Member(Protocol):
    """A client in the loop."""

    def fileno(self) -> int:
        """The descriptor of its socket; -1 after `close`."""
        ...

    def step(self) -> bool:
        """Execute the received requests, without waiting for the client. False: its own thread is to continue."""
        ...


class _Entry:
    """A member of the loop. Its own thread waits for the lock `back`, and then raises `error`, if there is one."""

    __slots__ = ("back", "error", "member", "number", "stepped")

    def __init__(self, member: Member) -> None:
        self.member = member
        self.number = member.fileno()
        self.back = threading.Lock()
        self.back.acquire()
        self.error: BaseException | None = None
        self.stepped = True


class Loop:
    """Serves several clients from one thread, which runs while there are any. Without epoll every client keeps its own.
    `execution`: the lock of all threads that execute requests, inside the loop or not."""

    def __init__(self) -> None:
        self.execution = ExecutionLock()
        #: Guards the attributes below.
        self._mutex = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        self._epoll: Any = None
        #: The member whose `step` runs, and since when.
        self._current: _Entry | None = None
        self._since = 0.0

    def serve(self, member: Member) -> None:
        """Let the loop serve `member`, and return when its own thread is to continue: at once if the loop is blocked or
        cannot start. Raises the error of its `step`."""
        if not hasattr(select, "epoll"):
            return
        with self._mutex:
            if self._is_blocked() or member.fileno() < 0:
                return
            entry = _Entry(member)
            try:
                if self._epoll is None:
                    self._epoll = self._begin()
                self._epoll.register(entry.number, select.EPOLLIN)
            except (OSError, RuntimeError, ValueError):
                return  # no descriptor or thread is available, or the socket was closed, as its own thread will see
            self._entries[entry.number] = entry
        while not entry.back.acquire(timeout=_BLOCKED):
            with self._mutex:
                if self._current is not entry and (self._is_blocked() or member.fileno() < 0):
                    self._remove(entry)
        if entry.error is not None:
            raise entry.error

    def _begin(self) -> Any:
        """Start the thread. (`_mutex` is held until there is an entry.)"""
        epoll = select.epoll()
        try:
            threading.Thread(target=self._run, args=(epoll,), name="nbd-loop", daemon=True).start()
        except RuntimeError:
            epoll.close()
            raise
        return epoll

    def _is_blocked(self) -> bool:
        """Whether the current `step` takes too long. (`_mutex` is held.)"""
        return self._current is not None and time.monotonic() - self._since > _BLOCKED

    def _remove(self, entry: _Entry) -> None:
        """Return the member to its own thread. (`_mutex` is held. The number of a closed socket may be reused.)"""
        if self._entries.get(entry.number) is entry:
            del self._entries[entry.number]
            if self._epoll is not None:
                with contextlib.suppress(OSError):
                    self._epoll.unregister(entry.number)
        if entry.back.locked():
            entry.back.release()

    def _run(self, epoll: Any) -> None:
        clock = time.monotonic
        mutex, entries = self._mutex, self._entries
        look = clock() + _SWEEP_INTERVAL
        while True:
            for number, _ in epoll.poll(_SWEEP_INTERVAL):
                with mutex:
                    entry = entries.get(number)
                    if entry is None:
                        continue
                    self._current, self._since = entry, clock()
                try:
                    stays = entry.member.step()
                    entry.stepped = True
                except BaseException as error:  # noqa: BLE001 - its own thread raises it
                    entry.error, stays = error, False
                with mutex:
                    self._current = None
                    if not stays:
                        self._remove(entry)
            due = clock() > look
            if due or not entries:
                with mutex:
                    if due:  # not for one that joined just after the last one left
                        look = clock() + _SWEEP_INTERVAL
                        self._sweep()
                    if not entries:
                        self._epoll = None
                        epoll.close()
                        return

    def _sweep(self) -> None:
        """Remove idle members, and then a single remaining one. (`_mutex` is held.)"""
        for entry in [entry for entry in self._entries.values() if not entry.stepped]:
            self._remove(entry)
        if len(self._entries) == 1:
            self._remove(next(iter(self._entries.values())))
        for entry in self._entries.values():
            entry.stepped = False

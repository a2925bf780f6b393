"""Who executes requests when several clients are busy at once: one thread for all of them.

Alone, a client is served best by a thread of its own. Threads of several clients meet at every system call, where the
interpreter passes from one to the other: a request of four clients then cost 7 us instead of 5. So clients that meet are
served in one loop, each as soon as something of it came, while their own threads sleep; those take over again for all that
may take long, and when the others have fallen silent.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from typing import Final, Protocol

#: Seconds that a client waits for its turn.
_PATIENCE: Final = 0.002
#: Seconds after which a client leaves a loop that stands still (in another one's slow storage).
_STUCK: Final = 0.02
#: Seconds between two looks for clients that have fallen silent.
_SWEEP: Final = 0.1


class ExecutionTurn:
    """Lets one thread at a time execute what was received, as long as that is quick. Nobody waits long: behind one that
    stands still (in slow storage, or because its client does not read) the others begin a new line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def take(self) -> tuple[threading.Lock, bool]:
        """A lock that is held, to be released when it is the next one's turn; and whether it was free."""
        lock = self._lock
        if lock.acquire(blocking=False):
            return lock, True
        if not lock.acquire(timeout=_PATIENCE):
            lock = self._lock = threading.Lock()
            lock.acquire()
        return lock, False


class Member(Protocol):
    """A client in the loop."""

    def fileno(self) -> int:
        """Its socket; -1 when that is closed."""
        ...

    def step(self) -> bool:
        """Answer what has come, without waiting for the client. False: what is next is for its own thread."""
        ...


class _Place:
    """A member's place in the loop. `back` is released when its own thread shall go on, `error` is for that to raise."""

    __slots__ = ("back", "error", "member", "number", "stepped")

    def __init__(self, member: Member) -> None:
        self.member = member
        self.number = member.fileno()
        self.back = threading.Lock()
        self.back.acquire()
        self.error: BaseException | None = None
        self.stepped = True


class Loop:
    """Serves several clients from one thread, which is there while they are. `turn`: of all who execute, in it or not."""

    def __init__(self) -> None:
        self.turn = ExecutionTurn()
        #: Guards all that follows.
        self._mutex = threading.Lock()
        self._places: dict[int, _Place] = {}
        self._epoll: select.epoll | None = None
        #: Whose `step` runs, and since when.
        self._current: _Place | None = None
        self._since = 0.0

    def serve(self, member: Member) -> None:
        """Let the loop serve `member`, and return when its own thread shall go on: at once where the loop stands still, or
        cannot begin. Raises what its `step` raised."""
        with self._mutex:
            if self._stands_still() or member.fileno() < 0:
                return
            place = _Place(member)
            try:
                if self._epoll is None:
                    self._epoll = self._begin()
                self._epoll.register(place.number, select.EPOLLIN)
            except (OSError, RuntimeError, ValueError):
                return  # no descriptor or no thread is left, or the socket was closed by now, as its own thread will see
            self._places[place.number] = place
        while not place.back.acquire(timeout=_STUCK):
            with self._mutex:
                if self._current is not place and (self._stands_still() or member.fileno() < 0):
                    self._remove(place)
        if place.error is not None:
            raise place.error

    def _begin(self) -> select.epoll:
        """Start the thread. (`_mutex` is held: it looks for places only when there is one.)"""
        epoll = select.epoll()
        try:
            threading.Thread(target=self._run, args=(epoll,), name="nbd-loop", daemon=True).start()
        except RuntimeError:
            epoll.close()
            raise
        return epoll

    def _stands_still(self) -> bool:
        """Whether somebody's `step` takes too long. (`_mutex` is held.)"""
        return self._current is not None and time.monotonic() - self._since > _STUCK

    def _remove(self, place: _Place) -> None:
        """Let its own thread go on. (`_mutex` is held; the number of a closed socket may be another one's by now.)"""
        if self._places.get(place.number) is place:
            del self._places[place.number]
            if self._epoll is not None:
                with contextlib.suppress(OSError):
                    self._epoll.unregister(place.number)
        if place.back.locked():
            place.back.release()

    def _run(self, epoll: select.epoll) -> None:
        clock = time.monotonic
        mutex, places = self._mutex, self._places
        look = clock() + _SWEEP
        while True:
            for number, _ in epoll.poll(_SWEEP):
                with mutex:
                    place = places.get(number)
                    if place is None:
                        continue
                    self._current, self._since = place, clock()
                try:
                    stays = place.member.step()
                    place.stepped = True
                except BaseException as error:  # noqa: BLE001 - its own thread says what happened
                    place.error, stays = error, False
                with mutex:
                    self._current = None
                    if not stays:
                        self._remove(place)
            if clock() > look or not places:
                look = clock() + _SWEEP
                with mutex:
                    self._sweep()
                    if not places:
                        self._epoll = None
                        epoll.close()
                        return

    def _sweep(self) -> None:
        """Whoever fell silent leaves, and whoever is alone then. (`_mutex` is held.)"""
        for place in [place for place in self._places.values() if not place.stepped]:
            self._remove(place)
        if len(self._places) == 1:
            self._remove(next(iter(self._places.values())))
        for place in self._places.values():
            place.stepped = False

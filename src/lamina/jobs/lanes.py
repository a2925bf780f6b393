"""Requests beside each other: where storage is far away, several at once take no longer than one."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from ..errors import OptionError
from ..node import Node, StorageNode

#: Requests at once to storage that is far away; and the most that may be asked for.
FAR, MOST = 8, 16
#: A call that takes so many seconds has waited. (2 MiB from or to a server on this machine take 1 ms, and eight threads are a
#: quarter slower at that than one. With 20 ms for each request they are four to six times as fast.)
WAITED = 0.004

_I = TypeVar("_I")
_T = TypeVar("_T")


class Errand:
    """A call that another thread is to make, once, and that can be called off. An exception may strike whoever sends it and
    calls it off (Ctrl-C is one) at any step: each can be done again."""

    __slots__ = ("_arguments", "_call", "_off", "_wake", "begun", "finished")

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._call, self._arguments = call, arguments
        self._off = self.begun = self.finished = False
        self._wake = threading.Lock()  # the other thread releases it at the end
        self._wake.acquire()

    def __call__(self) -> Any:
        # Each side says first what it does and looks then at what the other said: one of them sees it, or both.
        self.begun = True
        try:
            return None if self._off else self._call(*self._arguments)
        finally:
            self.finished = True
            self._wake.release()

    def call_off(self) -> None:
        """When this returns the call is not under way, and will not begin."""
        self._off = True
        while self.begun and not self.finished:
            self._wake.acquire(timeout=1)


class Lanes:
    """Runs calls beside each other in `count` threads, once two of them, one after the other, have waited; if `eager`, from
    the first on. Until then each runs at once in its caller's thread: those that do not wait only get in each other's way.
    One thread at a time may use it."""

    def __init__(self, count: int, name: str, *, eager: bool = False) -> None:
        self.count = count
        self._threads = ThreadPoolExecutor(count, name) if count > 1 else None
        self._errands: deque[Errand] = deque()
        self._waited = 2 if eager else 0

    def submit(self, call: Callable[[_I], _T], item: _I) -> Future[_T]:
        """call(item), which is done, under way, or waits for its turn. What it raises, the result raises."""
        if self._threads is not None and self._waited >= 2:
            while self._errands and self._errands[0].finished:
                self._errands.popleft()
            errand = Errand(call, item)
            self._errands.append(errand)  # before a thread can have it
            return self._threads.submit(errand)
        done: Future[_T] = Future()
        begun = time.monotonic()
        try:
            done.set_result(call(item))
        except Exception as error:  # noqa: BLE001 - whoever asks for the result gets it
            done.set_exception(error)
        self._waited = self._waited + 1 if time.monotonic() - begun > WAITED else 0
        return done

    def in_order(self, call: Callable[[_I], _T], items: Iterable[_I]) -> Iterator[tuple[_I, _T]]:
        """(item, call(item)) in the order of the items; as many as there are lanes are under way. What the call raises is
        raised when it is that item's turn."""
        if self._threads is None:
            for item in items:
                yield item, call(item)
            return
        under_way: deque[tuple[_I, Future[_T]]] = deque()
        for item in items:
            under_way.append((item, self.submit(call, item)))
            while under_way and (len(under_way) == self.count or under_way[0][1].done()):
                first, done = under_way.popleft()
                yield first, done.result()
        for item, done in under_way:
            yield item, done.result()

    def close(self) -> None:
        """Calls that wait for their turn are given up; returns when none is under way. May be called again."""
        if self._threads is not None:
            for errand in self._errands:
                errand.call_off()
            self._threads.shutdown(cancel_futures=True)


def lanes_for(*tops: Node, asked: int | None, name: str) -> Lanes:
    """Lanes for requests to these graphs: as many as were `asked` for, else one, or several where some of their storage is
    far away. OptionError where too many are asked for."""
    if asked is None:
        return Lanes(FAR if any(map(is_far, tops)) else 1, name)
    if not 1 <= asked <= MOST:
        raise OptionError(f"{asked} requests cannot be under way at once", hint=f"ask for 1 to {MOST}")
    return Lanes(asked, name, eager=True)


def is_far(top: Node) -> bool:
    """Whether some storage below `top` is far away."""
    return (isinstance(top, StorageNode) and top.far) or any(is_far(child.node) for child in top.children.values())

"""Requests beside each other: where storage is far away, several at once take no longer than one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from ..errors import OptionError
from ..node import Node, StorageNode

#: Requests at once to storage that is far away; and the most that may be asked for.
FAR, MOST = 8, 16

_I = TypeVar("_I")
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Lanes:
    """Runs calls in `count` threads; with one lane each runs at once, in its caller's: two threads that work on storage
    that is near only wait for one another."""

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self._threads = ThreadPoolExecutor(count, name) if count > 1 else None

    def submit(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """The call, which is done, under way, or waits for its turn. What it raises, the result raises."""
        if self._threads is not None:
            return self._threads.submit(call, *args, **kwargs)
        done: Future[_T] = Future()
        try:
            done.set_result(call(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - whoever asks for the result gets it
            done.set_exception(error)
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
            if len(under_way) == self.count:
                first, done = under_way.popleft()
                yield first, done.result()
        for item, done in under_way:
            yield item, done.result()

    def close(self) -> None:
        """Calls that wait for their turn are given up; returns when none is under way."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)


def lanes_for(top: Node, asked: int | None) -> int:
    """How many requests to `top` are best under way at once: as many as were `asked` for, else one, or several where some of
    its storage is far away. OptionError where too many are asked for."""
    if asked is not None:
        if not 1 <= asked <= MOST:
            raise OptionError(f"{asked} requests cannot be under way at once", hint=f"ask for 1 to {MOST}")
        return asked
    return FAR if is_far(top) else 1


def is_far(top: Node) -> bool:
    """Whether some storage below `top` is far away."""
    return (isinstance(top, StorageNode) and top.far) or any(is_far(child.node) for child in top.children.values())

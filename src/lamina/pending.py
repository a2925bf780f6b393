"""Started requests, which a caller waits for later: the results of `Node.start_read`, `start_write`, `start_zero`.

The node carries out a started request once, whether or not the caller waits for it. Until `wait` has returned or raised,
the request owns its buffer: no thread may read the buffer of a read, or change the buffer of a write. It also holds its
range lock (an exclusive request of an overlapping range waits for it) and counts as a request inside the graph (an edit and
`close` wait for it). A thread that waits for one of these finishes the request first. So a thread with started requests may
make any other call, and does not wait for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .errors import LaminaError
from .status import Status, rows_of

if TYPE_CHECKING:
    from .extents import Extents


class Pending(Protocol):
    """A started request. Thread-safe; each method may be called again, and the outcome stays the same."""

    def wait(self) -> Any:
        """Wait until the request is finished, and return its result: None for a read or a change. Raises its LaminaError."""

    def leave(self) -> None:
        """Abandon the request. When this returns, the buffer belongs to the caller again. A change may have been carried out,
        or may still be carried out."""


class Done:
    """A request that finished when it was started."""

    __slots__ = ("_answer",)

    def __init__(self, answer: Any = None) -> None:
        self._answer = answer

    def wait(self) -> Any:
        """The answer."""
        return self._answer

    def leave(self) -> None:
        """Nothing is left to do."""


#: A finished read or change.
DONE = Done()

#: Operations of a node, and the methods that start them.
_STARTED_BY = {
    "read_into": ("start_read",),
    "write": ("start_write",),
    "zero": ("start_zero",),
    "extents": ("first_extents", "zero_runs", "start_zero_runs"),
    "zero_runs": ("start_zero_runs",),
}


class Startable:
    """The part of a node (`node.py`) that starts requests.

    A class that overrides an operation, such as `read_into`, but not the method that starts it gets the default of that
    method back, whatever its base classes are: all reads of a filter that observes or changes reads pass its
    `read_into`, until the filter overrides `start_read` as well. (An inherited `start_read` would bypass its
    `read_into`.)"""

    #: The class whose `start_...` methods call the operations of the same object: the defaults of subclasses.
    starts_as: ClassVar[type[Startable]]

    if TYPE_CHECKING:

        def read_into(self, offset: int, view: memoryview) -> None: ...
        def write(self, offset: int, view: memoryview, flags: int = 0) -> None: ...
        def zero(self, offset: int, length: int, flags: int = 0) -> None: ...
        def extents(self, offset: int, length: int) -> Extents: ...

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own, defaults = vars(cls), vars(cls.starts_as)
        for operation, starts in _STARTED_BY.items():
            for start in starts:
                if operation in own and start not in own:
                    setattr(cls, start, defaults.get(start, vars(Startable)[start]))

    def start_read(self, offset: int, view: memoryview) -> Pending:
        """Begin what `read_into` does, and return the request. A node that cannot go on by itself does it at once, as here;
        an error is raised either here or by `Pending.wait`."""
        self.read_into(offset, view)
        return DONE

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        """Begin what `write` does."""
        self.write(offset, view, flags)
        return DONE

    def start_zero(self, offset: int, length: int, flags: int = 0) -> Pending:
        """Begin what `zero` does. NotSupported is raised here, not by `Pending.wait`."""
        self.zero(offset, length, flags)
        return DONE

    def first_extents(self, offset: int, length: int, most: int) -> list[Status]:
        """The first rows of what `extents` answers, without columns: at least one, at most `most`, from `offset` on. A row
        may be shorter than there, and neighbours may be equal: both say the same about each byte.

        It is the path of small questions, such as those of an NBD client that asks for one extent at a time: a node that can
        answer in plain Python overrides it beside `extents`. A class that overrides `extents` alone has this one."""
        return rows_of(self.extents(offset, length), most)

    def zero_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """(length, whether it is known to read as zero) of runs of bytes from `offset` on: what `extents` says of zeros, told
        without arrays. Like that answer it may end before the request does, but not before its first byte."""
        found = self.extents(offset, length)
        return list(zip(found.length.tolist(), found.zero.tolist(), strict=True))

    def start_zero_runs(self, offset: int, length: int) -> Pending:
        """Begin what `zero_runs` does; `Pending.wait` returns the answer."""
        return Done(self.zero_runs(offset, length))


Startable.starts_as = Startable


def start_holding(
    enter: Callable[[Holding], bool],
    leave: Callable[[Holding], object],
    start: Callable[..., Pending],
    *arguments: Any,
) -> Pending | None:
    """start(*arguments), which holds something until it is finished: `enter` takes that, `leave` gives it back and may be
    called again. None where `enter` returns False: then nothing is started."""
    holding = Holding(leave)
    try:
        try:
            if not enter(holding):
                return None
            request = start(*arguments)
            if isinstance(request, Done):
                return request
            holding.request = request
            return holding
        finally:
            if holding.request is None:
                leave(holding)
    finally:
        if holding.request is None:  # an interrupt may have struck the first time
            leave(holding)


class Holding:
    """A request that holds something until it is finished: a range of bytes together with others (`RangeLock.start`), or its
    place inside a gate (`Gate.enter`). `request` is what the node returned, and None until then."""

    __slots__ = ("_leave", "request")

    def __init__(self, leave: Callable[[Holding], object]) -> None:
        self._leave = leave
        self.request: Pending | None = None

    def wait(self) -> Any:
        # Where an interrupt strikes nothing is given back: whoever needs it waits for the request in its turn.
        assert self.request is not None
        try:
            answer = self.request.wait()
        except LaminaError:
            self._leave(self)
            raise
        self._leave(self)
        return answer

    def leave(self) -> None:
        assert self.request is not None
        self.request.leave()
        self._leave(self)

    def settle(self) -> bool:
        """Finish the request for a thread that needs what it holds; its outcome stays for whoever started it. False where it
        is just being started, and cannot be finished yet."""
        if self.request is None:
            return False
        with suppress(LaminaError):
            self.wait()
        return True

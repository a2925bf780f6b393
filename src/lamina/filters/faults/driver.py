"""The node of `faults`, which injects the faults of its rules into operations.

Random choices are made when an operation arrives, in the order of arrival, so the same seed and the same order of operations
give the same faults.
"""

from __future__ import annotations

import errno as _errno
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ... import clock as system_clock
from ...errors import BlockIOError, NotSupported, OptionError
from ...limits import MAX_SIZE, MIB
from ...node import MAY_UNMAP, FilterNode
from ...schema import Option, Schema
from .rule import APPLIES, RULE, SECTOR, ByteSet, Injected, Rule

if TYPE_CHECKING:
    from ...extents import Extents
    from ...request import Child


class Clock(Protocol):
    """The interface of a clock: the module `clock`, or a replacement in a test."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


class _Plan:
    """The faults to inject into one operation."""

    def __init__(self) -> None:
        self.wait = 0.0
        self.tags: list[str] = []
        self.error: tuple[int, int] | None = None  # errno, rule
        self.lost = False
        self.sectors: list[bool] | None = None  # of a torn write: whether each sector is stored
        self.bits: list[int] = []
        self.shift = 0


class Faults(FilterNode):
    """Injects the faults of `rules` into the operations on `image`. All rules that match an operation apply, in their order.
    Of several errors the first is raised: after all delays, and before the operation starts (except for `torn`).

    `space`: the number of bytes that may be allocated before ENOSPC; discards and truncates free space. `undo`: the node
    records changes until a flush reaches the storage, so that `crash` can revert them; a rule with `ack-only` enables it.
    Changes then run one at a time. `clock`: the clock for windows and delays; windows begin with the first operation.
    Thread-safe; faults are assigned in the order of arrival.
    """

    driver: ClassVar[str] = "faults"
    schema: ClassVar[Schema] = Schema(
        "faults",
        [
            Option("image", "node", "the child node", required=True),
            Option("seed", "int", "the seed of random choices; each rule has its own random generator", default=0),
            Option("rules", "list", "the rules", items=RULE),
            Option(
                "space",
                "size",
                "bytes that may be allocated before ENOSPC; discards and zeroes with unmap free space (default: no limit)",
            ),
            Option("undo", "bool", "record unflushed changes, so that `crash` can revert them", default=False),
        ],
    )

    def __init__(
        self,
        image: Child,
        *,
        seed: int = 0,
        rules: Iterable[Mapping[str, Any]] = (),
        space: int | None = None,
        undo: bool = False,
        clock: Clock | None = None,
        name: str | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__(image, name=name, read_only=read_only)
        self.clock: Clock = clock or system_clock
        self.seed = seed
        self.rules: list[Rule] = [Rule(number, options, seed) for number, options in enumerate(rules)]
        #: The remaining bytes that may be allocated; None: no limit.
        self.space = space
        #: The injected faults, in order. `operations` counts all operations.
        self.history: list[Injected] = []
        self.operations: int = 0
        self._started: float | None = None  # the time of the first operation
        self._mutex = threading.Lock()  # for rules, history and space
        self._changing = threading.RLock()  # held by each change if changes are recorded
        self._holes = ByteSet()  # bytes inside the storage that are not allocated
        self._end = 0  # the end of all allocated bytes, including writes in progress
        self._undo: list[tuple[int, bytes | int]] | None = None
        if undo or any("ack-only" in rule.actions for rule in self.rules):
            self._undo = []
            self.supported_flags = 0  # the request path emulates FUA by a flush, to which rules apply
        self._hung: dict[str, list[threading.Event]] = {}
        self._arrived = threading.Condition(self._mutex)

    # -- methods for tests

    def add(self, **options: Any) -> None:
        """Add a rule after the existing ones. Raises OptionError for `ack-only` if the node does not record changes."""
        rule = Rule(len(self.rules), {key.replace("_", "-"): value for key, value in options.items()}, self.seed)
        if "ack-only" in rule.actions and self._undo is None:
            raise OptionError("ack-only needs a node that records changes", hint="open it with undo=on")
        with self._mutex:
            self.rules = [*self.rules, rule]

    def clear(self) -> None:
        """Remove all rules and the limit of space. Operations that hang still need `release`."""
        with self._mutex:
            self.rules, self.space = [], None

    def release(self, tag: str) -> int:
        """Resume all operations that hang with `tag`. Returns their number."""
        with self._mutex:
            waiting = self._hung.pop(tag, [])
        for event in waiting:
            event.set()
        return len(waiting)

    def wait_hung(self, tag: str, timeout: float = 10.0) -> bool:
        """Wait until an operation hangs with `tag`. Returns False after `timeout` seconds of real time."""
        with self._arrived:
            return self._arrived.wait_for(lambda: tag in self._hung, timeout)

    def crash(self) -> int:
        """Simulate a power cut: revert all changes that were not flushed. Returns their number. The nodes above have stale
        state afterwards and must be dropped, not closed."""
        if self._undo is None:
            raise NotSupported("changes are not recorded", node=self.name, hint="open it with undo=on")
        with self._changing:
            count = len(self._undo)
            while self._undo:
                offset, old = self._undo[-1]
                if isinstance(old, bytes):
                    self.image.write(offset, memoryview(old))
                elif offset < 0:
                    self.image.truncate(old)
                else:
                    self.image.zero(offset, old)
                self._undo.pop()
            self.image.flush()
        return count

    # -- operations

    def read_into(self, offset: int, view: memoryview) -> None:
        plan = self._begin("read", offset, len(view))
        if plan is None:
            self.image.read_into(offset, view)
            return
        self.image.read_into(offset + plan.shift, view)
        _flip(view, plan.bits)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        plan = self._begin("write", offset, len(view))
        if plan is not None and plan.lost:
            return
        with self._change():
            self._allocate(offset, offset + len(view), "write")
            if plan is None:
                self._put(offset, view, flags)
                return
            if plan.bits:
                view = memoryview(bytearray(view))
                _flip(view, plan.bits)
            for low, high in _pieces(offset, len(view), plan.sectors):
                self._put(offset + plan.shift + low, view[low:high], flags)
        if plan.error:
            raise self._error(*plan.error, "write", offset, len(view))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        plan = self._begin("zero", offset, length)
        if plan is not None and plan.lost:
            return
        with self._change():
            size = max(self.size, self._end)
            if not flags & MAY_UNMAP:
                self._allocate(offset, offset + length, "zero")
            self._record(offset, length)
            self.image.zero(offset, length, flags)
            if flags & MAY_UNMAP:
                self._free(offset, min(offset + length, size))
                self._lengthen(size, offset + length)
            self._heal(offset, length)

    def discard(self, offset: int, length: int) -> None:
        plan = self._begin("discard", offset, length)
        if plan is not None and plan.lost:
            return
        with self._change():
            self._record(offset, length)
            self.image.discard(offset, length)
            self._free(offset, offset + length)

    def truncate(self, size: int) -> None:
        plan = self._begin("truncate", size, 0)
        if plan is not None and plan.lost:
            return
        with self._change():
            old = self.size
            if size < old:
                self._record(size, old - size)
                self._free(size, old)
            if self._undo is not None:
                self._undo.append((-1, old))
            self.image.truncate(size)
            with self._mutex:
                self._end = size
                if size > old:
                    self._holes.add(old, size)  # a truncate allocates nothing
                else:
                    self._holes.remove(size, MAX_SIZE)

    def flush(self) -> None:
        plan = self._begin("flush", 0, 0)
        if plan is not None and plan.lost:
            return
        with self._change():
            self.image.flush()
            if self._undo is not None:
                self._undo.clear()

    def extents(self, offset: int, length: int) -> Extents:
        self._begin("extents", offset, length)
        return self.image.extents(offset, length)

    # -- implementation

    def _begin(self, kind: str, offset: int, length: int) -> _Plan | None:
        """Apply the rules to an operation: wait for its delays, and raise its error, except that of a torn write, which the
        caller raises after the write. Returns the other faults, or None."""
        with self._mutex:
            self.operations += 1
            if not self.rules:
                return None
            now = self.clock.monotonic()
            self._started = now if self._started is None else self._started
            plan = None
            for rule in self.rules:
                if rule.matches(kind, offset, length, now - self._started):
                    plan = plan or _Plan()
                    self._apply(plan, rule, kind, offset, length)
        if plan is None:
            return None
        if plan.wait:
            self.clock.sleep(plan.wait)
        for tag in plan.tags:
            event = threading.Event()
            with self._arrived:
                self._hung.setdefault(tag, []).append(event)
                self._arrived.notify_all()
            event.wait()
        if plan.error and plan.sectors is None:
            raise self._error(*plan.error, kind, offset, length)
        return plan

    def _apply(self, plan: _Plan, rule: Rule, kind: str, offset: int, length: int) -> None:
        """Add the faults of `rule` to the plan. All random choices are made here."""
        for action, value in rule.actions.items():
            if kind not in APPLIES[action]:
                continue
            if action == "error":
                plan.error = plan.error or (value, rule.number)
            elif action == "latency":
                plan.wait += value / 1000
            elif action == "jitter":
                plan.wait += rule.rng.randint(0, value) / 1000
            elif action == "hang":
                plan.tags.append(value)
            elif action == "torn":
                plan.sectors = _torn(rule, value, offset, length)
            elif action == "flip":
                plan.bits += [rule.rng.randrange(8 * length) for _ in range(value)]
            elif action == "misdirect":
                shift = value * SECTOR
                if offset + shift < 0 or offset + shift + length > self.size:
                    continue  # the target is outside the disk
                plan.shift = shift
            else:
                plan.lost = True
            self.history.append(Injected(self.operations, kind, offset, length, rule.number, action))

    def _error(self, number: int, rule: int, kind: str, offset: int, length: int) -> BlockIOError:
        found = NotSupported if number in (_errno.ENOTSUP, _errno.EOPNOTSUPP) else BlockIOError
        return found(
            f"rule {rule} of {self.name} injects {_errno.errorcode.get(number, number)}",
            errno=number,
            path=self.filename,
            operation=kind,
            offset=offset,
            length=length,
        )

    @contextmanager
    def _change(self) -> Iterator[None]:
        if self._undo is None:
            yield
            return
        with self._changing:
            yield

    def _put(self, offset: int, view: memoryview, flags: int) -> None:
        self._record(offset, len(view))
        self.image.write(offset, view, flags)
        self._heal(offset, len(view))

    def _heal(self, offset: int, length: int) -> None:
        with self._mutex:
            for rule in self.rules:
                if rule.heals and rule.bad is not None:
                    rule.bad.remove(offset, offset + length)

    def _record(self, offset: int, length: int) -> None:
        """Record the current content of a range, so that `crash` can restore it."""
        if self._undo is None:
            return
        size = self.size
        for at in range(offset, min(offset + length, size), MIB):
            part = min(MIB, offset + length - at, size - at)
            if self.image.reads_zero(at, part):
                self._undo.append((at, part))
            else:
                old = bytearray(part)
                self.image.read_into(at, memoryview(old))
                self._undo.append((at, bytes(old)))
        if offset + length > size:
            self._undo.append((-1, size))

    def _allocate(self, start: int, end: int, kind: str) -> None:
        """Allocate the bytes of a range. Raises BlockIOError (ENOSPC) if they exceed the remaining space."""
        with self._mutex:
            if self.space is None:
                return
            size = max(self.size, self._end)
            needed = self._holes.within(start, end) + max(end - max(start, size), 0)
            if needed > self.space:
                self.history.append(Injected(self.operations, kind, start, end - start, -1, "space"))
                raise BlockIOError(
                    f"{self.name} has {self.space} bytes of free space, and {needed} are needed",
                    errno=_errno.ENOSPC,
                    path=self.filename,
                    operation=kind,
                    offset=start,
                    length=end - start,
                )
            self._holes.remove(start, end)
            if start > size:
                self._holes.add(size, start)
            self._end = max(size, end)
            self.space -= needed

    def _free(self, start: int, end: int) -> None:
        with self._mutex:
            if self.space is not None and start < end:
                self.space += self._holes.add(start, end)

    def _lengthen(self, size: int, end: int) -> None:
        """Record that the disk grew from `size` to `end` bytes: the new part is a hole, which uses no space."""
        with self._mutex:
            if self.space is not None and end > size:
                self._holes.add(size, end)
                self._end = max(self._end, end)


def _pieces(offset: int, length: int, stored: list[bool] | None) -> Iterator[tuple[int, int]]:
    """The parts (start, end) of a request that are stored. A sector of the node is never stored partially."""
    if stored is None:
        yield 0, length
        return
    first = offset // SECTOR
    for number, there in enumerate(stored):
        if there:
            yield max((first + number) * SECTOR - offset, 0), min((first + number + 1) * SECTOR - offset, length)


def _flip(view: memoryview, bits: list[int]) -> None:
    for bit in bits:
        view[bit >> 3] ^= 1 << (bit & 7)


def _torn(rule: Rule, how: str, offset: int, length: int) -> list[bool]:
    """Whether each sector of a torn write is stored. At least one is not."""
    count = -(-(offset + length) // SECTOR) - offset // SECTOR
    if how == "prefix":
        kept = rule.rng.randrange(count) if rule.keep is None else min(rule.keep, count - 1)
        return [number < kept for number in range(count)]
    stored = [rule.rng.random() < 0.5 for _ in range(count)]
    stored[rule.rng.randrange(count)] = False
    return stored

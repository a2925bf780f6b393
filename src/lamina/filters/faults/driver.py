"""The node of `faults`: what its rules say happens to the operations that pass.

What is random is decided when an operation arrives, in the order of arrival; so the same seed and the same order of
operations give the same faults.
"""

from __future__ import annotations

import errno as _errno
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ...errors import BlockIOError, NotSupported, OptionError
from ...limits import MAX_SIZE, MIB
from ...node import MAY_UNMAP, FilterNode
from ...schema import Option, Schema
from .rule import APPLIES, RULE, SECTOR, Injected, Rule, Spans

if TYPE_CHECKING:
    from ...extents import Extents
    from ...request import Child


class Clock(Protocol):
    """What time is: the module `time`, or a clock that a test moves."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


class _Fate:
    """What is to happen to one operation."""

    def __init__(self) -> None:
        self.wait = 0.0
        self.tags: list[str] = []
        self.error: tuple[int, int] | None = None  # errno, rule
        self.lost = False
        self.sectors: list[bool] | None = None  # torn: which are stored
        self.bits: list[int] = []
        self.shift = 0


class Faults(FilterNode):
    """Does to the operations on `image` what `rules` say; without any, nothing. Rules are asked in their order, and all that
    take an operation act; of several errors the first is raised, after waits, before anything is done (but see `torn`).

    `space`: so many bytes may be added to the storage before ENOSPC; what is discarded or cut off is given back. `undo`:
    changes are remembered until a flush reaches the storage, so that `crash` can take them back; a rule with `ack-only`
    turns it on. Then changes run one at a time. `clock` is what windows and delays go by; windows begin with the first
    operation. Any operation from any number of threads; faults are dealt out in the order of arrival.
    """

    driver: ClassVar[str] = "faults"
    schema: ClassVar[Schema] = Schema(
        "faults",
        [
            Option("image", "node", "the node below", required=True),
            Option("seed", "int", "what random choices are drawn from", default=0),
            Option("rules", "list", "what happens when", items=RULE),
            Option("space", "size", "bytes that may be added before there is no space; no bound if not given"),
            Option("undo", "bool", "remember what was not flushed, for `crash`", default=False),
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
        self.clock: Clock = clock or time
        self.seed = seed
        self.rules = [Rule(number, options, seed) for number, options in enumerate(rules)]
        #: Bytes that may still be added; None: no bound.
        self.space = space
        #: What was injected, in order. `operations` counts all operations.
        self.history: list[Injected] = []
        self.operations = 0
        self._born: float | None = None
        self._mutex = threading.Lock()  # around rules, history and space
        self._changing = threading.RLock()  # one change at a time, where they may have to be taken back
        self._holes = Spans()  # bytes inside the storage that take up no space
        self._end = 0  # no byte before it is added any more, though it may be on its way
        self._undo: list[tuple[int, bytes | int]] | None = None
        if undo or any("ack-only" in rule.actions for rule in self.rules):
            self._undo = []
            self.supported_flags = 0  # the edge above asks for a flush instead, and that may lie
        self._hung: dict[str, list[threading.Event]] = {}
        self._arrived = threading.Condition(self._mutex)

    # -- what a test does

    def add(self, **options: Any) -> None:
        """Another rule, after those that are there. It cannot bring `ack-only` if changes are not remembered."""
        rule = Rule(len(self.rules), {key.replace("_", "-"): value for key, value in options.items()}, self.seed)
        if "ack-only" in rule.actions and self._undo is None:
            raise OptionError("a flush can lie only where changes are remembered", hint="open it with undo=on")
        with self._mutex:
            self.rules = [*self.rules, rule]

    def clear(self) -> None:
        """No rule, and no bound of space: the storage is whole again. What hangs stays hung until `release`."""
        with self._mutex:
            self.rules, self.space = [], None

    def release(self, tag: str) -> int:
        """Let all operations go on that hang with `tag`; how many there were."""
        with self._mutex:
            waiting = self._hung.pop(tag, [])
        for event in waiting:
            event.set()
        return len(waiting)

    def wait_hung(self, tag: str, timeout: float = 10.0) -> bool:
        """Wait until an operation hangs with `tag`; False if none came within `timeout` seconds of real time."""
        with self._arrived:
            return self._arrived.wait_for(lambda: tag in self._hung, timeout)

    def crash(self) -> int:
        """The power fails: everything that was not really flushed is taken back. Returns how many changes that were. What
        lies above holds state that is now wrong, and must be dropped, not closed."""
        if self._undo is None:
            raise NotSupported("what was changed is not remembered", node=self.name, hint="open it with undo=on")
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
        fate = self._fate("read", offset, len(view))
        if fate is None:
            self.image.read_into(offset, view)
            return
        self.image.read_into(offset + fate.shift, view)
        _flip(view, fate.bits)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        fate = self._fate("write", offset, len(view))
        if fate is not None and fate.lost:
            return
        with self._change():
            self._take(offset, offset + len(view), "write")
            if fate is None:
                self._put(offset, view, flags)
                return
            if fate.bits:
                view = memoryview(bytearray(view))
                _flip(view, fate.bits)
            for low, high in _pieces(offset, len(view), fate.sectors):
                self._put(offset + fate.shift + low, view[low:high], flags)
        if fate.error:
            raise self._error(*fate.error, "write", offset, len(view))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        fate = self._fate("zero", offset, length)
        if fate is not None and fate.lost:
            return
        with self._change():
            if not flags & MAY_UNMAP:
                self._take(offset, offset + length, "zero")
            self._remember(offset, length)
            self.image.zero(offset, length, flags)
            if flags & MAY_UNMAP:
                self._give_back(offset, offset + length)
            self._heal(offset, length)

    def discard(self, offset: int, length: int) -> None:
        fate = self._fate("discard", offset, length)
        if fate is not None and fate.lost:
            return
        with self._change():
            self._remember(offset, length)
            self.image.discard(offset, length)
            self._give_back(offset, offset + length)

    def truncate(self, size: int) -> None:
        fate = self._fate("truncate", size, 0)
        if fate is not None and fate.lost:
            return
        with self._change():
            old = self.size
            if size < old:
                self._remember(size, old - size)
                self._give_back(size, old)
            if self._undo is not None:
                self._undo.append((-1, old))
            self.image.truncate(size)
            with self._mutex:
                self._end = size
                if size > old:
                    self._holes.add(old, size)  # length alone takes up no space
                else:
                    self._holes.remove(size, MAX_SIZE)

    def flush(self) -> None:
        fate = self._fate("flush", 0, 0)
        if fate is not None and fate.lost:
            return
        with self._change():
            self.image.flush()
            if self._undo is not None:
                self._undo.clear()

    def extents(self, offset: int, length: int) -> Extents:
        self._fate("extents", offset, length)
        return self.image.extents(offset, length)

    # -- inside

    def _fate(self, kind: str, offset: int, length: int) -> _Fate | None:
        """What happens to this operation, None: nothing. It has waited for what it must wait for, and an error is raised,
        except that of a torn write, which comes after the write."""
        with self._mutex:
            self.operations += 1
            if not self.rules:
                return None
            now = self.clock.monotonic()
            self._born = now if self._born is None else self._born
            fate = None
            for rule in self.rules:
                if rule.takes(kind, offset, length, now - self._born):
                    fate = fate or _Fate()
                    self._plan(fate, rule, kind, offset, length)
        if fate is None:
            return None
        if fate.wait:
            self.clock.sleep(fate.wait)
        for tag in fate.tags:
            event = threading.Event()
            with self._arrived:
                self._hung.setdefault(tag, []).append(event)
                self._arrived.notify_all()
            event.wait()
        if fate.error and fate.sectors is None:
            raise self._error(*fate.error, kind, offset, length)
        return fate

    def _plan(self, fate: _Fate, rule: Rule, kind: str, offset: int, length: int) -> None:
        """Add what `rule` does; all that is random is drawn here."""
        for action, value in rule.actions.items():
            if kind not in APPLIES[action]:
                continue
            if action == "error":
                fate.error = fate.error or (value, rule.number)
            elif action == "latency":
                fate.wait += value / 1000
            elif action == "jitter":
                fate.wait += rule.rng.randint(0, value) / 1000
            elif action == "hang":
                fate.tags.append(value)
            elif action == "torn":
                fate.sectors = _torn(rule, value, offset, length)
            elif action == "flip":
                fate.bits += [rule.rng.randrange(8 * length) for _ in range(value)]
            elif action == "misdirect":
                shift = value * SECTOR
                if offset + shift < 0 or offset + shift + length > self.size:
                    continue  # there is no such place
                fate.shift = shift
            else:
                fate.lost = True
            self.history.append(Injected(self.operations, kind, offset, length, rule.number, action))

    def _error(self, number: int, rule: int, kind: str, offset: int, length: int) -> BlockIOError:
        found = NotSupported if number in (_errno.ENOTSUP, _errno.EOPNOTSUPP) else BlockIOError
        return found(
            f"rule {rule} of {self.name} has it fail with {_errno.errorcode.get(number, number)}",
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
        self._remember(offset, len(view))
        self.image.write(offset, view, flags)
        self._heal(offset, len(view))

    def _heal(self, offset: int, length: int) -> None:
        with self._mutex:
            for rule in self.rules:
                if rule.heals and rule.bad is not None:
                    rule.bad.remove(offset, offset + length)

    def _remember(self, offset: int, length: int) -> None:
        """What these bytes are now, so that `crash` can bring them back."""
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

    def _take(self, start: int, end: int, kind: str) -> None:
        """These bytes take up space from now on; ENOSPC if there is not so much left."""
        with self._mutex:
            if self.space is None:
                return
            size = max(self.size, self._end)
            needed = self._holes.within(start, end) + max(end - max(start, size), 0)
            if needed > self.space:
                self.history.append(Injected(self.operations, kind, start, end - start, -1, "space"))
                raise BlockIOError(
                    f"{self.name} has space for {self.space} bytes more, and {needed} are needed",
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

    def _give_back(self, start: int, end: int) -> None:
        with self._mutex:
            if self.space is not None:
                self.space += self._holes.add(start, end)


def _pieces(offset: int, length: int, stored: list[bool] | None) -> Iterator[tuple[int, int]]:
    """The parts (start, end) of a request that are stored; a sector of the node is stored whole or not at all."""
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
    """Which sectors of a write are stored; never all of them."""
    count = -(-(offset + length) // SECTOR) - offset // SECTOR
    if how == "prefix":
        kept = rule.rng.randrange(count) if rule.keep is None else min(rule.keep, count - 1)
        return [number < kept for number in range(count)]
    stored = [rule.rng.random() < 0.5 for _ in range(count)]
    stored[rule.rng.randrange(count)] = False
    return stored

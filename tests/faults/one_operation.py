"""Each request of one operation on a qcow2 image fails, and the image goes on being used: for the tests of amend, bitmaps and
snapshots.

An operation changes what users see of the image, its *state* (options, bitmaps, snapshots), from one value to another; the
bytes of the disk are those of a `Session`. For each request of the operation, each `Fault` and each of two continuations
`fail_each` asserts:

- the operation raises an error whose cause is that of the storage, or can do without the request, and a warning says so;
- the open image has the state of before or that of after, also after further failures. Where it has that of after, the
  operation is one of those that say so (`Operation.late`);
- wherever the process were killed, the check finds no corruption, no flushed byte is lost, and the file has a state that
  `Kind.require_killed` accepts;
- the image goes on being written, flushed and closed, and so does the file, which has the state of the open image then; or it
  is closed while the fault lasts, and has one of the two states when it is opened again;
- the next try of an operation that did not happen succeeds.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from lamina import LaminaError
from lamina.bitmap import DirtyBitmap
from lamina.formats.qcow2 import bitmap_directory
from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.qcow2.header import Header
from lamina.graph import Opener
from lamina.image import Image
from lamina.limits import DEFAULT_BUDGET, Budget
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.failing import FailingStorage, Opening, Session, no_corruption
from lamina.testing.noticed import comes_from, warned_errors
from tests import evidence

KIB = 1024
#: What is written after each failure, and what before the operation, without a flush.
LATER, WAITING = 5 * KIB, 9 * KIB


class Geometry(NamedTuple):
    """How images are made."""

    name: str
    options: dict[str, Any]
    size: int
    backing: int = 0
    cache: int = DEFAULT_BUDGET.cache_bytes

    @property
    def below(self) -> bytes:
        return random.Random(self.backing).randbytes(self.backing)


SMALL = Geometry("512 bytes, 16 bits", {"cluster_size": 512, "refcount_bits": 16}, 40 * KIB)
WIDE = Geometry("512 bytes, 64 bits, no cache", {"cluster_size": 512, "refcount_bits": 64}, 40 * KIB, cache=2 * KIB)
BACKED = Geometry("4096 over a file", {"cluster_size": 4096}, 64 * KIB, 50 * KIB + 77)
SUBCLUSTERS = Geometry("16384, subclusters", {"cluster_size": 16384, "extended_l2": True}, 96 * KIB)
GEOMETRIES = [SMALL, WIDE, BACKED, SUBCLUSTERS]


class Fault(NamedTuple):
    """How a request fails. `whole`: a write that fails has stored everything, and not its first half or nothing."""

    errno: int
    lasting: bool
    whole: bool = False


FAULTS = [
    Fault(errno.EIO, False),
    Fault(errno.EIO, False, whole=True),
    Fault(errno.EIO, True),
    Fault(errno.ENOSPC, False),
    Fault(errno.ENOSPC, True),
]


class Storage(FailingStorage):
    """Memory that fails as `Fault` says, and can be opened again for reading alone."""

    whole = False

    def __init__(self, content: bytes = b"") -> None:
        super().__init__(content)
        #: The requests since `fail`.
        self.kinds: list[str] = []

    def _count(self, kind: str, offset: int, length: int) -> None:
        self.kinds.append(kind)
        super()._count(kind, offset, length)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        try:
            super().write(offset, view, flags)
        except LaminaError:
            if self.whole:
                self._put(offset, bytes(view))
            raise

    def reopen(self, read_only: bool) -> None:
        self.read_only = read_only

    def close(self) -> None:
        super().close()
        self.read_only = False

    def fail(self, fault: Fault, nth: int) -> None:
        self.whole, self.kinds = fault.whole, []
        self.arm(nth, fault.errno, sticky=fault.lasting)


class Qcow2Session(Session):
    """A session with the operations that change the size of the disk in other ways."""

    def close(self) -> None:
        super().close()
        self.edge = Child(self.storage, "file", grows=True)  # whatever the image reopened it for

    def amend(self, size: int | None = None, **options: Any) -> None:
        if size is not None:
            options["size"] = size
        self._change(f"amend {options}", lambda disk: _resized(disk, size), "amend", **options)

    def apply_snapshot(self, id: str, disk: bytes) -> None:
        self._change(f"apply {id}", lambda _: disk, "apply_snapshot", id)

    def do(self, method: str, *arguments: Any, **options: Any) -> Any:
        """image.method(...), which changes no byte of the disk."""
        self.trace.append(f"{method} {str(arguments)[:60]} {options}")
        return getattr(self.image, method)(*arguments, **options)


class Kind(NamedTuple):
    """A kind of state. `of`: that of an open image, whose storage works. `require_killed(image, states, disk)`: the file of
    an image that was not closed, and had one of these states in the end, says nothing wrong; else AssertionError. `disk`: how
    it read when the bitmaps began to record. `mend` makes an image that was opened again after a failure ready for the
    next try."""

    of: Callable[[Image], Any]
    require_killed: Callable[[Image, list[Any], bytes], None]
    mend: Callable[[Qcow2Session], None] = lambda session: None


class Operation(NamedTuple):
    """One operation. `work` does it, and can do it again; `expected` is the state after it, and `between` are those of one
    that has several steps. `setup` makes the content of the file, and `ready` is what the open image does before the faults
    begin. `late`: how the names of the requests begin whose failure the operation tells though it is done. `quiet`: the
    errors that it need not tell once it is done."""

    name: str
    work: Callable[[Qcow2Session], None]
    expected: Callable[[Any], Any]
    setup: Callable[[Qcow2Session], None]
    ready: Callable[[Qcow2Session], None]
    late: tuple[str, ...] = ()
    between: Callable[[Any], list[Any]] = lambda before: []
    quiet: tuple[int, ...] = ()


def _resized(disk: bytes, size: int | None) -> bytes:
    return disk if size is None else disk[:size] + bytes(max(size - len(disk), 0))


def opening(geometry: Geometry, **more: str) -> Opening:
    def make(edge: Child, read_only: bool) -> Image:
        options: dict[str, Any] = {"file": edge, **more}
        named = isinstance(edge.node, FailingStorage) and any(edge.node.content[8:16])
        if geometry.backing or named:  # a name that an operation stored is not looked for
            below = MemoryStorage()
            if geometry.backing:
                below.write(0, memoryview(geometry.below))
            below.read_only = True
            options["backing"] = Child(below, "backing")
        opener = Opener(read_only=read_only, budget=Budget(cache_bytes=geometry.cache))
        return Image(Qcow2.open(Qcow2.schema.parse(options), opener))

    return make


def starts_as(geometry: Geometry, content: bytes) -> bytes:
    with opening(geometry)(Child(FailingStorage(content), "file", grows=True), True) as image:
        return image.read(0, image.size)


def data(length: int, value: int) -> bytes:
    return bytes((value + at * 7) % 255 + 1 for at in range(min(length, 251))).ljust(length, bytes([value]))


def filled(session: Qcow2Session) -> None:
    """Some data, some zeros, some holes."""
    session.write(0, data(4 * KIB, 3))
    session.write(session.image.size - 3 * KIB, data(3 * KIB, 7))
    session.zero(KIB, KIB)
    session.flush()


def waiting(session: Qcow2Session) -> None:
    """Changes that no flush has seen."""
    session.write(WAITING, data(700, 11))
    session.discard(2 * KIB, KIB)


def fail_each(geometry: Geometry, kind: Kind, operation: Operation) -> int:
    """Assert the rules in the docstring of the module; the number of points (request, fault)."""
    trials, points = Trials(geometry, kind, operation), 0
    for nth, request in enumerate(trials.requests, 1):
        for fault in FAULTS:
            if request == "write" or not fault.whole:
                for way in (trials.goes_on, trials.closes):
                    trials.run(fault, nth, way)
                points += 1
    evidence.count("points (operation, request that fails, fault)", points)
    return points


class Trials:
    """All points of one operation on one image."""

    def __init__(self, geometry: Geometry, kind: Kind, operation: Operation) -> None:
        self.make, self.kind, self.operation = opening(geometry), kind, operation
        storage = Storage()
        values = Qcow2.create_schema.parse({**geometry.options, "size": geometry.size})
        Qcow2.create(Child(storage, "file", grows=True), geometry.size, values)
        session = Qcow2Session(self.make, storage, starts_as(geometry, bytes(storage.content)))
        operation.setup(session)
        session.close()
        self.content = bytes(storage.content)
        self.stored = starts_as(geometry, self.content)
        session = self._begin()
        #: The state, and the disk, before the operation and after it.
        self.before = self._state(session)
        self.after = operation.expected(self.before)
        self.states = [self.before, *operation.between(self.before), self.after]
        self.disk = session.image.read(0, session.image.size)
        session.close()
        #: How many errors told that the operation was done, by the kind of request that failed.
        self.late: Counter[str] = Counter()
        # The disk since when all bitmaps record that do.
        self._base = self.disk
        self.requests = self._without_faults()

    def _without_faults(self) -> list[str]:
        """The requests of the operation, by their kinds."""
        session = self._begin()
        storage = session.storage
        assert isinstance(storage, Storage)
        storage.fail(FAULTS[0], 1 << 62)
        self.operation.work(session)
        requests = list(storage.kinds)
        session.storage.disarm()
        assert self._state(session) == self.after
        self._end(session)
        return requests

    def _begin(self) -> Qcow2Session:
        session = Qcow2Session(self.make, Storage(self.content), self.stored)
        self.operation.ready(session)
        return session

    def _state(self, session: Qcow2Session) -> Any:
        return self.kind.of(session.image)

    def run(self, fault: Fault, nth: int, way: Callable[[Qcow2Session, Fault], None]) -> None:
        session, self._base = self._begin(), self.disk
        storage = session.storage
        assert isinstance(storage, Storage)
        session.trace.append("-- faults begin")
        storage.fail(fault, nth)
        failed = ""
        try:
            with warned_errors() as warned:
                told = self._failure(session)
            failed = storage.what
            assert storage.failed, "the number of requests differs"
            if told is None:
                noticed = fault.errno in self.operation.quiet or any(comes_from(one, storage.failed) for one in warned)
                assert noticed, (
                    "a request failed, but the operation raised no error, and no warning names that of the request"
                )
                storage.disarm()
                assert self._state(session) == self.after
                return
            assert comes_from(told, storage.failed), f"the error of the storage is not its cause: {told!r}"
            session.trace.append(f"-- failed: {told}")
            if session.is_open:
                way(session, fault)
            elif way == self.closes:
                self._opened_again(session)
        except Exception as error:
            lines = [
                f"request {nth} of {len(self.requests)} fails with {fault} ({failed}), then {way.__name__}:",
                repr(error),
            ]
            raise AssertionError("\n  ".join(lines + session.trace[-40:])) from error

    def _failure(self, session: Qcow2Session) -> LaminaError | None:
        try:
            self.operation.work(session)
        except LaminaError as error:
            return error
        return None

    def goes_on(self, session: Qcow2Session, fault: Fault) -> None:
        """The image is used, and the operation is tried again."""
        storage = session.storage
        assert isinstance(storage, Storage)
        what = storage.what
        storage.disarm()
        self._examine(session, self.states)
        done = self._now(session, what) == self.after != self.before
        if fault.lasting:
            storage.fail(fault, 1)
            for step in (self._write, Session.flush):
                with suppress(LaminaError):
                    step(session)
            storage.disarm()
            self._examine(session, [*self.states, self._state(session)])
        session.verify()
        self._write(session)
        session.flush()
        now = self._state(session)
        self._examine(session, [now])
        if not done:
            self._again(session)
        self._end(session)

    def closes(self, session: Qcow2Session, fault: Fault) -> None:
        """The image is closed; a lasting fault lasts until then."""
        storage = session.storage
        if fault.lasting:
            with suppress(LaminaError):
                session.close()
            self._opened_again(session)
        else:
            what = storage.what
            storage.disarm()
            now = self._now(session, what)
            session.close()
            self._examine(session, [now])
            assert self._state(session) == now, "the state was not stored"
            session.close()

    def _opened_again(self, session: Qcow2Session) -> None:
        session.storage.disarm()
        self._examine(session, self.states)
        session.trace.append("-- opened again")
        self.kind.mend(session)
        session.verify()
        self._base = session.image.read(0, session.image.size)
        self._write(session)
        self._again(session)
        self._end(session)

    def _again(self, session: Qcow2Session) -> None:
        session.trace.append("-- second attempt")
        wanted = self.operation.expected(self._state(session))
        self._base = session.image.read(0, session.image.size)
        self.operation.work(session)
        assert self._state(session) == wanted

    def _now(self, session: Qcow2Session, what: str) -> Any:
        """The state of the open image, which is that of before or that of after."""
        session.trace.append("-- the fault is gone")
        now = self._state(session)
        assert now in self.states, f"neither before nor after, but {now}"
        if now == self.after != self.before:
            assert what.startswith(self.operation.late), f"it is done, and raises an error of {what}"
            self.late[what.partition(" at")[0]] += 1
        return now

    def _write(self, session: Qcow2Session) -> None:
        if session.image.read_only:
            session.do("reopen", read_only=False)
        session.write(LATER, data(600, 23))

    def _end(self, session: Qcow2Session) -> None:
        """Close the image; another process finds it as it was."""
        session.verify()
        session.flush()
        state = self._state(session)
        header = session.image.node.header  # type: ignore[attr-defined]
        session.close()
        found = Header.read(Child(FailingStorage(bytes(session.storage.content)), "file"))
        differ = {name for name, value in header.__dict__.items() if getattr(found, name) != value}
        assert not differ, f"these fields in memory are not those of the file: {differ}"
        self._examine(session, [state])
        assert self._state(session) == state, "the state was not stored"
        session.close()

    def _examine(self, session: Qcow2Session, states: list[Any]) -> None:
        def check(image: Image) -> None:
            no_corruption(image)
            self.kind.require_killed(image, states, self._base)

        session.examine(check)


def require_right_bitmaps(image: Image, disk: bytes) -> None:
    """Each bitmap of the file that records and that is not marked as in use knows how the disk differs from `disk`."""
    now = image.read(0, min(image.size, len(disk)))
    changed = [at for at in range(0, len(now), 512) if now[at : at + 512] != disk[at : at + 512]]
    for name, one in image.bitmaps.items():
        if one.enabled:  # type: ignore[attr-defined]
            dirty = dirty_sectors(one, image.size)
            missed = [at for at in changed if at not in dirty]
            assert not missed, f"bitmap {name} does not know of the writes to {missed}"


def dirty_sectors(one: DirtyBitmap, size: int) -> frozenset[int]:
    return frozenset(at for begin, end in one.dirty(0, size) for at in range(begin, end, 512))


def without_unusable_bitmaps(session: Qcow2Session) -> None:
    """Remove the bitmaps that were not saved after their last change."""
    node: Any = session.image.node
    for entry in bitmap_directory.read(node.file, node.header):
        if not entry.usable:
            session.do("remove_bitmap", entry.name)

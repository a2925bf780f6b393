"""Failure of the Nth request: each request of an operation to its storage fails once, and the image must survive that.

    def operation(session):
        session.write(4096, b"x" * 8192)
        session.flush()

    points = fail_nth(open_mine, operation, content=image_bytes)

For N = 1, 2, ... until the operation succeeds, the harness opens a new copy of the image over storage whose Nth request fails
(once, or from then on, with each errno), and runs the operation. It asserts for each of these points:

- the operation raises nothing but a `LaminaError`, whose cause is the error of the storage, or can do without the failed
  request, and a warning of the logger `lamina` has that error among its arguments;
- if the process were killed at that moment, the file would pass `check` (leaks are allowed) and contain every flushed byte;
  bytes written since the flush are old or new;
- after the end of the fault the open image reads correctly, and a repetition of the operation succeeds;
- if the image is closed instead, it releases its storage and every descriptor, even if closing fails.

A `Session` is the image together with a flat disk that must be equal; operations use it.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import BlockIOError, LaminaError, UnsupportedFeature
from ..extents import Extents
from ..format import Format
from ..image import Image
from ..node import StorageNode
from ..request import Child
from .noticed import comes_from, warned_errors

#: The kinds of requests that can fail.
KINDS = ("read", "write", "zero", "discard", "truncate", "flush", "extents")

#: Opens the image in this storage; with `read_only` True to verify its content.
Opening = Callable[[Child, bool], Image]

_SECTOR = 512


class FailingStorage(StorageNode):
    """Storage in memory with the content `content`, which fails one request.

    After `arm`, the Nth request (from 1) of one of `kinds` raises BlockIOError(errno); with `sticky` all later ones do, until
    `disarm`. A write that fails with EIO has stored its first half, in whole sectors, like a torn write. A discard zeroes.
    The content survives `close`. Not thread-safe.
    """

    driver = "failing"

    def __init__(self, content: bytes = b"") -> None:
        super().__init__()
        self.content: bytearray = bytearray(content)
        #: Since `arm`: the number of requests, the raised errors, and the first failed request.
        self.seen: int = 0
        self.failed: list[BlockIOError] = []
        self.what: str = ""
        #: The number of calls of `close`.
        self.closed: int = 0
        self._at: int | None = None
        self._errno = _errno.EIO
        self._sticky = False
        self._kinds: tuple[str, ...] = KINDS

    def arm(self, number: int, errno: int, *, sticky: bool = False, kinds: Iterable[str] = KINDS) -> None:
        self.seen, self.failed, self.what = 0, [], ""
        self._at, self._errno, self._sticky, self._kinds = number, errno, sticky, tuple(kinds)

    def disarm(self) -> None:
        self._at = None

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def growable(self) -> bool:
        return True

    def read_into(self, offset: int, view: memoryview) -> None:
        self._count("read", offset, len(view))
        view[:] = self.content[offset : offset + len(view)]

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        try:
            self._count("write", offset, len(view))
        except BlockIOError as error:
            if error.errno == _errno.EIO:
                self._put(offset, bytes(view[: len(view) // 2 // _SECTOR * _SECTOR]))
            raise
        self._put(offset, bytes(view))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self._count("zero", offset, length)
        self._put(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        self._count("discard", offset, length)
        self._put(offset, bytes(length))

    def truncate(self, size: int) -> None:
        self._count("truncate", size, 0)
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))

    def flush(self) -> None:
        self._count("flush", 0, 0)

    def extents(self, offset: int, length: int) -> Extents:
        self._count("extents", offset, length)
        return Extents.single(offset, length, data=True, present=True, file=self, offset=offset)

    def close(self) -> None:
        self.closed += 1

    def _put(self, offset: int, data: bytes) -> None:
        if not data:
            return
        if offset > len(self.content):
            self.content.extend(bytes(offset - len(self.content)))
        self.content[offset : offset + len(data)] = data

    def _count(self, kind: str, offset: int, length: int) -> None:
        if self._at is None or kind not in self._kinds:
            return
        self.seen += 1
        if self.seen == self._at or (self._sticky and self.seen > self._at):
            error = BlockIOError(
                f"request {self.seen} was selected to fail", errno=self._errno, node=self.name, operation=kind
            )
            if not self.failed:
                self.what = f"{kind} at {offset}, {length} bytes"
            self.failed.append(error)
            raise error


class Session:
    """An image, opened when it is first used, and a disk that must be equal. Every request changes both.

    A failed request leaves each of its bytes old or new; a discard leaves them old or zero. `trace` lists the requests. Not
    thread-safe.
    """

    def __init__(self, make: Opening, storage: FailingStorage, disk: bytes | None) -> None:
        self._make = make
        self.storage = storage
        self.edge: Child = Child(storage, "file", grows=True)
        self.trace: list[str] = []
        self._image: Image | None = None
        # The possible contents of the open image; each byte equals that of one of them. None: unknown during a creation.
        self._live: list[bytes] | None = None if disk is None else [disk]
        # The possible contents of the file if nothing more is written: all of `_live` since the last flush.
        self._kept: list[bytes] = [] if disk is None else [disk]

    @property
    def image(self) -> Image:
        """The image. Raises the errors of opening it."""
        if self._image is None:
            self.trace.append("open")
            self._image = self._make(self.edge, False)
            if self._live is None:
                raise AssertionError("the content of the created disk is unknown: call `created` first")
        return self._image

    @property
    def is_open(self) -> bool:
        return self._image is not None

    def created(self, disk: bytes) -> None:
        """The operation has created an image that reads as `disk`."""
        self._live = [disk]
        self._kept = [disk]

    def read(self, offset: int, length: int) -> bytes:
        self.trace.append(f"read {offset} {length}")
        data = self.image.read(offset, length)
        wrong = _illegal(data, self._live or [], offset)
        assert wrong is None, f"byte {wrong} has a value that no request wrote"
        return data

    def extents(self, offset: int = 0, length: int | None = None) -> Extents:
        self.trace.append(f"extents {offset} {length}")
        return self.image.extents(offset, length)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self._change(f"write {offset} {len(data)}", lambda disk: _patched(disk, offset, data), "write", offset, data)
        if fua:
            self.flush()

    def zero(self, offset: int, length: int, *, unmap: bool = False) -> None:
        name = f"zero {offset} {length}{' unmap' if unmap else ''}"
        zeros = bytes(length)
        self._change(name, lambda disk: _patched(disk, offset, zeros), "zero", offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        zeros = bytes(length)
        both = _Either(lambda disk: _patched(disk, offset, zeros))
        self._change(f"discard {offset} {length}", both, "discard", offset, length)

    def truncate(self, size: int) -> None:
        self._change(f"truncate {size}", lambda disk: disk[:size] + bytes(max(size - len(disk), 0)), "truncate", size)

    def flush(self) -> None:
        self.trace.append("flush")
        self.image.flush()
        self._kept = list(self._live or [])

    def close(self) -> None:
        """Close the image, which flushes it; the session opens it again for the next request."""
        self.trace.append("close")
        image, self._image = self._image, None
        if image is not None:
            before = self.storage.closed
            try:
                image.close()
            except BaseException:
                self._live = list(self._kept)  # the next open finds the content of the file
                raise
            finally:
                assert self.storage.closed == before + 1, "the image did not close its storage"
            self._kept = list(self._live or [])

    def verify(self) -> None:
        """Read the whole open image and compare it with the disk, for each of its possible sizes."""
        self._compare(self.image, self._live or [])

    def examine(self, check: Callable[[Image], None]) -> None:
        """Open the file as another process would: `check` finds no error, and no flushed byte is lost."""
        if not self._kept:
            return  # it was never created
        copy = FailingStorage(bytes(self.storage.content))
        image = self._make(Child(copy, "file", grows=True), True)
        try:
            check(image)
            self._compare(image, self._kept)
        finally:
            image.close()

    def _compare(self, image: Image, legal: list[bytes]) -> None:
        sizes = {len(disk) for disk in legal}
        assert image.size in sizes, f"the disk has {image.size} bytes, but only {sorted(sizes)} are possible"
        wrong = _illegal(image.read(0, image.size), legal)
        assert wrong is None, f"byte {wrong} is neither its flushed value nor one that was written since"

    def _change(self, name: str, changed: Any, method: str, *arguments: Any, **options: Any) -> None:
        self.trace.append(name)
        image = self.image
        assert self._live is not None
        after = _distinct([changed(disk) for disk in self._live])
        if isinstance(changed, _Either):
            after = _distinct(self._live + after)
        try:
            getattr(image, method)(*arguments, **options)
        except BaseException:
            self._live = _distinct(self._live + after)
            raise
        else:
            self._live = after
        finally:
            self._kept = _distinct(self._kept + after)


class _Either:
    """A change that the driver may execute or ignore."""

    def __init__(self, change: Callable[[bytes], bytes]) -> None:
        self._change = change

    def __call__(self, disk: bytes) -> bytes:
        return self._change(disk)


def no_corruption(image: Image) -> None:
    """The default check: if the format has a check, it finds no corruption. Leaks are allowed."""
    node = image.node
    if isinstance(node, Format):
        try:
            report = node.check()
        except UnsupportedFeature:
            return
        assert not report.corruptions, f"corrupt: {report.findings[:5]}"
        assert not report.check_errors, f"the check is incomplete: {report.findings[:5]}"


def fail_nth(
    make: Opening,
    operation: Callable[[Session], None],
    check: Callable[[Image], None] = no_corruption,
    *,
    content: bytes = b"",
    errnos: Iterable[int] = (_errno.EIO, _errno.ENOSPC),
    kinds: Iterable[str] = KINDS,
    sticky: Iterable[bool] = (False, True),
    absorbed: Iterable[str] = (),
    setup: Callable[[Session], None] | None = None,
    limit: int = 10_000,
) -> int:
    """Run `operation` once for each of its requests to storage, with a different one failing each time, and assert the rules
    in the docstring of the module. Returns the number of points: (N, errno, sticky) at which a request failed.

    `make` opens the image in `content`; if `content` is empty, the operation creates the image (`Session.created`). `setup`
    runs before, without failures; without it the opening of the image may fail as well. `absorbed`: kinds of requests whose
    failure the operation may ignore (hints, such as discards). An AssertionError names the point and the requests. At most
    `limit` requests fail for each errno.
    """
    kinds, absorbed = tuple(kinds), tuple(absorbed)
    start = _begin(make, content)
    points = 0
    for number in errnos:
        for lasting in sticky:
            for nth in range(1, limit + 1):
                point = _Point(make, operation, check, setup, absorbed, content, start, nth, number, lasting, kinds)
                if not point.run():
                    break
                points += 1
            else:
                raise AssertionError(f"the operation does not end within {limit} requests")
    return points


def _begin(make: Opening, content: bytes) -> bytes | None:
    if not content:
        return None
    with make(Child(FailingStorage(content), "file", grows=True), True) as image:
        return image.read(0, image.size)


class _Point:
    """One point: the request that fails, its error, and the two continuations from there."""

    def __init__(
        self,
        make: Opening,
        operation: Callable[[Session], None],
        check: Callable[[Image], None],
        setup: Callable[[Session], None] | None,
        absorbed: tuple[str, ...],
        content: bytes,
        disk: bytes | None,
        nth: int,
        errno: int,
        sticky: bool,
        kinds: tuple[str, ...],
    ) -> None:
        self._make, self._operation, self._check, self._setup = make, operation, check, setup
        self._absorbed, self._content, self._disk = absorbed, content, disk
        self._nth, self._errno, self._sticky, self._kinds = nth, errno, sticky, kinds

    def run(self) -> bool:
        """Whether there was an Nth request."""
        descriptors = _descriptors()
        for way in (self._retry, self._close):
            storage = FailingStorage(self._content)
            session = Session(self._make, storage, self._disk)
            try:
                failed = self._break(session)
                if failed:
                    way(session)
                else:
                    session.verify()
                    session.close()
                    session.examine(self._check)
                    return False
            except Exception as error:
                raise AssertionError(self._report(session, way.__name__[1:], error)) from error
        leaked = _descriptors() - descriptors
        assert leaked <= 0, f"{leaked} descriptors are still open: {self._report(session, 'close', None)}"
        return True

    def _break(self, session: Session) -> bool:
        """Run the operation with the fault. Returns whether the fault occurred."""
        storage = session.storage
        if self._setup is not None:
            self._setup(session)
        session.trace.append("-- faults begin")
        storage.arm(self._nth, self._errno, sticky=self._sticky, kinds=self._kinds)
        with warned_errors() as warned:
            caught = _failure(self._operation, session)
        if caught is None:
            absorbed = not storage.failed or storage.what.split()[0] in self._absorbed
            told = absorbed or any(comes_from(error, storage.failed) for error in warned)
            assert told, "a request failed, but the operation raised no error, and no warning names that of the request"
        else:
            assert storage.failed, f"the operation fails without a fault: {caught!r}"
            assert comes_from(caught, storage.failed), f"the error of the storage is not its cause: {caught!r}"
            session.trace.append(f"-- failed: {caught}")
        if not storage.failed:
            storage.disarm()
            return False
        return True

    def _retry(self, session: Session) -> None:
        """No flushed byte is lost in the file. After the end of the fault the image reads correctly and the operation
        succeeds."""
        session.examine(self._check)
        session.storage.disarm()
        if session.is_open:
            session.verify()
        session.trace.append("-- second attempt")
        self._operation(session)
        session.examine(self._check)
        session.verify()
        session.close()
        session.examine(self._check)

    def _close(self, session: Session) -> None:
        """The image is closed instead, while a lasting fault continues."""
        if not self._sticky:
            session.storage.disarm()
        if session.is_open:
            caught = _failure(Session.close, session)
            assert caught is None or self._sticky, f"the close fails after the end of the fault: {caught!r}"
        session.storage.disarm()
        session.examine(self._check)
        if not self._content:
            return
        # The same operation succeeds after the next open.
        session.trace.append("-- opened again")
        self._operation(session)
        session.verify()
        session.close()
        session.examine(self._check)

    def _report(self, session: Session, way: str, error: Exception | None) -> str:
        name = _errno.errorcode.get(self._errno, str(self._errno))
        lasting = "and all later ones" if self._sticky else "once"
        lines = [
            f"request {self._nth} fails with {name} {lasting} ({session.storage.what or 'not reached'}), then {way}:",
            f"  {type(error).__name__}: {error}" if error else "",
            *(f"  {line}" for line in session.trace[-40:]),
        ]
        return "\n".join(line for line in lines if line)


def _failure(action: Callable[[Session], None], session: Session) -> LaminaError | None:
    """The LaminaError of `action`, or None; other exceptions pass."""
    try:
        action(session)
    except LaminaError as error:
        return error
    return None


def _descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except FileNotFoundError:
        return 0


def _patched(disk: bytes, offset: int, data: bytes) -> bytes:
    return b"".join((disk[:offset], data, disk[offset + len(data) :]))


def _distinct(disks: list[bytes]) -> list[bytes]:
    return list(dict.fromkeys(disks))


def _illegal(data: bytes, legal: list[bytes], offset: int = 0) -> int | None:
    """The offset of the first byte of `data`, read at `offset`, that equals the byte of none of the `legal` disks; past the
    end of a shorter disk zeros are legal."""
    end = offset + len(data)
    if any(disk[offset:end] == data for disk in legal):
        return None
    for at in range(0, len(data), _SECTOR):
        part = data[at : at + _SECTOR]
        choices = [disk[offset + at : offset + at + len(part)].ljust(len(part), b"\0") for disk in legal]
        if part in choices:
            continue
        for index, byte in enumerate(part):
            if all(choice[index] != byte for choice in choices):
                return offset + at + index
    return None

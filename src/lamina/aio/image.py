"""`Image`: an opened image for the tasks of event loops."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Self, TypeVar

from .. import image as synchronous
from .. import lifecycle
from ..errors import OptionError
from ..jobs.requests import is_far
from .calls import Call, Pool, in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Buffer, Callable  # type: ignore[attr-defined,unused-ignore]  # Python 3.12

    from ..extents import Extents
    from ..node import Node

_T = TypeVar("_T")
_P = ParamSpec("_P")

#: The number of requests in progress at once: to local storage, where more threads would only compete, and to storage whose
#: requests take the time of a network. The last is the largest number that a caller may choose.
_NEAR, _FAR, _MOST = 4, 16, 64


class Image:
    """A virtual disk for asyncio: the operations of `lamina.Image`, to be awaited. Offsets and lengths are bytes. Errors are
    those of `lamina.Image`.

    Threads make the requests: `requests` at once (default: 4, or 16 if storage of the image is remote), in the order in which
    tasks ask for them. Tasks that ask for more wait. Requests that are in progress together are ordered as those of several
    threads: overlapping writes leave each aligned block of 512 bytes as one of them wrote it.

    A cancelled task: a request that has not begun is never made. One that has begun is completed, and the await of `write`,
    `zero`, `discard`, `flush`, `truncate`, `read_into`, `run`, `share` and `close` ends after that, also under
    `asyncio.timeout`: afterwards nothing changes the disk and no thread uses the buffer. Until then the buffer belongs to the
    request. The await of `read`, `extents` and `windows` ends at once.

    The tasks of several event loops, in several threads, may use one image. It survives the end of a loop; requests of that
    loop are completed. In a forked child, a new event loop may read through it, as through a `lamina.Image`.
    """

    def __init__(self, image: synchronous.Image, *, requests: int | None = None) -> None:
        """Use an opened `image`, which `close` closes. OptionError for `requests` outside 1 to 64."""
        require_requests(requests)
        self._image = image
        self._count = requests or (_FAR if is_far(image.node) else _NEAR)
        self._pool = Pool(self._count, "lamina-aio-image")
        self._closed = False

    @property
    def sync(self) -> synchronous.Image:
        """The same image for threads; its methods block."""
        return self._image

    @property
    def size(self) -> int:
        """The length of the disk in bytes."""
        return self._image.size

    @property
    def filename(self) -> str:
        """The name of the image in messages: a path if there is one."""
        return self._image.filename

    @property
    def format(self) -> str:
        """The name of the driver on top."""
        return self._image.format

    @property
    def read_only(self) -> bool:
        """Whether the image refuses changes."""
        return self._image.read_only

    async def read(self, offset: int, length: int) -> bytes:
        """The `length` bytes at `offset`. Raises OutOfRange, before it allocates memory, if they are not inside the disk."""
        return await self._pool.value_of(self._image.read, offset, length)

    async def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` (any writable contiguous buffer) with the bytes at `offset`. It belongs to the request until the
        await ends."""
        await self._pool.call(self._image.read_into, offset, memoryview(buffer))

    async def write(self, offset: int, data: Buffer, *, fua: bool = False, compress: bool = False) -> None:
        """Make the bytes at `offset` equal to `data`, which must not change until the await ends. `fua` and `compress` as for
        `lamina.Image.write`."""
        await self._pool.call(self._image.write, offset, memoryview(data), fua=fua, compress=compress)

    async def zero(
        self, offset: int, length: int, *, unmap: bool = False, fast: bool = False, fua: bool = False
    ) -> None:
        """Make the bytes read as zero; the options are those of `lamina.Image.zero`."""
        await self._pool.call(self._image.zero, offset, length, unmap=unmap, fast=fast, fua=fua)

    async def discard(self, offset: int, length: int) -> None:
        """The caller no longer needs these bytes; see `lamina.Image.discard`."""
        await self._pool.call(self._image.discard, offset, length)

    async def flush(self) -> None:
        """Return when all bytes of writes that were awaited before are on stable storage."""
        await self._pool.call(self._image.flush)

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        """Change the size of the disk, while no request of it runs; see `lamina.Image.truncate`."""
        await self._pool.call(self._image.truncate, size, preallocation)

    async def extents(self, offset: int = 0, length: int | None = None) -> Extents:
        """The exact status of these bytes (up to the end by default), as columns; see `lamina.Image.extents`."""
        return await self._pool.value_of(self._image.extents, offset, length)

    async def windows(self, offset: int = 0, length: int | None = None) -> AsyncGenerator[Extents, None]:
        """The result of `extents` in parts of a few megabytes at most, whatever the image contains: `async for part in
        image.windows()`. Each part is a request of its own."""
        end = max(self.size, offset) if length is None else offset + length
        while offset < end:
            found = await self._pool.value_of(self._image.root.extents, offset, end - offset)
            yield found
            offset = found.end

    async def run(
        self, work: Callable[Concatenate[synchronous.Image, _P], _T], *arguments: _P.args, **named: _P.kwargs
    ) -> _T:
        """work(image, *arguments) in a thread of this image, with the synchronous image, which is how all its other methods
        are awaited: `await image.run(lamina.Image.create_snapshot, "before")`, or edits of the graph in a function of the
        caller's. It counts as one request."""
        return await self._pool.call(work, self._image, *arguments, **named)

    async def share(self, node: Node | str | None = None, *, read_only: bool = False) -> Image:
        """Another image on the same node, or on another node of the graph; see `lamina.Image.share`."""
        where = lifecycle.caller()
        work = partial(self._image.share, node, read_only=read_only)
        shared = await Call(work, synchronous.Image.close).outcome(self._pool.begin)
        try:
            shared.root.opened_at = shared.root.opened_at and where
            return Image(shared, requests=self._count)
        except BaseException:  # an interrupt
            shared.close()
            raise

    async def close(self) -> None:
        """Refuse further requests (Closed), complete those in progress, write buffered data to the files and close them; see
        `lamina.Image.close`. A cancelled task waits until the image is closed. A second call does nothing."""
        self._pool.refuse()
        if not self._closed:
            await in_thread(self._close)

    def _close(self) -> None:
        try:
            self._image.close()
        finally:
            self._pool.finish()
        self._closed = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.close()
        finally:
            await self.close()  # completes what an interrupt stopped, and else does nothing

    def __repr__(self) -> str:
        return f"<aio.{repr(self._image)[1:]}"


def opened(image: synchronous.Image, requests: int | None, where: str) -> Image:
    """An `Image` over `image`, which a thread has opened for the line of code `where`."""
    for part in (image.root, image.node):
        part.opened_at = part.opened_at and where
    return Image(image, requests=requests)


def require_requests(requests: int | None) -> None:
    """Raise OptionError for a number of requests that is not possible."""
    if requests is not None and not 1 <= requests <= _MOST:
        raise OptionError(f"{requests} requests cannot be in progress at once", hint=f"choose 1 to {_MOST}")

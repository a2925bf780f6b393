"""Lamina for asyncio: images whose requests are awaited, and whole-image work in threads.

    async with lamina.aio.open("disk.qcow2", format="qcow2") as image:
        head, tail = await asyncio.gather(image.read(0, 512), image.read(image.size - 512, 512))

The core of Lamina blocks and has threads; this package is the bridge from event loops, and nothing else of Lamina imports
asyncio. `Image` has the requests; `run` awaits any other function. The functions of `lamina` have the same names and
arguments here: `await lamina.aio.info("disk.qcow2")`; `diff`, which returns an iterator, is `iterate(lamina.diff, ...)`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import lifecycle
from ..api import open as _open
from ..image import Image as _Synchronous
from ..limits import DEFAULT_BUDGET, Budget
from ..policy import Policy
from ..root import Graph
from ..workers import Workers
from .calls import Call, passing_to
from .image import Image, opened, require_requests
from .work import awaitable, awaitable_as, iterate, run

if TYPE_CHECKING:
    import lamina

    # What a type checker sees of `_FUNCTIONS`. (A variable would have an inferred type.)

    @awaitable_as(lamina.bench)
    def bench() -> None: ...

    @awaitable_as(lamina.check)
    def check() -> None: ...

    @awaitable_as(lamina.commit)
    def commit() -> None: ...

    @awaitable_as(lamina.compact)
    def compact() -> None: ...

    @awaitable_as(lamina.compare)
    def compare() -> None: ...

    @awaitable_as(lamina.connect)
    def connect() -> None: ...

    @awaitable_as(lamina.convert)
    def convert() -> None: ...

    @awaitable_as(lamina.copy)
    def copy() -> None: ...

    @awaitable_as(lamina.create)
    def create() -> None: ...

    @awaitable_as(lamina.detect)
    def detect() -> None: ...

    @awaitable_as(lamina.explain)
    def explain() -> None: ...

    @awaitable_as(lamina.explain_guest)
    def explain_guest() -> None: ...

    @awaitable_as(lamina.flatten)
    def flatten() -> None: ...

    @awaitable_as(lamina.info)
    def info() -> None: ...

    @awaitable_as(lamina.info_chain)
    def info_chain() -> None: ...

    @awaitable_as(lamina.inspect)
    def inspect() -> None: ...

    @awaitable_as(lamina.map)
    def map() -> None: ...

    @awaitable_as(lamina.measure)
    def measure() -> None: ...

    @awaitable_as(lamina.rebase)
    def rebase() -> None: ...

    @awaitable_as(lamina.resize)
    def resize() -> None: ...

    @awaitable_as(lamina.serve)
    def serve() -> None: ...

    @awaitable_as(lamina.structures)
    def structures() -> None: ...

    @awaitable_as(lamina.view)
    def view() -> None: ...


__all__ = [
    "Image",
    "Opening",
    "bench",
    "check",
    "commit",
    "compact",
    "compare",
    "connect",
    "convert",
    "copy",
    "create",
    "detect",
    "explain",
    "explain_guest",
    "flatten",
    "info",
    "info_chain",
    "inspect",
    "iterate",
    "map",
    "measure",
    "open",
    "rebase",
    "resize",
    "run",
    "serve",
    "structures",
    "view",
]

#: The functions of `lamina` that are awaited here under the same name. They are imported at their first use.
_FUNCTIONS = frozenset(__all__) - {"Image", "Opening", "iterate", "open", "run"}

#: Opening has threads of its own: it waits for no long work.
_threads = Workers(8, "lamina-aio-open")


class Opening:
    """What `open` returns: `image = await opening`, or `async with opening as image:`, which closes the image at the end."""

    def __init__(self, work: Callable[[], _Synchronous], requests: int | None, where: str) -> None:
        self._work, self._requests, self._where = work, requests, where
        self._image: Image | None = None

    def __await__(self) -> Generator[Any, Any, Image]:
        return self._open().__await__()

    async def _open(self) -> Image:
        require_requests(self._requests)
        image = await Call(self._work, _Synchronous.close).outcome(passing_to(_threads))
        try:
            return opened(image, self._requests, self._where)
        except BaseException:  # an interrupt
            image.close()
            raise

    async def __aenter__(self) -> Image:
        self._image = await self
        return self._image

    async def __aexit__(self, *_: object) -> None:
        if self._image is not None:
            try:
                await self._image.close()
            finally:
                await self._image.close()  # completes what an interrupt stopped, and else does nothing


def open(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    format: str | None = None,
    read_only: bool = True,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
    snapshot: bool = False,
    graph: Graph | None = None,
    requests: int | None = None,
) -> Opening:
    """Open a disk image in a thread: `async with lamina.aio.open(...) as image:`, or `image = await lamina.aio.open(...)`.

    The arguments are those of `lamina.open`; `requests` is the number of requests that are in progress at once, 1 to 64
    (see `Image`). If the task is cancelled, the image is closed again before the await ends. Raises the errors of
    `lamina.open`."""
    work = partial(
        _open,
        source,
        format=format,
        read_only=read_only,
        references=references,
        budget=budget,
        force_share=force_share,
        snapshot=snapshot,
        graph=graph,
    )
    return Opening(work, requests, lifecycle.caller())


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .. import __getattr__ as public

    value = globals()[name] = awaitable(public(name))
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

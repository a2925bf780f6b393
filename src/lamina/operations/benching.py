"""`lamina.bench`: the rate of requests to an image, and how long each takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..job_results import BenchResult
from ..jobs import bench as benching
from ..jobs.progress import Monitor
from ..limits import DEFAULT_BUDGET, Budget
from ..options import size_of
from ..parameters import checked
from ..policy import Policy
from .sources import Source, opened

if TYPE_CHECKING:
    from ..jobs.progress import CancelEvent, Progress


@checked
def bench(
    image: Source,
    *,
    count: int = 75000,
    depth: int = 64,
    size: int | str = 4096,
    offset: int | str = 0,
    step: int | str | None = None,
    write: bool = False,
    pattern: int = 0,
    stable: bool = False,
    flush_interval: int = 0,
    drain: bool = True,
    format: str | None = None,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
    progress: Progress | None = None,
    cancel: CancelEvent | None = None,
) -> BenchResult:
    """Measure reads of an image, or writes to it: their rate, and how long each takes.

    `image` is a path, a name or nested options as for `lamina.open`, opened with `format`, `references`, `budget` and
    `force_share`; or an open image, which stays open, and which others may use meanwhile. The options of its file choose the
    page cache (`"cache": {"direct": True}`).

    `count` requests of `size` bytes are made, at most `depth` of them (1 to 1024) in flight. The first is at `offset`, each
    other one `step` bytes behind the one before it (None: `size`); one past the end of the disk starts again at its
    beginning. Sizes are bytes, or texts such as "64k".

    With `write` the requests are writes of the byte `pattern`: what was there is lost, and an open image must be writable.
    `stable`: each write is on stable storage when it ends. `flush_interval`: a flush follows so many writes, and waits for
    those before it unless `drain` is False; 0: none. `progress(done, total)` is told requests; otherwise it is that of
    `lamina.convert`, as `cancel` is.

    Raises OptionError, LimitExceeded for more than 1 GiB of buffers, OutOfRange for a request across the end of the disk,
    Cancelled, and the errors of opening, reading and writing. No request is in flight then.
    """
    load = benching.Load(
        count,
        depth,
        size_of(size, "size"),
        size_of(offset, "offset"),
        None if step is None else size_of(step, "step"),
        write,
        pattern,
        stable,
        flush_interval,
        drain,
    )
    how = {"references": references, "budget": budget, "force_share": force_share}
    with opened(image, format, read_only=not write, **how) as disk:  # type: ignore[arg-type]
        if write:
            disk.root.edge.require_writable("write")
        return benching.bench(disk, load, Monitor(progress, event=cancel)).result(disk.filename, load)

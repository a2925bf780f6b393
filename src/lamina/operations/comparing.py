"""`lamina.compare` and `lamina.diff`: whether, and where, two disks differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from ..job_results import CompareResult
from ..jobs import compare as comparing
from ..jobs import diff as differing
from ..jobs.progress import Monitor
from ..limits import DEFAULT_BUDGET, Budget
from ..options import size_of
from ..parameters import checked
from ..policy import Policy
from .sources import Source, opened

if TYPE_CHECKING:
    from ..jobs.diff import Range
    from ..jobs.progress import CancelEvent, Progress


@checked
def compare(
    first: Source,
    second: Source,
    *,
    first_format: str | None = None,
    second_format: str | None = None,
    strict: bool | Literal["status", "compression"] = False,
    parallel: int | None = None,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
    progress: Progress | None = None,
    cancel: CancelEvent | None = None,
) -> CompareResult:
    """Whether two disks are identical, and the first thing in which they differ. Ranges that are zero in both are not read.

    `first` and `second` are paths, names or nested options as for `lamina.open`, opened with `first_format` and
    `second_format`; or open images, which stay open. What one has beyond the end of the other must read as zero. With
    `strict` the sizes must be equal too, and so must be, for each byte, whether it is stored, is zero without being
    stored, and is owned by any layer; with "compression" also whether it is stored compressed. `parallel`: pieces that
    are read at once, 1 to 16. `references`, `budget` and `force_share` are those of `lamina.open`; `progress` and
    `cancel` those of `lamina.convert`.

    Raises OptionError, Cancelled, and the errors of opening and reading.
    """
    how: dict[str, Any] = {"references": references, "budget": budget, "force_share": force_share}
    with opened(first, first_format, **how) as mine, opened(second, second_format, **how) as theirs:
        monitor = Monitor(progress, event=cancel)
        found = comparing.compare(mine, theirs, strict=strict or "", parallel=parallel, monitor=monitor)
        names, sizes = (mine.filename, theirs.filename), (mine.size, theirs.size)
    if found is None:
        return CompareResult(*names, *sizes, identical=True)
    return CompareResult(*names, *sizes, identical=False, difference=found.kind, offset=found.offset)


@checked
def diff(
    first: Source,
    second: Source,
    *,
    first_format: str | None = None,
    second_format: str | None = None,
    granularity: int | str = 4096,
    content: bool = True,
    parallel: int | None = None,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
    progress: Progress | None = None,
    cancel: CancelEvent | None = None,
) -> Iterator[Range]:
    """Yield the ranges (offset, length) of `second` whose bytes differ from those of `first`, in order and not adjacent.

    `first` and `second` as for `compare`; names are opened when the first range is asked for, and closed at the end. The disk
    is divided into blocks of `granularity` bytes, a power of two (the last block may be shorter). Each block of a range has
    at least one byte that differs; all other blocks are equal. Without `content` nothing is read: the ranges are those not
    known to be equal, rounded to blocks, and never leave out a byte that differs. Past its end `first` reads as zero; what it
    has past the end of `second` is not part of the result.

    `parallel`: pieces that are read at once, 1 to 16. No other user may write to the images meanwhile. `references`,
    `budget` and `force_share` are those of `lamina.open`; `progress` and `cancel` those of `lamina.convert`.

    Raises OptionError, Cancelled, and the errors of opening and reading.
    """
    block = size_of(granularity, "granularity")
    differing.require_granularity(block)
    how: dict[str, Any] = {"references": references, "budget": budget, "force_share": force_share}

    def ranges() -> Iterator[Range]:
        with ExitStack() as stack:
            mine = stack.enter_context(opened(first, first_format, **how))
            theirs = stack.enter_context(opened(second, second_format, **how))
            monitor = Monitor(progress, event=cancel)
            yield from differing.diff(
                mine, theirs, granularity=block, content=content, parallel=parallel, monitor=monitor
            )

    return ranges()

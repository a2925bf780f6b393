"""`lamina.view`: an image, or two side by side, as one HTML page."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..jobs.progress import Monitor
from ..limits import DEFAULT_BUDGET, Budget
from ..options import size_of
from ..parameters import checked
from ..policy import Policy
from ..viewer.report import LIMIT, report
from .sources import Source, opened

if TYPE_CHECKING:
    from ..jobs.progress import CancelEvent, Progress


@checked
def view(
    first: Source,
    second: Source | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    first_format: str | None = None,
    second_format: str | None = None,
    granularity: int | str = 4096,
    content: bool = True,
    limit: int | str = LIMIT,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
    progress: Progress | None = None,
    cancel: CancelEvent | None = None,
) -> str:
    """One self-contained HTML page that shows one image, or two with their differences: the status of every byte of the disk,
    what every part of each file is, and the chain with its snapshots. It needs no network. Returns the text of the page; with
    `output` it is also written to that file, which is replaced if it is an HTML page.

    `first` and `second` are paths, names or nested options as for `lamina.open`, opened with `first_format` and
    `second_format`; or open images, which stay open. The page is exact, to the byte, as long as its text stays below `limit`
    bytes (at least 400,000). Where there are too many extents for that, blocks that several extents touch become one, with
    counts of what is in it; the page says how large they are. `granularity` and `content` are those of `lamina.diff`:
    without `content` nothing is read, and two images are compared by their status alone. `references`, `budget` and
    `force_share` are those of `lamina.open`; `progress` and `cancel` those of `lamina.convert`.

    No other user may write to the images meanwhile. Raises OptionError for an `output` that is one of their files or no page;
    LimitExceeded for a disk or file of 8 PiB; the errors of opening, reading and writing; Cancelled.
    """
    if second is None and second_format is not None:
        raise OptionError("second_format is given, and there is no second image", hint="omit it, or give the image")
    how: dict[str, Any] = {"references": references, "budget": budget, "force_share": force_share}
    with ExitStack() as stack:
        images = [stack.enter_context(opened(first, first_format, **how))]
        if second is not None:
            images.append(stack.enter_context(opened(second, second_format, **how)))
        return report(
            images,
            output=output,
            granularity=size_of(granularity, "granularity"),
            content=content,
            limit=size_of(limit, "limit"),
            monitor=Monitor(progress, event=cancel),
        )

"""Opened images as one HTML page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..atomic_file import write_file
from ..errors import OptionError
from ..jobs.diff import require_granularity
from ..jobs.progress import Monitor
from ..options import file_path
from ..own_files import refuse_other, refuse_own
from .collect import collect
from .document import document
from .page import page

if TYPE_CHECKING:
    from ..image import Image

#: The longest page, if the caller does not say otherwise.
LIMIT: Final = 8_000_000
#: How every page begins.
_BEGINNING: Final = b"<!doctype html>"


def report(
    images: Sequence[Image],
    *,
    output: str | os.PathLike[str] | None = None,
    granularity: int = 4096,
    content: bool = True,
    limit: int = LIMIT,
    monitor: Monitor | None = None,
) -> str:
    """The page of one image or two (see `lamina.view`)."""
    require_granularity(granularity)
    if limit < 400_000:
        raise OptionError(f"the limit is {limit} bytes, too little for a page", hint="allow at least 400000")
    target = None if output is None else file_path(output)
    if target is not None:
        require_target(target, images)
    model = collect(images, granularity, content, monitor or Monitor())
    title = " and ".join(disk.title for disk in model.disks)
    text = page(document(model, limit), title)
    if target is not None:
        write_file(target, text.encode("utf-8"))
    return text


def require_target(path: str, images: Sequence[Image]) -> None:
    """Raise OptionError if a page at `path` would overwrite a file of these images, or anything but a page."""
    for image in images:
        refuse_own(image.node, path, what="image")
    refuse_other(path, _BEGINNING, "HTML page")

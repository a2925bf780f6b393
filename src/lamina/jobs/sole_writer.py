"""A job that changes an image in steps, and relies on the bytes that it has read: nobody else writes meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import OptionError

if TYPE_CHECKING:
    from ..image import Image
    from ..root import Root


@contextmanager
def sole_writer(image: Image) -> Iterator[Image]:
    """Another image on the node of `image`, which nothing else writes to until the end: `image` is read-only meanwhile, for
    all threads. OptionError if other users of the graph write to it."""
    root, own = image.root, image.share()
    before = root.edge.read_only
    try:
        root.alone("starts a job", _claim, root, own.root)
        yield own
    finally:
        try:
            root.edge.read_only = before
        finally:
            own.close()


def _claim(root: Root, own: Root) -> None:
    """Runs while no request does, so that no write is under way."""
    if any(other.edge.writes for other in root.graph.roots if other not in (root, own)):
        raise OptionError(
            "another image, export or job writes to this graph, and the job needs it for itself",
            path=root.node.filename,
            hint="close that one first",
        )
    root.edge.read_only = True

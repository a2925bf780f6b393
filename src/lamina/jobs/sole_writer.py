"""A job that changes an image in steps, and relies on the bytes that it has read: nobody else writes meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ..descriptors import opening
from ..errors import OptionError
from ..image import Image

if TYPE_CHECKING:
    from ..request import Child
    from ..root import Root

_Result = TypeVar("_Result")


def as_sole_writer(image: Image, work: Callable[[Image], _Result]) -> _Result:
    """work(another image on the node of `image`), which nothing else writes to meanwhile: `image` itself refuses writes of
    all threads, no other image of the graph becomes writable, and nobody else edits the graph. OptionError if other users of
    the graph write to it, or another job needs it for itself."""
    root = image.root
    before: list[bool] = []  # whether `image` was read-only, once the job has the graph
    with opening(image.share) as own:
        try:
            try:
                root.alone("starts a job", _claim, root, own.root, before)
                return work(own)
            finally:
                _release(root, own.root, before)
        finally:
            _release(root, own.root, before)  # an interrupt may have struck the first time


def _claim(root: Root, own: Root, before: list[bool]) -> None:
    """Runs while no request does, so that no write is under way."""
    graph = root.graph
    graph.require_free()
    if any(other.edge.writes for other in graph.roots if other not in (root, own)):
        raise OptionError(
            "another image, export or job writes to this graph, and the job needs it for itself",
            path=root.node.filename,
            hint="close that one first",
        )
    before.append(root.edge.read_only)
    graph.sole = own
    root.edge.read_only = True


def _release(root: Root, own: Root, before: list[bool]) -> None:
    if root.graph.sole is own:  # else it never had the graph, or another job has it by now
        root.edge.read_only = before[0]
        root.graph.sole = None


def writing_beneath(image: Image, edge: Child, work: Callable[[Image], _Result]) -> _Result:
    """work(an image on the backing node of `edge`, an edge below `image`), which writes to that node: see `Root.beneath`."""
    with opening(_beneath, image, edge) as target:
        try:
            result = work(target)
        except Exception as error:
            try:
                target.reopen(read_only=True)
            except Exception as other:  # noqa: BLE001 - the first error is the reason
                error.add_note(f"and then: {other}")
            raise
        target.reopen(read_only=True)
        return result


def _beneath(image: Image, edge: Child) -> Image:
    root = image.root.beneath(edge)
    try:
        return Image(root, budget=image.budget)
    except BaseException:  # an interrupt
        root.give_up()
        raise

"""An opened graph as plain data: `lamina.tree`, the public function behind `lamina graph`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from .format import Format
from .image import Image
from .node import Node, StorageNode
from .parameters import checked

if TYPE_CHECKING:
    from .json_forms import NodeJson
    from .references import NotOpened, Unopened


@checked
def tree(top: Image | Node) -> NodeJson:
    """The node on top of an image, or this node, and all nodes below it, as dicts of JSON types.

    A node has `name`, `driver`, `kind` ("storage", "format" or "filter"), `size` (bytes of its disk) and `read-only`;
    storage also has `filename` (null if it has none) and `allocated` (bytes that take space; null if unknown). `options` are
    those that were given and differ from their defaults, as text, without children and secrets. `children` is a list of
    edges: `role` ("file", "backing", "image", ...), `writes` (whether requests through the edge may change the node) and
    `node`. A node that several edges lead to is described at the first; at the others it has `name`, `driver` and `shared`:
    true.

    An edit of the graph waits meanwhile. Raises Closed if the image was closed.
    """
    return cast("NodeJson", tree_of_opened(top, {}))


def tree_of_opened(top: Image | Node, unopened: Unopened) -> dict[str, Any]:
    """As `tree`, for a graph that was opened with `unopened` (see `Opener`). A node that was not opened has `name` null,
    `driver` (the format that the image states; null if it states none), `filename` (the name in the image) and `not-opened`:
    the `type` of the error, its `message`, and a `hint` or null."""
    node = top.node if isinstance(top, Image) else top
    if node.graph is None:
        return _described(node, set(), unopened)
    return node.graph.exclusively("describes the graph", _described, node, set[int](), unopened)


def _described(node: Node, seen: set[int], unopened: Unopened) -> dict[str, Any]:
    found: dict[str, Any] = {"name": node.name, "driver": node.driver}
    if id(node) in seen:
        return found | {"shared": True}
    seen.add(id(node))
    storage = isinstance(node, StorageNode)
    found |= {
        "kind": "storage" if storage else "format" if isinstance(node, Format) else "filter",
        "size": node.size,
        "read-only": node.read_only,
    }
    if storage:
        found |= {"filename": None if node.filename == node.name else node.filename, "allocated": node.allocated}
    options = {key: value for key, value in node.given.items() if key != "filename" or not storage}
    if node.zero_detected is not None:
        options["detect-zeroes"] = "unmap" if node.zero_detected else "on"
    if not node.discards:
        options["discard"] = "ignore"
    found["options"] = options
    lacking = {
        one.reference.role: one for edge in node.children.values() for one in unopened.get(edge.node, ()) if not storage
    }
    edges = [
        {"role": role, "writes": edge.writes, "node": _described(edge.node, seen, unopened)}
        for role, edge in node.children.items()
        if role not in lacking  # the driver may have put something in its place
    ]
    edges += [{"role": role, "writes": False, "node": _not_opened(one)} for role, one in lacking.items()]
    found["children"] = edges
    return found


def _not_opened(found: NotOpened) -> dict[str, Any]:
    name, error = found.reference, found.error
    return {
        "name": None,
        "driver": name.format if name.kind == "format" else "file",
        "filename": name.name,
        "not-opened": {"type": type(error).__name__, "message": error.message, "hint": error.hint},
    }

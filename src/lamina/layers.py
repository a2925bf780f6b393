"""The layers of an opened disk, from the top down: what `Image.layers` returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from .format import Format
from .node import Node, StorageNode


class Layer(NamedTuple):
    """One layer of a chain of overlays and backing files. Sizes are in bytes."""

    depth: int  #: the number of layers above it; 0 is the top; extents have the same number
    format: str  #: the name of its driver
    filename: str  #: the name of its file
    virtual_size: int  #: the length of its disk
    file_size: int | None  #: the length of its file, if it is known and one file
    actual_size: int | None  #: the bytes that its file takes up, if that is known
    read_only: bool  #: whether its node refuses writes; layers below the top always do
    node_name: str  #: the name of its node in the graph

    def to_json(self) -> dict[str, Any]:
        """The same with the names of `lamina info --output=json`; unknown sizes are omitted."""
        return {name.replace("_", "-"): value for name, value in self._asdict().items() if value is not None}


def layers_of(top: Node) -> tuple[Layer, ...]:
    """The layers of the graph below `top`, from top to bottom. A filter belongs to the layer of its image, since the depth of
    extents does not change there. A filter over several images (`quorum`, `concat`) is a layer itself, and the last one,
    since these have layers of their own."""
    found: list[Layer] = []
    node: Node | None = top
    while node is not None:
        node = _below_filters(node)
        file = _file(node)
        file_size, actual_size = (None, None) if file is None else (file.size, file.allocated)
        sizes = (node.size, file_size, actual_size)
        found.append(Layer(len(found), node.driver, node.filename, *sizes, node.read_only, node.name))
        backing = node.children.get("backing")
        node = None if backing is None else backing.node
    return tuple(found)


def _below_filters(node: Node) -> Node:
    while not isinstance(node, Format) and "image" in node.children:
        node = node.children["image"].node
    return node


def _file(node: Node) -> StorageNode | None:
    """The storage of a layer."""
    node = _below_filters(node)
    while "file" in node.children:
        node = _below_filters(node.children["file"].node)
    return node if isinstance(node, StorageNode) else None

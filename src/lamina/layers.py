"""The layers of an opened disk, from the top down: what `Image.layers` returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from .format import Format, below_filter, layers_of
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


def chain_of(top: Node) -> tuple[Layer, ...]:
    """The layers of the graph below `top`, from top to bottom (see `chain_nodes`)."""
    return tuple(_layer(depth, node) for depth, node in enumerate(chain_nodes(top)))


def chain_nodes(top: Node) -> list[Node]:
    """The nodes that can own bytes of the disk `top`, as extents count depths: `layers_of`, and what is below the last one:
    storage without a format, or a filter over several images (`quorum`, `concat`), which have layers of their own."""
    nodes = layers_of(top)
    rest = nodes[-1].children.get("backing") if nodes else None
    if not nodes or rest is not None:
        nodes.append(_end(top if rest is None else rest.node))
    return nodes


def _layer(depth: int, node: Node) -> Layer:
    file = _end(node.children["file"].node if isinstance(node, Format) else node)
    file_size, actual_size = (file.size, file.allocated) if isinstance(file, StorageNode) else (None, None)
    sizes = (node.size, file_size, actual_size)
    return Layer(depth, node.driver, node.filename, *sizes, node.read_only, node.name)


def _end(node: Node) -> Node:
    """The first node below the filters over one image."""
    while (below := below_filter(node)) is not None:
        node = below
    return node

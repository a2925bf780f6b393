"""The function that users call first: `open`; and `probe`, the old name of `detect`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .descriptors import opening
from .graph import Opener, named, open_graph
from .graph import probe as _probe
from .image import Image
from .limits import DEFAULT_BUDGET, Budget
from .parameters import checked
from .policy import Policy
from .root import Graph


@checked
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
) -> Image:
    """Open a disk image.

    `source` is a path, a name with a prefix (`json:{...}`, `blkdebug::disk.qcow2`; a `Path` object is always a path), or
    nested options (`{"driver": "blkdebug", "align": 4096, "image": {...}}`). `format` is the driver for a plain path. The
    default is an error rather than a guess, since a guest controls the content of a raw disk; "probe" asks for detection.
    Images are opened read-only by default, and backing files always.

    `references` decides which files may be opened because an image names them. The default is `Policy.default()`: files in
    the directory of the image, hidden files excepted, unless this site has another policy. An image whose format was detected
    opens no other file unless `references` grants it. A service that opens uploads of strangers passes `Policy.none()`.
    `budget` bounds the cost of the images. `force_share` opens an image that another program has open for writing; reads may
    then be inconsistent. `snapshot` opens the image read-only, whatever `read_only` says, and keeps all changes in memory
    (the filter `cow`) until `close` discards them. `graph`: the new nodes become part of that graph (`image.graph`), and
    options may refer to its nodes: where a child is expected, the `node-name` of a node stands for the node.

    Raises a `LaminaError`: OptionError, NotFound, BlockIOError, FormatError, PolicyError, Locked, LimitExceeded.
    """
    node = open_graph(
        named(source),
        format=format,
        read_only=read_only,
        policy=references,
        budget=budget,
        force_share=force_share,
        snapshot=snapshot,
        graph=graph,
    )
    try:
        return Image(node, budget=budget)
    except BaseException:
        node.close()
        raise


def probe(source: str | os.PathLike[str], *, force_share: bool = True) -> str:
    """Deprecated: `lamina.detect(source).format`, the format of a file according to its magic."""
    import warnings

    warnings.warn("lamina.probe is lamina.detect(...).format now", DeprecationWarning, stacklevel=2)
    opener = Opener(force_share=force_share)
    with opening(opener.child, "file", named(source), storage=True) as storage:
        return _probe(storage).format
